"""A container's tree as a tar: read through its mount, or through one that nobody sees."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.layer import stubs
from overlayctl.layer.stack import Stack
from overlayctl.layer.tar_writer import TarWriter
from overlayctl.runtime import trees
from overlayctl.store import containers, snapshots

if TYPE_CHECKING:
    from overlayctl.store.opened import Store


class Exported(NamedTuple):
    """What was written: ``size`` bytes. ``notes`` maps a kind of remark to paths.

    ``upper_only`` is whether it is a layer, not a merged tree: the layers below are not known.
    """

    id: str
    size: int
    upper_only: bool
    notes: dict[str, list[bytes]]


def export_container(store: Store, name: str, write: Callable[[bytes], object]) -> Exported:
    """Give ``write`` the container's merged tree, piece by piece; its volumes are no part of it.

    Its lock is held shared: it is neither mounted nor unmounted nor removed meanwhile. Raises
    InUse where an overlay that no mount table shows has the upper, and what ``TarWriter`` raises.
    """
    with store.locked(exclusive=False):
        found = containers.resolve(store.layout, name)
    with trees.reading(store, found.id) as tree:
        left_out = frozenset() if tree.upper_only else _stubs(store, found.id)
        tar = TarWriter(tree.root, layer=tree.upper_only, leave_out=left_out)
        size = 0
        for piece in tar:
            write(piece)
            size += len(piece)
    return Exported(found.id, size, tree.upper_only, tar.notes)


def _stubs(store: Store, key: str) -> frozenset[bytes]:
    """What a run made only to have something to mount on."""
    snapshot = snapshots.find(store.layout, key)
    if snapshot is None:
        return frozenset()
    with ExitStack() as owned:
        upper = snapshots.open_upper(store.layout, key)
        owned.callback(os.close, upper)
        below = snapshots.open_lowers(store.layout, snapshot.layers, owned)
        return stubs.found(upper, Stack(below))

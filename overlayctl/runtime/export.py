"""A container's tree as a tar: read through its mount, or through one that nobody sees."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.errors import Damaged
from overlayctl.kernel import mounter, rooted
from overlayctl.layer import attach
from overlayctl.layer.tar_writer import TarWriter
from overlayctl.runtime import mounts
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
    """Give ``write`` the container's merged tree, piece by piece.

    Its lock is held shared: it is neither mounted nor unmounted nor removed meanwhile. Raises
    InUse where an overlay that no mount table shows has the upper, and what ``TarWriter`` raises.
    """
    with store.locked(exclusive=False):
        found = containers.resolve(store.layout, name)
    with store.holding(found.id, exclusive=False), ExitStack() as owned:
        root, upper_only = store.attaching(lambda: _tree(store, found.id, owned))
        tar = TarWriter(root, layer=upper_only)
        size = 0
        for piece in tar:
            write(piece)
            size += len(piece)
    return Exported(found.id, size, upper_only, tar.notes)


def _tree(store: Store, key: str, owned: ExitStack) -> tuple[int, bool]:
    """An fd of the merged tree, or of the upper alone; which of them. The store is locked."""
    if views := mounts.views(store, "container", key):
        view = min(views, key=lambda view: view.pid != os.getpid())
        root = rooted.open_overlay(view.target, view.pid)
        owned.callback(os.close, root)
        return root, False
    upper = store.layout.snapshot(key, "upper")
    if not os.path.isdir(upper):
        raise Damaged(f"{upper} is gone, with what was written", hint="overlayctl system check")
    snapshot = snapshots.find(store.layout, key)
    if snapshot is None:
        root = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        owned.callback(os.close, root)
        return root, True
    store.attach(snapshots.lowers(store.layout, snapshot.layers) or [attach.EMPTY])
    overlay = snapshots.reading(store.layout, mounts.source(store, "container", key), key)
    return owned.enter_context(mounter.detached(overlay._replace(rung=store.rung))), False

"""A container's merged tree as a descriptor, to read it or to write in it, whatever its state.

What it has mounted below (``/proc``, volumes) is not seen through it. Of a container that is
not mounted, a view is read that nobody else sees; to write in it, it is mounted for as long.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.errors import Locked, NotFound
from overlayctl.kernel import mounter, rooted
from overlayctl.layer import attach
from overlayctl.runtime import mounts, sweeping
from overlayctl.store import records, snapshots

if TYPE_CHECKING:
    from overlayctl.mount import Merged
    from overlayctl.store.opened import Store


class Tree(NamedTuple):
    """``root`` is an fd. ``upper_only`` is whether it is what was written, without the layers."""

    root: int
    upper_only: bool


@contextmanager
def reading(store: Store, key: str) -> Iterator[Tree]:
    """The tree to read from; the container's lock is held shared.

    So it is neither mounted nor unmounted nor removed meanwhile. Where the layers are not known
    it is the upper directory. Raises InUse where an overlay that no mount table shows has that.
    """
    with store.holding(key, exclusive=False), ExitStack() as owned:
        yield store.attaching(lambda: _read(store, key, owned))


def _read(store: Store, key: str, owned: ExitStack) -> Tree:
    """The store is locked."""
    if views := mounts.views(store, "container", key):
        return Tree(_opened(views, owned), upper_only=False)
    upper = snapshots.open_upper(store.layout, key)
    owned.callback(os.close, upper)
    snapshot = snapshots.find(store.layout, key)
    if snapshot is None:
        return Tree(upper, upper_only=True)
    store.attach(snapshots.lowers(store.layout, snapshot.layers) or [attach.EMPTY])
    overlay = snapshots.reading(store.layout, mounts.source(store, "container", key), key)
    root = owned.enter_context(mounter.detached(overlay._replace(rung=store.rung)))
    return Tree(root, upper_only=False)


@contextmanager
def writing(store: Store, key: str) -> Iterator[int]:
    """The root to write in, an fd; what is written is seen at once by who has it mounted.

    It counts as running: so it stays mounted, and who comes last unmounts what was mounted
    for it. Raises as a mount does, HostCannot for a store that may only be read.
    """
    records.refuse_writing(store.marker)
    try:
        with store.running(key), ExitStack() as owned:
            yield _written(store, key, owned)
    finally:
        # What cannot be put away because somebody reads is, by the next command that runs one.
        with suppress(Locked, NotFound):
            sweeping.leave(store, key)


def _written(store: Store, key: str, owned: ExitStack) -> int:
    """Who says that it runs keeps it from being unmounted and removed, without its lock."""
    views = mounts.views(store, "container", key)
    if not views:
        mounts.mount_container(store, key, volatile=False, xino=False, held=False)
        views = mounts.views(store, "container", key)
    return _opened(views, owned)


def _opened(views: list[Merged], owned: ExitStack) -> int:
    """An fd of a view, of this mount namespace if it has one."""
    view = min(views, key=lambda view: view.pid != os.getpid())
    root = rooted.open_overlay(view.target, view.pid)
    owned.callback(os.close, root)
    return root

"""A store that is open: its layout, its marks, and the one way to decide something in it."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

from overlayctl.errors import HostCannot, InUse, NotFound, OverlayctlError
from overlayctl.kernel import disk
from overlayctl.store import gc, locks, records, staging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from overlayctl.kernel.probe import Setting
    from overlayctl.layout import Layout
    from overlayctl.mount import Rung

_Thing = TypeVar("_Thing")


class Store:
    """``timeout`` is how long to wait for a lock, in seconds.

    ``attach`` and ``rung`` say how layers are attached and overlays mounted. ``mark`` tells
    the mounts of this store from those of a copy of it, which has the same ``id``.
    """

    def __init__(
        self,
        layout: Layout,
        marker: records.Record,
        *,
        timeout: float,
        attach: Setting = "auto",
        rung: Rung = "auto",
    ) -> None:
        self.layout = layout
        self.marker = marker
        self.id = str(marker.get("id"))
        place = os.stat(layout.root)
        self.mark = f"{self.id}.{place.st_dev:x}.{place.st_ino:x}"
        self.timeout = timeout
        self.attach_by = attach
        self._cannot_unpack: OverlayctlError | None = None
        self.rung = rung

    @contextmanager
    def locked(self, *, exclusive: bool = True) -> Iterator[None]:
        """Hold the store's lock.

        Raises Locked, NotFound if the store was removed meanwhile, and what the disk refuses
        as ``disk.told`` does.
        """
        root, gate = self.layout.root, self.layout.ingest
        lock = locks.hold(root, exclusive=exclusive, timeout=self.timeout, turnstile=gate)
        with disk.told(root), lock:
            if not os.path.exists(self.layout.marker):
                raise NotFound(f"the store at {root} is gone: it was reset meanwhile")
            yield

    @contextmanager
    def unmaking(self) -> Iterator[None]:
        """As ``deciding``, for what only removes: nothing new is made, so a full disk is no bar."""
        records.refuse_writing(self.marker)
        disk.refuse_unfit(self.layout.root)
        with self.locked():
            gc.finish(self.layout)
            yield

    @contextmanager
    def deciding(self) -> Iterator[str]:
        """Hold the lock, what a killed command left being finished; the value is a staging place.

        What a command decides on it reads again in here, and commits in the same hold.
        Raises Locked, HostCannot for a store that may only be read.
        """
        records.refuse_writing(self.marker)
        with self.locked(), staging.staging(self.layout) as place:
            gc.finish(self.layout)
            yield place

    @contextmanager
    def holding(self, key: str, *, exclusive: bool = True) -> Iterator[None]:
        """Hold a container's lock, shared for long reading.

        Raises NotFound if the container went meanwhile, Locked.
        """
        if exclusive:
            records.refuse_writing(self.marker)
        with self._hold(key, self.layout.snapshot(key), exclusive=exclusive):
            yield

    @contextmanager
    def running(self, key: str) -> Iterator[None]:
        """Say that a process lives in the container; held before its lock, never inside.

        Raises NotFound if the container went meanwhile, Locked.
        """
        with self._hold(key, self.layout.snapshot(key, "upper"), exclusive=False):
            yield

    @contextmanager
    def idle(self, key: str) -> Iterator[None]:
        """Make sure that no process lives in the container, and that none begins to.

        The caller holds the container's lock, so only processes can be in the way: they are
        not waited for. Raises InUse naming them. An upper that is gone has none.
        """
        upper = self.layout.snapshot(key, "upper")
        with ExitStack() as held:
            if os.path.isdir(upper):
                others = held.enter_context(locks.attempt(upper))
                if others:
                    raise InUse(f"container {key[:12]}", others)
            yield

    @contextmanager
    def _hold(self, key: str, path: str, *, exclusive: bool) -> Iterator[None]:
        with ExitStack() as held:
            try:
                held.enter_context(locks.hold(path, exclusive=exclusive, timeout=self.timeout))
            except NotFound:
                raise NotFound(
                    f"there is no container {key[:12]} any more", hint="overlayctl ps -a"
                ) from None
            yield

    def unpacks(self) -> bool:
        """Whether this host needs layers as trees; not if it can attach none at all."""
        from overlayctl.kernel import probe

        try:
            return probe.attach_way((self.layout.empty,), self.attach_by) == "unpacked"
        except HostCannot:
            return False

    def attach(self, names: Iterable[str]) -> None:
        """Make the diff paths of these layers be there; the caller holds the lock.

        Raises TreeMissingError where they have to be unpacked first: so ``attaching``.
        """
        from overlayctl.layer import attach

        try:
            attach.attach(self.layout, self.mark, dict.fromkeys(names), self.attach_by)
        except attach.TreeMissingError:
            if self._cannot_unpack is None:
                raise
            raise self._cannot_unpack from None

    def attach_or_why(self, names: Iterable[str]) -> str | None:
        """As ``attach``; where that cannot be, the reason."""
        try:
            self.attach(names)
        except OverlayctlError as error:
            return str(error)
        return None

    def attaching(self, act: Callable[[], _Thing]) -> _Thing:
        """What ``act`` returns, done under the lock; it attaches layers.

        Where a layer turns out not to be unpacked, and must be, that is tried without the
        lock, and then ``act`` is called once more: it decides everything again.
        """
        from overlayctl.layer.attach import TreeMissingError

        while True:
            try:
                with self.locked():
                    return act()
            except TreeMissingError as error:
                lacking = error.names
            try:
                self._unpack(lacking)
            except OverlayctlError as error:
                self._cannot_unpack = error

    def _unpack(self, names: Iterable[str]) -> None:
        from overlayctl.store import layers

        with staging.staging(self.layout) as place:
            trees = {name: layers.unpack(self.layout, place, name) for name in names}
            with self.locked():
                for name, tree in trees.items():
                    layers.commit_tree(self.layout, tree, name)

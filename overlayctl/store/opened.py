"""A store that is open: its layout, its id, and the one way to decide something in it."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from overlayctl.errors import NotFound
from overlayctl.store import gc, locks, records, staging

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from overlayctl.layout import Layout


class Store:
    """``timeout`` is how long to wait for a lock, in seconds."""

    def __init__(self, layout: Layout, marker: records.Record, timeout: float) -> None:
        self.layout = layout
        self.marker = marker
        self.id = str(marker.get("id"))
        self.timeout = timeout

    @contextmanager
    def locked(self, *, exclusive: bool = True) -> Iterator[None]:
        """Hold the store's lock. Raises Locked."""
        with locks.hold(self.layout.root, exclusive=exclusive, timeout=self.timeout):
            yield

    @contextmanager
    def unmaking(self) -> Iterator[None]:
        """As ``deciding``, for what only removes: nothing new is made, so a full disk is no bar."""
        with self.locked():
            gc.finish(self.layout)
            yield

    @contextmanager
    def deciding(self) -> Iterator[str]:
        """Hold the lock, what a killed command left being finished; the value is a staging place.

        What a command decides on it reads again in here, and commits in the same hold.
        """
        with self.locked(), staging.staging(self.layout) as place:
            gc.finish(self.layout)
            yield place

    @contextmanager
    def holding(self, key: str) -> Iterator[None]:
        """Hold a container's lock. Raises NotFound if it went meanwhile, Locked."""
        with ExitStack() as held:
            try:
                lock = locks.hold(self.layout.snapshot(key), exclusive=True, timeout=self.timeout)
                held.enter_context(lock)
            except NotFound:
                raise NotFound(
                    f"there is no container {key[:12]} any more", hint="overlayctl ps -a"
                ) from None
            yield

    def attach(self, names: Iterable[str]) -> None:
        """Make the diff paths of these layers be there; the caller holds the lock."""
        from overlayctl.layer import attach

        attach.attach(self.layout, self.id, dict.fromkeys(names))

"""An open store, and what everything that is asked of it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overlayctl.errors import NotFound
from overlayctl.store import containers, images, records
from overlayctl.store.opened import Store

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager
    from typing import Self

    from overlayctl.kernel.probe import Setting
    from overlayctl.mount import Merged, Rung
    from overlayctl.store.check import Finding


class Opened:
    """A store, open."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.layout = store.layout

    @classmethod
    def open(
        cls,
        root: str,
        *,
        create: bool = False,
        lock_timeout: float = 30.0,
        attach: Setting = "auto",
        rung: Rung = "auto",
    ) -> Self:
        """The store at ``root``, made if it is missing and ``create`` is set.

        ``attach`` and ``rung`` force a way to attach layers and to mount overlays.
        """
        layout, marker = records.open_store(root, create=create)
        return cls(Store(layout, marker, timeout=lock_timeout, attach=attach, rung=rung))

    def _seeing_all(self) -> AbstractContextManager[None]:
        """Inside the block nothing changes.

        A scan of a directory may miss a name that is replaced meanwhile (on btrfs it does),
        and records read one after another need not agree.
        """
        return self.store.locked(exclusive=False)

    def _put_away(self) -> None:
        """Put away what killed commands left: for every command that writes."""
        from overlayctl.runtime import running

        running.sweep(self.store)

    def _views(self) -> dict[str, Merged]:
        from overlayctl.runtime import mounts

        return {v.id: v for v in mounts.mounted(self.store) if v.kind == "container"}

    def kind_of(self, name: str) -> str:
        """``container`` or ``image``: containers come first. Raises NotFound for neither."""
        with self._seeing_all():
            if containers.exists(self.layout, name):
                return "container"
            try:
                images.resolve(self.layout, name)
            except NotFound as error:
                hint = error.hint if "mean" in error.hint else "overlayctl ps -a, overlayctl images"
                raise NotFound(f"there is no container and no image {name!r}", hint=hint) from None
            return "image"


def rows(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """What a check found, in plain values."""
    return [
        {"Tag": f.tag, "Path": f.path, "Message": f.message, "Users": list(f.users)}
        for f in findings
    ]

"""The one object a front end holds. Every command is a method here; none of them prints.

    engine = Engine.open("/var/lib/overlayctl", create=True)
    engine.load("image.tar", tag=None, platform=None, progress=Silent())
    path = engine.mount_image("demo:latest")

What a command decides on is read again under the store's lock and committed in the same
hold (``Store.deciding``); long work happens before it, in staging.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from overlayctl.engine.containers import Containers
from overlayctl.engine.images import Images
from overlayctl.engine.layers import Layers
from overlayctl.engine.opened import rows
from overlayctl.engine.volumes import Volumes
from overlayctl.errors import NotFound
from overlayctl.store import containers, images, layers

if TYPE_CHECKING:
    from overlayctl.runtime.prune import Pruned


class Engine(Images, Layers, Containers, Volumes):
    """A store, open, with everything that can be asked of it."""

    def inspect(self, name: str) -> dict[str, Any]:
        """The container of that name, else the image, else the volume."""
        try:
            kind = self.kind_of(name)
        except NotFound as error:
            try:
                return self.inspect_volume(name)
            except NotFound:
                error.args = (f"there is no container, no image and no volume {name!r}",)
                raise error from None
        return self.inspect_container(name) if kind == "container" else self.inspect_image(name)

    def check(self, *, quick: bool = False, deep: bool = False) -> list[dict[str, Any]]:
        """What is wrong with the store; a fault counts that is still there under the lock.

        ``deep`` derives every index again. Raises HostCannot where that cannot be done.
        """
        from overlayctl.store import check

        first = check.check(self.layout, quick=quick, deep=deep)
        if not first:
            return []
        with self._seeing_all():
            # Whoever changes something waits: so no layer is hashed that was found whole.
            seen = {finding.path for finding in first}
            again = set(check.check(self.layout, quick=quick, deep=deep, only=seen))
        return rows(finding for finding in first if finding in again)

    def repair(self, *, deep: bool = False) -> dict[str, list[dict[str, Any]]]:
        """Repair what can be: what was done, and what is still wrong."""
        from overlayctl.store import repair

        done, remaining = repair.repair(self.store, deep=deep)
        told = zip(done, rows(one.finding for one in done), strict=True)
        return {
            "Repaired": [{"Action": one.action, **row} for one, row in told],
            "Findings": rows(remaining),
        }

    def info(self) -> dict[str, Any]:
        """What this store is and what this host can."""
        from overlayctl.inspect import host
        from overlayctl.store import volumes

        free = os.statvfs(self.layout.root)
        # Exclusive: what is tried copies this namespace, and with it whatever is mounted.
        with self.store.locked():
            possible = host.host(self.layout.root)
            counts = {
                "Images": len(images.listed(self.layout)),
                "Layers": len(layers.listed(self.layout)),
                "Containers": len(containers.listed(self.layout)),
                "Volumes": len(volumes.listed(self.layout)),
            }
        return {
            "Root": self.layout.root,
            "StoreId": self.store.id,
            "Format": self.store.marker.get("format"),
            **counts,
            "FreeBytes": free.f_bavail * free.f_frsize,
            "FreeInodes": free.f_favail,
            **possible,
        }

    def prune(self, *, everything: bool, dry_run: bool, agreed: Pruned | None = None) -> Pruned:
        """Remove abandoned staging, untagged images that nobody uses, layers that nobody names.

        ``everything`` takes tagged images, too; ``agreed``, a dry run's result, limits it.
        """
        from overlayctl.runtime import prune

        self._put_away()
        return prune.prune(self.store, everything=everything, dry_run=dry_run, agreed=agreed)

    def reset(self, *, dry_run: bool) -> dict[str, Any]:
        """Remove everything: unmount, detach, delete. Raises InUse for what is busy."""
        from overlayctl.runtime import removal

        return removal.reset(self.store, dry_run=dry_run)

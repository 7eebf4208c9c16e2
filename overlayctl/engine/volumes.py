"""What is asked of volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overlayctl.runtime.volumes import Made
    from overlayctl.runtime.volumes import Pruned as PrunedVolumes


from overlayctl.engine.opened import Opened


class Volumes(Opened):
    """Volumes: data that outlives containers."""

    def create_volume(self, name: str | None, labels: Mapping[str, str]) -> Made:
        """The volume of that name, made if it is not there; without a name an anonymous one."""
        from overlayctl.runtime import volumes

        self._put_away()
        return volumes.create(self.store, name, labels)

    def volumes(self, *, sizes: bool, filters: Sequence[str] = ()) -> list[dict[str, Any]]:
        """One row for each volume that fits the filters; ``sizes`` reads every directory in them.

        Raises Usage for a filter that there is not.
        """
        from overlayctl.inspect import filters as given
        from overlayctl.inspect import volume

        with self._seeing_all():
            return given.volumes(volume.rows(self.layout, sizes=sizes), filters)

    def inspect_volume(self, name: str) -> dict[str, Any]:
        """The ``volume inspect`` of docker, with who has it and what it takes."""
        from overlayctl.inspect import volume

        with self._seeing_all():
            return volume.describe(self.layout, name)

    def volume_exists(self, name: str) -> bool:
        """Whether there is such a volume."""
        from overlayctl.store import volumes

        with self._seeing_all():
            return volumes.exists(self.layout, name)

    def remove_volume(self, name: str, *, force: bool, dry_run: bool) -> bool:
        """Remove a volume and what is in it; False if it is not there and ``force`` is set.

        Raises NotFound, InUse naming each container that has it.
        """
        from overlayctl.runtime import volumes

        self._put_away()
        return volumes.remove(self.store, name, force=force, dry_run=dry_run)

    def prune_volumes(
        self, *, everything: bool, labels: Mapping[str, str | None], dry_run: bool,
        agreed: PrunedVolumes | None = None,
    ) -> PrunedVolumes:  # fmt: skip
        """Remove the anonymous volumes that no container has; with ``everything`` all of them.

        Only those with all ``labels``; ``agreed``, a dry run's result, limits it.
        """
        from overlayctl.runtime import volumes

        self._put_away()
        return volumes.prune(
            self.store, everything=everything, labels=labels, dry_run=dry_run, agreed=agreed
        )

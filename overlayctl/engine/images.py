"""What is asked of images, and of merged views."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from overlayctl import names
from overlayctl.store import images

if TYPE_CHECKING:
    from overlayctl.layer.compress import Codec
    from overlayctl.layer.compression import Buffer
    from overlayctl.runtime.loading import Loaded
    from overlayctl.runtime.removal import Removed
    from overlayctl.runtime.saving import Form, Saved
    from overlayctl.store.ingest import Progress


from overlayctl.engine.opened import Opened


class Images(Opened):
    """Images: loading, naming, saving, mounting, removing."""

    def load(
        self, path: str, *, tag: str | None, platform: str | None, progress: Progress
    ) -> list[Loaded]:
        """Load every image of an archive, a layout or standard input (``-``).

        Raises BadInput and its kin for what is none; then nothing is left behind.
        """
        from overlayctl.runtime import loading

        self._put_away()
        return loading.load(self.store, path, tag=tag, platform=platform, progress=progress)

    def import_layers(
        self,
        paths: Sequence[str],
        *,
        reference: str | None,
        progress: Progress,
        raw: bool = False,
    ) -> Loaded:
        """Make an image of plain layer tars, given bottom to top; ``raw``: of upper directories."""
        from overlayctl.runtime import loading

        self._put_away()
        return loading.import_layers(
            self.store, paths, reference=reference, progress=progress, raw=raw
        )

    def images(self, *, filters: Sequence[str] = ()) -> list[dict[str, Any]]:
        """One row for each image that fits the filters, newest first.

        Raises Usage for a filter that there is not.
        """
        from overlayctl.inspect import describe

        with self._seeing_all():
            rows = describe.image_rows(self.layout)
            if not filters:
                return rows
            from overlayctl.inspect import filters as given

            return given.images(self.layout, rows, filters)

    def inspect_image(self, name: str) -> dict[str, Any]:
        """The ``image inspect`` of docker; every layer is attached first, so each path is there."""
        from overlayctl.inspect import describe

        def act() -> dict[str, Any]:
            image, _ = images.resolve(self.layout, name)
            unseen = self.store.attach_or_why(image.layers)
            return describe.image(self.layout, image, unseen)

        return self.store.attaching(act)

    def history(self, name: str) -> list[dict[str, Any]]:
        """The image's history, newest first, with real layers."""
        from overlayctl.inspect import describe

        def act() -> list[dict[str, Any]]:
            image, _ = images.resolve(self.layout, name)
            self.store.attach_or_why(image.layers)
            return describe.history(self.layout, image)

        return self.store.attaching(act)

    def image_exists(self, name: str) -> bool:
        """Whether there is such an image."""
        with self._seeing_all():
            return images.exists(self.layout, name)

    def tag(self, source: str, target: str) -> str | None:
        """Let ``target`` stand for the image ``source``; the id it stood for before."""
        self._put_away()
        reference = names.stored(target)
        with self.store.deciding() as own:
            image, _ = images.resolve(self.layout, source)
            before = images.tag(self.layout, own, reference, image.hex)
        return f"sha256:{before}" if before else None

    def remove_image(self, name: str, *, force: bool, dry_run: bool) -> Removed:
        """Untie a tag; with the last one go the image and the layers that nobody else uses.

        Raises InUse naming each container that needs it and each place it is mounted.
        """
        from overlayctl.runtime import removal

        self._put_away()
        return removal.remove_image(self.store, name, force=force, dry_run=dry_run)

    def save(
        self,
        names: Sequence[str],
        write: Callable[[Buffer], object],
        *,
        form: Form,
        codec: Codec,
        progress: Progress,
    ) -> Saved:
        """Give ``write`` an archive of the images. Raises Damaged for a layer that is not whole."""
        from overlayctl.runtime import saving

        return saving.save(self.store, names, write, form=form, codec=codec, progress=progress)

    def save_directory(
        self, names: Sequence[str], place: str, *, codec: Codec, progress: Progress
    ) -> Saved:
        """Write the images as an OCI layout into an empty directory."""
        from overlayctl.runtime import saving

        return saving.save_directory(self.store, names, place, codec=codec, progress=progress)

    def mount_image(
        self, name: str, directory: str | None = None, *, suid: bool = False, dev: bool = False
    ) -> str:
        """Mount the image's read-only view; the path."""
        from overlayctl.runtime import mounts

        place = os.path.realpath(directory) if directory else None

        def act() -> str:
            image, _ = images.resolve(self.layout, name)
            return mounts.mount_image(
                self.store, image.hex, image.layers, place, suid=suid, dev=dev
            )

        return self.store.attaching(act)

    def unmount_image(self, name: str, *, lazy: bool = False) -> str:
        """Unmount an image's views, or the one at a directory; the image id."""
        from overlayctl.runtime import mounts

        return mounts.unmount_image(self.store, name, lazy=lazy)

    def mounts(self) -> list[dict[str, Any]]:
        """Every merged view of this store that is mounted in this namespace."""
        from overlayctl.inspect import describe
        from overlayctl.runtime import mounts

        with self._seeing_all():
            return describe.mount_rows(self.layout, mounts.mounted(self.store))

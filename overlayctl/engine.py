"""The one object a front end holds. Every command is a method here; none of them prints.

    engine = Engine.open("/var/lib/overlayctl", create=True)
    engine.load("image.tar", tag=None, platform=None, progress=Silent())
    path = engine.mount_image("demo:latest")

What a command decides on is read again under the store's lock and committed in the same
hold (``Store.deciding``); long work happens before it, in staging.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from overlayctl import names
from overlayctl.errors import NotFound
from overlayctl.store import containers, gc, images, layers, records, snapshots
from overlayctl.store.opened import Store

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from overlayctl.kernel.probe import Setting
    from overlayctl.layer.compress import Codec
    from overlayctl.layer.compression import Buffer
    from overlayctl.layer.diff import Change
    from overlayctl.mount import Merged, Rung
    from overlayctl.runtime.commit import Committed, Wish
    from overlayctl.runtime.copy import Done as Copying
    from overlayctl.runtime.diff import Versions
    from overlayctl.runtime.export import Exported
    from overlayctl.runtime.loading import Loaded
    from overlayctl.runtime.process import Command
    from overlayctl.runtime.prune import Pruned
    from overlayctl.runtime.removal import Removed
    from overlayctl.runtime.saving import Form, Saved
    from overlayctl.runtime.volumes import Made
    from overlayctl.runtime.volumes import Pruned as PrunedVolumes
    from overlayctl.store.check import Finding
    from overlayctl.store.containers import Config
    from overlayctl.store.ingest import Progress


class Created(NamedTuple):
    """A new container."""

    id: str
    name: str
    merged: str | None


class Engine:
    """A store, open, with everything that can be asked of it."""

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
    ) -> Engine:
        """The store at ``root``, made if it is missing and ``create`` is set.

        ``attach`` and ``rung`` force a way to attach layers and to mount overlays.
        """
        layout, marker = records.open_store(root, create=create)
        return cls(Store(layout, marker, timeout=lock_timeout, attach=attach, rung=rung))

    # -- images ----------------------------------------------------------------------

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

    # -- mounts ----------------------------------------------------------------------

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

    # -- layers ----------------------------------------------------------------------

    def layers(self) -> list[dict[str, Any]]:
        """One row for each stored layer."""
        from overlayctl.inspect import layer

        with self._seeing_all():
            return layer.rows(self.layout)

    def layer_name(self, spec: str) -> str:
        """The layer of ``REF:N`` (1 is the bottom) or of an id's start."""
        from overlayctl.inspect import layer

        with self._seeing_all():
            return layer.named(self.layout, spec)

    def inspect_layer(self, spec: str) -> dict[str, Any]:
        """Everything about one layer, attached."""
        from overlayctl.inspect import layer

        def act() -> dict[str, Any]:
            name = layer.named(self.layout, spec)
            return layer.describe(self.layout, name, self.store.attach_or_why([name]))

        return self.store.attaching(act)

    def layer_path(self, spec: str) -> str:
        """The layer's diff path, attached. Raises HostCannot where it cannot be."""
        from overlayctl.inspect import layer

        def act() -> str:
            name = layer.named(self.layout, spec)
            self.store.attach([name])
            return self.layout.diff(name)

        return self.store.attaching(act)

    def layer_files(self, spec: str) -> Iterator[dict[str, Any]]:
        """Each entry of a layer, read from its index."""
        from overlayctl.inspect import layer

        return layer.files(self.layout, self.layer_name(spec))

    def layer_cat(self, spec: str, path: bytes) -> Iterator[bytes]:
        """The bytes of one file of a layer. Raises NotFound, BadInput for no file."""
        from overlayctl.inspect import layer

        return layer.cat(self.layout, self.layer_name(spec), path)

    def layer_verify(self, spec: str | None) -> list[dict[str, Any]]:
        """What is wrong with one layer, or with any; a fault counts as it does for ``check``."""
        from overlayctl.inspect import layer
        from overlayctl.store import check

        with self._seeing_all():
            wanted = (
                [layer.named(self.layout, spec)]
                if spec
                else records.names(self.layout.path("layers"))
            )
            users = gc.layer_users(self.layout)

        def look(name: str) -> list[Finding]:
            return check.layer(self.layout, name, tuple(users.get(name, ())), quick=False)

        faulty = [name for name in wanted if look(name)]
        if not faulty:
            return []
        with self._seeing_all():
            still = set(records.names(self.layout.path("layers")))
            return _rows(finding for name in faulty if name in still for finding in look(name))

    def detach(self, spec: str | None) -> list[str]:
        """Take one diff path away, or all that this namespace has; their names."""
        from overlayctl.inspect import layer
        from overlayctl.layer import attach

        with self.store.locked():
            wanted = [layer.named(self.layout, spec)] if spec else attach.attached(self.layout)
            gone = [name for name in wanted if attach.detach(self.layout, name)]
            if spec is None:
                attach.leave(self.layout)
        return [name for name in gone if name != attach.EMPTY]

    # -- containers ------------------------------------------------------------------

    def create(
        self,
        image: str,
        *,
        name: str | None = None,
        asked: Config | None = None,
        labels: Mapping[str, str] | None = None,
        mount: bool = False,
    ) -> Created:
        """A container: an image and a writable layer of its own. No process is needed."""
        from overlayctl.runtime import creation

        self._put_away()
        wanted = asked or containers.Config()
        made = creation.create(self.store, image, name=name, asked=wanted, labels=labels or {})
        merged = self.mount_container(made.id, volatile=False, xino=False) if mount else None
        return Created(made.id, made.name, merged)

    def containers(
        self, *, everything: bool, filters: Sequence[str] = (), sizes: bool = False
    ) -> list[dict[str, Any]]:
        """One row for each container that is mounted or runs, or for all, that fits the filters.

        Raises Usage for a filter that there is not.
        """
        from overlayctl.inspect import container

        with self._seeing_all():
            found = container.rows(self.layout, self._views(), everything=everything)
            if filters:
                from overlayctl.inspect import filters as given

                found = given.containers(self.layout, found, filters)
        return container.with_sizes(self.store, found) if sizes else found

    def _views(self) -> dict[str, Merged]:
        from overlayctl.runtime import mounts

        return {v.id: v for v in mounts.mounted(self.store) if v.kind == "container"}

    def inspect_container(self, name: str, *, sizes: bool = False) -> dict[str, Any]:
        """The ``container inspect`` of docker, the layers attached."""
        from overlayctl.inspect import container

        def act() -> dict[str, Any]:
            found = containers.resolve(self.layout, name)
            snapshot = snapshots.find(self.layout, found.id)
            unseen = self.store.attach_or_why(snapshot.layers if snapshot else ())
            return container.describe(self.layout, found, self._views(), unseen)

        told = self.store.attaching(act)
        return {**told, **container.sizes(self.store, told["Id"])} if sizes else told

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

    def container_exists(self, name: str) -> bool:
        """Whether there is such a container."""
        with self._seeing_all():
            return containers.exists(self.layout, name)

    def mount_container(self, name: str, *, volatile: bool, xino: bool) -> str:
        """Mount a container's merged view; the path."""
        from overlayctl.runtime import mounts

        self._put_away()
        with self._seeing_all():
            found = containers.resolve(self.layout, name)
        return mounts.mount_container(self.store, found.id, volatile=volatile, xino=xino)

    def unmount_container(self, name: str, *, lazy: bool) -> str:
        """Unmount a container; its id. Raises InUse for processes in it, unless ``lazy``."""
        from overlayctl.runtime import mounts

        return mounts.unmount_container(self.store, name, lazy=lazy)

    def run(
        self, image: str, *, name: str | None, asked: Config, labels: Mapping[str, str],
        runtime: str, note: Callable[[str], None],
    ) -> int:  # fmt: skip
        """Make a container of an image and run its command; the command's exit status.

        ``note`` is told what a person should know. Raises CommandNotFound, CannotExecute.
        """
        from overlayctl.runtime import process

        return process.run(
            self.store, image, name=name, asked=asked, labels=labels, runtime=runtime, note=note
        )

    def execute(
        self, name: str, command: Command, *, runtime: str, note: Callable[[str], None]
    ) -> int:
        """Execute a command in a container, running or not; its exit status."""
        from overlayctl.runtime import process

        return process.execute(self.store, name, command, runtime=runtime, note=note)

    def write_bundle(self, name: str, directory: str) -> str:
        """Write an OCI runtime bundle for a container that is mounted; the directory."""
        from overlayctl.runtime import process

        return process.write_bundle(self.store, name, directory)

    def within(
        self, name: str, words: Sequence[str], *, writable: bool, note: Callable[[str], None]
    ) -> int:
        """Run a program of the host in the merged view of a container or an image; its status."""
        from overlayctl.runtime import within

        kind = self.kind_of(name)
        return within.run(self.store, name, words, kind=kind, writable=writable, note=note)

    def export_container(self, name: str, write: Callable[[bytes], object]) -> Exported:
        """Give ``write`` the container's merged tree as a tar, mounted or not.

        Where its layers are not known it is the tar of what was written, as a layer.
        """
        from overlayctl.runtime import export

        return export.export_container(self.store, name, write)

    def rename_container(self, name: str, new: str) -> None:
        """Give a container another name. Raises NotFound, Usage, Conflict for one that is taken."""
        self._put_away()
        with self.store.deciding():
            containers.rename(self.layout, containers.resolve(self.layout, name), new)

    def prune_containers(
        self, *, filters: Sequence[str] = (), dry_run: bool, agreed: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Remove the containers that are neither mounted nor running, anywhere; their rows.

        ``agreed``, ids of a dry run, limits it. What somebody began to use meanwhile stays.
        """
        from overlayctl.runtime import removal

        self._put_away()
        rows = self.containers(everything=True, filters=filters, sizes=True)
        return removal.prune_containers(self.store, rows, dry_run=dry_run, agreed=agreed)

    def commit(
        self, name: str, *, reference: str | None, wish: Wish, progress: Progress
    ) -> Committed:
        """An image of a container, mounted or not: its image's layers and what was written."""
        from overlayctl.runtime import commit

        self._put_away()
        return commit.commit(self.store, name, reference=reference, wish=wish, progress=progress)

    def diff(self, name: str, *, sizes: bool = False) -> list[Change]:
        """What a container changed of its image, mounted, running or neither.

        ``sizes`` adds up what was in the directories that are gone. Raises BadInput for an
        upper directory that another program wrote, Damaged where the layers are not known.
        """
        from overlayctl.runtime import diff

        return diff.changes(self.store, name, sizes=sizes)

    def diff_content(self, name: str, path: bytes) -> Versions:
        """One file of a container, as the image has it and as it is. Raises NotFound, BadInput."""
        from overlayctl.runtime import diff

        return diff.versions(self.store, name, path)

    def copy_out(
        self, name: str, path: bytes, target: str, *, archive: bool, follow: bool
    ) -> Copying:
        """Copy what a container has at ``path`` to the host."""
        from overlayctl.runtime import copy

        return copy.copy_out(self.store, name, path, target, archive=archive, follow=follow)

    def copy_out_tar(
        self, name: str, path: bytes, write: Callable[[bytes], object], *, follow: bool
    ) -> Copying:
        """Give ``write`` a tar of what a container has at ``path``."""
        from overlayctl.runtime import copy

        return copy.copy_out_tar(self.store, name, path, write, follow=follow)

    def copy_in(self, source: str, name: str, path: bytes, *, follow: bool) -> Copying:
        """Copy a path of the host into a container."""
        from overlayctl.runtime import copy

        return copy.copy_in(self.store, source, name, path, follow=follow)

    def copy_in_tar(self, name: str, path: bytes) -> Copying:
        """Put the tar on standard input into a directory of a container."""
        from overlayctl.runtime import copy

        return copy.copy_in_tar(self.store, name, path)

    def remove_container(
        self, name: str, *, force: bool, dry_run: bool, volumes: bool = False
    ) -> str:
        """Remove a container and what was written in it; its id.

        With ``volumes`` its anonymous volumes, too, that no other container has. Raises InUse
        while it is mounted; ``force`` unmounts it first.
        """
        from overlayctl.runtime import removal

        self._put_away()
        return removal.remove_container(
            self.store, name, force=force, dry_run=dry_run, volumes=volumes
        )

    # -- volumes ---------------------------------------------------------------------

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

    # -- the store -------------------------------------------------------------------

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
        return _rows(finding for finding in first if finding in again)

    def repair(self, *, deep: bool = False) -> dict[str, list[dict[str, Any]]]:
        """Repair what can be: what was done, and what is still wrong."""
        from overlayctl.store import repair

        done, remaining = repair.repair(self.store, deep=deep)
        rows = zip(done, _rows(one.finding for one in done), strict=True)
        return {
            "Repaired": [{"Action": one.action, **row} for one, row in rows],
            "Findings": _rows(remaining),
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


def _rows(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    return [
        {"Tag": f.tag, "Path": f.path, "Message": f.message, "Users": list(f.users)}
        for f in findings
    ]

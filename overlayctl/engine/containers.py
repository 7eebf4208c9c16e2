"""What is asked of containers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from overlayctl.store import containers, snapshots

if TYPE_CHECKING:
    from overlayctl.layer.diff import Change
    from overlayctl.runtime.commit import Committed, Wish
    from overlayctl.runtime.copy import Done as Copying
    from overlayctl.runtime.diff import Versions
    from overlayctl.runtime.export import Exported
    from overlayctl.runtime.process import Command
    from overlayctl.store.containers import Config
    from overlayctl.store.ingest import Progress


from overlayctl.engine.opened import Opened


class Created(NamedTuple):
    """A new container."""

    id: str
    name: str
    merged: str | None


class Containers(Opened):
    """Containers: what is in them, what runs in them."""

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

    def container_exists(self, name: str) -> bool:
        """Whether there is such a container."""
        with self._seeing_all():
            return containers.exists(self.layout, name)

    def rename_container(self, name: str, new: str) -> None:
        """Give a container another name. Raises NotFound, Usage, Conflict for one that is taken."""
        self._put_away()
        with self.store.deciding():
            containers.rename(self.layout, containers.resolve(self.layout, name), new)

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

        self._put_away()
        return process.run(
            self.store, image, name=name, asked=asked, labels=labels, runtime=runtime, note=note
        )

    def execute(
        self, name: str, command: Command, *, runtime: str, note: Callable[[str], None]
    ) -> int:
        """Execute a command in a container, running or not; its exit status."""
        from overlayctl.runtime import process

        self._put_away()
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
        self._put_away()
        return within.run(self.store, name, words, kind=kind, writable=writable, note=note)

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

    def export_container(self, name: str, write: Callable[[bytes], object]) -> Exported:
        """Give ``write`` the container's merged tree as a tar, mounted or not.

        Where its layers are not known it is the tar of what was written, as a layer.
        """
        from overlayctl.runtime import export

        return export.export_container(self.store, name, write)

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

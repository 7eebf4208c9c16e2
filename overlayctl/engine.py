"""The one object a front end holds. Every command is a method here; none of them prints.

    engine = Engine.open("/var/lib/overlayctl", create=True)
    engine.load("image.tar", tag=None, platform=None, progress=Silent())
    path = engine.mount_image("demo:latest")

What a command decides on is read again under the store's lock and committed in the same
hold (``Store.deciding``); long work happens before it, in staging.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from overlayctl import names
from overlayctl.digest import hex_of
from overlayctl.errors import Ambiguous, BadInput, Conflict, NotFound, Usage
from overlayctl.layout import Layout
from overlayctl.store import containers, gc, images, layers, records, snapshots
from overlayctl.store.opened import Store

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from overlayctl.kernel.probe import Setting
    from overlayctl.mount import Merged, Rung
    from overlayctl.runtime.loading import Loaded
    from overlayctl.runtime.prune import Pruned
    from overlayctl.runtime.removal import Removed
    from overlayctl.store.check import Finding
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

        return loading.load(self.store, path, tag=tag, platform=platform, progress=progress)

    def import_layers(
        self,
        paths: Sequence[str],
        *,
        reference: str | None,
        progress: Progress,
    ) -> Loaded:
        """Make an image of plain layer tars, given bottom to top."""
        from overlayctl.runtime import loading

        return loading.import_layers(self.store, paths, reference=reference, progress=progress)

    def images(self) -> list[dict[str, Any]]:
        """One row for each image, newest first."""
        from overlayctl.inspect import describe

        with self._seeing_all():
            return describe.image_rows(self.layout)

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

    def image_exists(self, name: str) -> bool:
        """Whether there is such an image."""
        with self._seeing_all():
            return self._is_image(name)

    def _is_image(self, name: str) -> bool:
        try:
            images.resolve(self.layout, name)
        except NotFound:
            return False
        return True

    def tag(self, source: str, target: str) -> str | None:
        """Let ``target`` stand for the image ``source``; the id it stood for before."""
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

        return removal.remove_image(self.store, name, force=force, dry_run=dry_run)

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

        with self.store.locked():
            views = [v for v in mounts.mounted(self.store) if v.kind == "image"]
            there = [v for v in views if v.target == os.path.realpath(name)]
            if not there:
                image, _ = images.resolve(self.layout, name)
                there = [v for v in views if v.id == image.hex]
            if not there:
                raise NotFound(f"{name} is not mounted", hint="overlayctl mounts lists what is")
            for view in there[::-1]:
                mounts.unmount(self.store, view, lazy=lazy)
            return f"sha256:{there[0].id}"

    def mounts(self) -> list[dict[str, Any]]:
        """Every merged view of this store that is mounted in this namespace."""
        from overlayctl.inspect import describe
        from overlayctl.runtime import mounts

        with self._seeing_all():
            return describe.mount_rows(self.layout, mounts.mounted(self.store))

    # -- layers ----------------------------------------------------------------------

    def layers(self) -> list[dict[str, Any]]:
        """One row for each stored layer."""
        from overlayctl.inspect import describe

        with self._seeing_all():
            return describe.layer_rows(self.layout)

    def layer_name(self, spec: str) -> str:
        """The layer of ``REF:N`` (1 is the bottom) or of an id's start."""
        with self._seeing_all():
            return self._layer_name(spec)

    def _layer_name(self, spec: str) -> str:
        reference, _, number = spec.rpartition(":")
        if reference not in ("", "sha256") and number.isdigit() and not self._is_image(spec):
            image, _ = images.resolve(self.layout, reference)
            if not 1 <= int(number) <= len(image.layers):
                raise NotFound(f"{reference} has layers 1 to {len(image.layers)}, bottom to top")
            return image.layers[int(number) - 1]
        known = layers.listed(self.layout)
        prefix = hex_of(spec)
        if prefix in known:
            return prefix
        hexes = {name[:64] for name in known}
        try:
            found = names.match(prefix, hexes)
        except NotFound:
            if not self._is_image(spec):
                raise NotFound(f"there is no layer {spec!r}", hint="overlayctl layer ls") from None
            raise Usage(
                f"{spec} is an image: say which of its layers",
                hint=f"{spec}:1 is the bottom one",
            ) from None
        same = [name for name in known if name.startswith(found)]
        if len(same) > 1:
            raise Ambiguous(spec, same)
        return same[0]

    def inspect_layer(self, spec: str) -> dict[str, Any]:
        """Everything about one layer, attached."""
        from overlayctl.inspect import describe

        def act() -> dict[str, Any]:
            name = self._layer_name(spec)
            return describe.layer(self.layout, name, self.store.attach_or_why([name]))

        return self.store.attaching(act)

    def layer_path(self, spec: str) -> str:
        """The layer's diff path, attached. Raises HostCannot where it cannot be."""

        def act() -> str:
            name = self._layer_name(spec)
            self.store.attach([name])
            return self.layout.diff(name)

        return self.store.attaching(act)

    def layer_files(self, spec: str) -> Iterator[dict[str, Any]]:
        """Each entry of a layer, read from its index."""
        from overlayctl.inspect import describe

        with layers.open_index(self.layout, self.layer_name(spec)) as index:
            yield from describe.files(index)

    def layer_cat(self, spec: str, path: bytes) -> Iterator[bytes]:
        """The bytes of one file of a layer. Raises NotFound, BadInput for no file."""
        import stat

        with layers.open_index(self.layout, self.layer_name(spec)) as index:
            node = index.lookup(b"/".join(p for p in path.split(b"/") if p not in (b"", b".")))
            if node is None:
                raise NotFound(
                    f"layer {spec} has no {os.fsdecode(path)}", hint="overlayctl layer files lists"
                )
            if not stat.S_ISREG(node.mode):
                raise BadInput(f"{os.fsdecode(path)} is no regular file in layer {spec}")
            for offset in range(0, node.size, 1 << 20):
                yield index.read(node, offset, min(1 << 20, node.size - offset))

    def layer_verify(self, spec: str | None) -> list[dict[str, Any]]:
        """What is wrong with one layer, or with any; a fault counts as it does for ``check``."""
        from overlayctl.store import check

        with self._seeing_all():
            wanted = [self._layer_name(spec)] if spec else records.names(self.layout.path("layers"))
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
        from overlayctl.layer import attach

        with self.store.locked():
            wanted = [self._layer_name(spec)] if spec else attach.attached(self.layout)
            gone = [name for name in wanted if attach.detach(self.layout, name)]
        return [name for name in gone if name != attach.EMPTY]

    # -- containers ------------------------------------------------------------------

    def create(
        self, image: str, *, name: str | None, command: Sequence[str], labels: dict[str, str],
        mount: bool,
    ) -> Created:  # fmt: skip
        """A container: an image and a writable layer of its own. No process is needed."""
        if name is not None:
            names.container_name(name)
        identifier = secrets.token_hex(32)
        with self.store.deciding() as own:
            found, reference = images.resolve(self.layout, image)
            default = images.command(images.config(self.layout, found))
            container = containers.Container(
                identifier,
                name or identifier[:12],
                found.hex,
                reference or found.id,
                tuple(command) or default,
                labels,
                records.now(),
            )
            snapshots.prepare(self.layout, own, identifier, "container", found.layers)
            try:
                containers.commit(self.layout, own, container)
            except (Conflict, OSError):
                snapshots.remove(self.layout, identifier)
                raise
        merged = self.mount_container(identifier, volatile=False, xino=False) if mount else None
        return Created(identifier, container.name, merged)

    def containers(self, *, everything: bool) -> list[dict[str, Any]]:
        """One row for each container that is mounted, or for all."""
        from overlayctl.inspect import describe

        with self._seeing_all():
            return describe.container_rows(self.layout, self._views(), everything=everything)

    def _views(self) -> dict[str, Merged]:
        from overlayctl.runtime import mounts

        return {v.id: v for v in mounts.mounted(self.store) if v.kind == "container"}

    def inspect_container(self, name: str) -> dict[str, Any]:
        """The ``container inspect`` of docker, the layers attached."""
        from overlayctl.inspect import describe

        def act() -> dict[str, Any]:
            found = containers.resolve(self.layout, name)
            snapshot = snapshots.find(self.layout, found.id)
            unseen = self.store.attach_or_why(snapshot.layers if snapshot else ())
            return describe.container(self.layout, found, self._views(), unseen)

        return self.store.attaching(act)

    def inspect(self, name: str) -> dict[str, Any]:
        """The container of that name, else the image."""
        if self.kind_of(name) == "container":
            return self.inspect_container(name)
        return self.inspect_image(name)

    def kind_of(self, name: str) -> str:
        """``container`` or ``image``: containers come first. Raises NotFound for neither."""
        with self._seeing_all():
            if self._is_container(name):
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
            return self._is_container(name)

    def _is_container(self, name: str) -> bool:
        try:
            containers.resolve(self.layout, name)
        except NotFound:
            return False
        return True

    def mount_container(self, name: str, *, volatile: bool, xino: bool) -> str:
        """Mount a container's merged view; the path."""
        from overlayctl.runtime import mounts

        with self._seeing_all():
            found = containers.resolve(self.layout, name)
        return mounts.mount_container(self.store, found.id, volatile=volatile, xino=xino)

    def unmount_container(self, name: str, *, lazy: bool) -> str:
        """Unmount a container; its id. Raises InUse for processes in it, unless ``lazy``."""
        from overlayctl.runtime import mounts

        with self._seeing_all():
            found = containers.resolve(self.layout, name)
        idle = nullcontext() if lazy else self.store.idle(found.id)
        with self.store.holding(found.id), idle:
            view = self._views().get(found.id)
            if view is None:
                raise NotFound(f"container {name} is not mounted", hint="overlayctl mounts")
            mounts.unmount(self.store, view, lazy=lazy)
        return found.id

    def remove_container(self, name: str, *, force: bool, dry_run: bool) -> str:
        """Remove a container and what was written in it; its id.

        Raises InUse while it is mounted; ``force`` unmounts it first.
        """
        from overlayctl.runtime import removal

        return removal.remove_container(self.store, name, force=force, dry_run=dry_run)

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
        free = os.statvfs(self.layout.root)
        # Exclusive: what is tried copies this namespace, and with it whatever is mounted.
        with self.store.locked():
            possible = host(self.layout.root)
            counts = {
                "Images": len(images.listed(self.layout)),
                "Layers": len(layers.listed(self.layout)),
                "Containers": len(containers.listed(self.layout)),
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

        return prune.prune(self.store, everything=everything, dry_run=dry_run, agreed=agreed)

    def reset(self, *, dry_run: bool) -> dict[str, Any]:
        """Remove everything: unmount, detach, delete. Raises InUse for what is busy."""
        from overlayctl.runtime import removal

        return removal.reset(self.store, dry_run=dry_run)


def host(root: str) -> dict[str, Any]:
    """What this host can, tried with an image of nothing where the store is or would be."""
    import tempfile

    from overlayctl.layer import erofs

    empty = Layout(root).empty
    if os.path.exists(empty):
        return _host(empty)
    while not os.path.isdir(root):
        root = os.path.dirname(os.path.abspath(root))

    def tried(directory: str | None) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix=".overlayctl-", dir=directory) as place:
            image = os.path.join(place, "empty.erofs")
            erofs.write_empty(image)
            return _host(image)

    try:
        return tried(root)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        # Nothing can be tried there; what the kernel can shows elsewhere, too.
        return tried(None)


def _host(image: str) -> dict[str, Any]:
    from overlayctl.kernel import probe

    return {
        "Kernel": os.uname().release,
        "Attach": probe.attach_ways(image),
        "Mount": probe.mount_rungs(os.path.dirname(image)),
    }


def _rows(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    return [
        {"Tag": f.tag, "Path": f.path, "Message": f.message, "Users": list(f.users)}
        for f in findings
    ]

"""Volumes as people use them: made, filled, put into containers, removed where nobody has them."""

from __future__ import annotations

import os
import secrets
import shlex
import stat
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple

from overlayctl import names
from overlayctl.errors import Conflict, Holder, InUse, NotFound
from overlayctl.kernel import inuse
from overlayctl.layer.fields import shown
from overlayctl.placed import is_of_kernel
from overlayctl.runtime.targets import Targets
from overlayctl.store import containers, records, volumes
from overlayctl.store.volumes import Volume

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from overlayctl.layout import Layout
    from overlayctl.placed import Placed
    from overlayctl.store.containers import Container
    from overlayctl.store.opened import Store


class Made(NamedTuple):
    """A volume that was asked for; ``new`` is False where it was there already."""

    volume: Volume
    new: bool


class Pruned(NamedTuple):
    """What ``prune`` took away, or would; ``freed`` in bytes. ``kept`` says what stays, and why.

    ``unread`` says that a container's record could not be read, which may name any volume: so
    none went.
    """

    names: tuple[str, ...]
    freed: int
    kept: tuple[str, ...] = ()
    unread: bool = False


class Bound(NamedTuple):
    """A mount that can be made now, at ``target`` in the container, on whose way no link is.

    ``source`` is an absolute path of the host, and ``target`` is there: a directory, or for a
    source that is none a file. A tmpfs has the source "". Only below a tmpfs ``target`` may be
    missing: it is to be made when that is mounted.
    """

    placed: Placed
    source: str
    target: str


def create(store: Store, name: str | None, labels: Mapping[str, str]) -> Made:
    """The volume of that name, made if it is not there; without a name an anonymous one.

    Raises Usage for what cannot be a name, Conflict for what is there and is no volume.
    """
    if name is not None:
        names.volume_name(name)
    with store.deciding() as own:
        if name is not None and volumes.exists(store.layout, name):
            return Made(volumes.find(store.layout, name), new=False)
        volume = new(name, labels)
        volumes.make(store.layout, own, volume)
    return Made(volume, new=True)


def new(name: str | None, labels: Mapping[str, str] | None = None) -> Volume:
    """What is to be recorded of a volume; without a name it gets one that nobody chose."""
    return Volume(
        name or secrets.token_hex(32), labels or {}, records.now(), anonymous=name is None
    )


def remove(store: Store, name: str, *, force: bool, dry_run: bool) -> bool:
    """Remove a volume and what is in it; False if it is not there and ``force`` is set.

    Raises NotFound, InUse naming each container that has it.
    """
    with store.unmaking():
        if not volumes.exists(store.layout, name):
            if force:
                return False
            raise volumes.missing(store.layout, name)
        holders = [
            Holder("container", found.name, f"overlayctl rm {found.name}")
            for found in volumes.users(store.layout).get(name, ())
        ]
        if holders:
            raise InUse(f"volume {name}", holders)
        if not dry_run:
            take_away(store, name)
    return True


def take_away(store: Store, name: str) -> None:
    """Remove a volume that no container names; the caller holds the lock. Raises InUse."""
    inuse.refuse_mounts(store.layout.volume(name))
    volumes.remove(store.layout, name)


def prune(
    store: Store, *, everything: bool, labels: Mapping[str, str | None], dry_run: bool,
    agreed: Pruned | None = None,
) -> Pruned:  # fmt: skip
    """Remove the anonymous volumes that no container names; with ``everything`` named ones too.

    Only those with all ``labels``, of any value where that is None. ``agreed`` is what a dry
    run showed: nothing else goes.
    """
    layout = store.layout
    with store.locked(exclusive=False) if dry_run else store.unmaking():
        known = containers.listed(layout)
        readable = containers.readable(layout)
        if len(readable) < len(known) or any(not found.image for found in readable):
            return Pruned((), 0, unread=True)
        used = volumes.users(layout)
        gone: list[str] = []
        kept: list[str] = []
        freed = 0
        for name in volumes.listed(layout):
            volume = volumes.find(layout, name)
            if name in used or not (everything or volume.anonymous):
                continue
            if not carries(volume, labels) or (agreed and name not in agreed.names):
                continue
            size = volumes.taken(layout, name).disk
            try:
                if not dry_run:
                    take_away(store, name)
            except InUse as error:
                kept.append(str(error))
            else:
                gone.append(name)
                freed += size
    return Pruned(tuple(gone), freed, tuple(kept))


def carries(volume: Volume, labels: Mapping[str, str | None]) -> bool:
    """Whether a volume has all these labels, of any value where that is None."""
    return all(
        key in volume.labels and value in {None, volume.labels[key]}
        for key, value in labels.items()
    )


# --- in a container -----------------------------------------------------------------------------


def find_directories(mounts: Iterable[Placed], undo: ExitStack) -> None:
    """See to it that the directories of the host are there, which a new container is to have.

    Those that are made go again with ``undo``. Raises NotFound.
    """
    for one in mounts:
        if one.kind != "bind" or os.path.lexists(one.source):
            continue
        if not one.make:
            raise NotFound(
                f"there is no {one.source} to be mounted at {one.target}",
                hint=f"mkdir -p {shlex.quote(one.source)}; -v makes a directory that is missing",
            )
        missing = [one.source]
        while not os.path.lexists(os.path.dirname(missing[-1])):
            missing.append(os.path.dirname(missing[-1]))
        for path in missing[::-1]:
            os.mkdir(path, 0o755)
            undo.callback(_remove_empty, path)


def _remove_empty(path: str) -> None:
    with suppress(OSError):
        os.rmdir(path)


def find_volumes(
    layout: Layout, staged: str, mounts: Iterable[Placed], undo: ExitStack
) -> tuple[Placed, ...]:
    """The mounts of a new container, with every volume there; the caller holds the lock.

    Anonymous ones get their names. Those that are made go again with ``undo``.
    """
    found = []
    for one in mounts:
        if one.kind == "volume" and not (one.source and volumes.exists(layout, one.source)):
            volume = new(one.source or None)
            volumes.make(layout, staged, volume)
            undo.callback(volumes.remove, layout, volume.name)
            found.append(one._replace(source=volume.name))
        else:
            found.append(one)
    return tuple(found)


def prepare(
    store: Store, container: Container, root_fd: int, *, lives: ExitStack | None = None
) -> list[Bound]:
    """The mounts of a container whose merged root is ``root_fd``, in the order to make them in.

    New volumes get the image's content first; those that get none stay as they are while
    ``lives``, which is to end with the container's process. The caller holds neither the
    store's lock nor that of the container exclusively. Raises NotFound for a source that is
    gone, Conflict and BadInput for a target where nothing can be mounted, DiskFull.
    """
    mounts = [(one, _source(store.layout, container, one)) for one in container.config.mounts]
    plain = Targets(root_fd)
    found = [(plain.resolve(os.fsencode(one.target)), one, source) for one, source in mounts]
    found.sort(key=lambda each: (each[0].count(b"/"), each[0]))
    for place, one, _ in found:
        _refuse_place(one, place)
    for place, one, _ in found:
        if one.kind == "volume":
            from overlayctl.runtime import filling

            if one.copy:
                filling.fill(store, one.source, plain, place)
            if lives is not None:
                filling.hold(store, one.source, lives)
    bound = []
    with ExitStack() as held:
        targets = Targets(root_fd)
        for _, one, source in found:
            fd = None
            if one.kind != "tmpfs":
                fd = os.open(source, os.O_PATH | os.O_CLOEXEC)
                held.callback(os.close, fd)
            directory = fd is None or stat.S_ISDIR(os.fstat(fd).st_mode)
            wanted = os.fsencode(one.target)
            _refuse_place(one, targets.resolve(wanted))
            # A tmpfs gets the mode of what it covers: of a place that we make, its own default.
            mode = 0 if one.source else 0o1777
            place = targets.resolve(wanted, make="directory" if directory else "file", mode=mode)
            targets.mount(place, fd, writable=not one.read_only)
            bound.append(Bound(one, source, os.fsdecode(place)))
    return bound


def _source(layout: Layout, container: Container, one: Placed) -> str:
    """Where on the host it lies. Raises NotFound, Damaged."""
    if one.kind == "tmpfs":
        return ""
    if one.kind == "volume":
        try:
            return volumes.data(layout, one.source)
        except NotFound:
            raise NotFound(
                f"volume {one.source} is gone, which container {container.name} has at "
                f"{one.target}",
                hint=f"overlayctl volume create {one.source} makes it again, empty",
            ) from None
    if not os.path.exists(one.source):
        raise NotFound(
            f"{one.source} is gone, which container {container.name} has at {one.target}",
            hint="put it back; the container knows it by that path",
        )
    return one.source


def _refuse_place(one: Placed, place: bytes) -> None:
    """Raises Conflict where links of the image lead to a place that is not to be covered."""
    if place == b"/" or is_of_kernel(os.fsdecode(place)):
        raise Conflict(
            f"{one.target} leads to {shown(place)} in the container, where nothing can be mounted",
            hint="name another place",
        )

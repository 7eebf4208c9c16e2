"""``cp``: between a container and the host, with docker's meaning of the paths.

    SOURCE      DIR/. is what is in it, DIR and DIR/ the directory; a symlink is copied as it is,
                unless a slash follows it or links are to be followed
    TARGET      a directory that is there (or a link to one): into it; a file: replaced;
                nothing: made, in a directory that is there; with a slash only a directory is made

docs.docker.com/reference/cli/docker/container/cp; moby, ``archive/copy.go``.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.errors import BadInput, Conflict, Damaged, NotFound, OverlayctlError, Usage
from overlayctl.kernel import disk, places
from overlayctl.layer import copy
from overlayctl.layer.extract import Extraction
from overlayctl.layer.fields import shown
from overlayctl.layer.input import open_file
from overlayctl.layer.tar import TarReader
from overlayctl.layer.tar_writer import TarWriter
from overlayctl.runtime import trees
from overlayctl.runtime.inside import Inside, Place
from overlayctl.store import containers, staging

if TYPE_CHECKING:
    from overlayctl.layer.input import Opened
    from overlayctl.store.containers import Container
    from overlayctl.store.opened import Store

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Done(NamedTuple):
    """What was copied; ``size`` are bytes of content, of a tar all its bytes."""

    id: str
    size: int
    entries: int
    notes: dict[str, list[bytes]]


class _Source(NamedTuple):
    """What to copy: the fd of a directory and a name in it, ``.`` for the directory itself.

    ``called`` is its name where it goes, empty if only its content does.
    """

    parent: int
    name: bytes
    called: bytes

    @property
    def is_directory(self) -> bool:
        """Whether it is one, and stays one whatever has its name by now."""
        return self.name == b"."


def copy_out(
    store: Store, name: str, path: bytes, target: str, *, archive: bool, follow: bool
) -> Done:
    """Copy from a container to a path of the host.

    With ``archive`` owners stay, else all belongs to who calls; with ``follow`` a link that
    ``path`` is stands for what it leads to. Raises NotFound, Conflict, and OverlayctlError for
    what the host refuses.
    """
    with _from(store, name) as (container, inside), ExitStack() as owned:
        source, place = _source(inside, container, path, owned, follow=follow)
        parent, renamed = _host_target(source, target, owned)
        owner = None if archive else (os.geteuid(), os.getegid())
        tree = copy.TreeCopy(parent, owner=owner)
        mounted = inside.mounts_below(place.path) if source.is_directory else []
        with _told(target):
            hidden = {below for below, _ in mounted}
            done = tree.copy(source.parent, source.name, renamed, hidden=hidden)
            for below, there in mounted:
                to = places.below(b"" if renamed == b"." else renamed, below)
                inner = {one[len(below) + 1 :] for one in hidden if one.startswith(below + b"/")}
                done = tree.copy(there.parent, there.name, to, hidden=inner)
    return Done(container.id, *done)


def copy_out_tar(
    store: Store, name: str, path: bytes, write: Callable[[bytes], object], *, follow: bool
) -> Done:
    """Give ``write`` a tar of what a container has at a path, by its name."""
    with _from(store, name) as (container, inside), ExitStack() as owned:
        source, place = _source(inside, container, path, owned, follow=follow)
        called = source.called and place.path.rpartition(b"/")[2] if follow else source.called
        parts = [(called, source.parent, source.name)]
        if source.is_directory:
            for below, there in inside.mounts_below(place.path):
                parts.append((places.below(called, below), there.parent, there.name))
        size = entries = 0
        notes: dict[str, list[bytes]] = {}
        for number, (at, parent, start) in enumerate(parts, 1):
            others = {one for one, _, _ in parts if one != at}
            tar = TarWriter(
                parent,
                leave_out=others,
                start=b"" if start == b"." else start,
                called=at,
                end=number == len(parts),
            )
            for piece in tar:
                write(piece)
                size += len(piece)
            entries += tar.entries
            for kind, paths in tar.notes.items():
                notes.setdefault(kind, []).extend(paths)
    return Done(container.id, size, entries, notes)


def copy_in(store: Store, source: str, name: str, path: bytes, *, follow: bool) -> Done:
    """Copy from a path of the host into a container; owners stay. Raises as ``copy_out``.

    A container that is idle is mounted for as long as it takes.
    """
    with ExitStack() as owned:
        what = _host_source(source, owned, follow=follow)
        with _into(store, name) as (container, inside):
            place = inside.place(path, follow=True)
            inside.expect_writable(place.path)
            parent, renamed = _container_target(what, place, path, owned)
            full = nullcontext() if inside.is_foreign(place.path) else disk.told(store.layout.root)
            with _told(f"{name}:{os.fsdecode(path)}"), full:
                done = copy.copy_tree(what.parent, what.name, parent, renamed)
    return Done(container.id, *done)


def copy_in_tar(store: Store, name: str, path: bytes) -> Done:
    """Put the tar that comes on standard input into a directory of a container; owners stay.

    It may be compressed. All of it is there, and whole as far as its headers tell, before
    anything is written. Raises BadTar, BadArchive, NotFound, Conflict.
    """
    with ExitStack() as owned:
        own = owned.enter_context(staging.staging(store.layout))
        fd, start, size = _spooled(open_file("-", owned, expand=True), own, owned)
        for _ in TarReader(fd, start, size):
            pass
        with _into(store, name) as (container, inside):
            place = inside.place(path, follow=True)
            if not place.is_directory:
                raise NotFound(
                    f"{shown(path)} in container {container.name} is no directory",
                    hint="a tar goes into a directory that is there",
                )
            inside.expect_writable(place.path)
            full = nullcontext() if inside.is_foreign(place.path) else disk.told(store.layout.root)
            with _told(f"{name}:{os.fsdecode(path)}"), full:
                extraction = Extraction(fd, start, lambda below: inside.parent(place.path, below))
                done = extraction.run(TarReader(fd, start, size))
    return Done(container.id, *done)


def _spooled(given: Opened, own: str, owned: ExitStack) -> tuple[int, int, int]:
    """The tar as a part of a file: fd, offset, length."""
    if given.source is not None:
        return given.source.fd, given.source.offset, given.source.size
    if given.pieces is None:
        raise Usage("standard input is a directory", hint="tar -c DIR | overlayctl cp - ...")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(os.path.join(own, "tar"), flags, 0o600)
    owned.callback(os.close, fd)
    size = 0
    for piece in given.pieces:
        disk.look(fd)
        view = memoryview(piece)
        while view:
            written = os.pwrite(fd, view, size)
            size += written
            view = view[written:]
    return fd, 0, size


# --- the container ------------------------------------------------------------------------------


@contextmanager
def _from(store: Store, name: str) -> Iterator[tuple[Container, Inside]]:
    with store.locked(exclusive=False):
        found = containers.resolve(store.layout, name)
    with trees.reading(store, found.id) as tree, ExitStack() as owned:
        if tree.upper_only:
            raise Damaged(
                f"which layers container {found.name} lies on is lost",
                hint=f"overlayctl export {found.name} gives what was written in it",
            )
        yield found, Inside(store, found, tree.root, owned)


@contextmanager
def _into(store: Store, name: str) -> Iterator[tuple[Container, Inside]]:
    with store.locked(exclusive=False):
        found = containers.resolve(store.layout, name)
    with trees.writing(store, found.id) as root, ExitStack() as owned:
        yield found, Inside(store, found, root, owned)


def _source(
    inside: Inside, container: Container, path: bytes, owned: ExitStack, *, follow: bool
) -> tuple[_Source, Place]:
    content, directory = _ends(path)
    place = inside.place(path, follow=follow or directory)
    if place.info is None:
        raise NotFound(
            f"container {container.name} has no {shown(path)}",
            hint=f"overlayctl export {container.name} | tar -t lists what it has",
        )
    if directory and not place.is_directory:
        raise BadInput(
            f"{shown(path)} in container {container.name} is no directory",
            hint="leave out the slash at its end",
        )
    called = b"" if content else posixpath.normpath(path).rpartition(b"/")[2]
    if not place.is_directory:
        return _Source(place.parent, place.name, called), place
    return _Source(_entered(place, owned), b".", called), place


def _entered(place: Place, owned: ExitStack) -> int:
    """An fd of the directory that was found at a place."""
    try:
        fd = os.open(place.name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=place.parent)
    except OSError as error:
        if error.errno not in places.GONE:
            raise
        raise NotFound(
            f"{shown(place.path)} became something else meanwhile", hint="repeat the command"
        ) from None
    owned.callback(os.close, fd)
    return fd


def _container_target(
    source: _Source, place: Place, path: bytes, owned: ExitStack
) -> tuple[int, bytes]:
    if not path:
        raise Usage("the path in the container is empty", hint="CONTAINER:/ is its root")
    there = None if place.info is None else place.is_directory
    if not _goes_into(source, there, path):
        return place.parent, place.name
    return _entered(place, owned), source.called or b"."


# --- the host -----------------------------------------------------------------------------------


def _host_source(path: str, owned: ExitStack, *, follow: bool) -> _Source:
    if not path:
        raise Usage("the path to copy is empty", hint="overlayctl cp PATH CONTAINER:PATH")
    content, directory = _ends(os.fsencode(path))
    whole = os.path.abspath(path)
    above, last = os.path.split(whole)
    there = os.path.realpath(whole if follow or directory else above)
    if not (follow or directory):
        there = os.path.join(there, last)
    try:
        info = os.lstat(there)
        is_directory = stat.S_ISDIR(info.st_mode)
        if directory and not is_directory:
            raise BadInput(f"{path} is no directory", hint="leave out the slash at its end")
        fd = os.open(there if is_directory else os.path.dirname(there), _DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{path} does not exist", hint="it is a path of the host") from None
    owned.callback(os.close, fd)
    called = b"" if content else os.fsencode(last)
    return _Source(fd, b"." if is_directory else os.fsencode(os.path.basename(there)), called)


def _host_target(source: _Source, path: str, owned: ExitStack) -> tuple[int, bytes]:
    if not path:
        raise Usage("the path to copy to is empty", hint="overlayctl cp CONTAINER:PATH .")
    there = os.path.realpath(path)
    is_directory = os.path.isdir(there) if os.path.lexists(there) else None
    into = _goes_into(source, is_directory, os.fsencode(path))
    above = there if into else os.path.dirname(there)
    try:
        fd = os.open(above, _DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no directory {above}", hint=f"mkdir -p {above}") from None
    owned.callback(os.close, fd)
    return fd, (source.called or b".") if into else os.fsencode(os.path.basename(there))


# --- the meaning of paths -----------------------------------------------------------------------


def _ends(path: bytes) -> tuple[bool, bool]:
    """Whether a source means what is in it, and whether it has to be a directory."""
    content = posixpath.basename(path) == b"." or not path.strip(b"/")
    return content, content or path.endswith(b"/")


def _goes_into(source: _Source, is_directory: bool | None, path: bytes) -> bool:  # noqa: FBT001
    """Whether the target is a directory for the source to go into; None is that nothing is there.

    Raises Conflict, NotFound where it cannot be copied there.
    """
    named_directory = path.endswith(b"/") or posixpath.basename(path) == b"."
    if is_directory:
        return True
    if is_directory is None:
        if named_directory and not source.is_directory:
            raise NotFound(f"there is no directory {shown(path)}", hint="make it first")
        return False
    if source.is_directory or named_directory:
        raise Conflict(
            f"{shown(path)} is there and is no directory",
            hint="copy a directory to a directory, or to a new name",
        )
    return False


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Let what the system refuses say which entry it was, and where it was to go."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "make room there, then repeat the command"
        else:
            hint = "what was copied until then is there; repeat the command"
        what = f"{error.filename!r}: " if error.filename else ""
        raise OverlayctlError(
            f"cannot copy to {where}: {what}{error.strerror}", hint=hint
        ) from error

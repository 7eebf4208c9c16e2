"""Where mounts go in a container: every path resolved inside its root, whatever links say.

Nothing is opened by a path that the container could bend: each name is looked at in the fd of
the directory that holds it, a symlink is read and followed by hand, and ``/`` and ``..`` never
lead out (path_resolution(7), as chroot(2) would have it).
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from overlayctl.errors import BadInput, Conflict
from overlayctl.kernel.rooted import open_directory
from overlayctl.layer.fields import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

# As many as the kernel follows (path_resolution(7)).
_LINKS = 40

_Names = tuple[bytes, ...]


class Targets:
    """The paths of one container, whose merged root is the fd ``root``.

    ``mount`` says what will lie at a path: from then on paths lead through it.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._mounted: dict[_Names, tuple[int | None, bool]] = {(): (root, True)}

    def mount(self, path: bytes, fd: int | None, *, writable: bool) -> None:
        """Let the directory ``fd`` lie at ``path``, as ``resolve`` gave it; None for a tmpfs.

        Raises Conflict for one that hides what was mounted before.
        """
        names = _names(path)
        for there in self._mounted:
            if there and there[: len(names)] == names:
                raise Conflict(
                    f"a mount at {shown(path)} would hide the one at {shown(_path(there))}",
                    hint="links in the container lead them there: name other places",
                )
        self._mounted[names] = (fd, writable)

    def resolve(self, path: bytes, *, make: str = "", mode: int = 0) -> bytes:
        """The absolute path in the container without any link on the way.

        With ``make`` it is there afterwards: a ``directory`` or a ``file`` (an empty one), with
        the directories above it, whatever the umask is; what is made at its end has ``mode``,
        if that is given. Raises Conflict where something else is in the way, BadInput for links
        without end.
        """
        done: list[bytes] = []
        pending = _reversed(path)
        links = 0
        while pending:
            name = pending.pop()
            if name == b"..":
                del done[-1:]
                continue
            last = not pending
            info = self._look((*done, name))
            if info is not None and stat.S_ISLNK(info.st_mode):
                links += 1
                if links > _LINKS:
                    raise BadInput(
                        f"{shown(path)} leads through too many symbolic links in the container",
                        hint="name another place",
                    )
                target = self._read_link(done, name)
                if target.startswith(b"/"):
                    done = []
                pending += _reversed(target)
                continue
            if info is not None:
                _refuse_other(path, _path((*done, name)), info, last=last, make=make)
            elif make:
                file = last and make == "file"
                if self._make(path, (*done, name), file=file, mode=mode if last else 0):
                    # Somebody else may have been faster: it is looked at again.
                    pending.append(name)
                    continue
            done.append(name)
        return _path(tuple(done))

    def stat(self, path: bytes) -> os.stat_result | None:
        """What is at a path that ``resolve`` gave; None if nothing is."""
        return self._look(_names(path))

    def open_parent(self, path: bytes) -> tuple[int, bytes]:
        """The fd of the directory above what ``resolve`` gave, and the last name."""
        names = _names(path)
        fd = self._open(names[:-1])
        if fd is None:
            raise FileNotFoundError(errno.ENOENT, "in a tmpfs that is not there yet", path)
        return fd, names[-1]

    def _place(self, names: Sequence[bytes]) -> tuple[int | None, bool, bytes]:
        """The tree that a path leads into, whether it may be written, and the path in it."""
        for length in range(len(names), -1, -1):
            found = self._mounted.get(tuple(names[:length]))
            if found is not None:
                return *found, b"/".join(names[length:])
        raise AssertionError(names)

    def _open(self, names: Sequence[bytes]) -> int | None:
        """An fd of a directory; None in a tmpfs that is not there yet."""
        fd, _, below = self._place(names)
        return None if fd is None else open_directory(fd, below)

    def _look(self, names: _Names) -> os.stat_result | None:
        mounted = self._mounted.get(names)
        if mounted is not None:
            # A tmpfs that is to come is a directory, as its mountpoint is.
            return os.fstat(self._root if mounted[0] is None else mounted[0])
        try:
            fd = self._open(names[:-1])
            if fd is None:
                return None
            try:
                return os.stat(names[-1], dir_fd=fd, follow_symlinks=False)
            finally:
                os.close(fd)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _read_link(self, above: Sequence[bytes], name: bytes) -> bytes:
        fd = self._open(above)
        if fd is None:
            raise FileNotFoundError(errno.ENOENT, "in a tmpfs that is not there yet", name)
        try:
            return os.readlink(name, dir_fd=fd)
        finally:
            os.close(fd)

    def _make(self, path: bytes, names: _Names, *, file: bool, mode: int) -> bool:
        """Whether the last name is there now: not in a tmpfs that is to come."""
        base, writable, below = self._place(names[:-1])
        if base is None:
            return False
        if not writable:
            raise Conflict(
                f"{shown(path)} is missing in what is mounted read-only above it",
                hint="make it there, or mount what is above it writable",
            )
        fd = open_directory(base, below)
        try:
            # Another container may have the same volume, and make it at the same time.
            with suppress(FileExistsError):
                _make(fd, names[-1], file=file, mode=mode)
        finally:
            os.close(fd)
        return True


def _make(parent: int, name: bytes, *, file: bool, mode: int) -> None:
    """Whoever calls may have a umask that keeps others out."""
    if file:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=parent)
    else:
        os.mkdir(name, 0o700, dir_fd=parent)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=parent)
    try:
        os.fchmod(fd, mode or (0o644 if file else 0o755))
    finally:
        os.close(fd)


def _refuse_other(
    path: bytes, found: bytes, info: os.stat_result, *, last: bool, make: str
) -> None:
    """Raises Conflict where a directory meets what is none."""
    directory = stat.S_ISDIR(info.st_mode)
    if not last and not directory:
        raise Conflict(
            f"{shown(path)} leads through {shown(found)}, which is no directory",
            hint="name another place",
        )
    if last and make and directory != (make == "directory"):
        raise Conflict(
            f"{shown(path)} is {'a directory' if directory else 'no directory'} in the container, "
            f"and a {make} is to be mounted there",
            hint="name another place",
        )


def _names(path: bytes) -> _Names:
    return tuple(name for name in path.split(b"/") if name)


def _reversed(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/")[::-1] if name not in {b"", b"."}]


def _path(names: Sequence[bytes]) -> bytes:
    return b"/" + b"/".join(names)

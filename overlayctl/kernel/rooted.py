"""Below one directory and nowhere else: by descriptors, through no symlink, however deep it is."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Self

from overlayctl.errors import NotFound
from overlayctl.kernel import libc

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_INSIDE = libc.RESOLVE_IN_ROOT | libc.RESOLVE_NO_SYMLINKS
# The kernel's PATH_MAX counts the NUL.
_LONGEST = 4095


def open_directory(root: int, path: bytes) -> int:
    """An fd of the directory ``path`` below ``root``; the path may be longer than PATH_MAX.

    Raises OSError: ELOOP for a symlink on the way (openat2(2)).
    """
    fd = -1
    try:
        while True:
            cut = len(path) if len(path) <= _LONGEST else path.rindex(b"/", 0, _LONGEST)
            head, path = path[:cut], path[cut + 1 :]
            above = root if fd < 0 else fd
            below = libc.openat2(above, head or b".", _DIRECTORY, resolve=_INSIDE)
            if fd >= 0:
                os.close(fd)
            fd = below
            if not path:
                return fd
    except OSError:
        if fd >= 0:
            os.close(fd)
        raise


def remove_tree(path: str, *, ignore_errors: bool = False) -> None:
    """Delete a directory and all in it; nothing that is mounted below, however deep it is.

    Raises OSError at the first name that cannot go, EBUSY for a mount; with ``ignore_errors``
    everything else goes.
    """

    def hindered(error: OSError) -> None:
        if not ignore_errors:
            raise error

    for fd, name, entries in _descent(path, hindered):
        try:
            if name is not None:
                os.rmdir(name, dir_fd=fd)
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=fd)
        except OSError as error:
            hindered(error)


def stats(path: str) -> Iterator[os.stat_result]:
    """What lies below a directory, however deep, but for what is mounted there; not itself.

    What goes meanwhile is left out. Raises FileNotFoundError if the directory is not there.
    """

    def hindered(error: OSError) -> None:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EBUSY, errno.ELOOP):
            raise error

    os.stat(path)
    for _, _, entries in _descent(path, hindered):
        for entry in entries:
            try:
                yield entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue


def _descent(
    path: str, hindered: Callable[[OSError], None]
) -> Iterator[tuple[int, str | None, list[os.DirEntry[str]]]]:
    """Each directory from ``path`` down: its fd and what is in it.

    When it is left again: the fd of the one above, its name, and nothing. Two descriptors
    are open however deep it goes, and no path is longer than a name. What cannot be entered
    is told to ``hindered`` and left out.
    """
    above, first = os.path.split(path)
    try:
        top = os.open(above, _DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        hindered(error)
        return
    fd = os.dup(top)
    names: list[str] = []
    places = [os.fstat(top)]
    pending = [[first]]
    try:
        while True:
            if pending[-1]:
                name = pending[-1].pop()
                try:
                    below = _enter(fd, name)
                except OSError as error:
                    hindered(error)
                    continue
                os.close(fd)
                fd = below
                names.append(name)
                places.append(os.fstat(fd))
                entries = []
                try:
                    with os.scandir(fd) as found:
                        entries = list(found)
                except OSError as error:
                    hindered(error)
                pending.append([e.name for e in entries if e.is_dir(follow_symlinks=False)])
                yield fd, None, entries
            elif names:
                name = names.pop()
                del places[-1], pending[-1]
                up = os.open("..", _DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = up
                if not os.path.samestat(os.fstat(fd), places[-1]):
                    # It was moved while we were in it.
                    fd, up = -1, fd
                    os.close(up)
                    fd = open_directory(top, os.fsencode("/".join(names)))
                yield fd, name, []
            else:
                return
    except OSError as error:
        hindered(error)
    finally:
        os.close(top)
        if fd >= 0:
            os.close(fd)


def _enter(above: int, name: str) -> int:
    fd = os.open(name, _DIRECTORY | os.O_CLOEXEC, dir_fd=above)
    if libc.is_mount_root(fd):
        os.close(fd)
        raise OSError(errno.EBUSY, "something is mounted there", name)
    return fd


class Parents:
    """The directory of one path after another, opened once for all names in it."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._path: bytes | None = None
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._path = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def of(self, path: bytes) -> tuple[int, bytes]:
        """The fd of the directory that holds ``path``, until the next call; the last name.

        Raises OSError as ``open_directory`` does.
        """
        above, _, name = path.rpartition(b"/")
        if above != self._path:
            self.__exit__()
            self._fd = open_directory(self._root, above)
            self._path = above
        return self._fd, name


def open_overlay(target: str, pid: int) -> int:
    """An fd of the overlay that the process ``pid`` has at ``target``, and of nothing in it.

    It is a copy of that one mount (open_tree(2)): what is mounted below does not cover it.
    Raises NotFound if the overlay is not there any more, OSError.
    """
    try:
        fd = os.open(f"/proc/{pid}/root{target}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        raise NotFound(f"{target} is not mounted any more") from None
    try:
        if libc.fstatfs(fd).magic != libc.OVERLAYFS_MAGIC or not libc.is_mount_root(fd):
            raise NotFound(f"{target} is not mounted any more")
        if pid == os.getpid():
            return libc.open_tree(fd, clone=True)
        return _copy_in_namespace(fd, pid)
    finally:
        os.close(fd)


def _copy_in_namespace(fd: int, pid: int) -> int:
    """The kernel copies mounts of the caller's own namespace only: one thread goes there."""

    def copy() -> int:
        namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            libc.unshare(libc.CLONE_FS)
            libc.setns(namespace, libc.CLONE_NEWNS)
            return libc.open_tree(fd, clone=True)
        finally:
            os.close(namespace)

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(copy).result()

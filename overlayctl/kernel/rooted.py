"""Below one directory and nowhere else: by descriptors, through no symlink, however deep it is."""

from __future__ import annotations

import os
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

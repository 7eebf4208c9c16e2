"""What lies at a name, held as a place (O_PATH): asked everything about without being opened.

So a symlink is never followed, a device or a FIFO never opened, and what is read, listed or
changed is that very inode, whatever has its name meanwhile. The descriptor of a place takes
few calls; its magic link in /proc leads to the inode itself, be it a symlink.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
"""What opening a name that was listed says when it went, or became another, meanwhile."""

_READ = os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC
# Where xfs keeps ACLs, listed to root beside the ACLs themselves.
_XFS_ACL = "trusted.SGI_ACL_"


def at(parent: int, name: bytes) -> int:
    """An fd of the place ``name`` (``.`` if it is empty) in the directory ``parent``."""
    return os.open(name or b".", FLAGS, dir_fd=parent)


def below(top: bytes, path: bytes) -> bytes:
    """The path of what is at ``path`` below ``top``; empty is the place itself."""
    return top + b"/" + path if top and path else top or path


def link(place: int) -> str:
    """The path that leads to the place."""
    return f"/proc/self/fd/{place}"


def read(place: int) -> int:
    """An fd to read a regular file; its time of access stays."""
    return os.open(link(place), _READ)


def names(place: int) -> list[bytes]:
    """The names in a directory, the last one in byte order first."""
    fd = os.open(link(place), _READ | os.O_DIRECTORY)
    try:
        return sorted(map(os.fsencode, os.listdir(fd)), reverse=True)
    finally:
        os.close(fd)


def xattrs(place: int) -> dict[bytes, bytes]:
    """All xattrs that the kernel shows, ACLs and capabilities among them."""
    path = link(place)
    found: dict[bytes, bytes] = {}
    for name in os.listxattr(path):
        if name.startswith(_XFS_ACL):
            continue
        try:
            found[os.fsencode(name)] = os.getxattr(path, name)
        except OSError as error:
            # It went meanwhile.
            if error.errno != errno.ENODATA:
                raise
    return found


def version(info: os.stat_result) -> tuple[int, int, int]:
    """What becomes another when a file is changed."""
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns


def data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file of ``size`` bytes has data, as offset and length: what is between is a hole.

    lseek(2), SEEK_DATA; a filesystem that knows no holes says that all is data.
    """
    at = 0
    try:
        while at < size:
            begin = os.lseek(fd, at, os.SEEK_DATA)
            if begin >= size:
                return
            at = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
            yield begin, at - begin
    except OSError as error:
        if error.errno == errno.EINVAL:
            # Most files of /proc cannot say.
            yield at, size - at
        # No data from here on.
        elif error.errno != errno.ENXIO:
            raise

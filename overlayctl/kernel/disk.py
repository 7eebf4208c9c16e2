"""The disk under a store: whether there is room, and what its refusals mean in words.

``look`` asks before work begins, ``told`` translates what the kernel says in its course,
``refuse_unfit`` keeps writers off filesystems on which a store's promises do not hold.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from overlayctl.errors import DiskFull, HostCannot, KernelRefused
from overlayctl.kernel import libc

ANY_FILESYSTEM = "OVERLAYCTL_ANY_FILESYSTEM"
"""Set to 1 in the environment, it lets a store be written wherever it lies."""

RESERVE = 16 << 20
"""Bytes beyond the known ones: a layer's index, and what a filesystem wants for itself."""

_ROOM = 1 << 20
# As many files as a process can surely open.
_TRIED = 512
# With fewer than these, what a mount makes beside the upper directory may be what failed.
_FEW_INODES = 8

# statfs(2) and include/uapi/linux/magic.h. On these flock(2) may hold on this host only or not
# at all, and overlay refuses an upper directory.
_UNFIT = {
    0x6969: "NFS",
    0x0102_1997: "9p",
    0x6573_5546: "FUSE or virtiofs",
    0x517B: "SMB",
    0xFF53_4D42: "CIFS",
    0xFE53_4D42: "SMB",
    0x00C3_6400: "Ceph",
}


def look(fd: int, size: int = 0, inodes: int = 0) -> None:
    """Raise DiskFull unless ``size`` bytes and RESERVE are free where ``fd`` lies.

    With ``inodes``, for which ``fd`` must be a directory, unless so many are free.
    """
    if _missing(fd, size + RESERVE, inodes) is not None:
        # Removed files may take their room with them until a transaction ends (btrfs).
        libc.syncfs(fd)
        full = _missing(fd, size + RESERVE, inodes)
        if full is not None:
            raise full


def is_full(fd: int) -> bool:
    """Whether ENOSPC was about the disk: ext4 says it also for xattrs that find no place in it."""
    free = os.fstatvfs(fd)
    return free.f_bavail * free.f_frsize < _ROOM


def _missing(fd: int, size: int, inodes: int) -> DiskFull | None:
    free = os.fstatvfs(fd)
    room = free.f_bavail * free.f_frsize
    nodes: int | None = free.f_favail
    if free.f_favail < inodes:
        nodes = _inodes(fd, free, inodes)
    if room >= size and (nodes is None or nodes >= inodes):
        return None
    return DiskFull(
        free_bytes=room,
        free_inodes=nodes,
        needed_bytes=size,
        needed_inodes=inodes,
        reserve=RESERVE,
    )


def _inodes(fd: int, free: os.statvfs_result, wanted: int) -> int | None:
    """How many inodes can be had, found by having up to ``wanted``; None if nothing tells.

    btrfs counts none and says 0 of 0; xfs makes 64 at a time and says 0 as long as it is
    beyond its limit, however many of those are free.
    """
    told = free.f_favail if free.f_files else None
    if wanted > _TRIED:
        return told
    with ExitStack() as held:
        for number in range(wanted):
            try:
                file = os.open(f"/proc/self/fd/{fd}", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    return number
                if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EROFS, errno.EMFILE):
                    return told
                raise
            held.callback(os.close, file)
    return wanted


@contextmanager
def told(root: str) -> Iterator[None]:
    """Let what the disk of the store at ``root`` refuses inside the block have a name.

    Raises DiskFull for a full disk or quota, HostCannot for one that is read-only.
    """
    try:
        yield
    except KernelRefused as error:
        # Overlay says "upper fs does not support tmpfile" then. But a namespace has a limit of
        # mounts, too, with the same errno.
        full = _refused(root, str(error))
        few = full.free_inodes is not None and full.free_inodes < _FEW_INODES
        if error.errno == errno.ENOSPC and (few or full.free_bytes < RESERVE):
            raise full from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _refused(root, os.strerror(error.errno)) from error
        if error.errno == errno.EROFS:
            raise HostCannot(
                f"{root} is on a read-only filesystem: nothing in it can be changed",
                hint="mount -o remount,rw "
                + shlex.quote(_mount_point(_there(root)))
                + ", if it should not be (findmnt and dmesg may say why it is)",
                path=root,
            ) from error
        raise


def _refused(root: str, said: str) -> DiskFull:
    free = os.statvfs(_there(root))
    return DiskFull(
        said=said,
        free_bytes=free.f_bavail * free.f_frsize,
        free_inodes=free.f_favail if free.f_files else None,
    )


def refuse_unfit(root: str) -> None:
    """Raise HostCannot if a store at ``root`` cannot be sure of its locks and mounts.

    Unless ANY_FILESYSTEM is set.
    """
    there = _there(root)
    fd = os.open(there, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        kind = _UNFIT.get(libc.fstatfs(fd).magic)
    finally:
        os.close(fd)
    if kind is not None and os.environ.get(ANY_FILESYSTEM) != "1":
        raise HostCannot(
            f"{root} is on {kind}, where neither locks nor overlay mounts can be relied on: "
            "it can be read, not written",
            hint="give --root a directory on a local disk (ext4, xfs, btrfs); "
            f"{ANY_FILESYSTEM}=1 in the environment writes all the same",
            path=root,
            filesystem=kind,
        )


def _there(path: str) -> str:
    """``path``, or the nearest directory above it that exists."""
    path = os.path.abspath(path)
    while not os.path.isdir(path) and path != "/":
        path = os.path.dirname(path)
    return path


def _mount_point(path: str) -> str:
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path

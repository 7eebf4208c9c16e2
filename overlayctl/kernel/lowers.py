"""Whether what lies at a layer's diff path is that layer: asked before every use of it.

Over a mountpoint that lost its mount, over another file's mount, over an older one, an
overlay would be made without a word, and show something else.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from overlayctl.errors import Damaged
from overlayctl.kernel import libc, mounttable

if TYPE_CHECKING:
    from overlayctl.mount import Lower

Table = dict[int, mounttable.MountInfo]


def table() -> Table:
    """This namespace's mounts by the id that ``libc.table_id`` gives."""
    return {mount.mount_id: mount for mount in mounttable.read()}


def problem(fd: int, lower: Lower, mounts: Table) -> str | None:
    """Why the directory ``fd`` (open for reading) is not that layer; None if it is."""
    # An upper directory that is read as a layer lies where it is.
    if not libc.is_mount_root(fd) and lower.tree != lower.path:
        return "is not the root of an attached layer"
    found = libc.fstatfs(fd)
    if found.magic == libc.EROFS_MAGIC:
        uuid = libc.fs_uuid(fd)
        if uuid not in (None, lower.uuid):
            return "shows another layer"
        mount = mounts.get(libc.table_id(fd))
        if mount is None or not backing(mount.source).endswith("/" + lower.file):
            return f"shows an older file than {lower.file}"
        return None
    if lower.tree:
        try:
            same = os.path.samestat(os.fstat(fd), os.stat(lower.tree))
        except FileNotFoundError:
            same = False
        return None if same else f"shows something else than {lower.tree}"
    nothing = found.magic == libc.TMPFS_MAGIC and found.flags & libc.ST_RDONLY
    return None if nothing and not os.listdir(fd) else "is not an empty read-only filesystem"


def open_verified(lower: Lower, mounts: Table) -> int:
    """An fd of the attached layer, open for reading. Raises Damaged if it is anything else."""
    try:
        fd = os.open(lower.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"the layer at {lower.path} is not attached") from None
    wrong = problem(fd, lower, mounts)
    if wrong:
        os.close(fd)
        raise Damaged(
            f"{lower.path} {wrong}", hint="overlayctl layer detach --all, then repeat the command"
        )
    return fd


def backing(source: str) -> str:
    """The file behind a mount's source: the source itself, or what its loop device reads.

    One that was deleted since ends in `` (deleted)`` where the kernel knows it (loop only).
    """
    if not source.startswith("/dev/loop"):
        return source
    try:
        with open(f"/sys/block/{source[5:]}/loop/backing_file", "rb") as file:
            return os.fsdecode(file.read().removesuffix(b"\n"))
    except OSError as error:
        # Opened, and then gone: sysfs says that there is no such device.
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return source

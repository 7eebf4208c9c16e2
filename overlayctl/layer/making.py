"""Entries made in a directory: under another name until whole, dressed through a descriptor."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from overlayctl.errors import Conflict
from overlayctl.kernel import disk, places
from overlayctl.layer.attributes import ACLS
from overlayctl.layer.fields import shown

Identity = tuple[int, int]
"""Device and inode number."""

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_REFUSED = (errno.ENOTSUP, errno.EPERM, errno.EINVAL, errno.ERANGE, errno.E2BIG)


class Attributes(NamedTuple):
    """What an entry is to look like. ``mode`` has no type, ``mtime`` is in nanoseconds."""

    mode: int
    uid: int
    gid: int
    mtime: int
    xattrs: dict[bytes, bytes]


class Made(NamedTuple):
    """A directory that is there now; ``fresh`` is whether it was not before."""

    identity: Identity
    fresh: bool


def identity(place: int) -> Identity:
    """What tells the inode of a descriptor from all others."""
    info = os.fstat(place)
    return info.st_dev, info.st_ino


def directory(parent: int, name: bytes, path: bytes) -> Made:
    """Make a directory, if none is there; an empty ``name`` is ``parent`` itself.

    A new one is nobody else's until it is dressed. Raises Conflict, in which ``path`` names it,
    if something else is there.
    """
    fresh = False
    if name:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            pass
        else:
            fresh = True
    place = places.at(parent, name)
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            raise Conflict(
                f"{shown(path)} is there and is no directory: a directory does not replace it",
                hint="remove it first, or copy to another name",
            )
        if fresh:
            _strip_acls(place)
        return Made(identity(place), fresh)
    finally:
        os.close(place)


@contextmanager
def named(parent: int, name: bytes, path: bytes, *, fresh: bool) -> Iterator[bytes]:
    """The name under which to make an entry that is no directory.

    It gets its own when the block ends, in the place of what has it; in a ``fresh`` directory
    it has it at once. Raises Conflict, in which ``path`` names it, if that is a directory.
    """
    beside = name if fresh else b".overlayctl-" + secrets.token_hex(8).encode()
    try:
        yield beside
        if not fresh:
            os.rename(beside, name, src_dir_fd=parent, dst_dir_fd=parent)
    except FileExistsError:
        raise
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(beside, dir_fd=parent)
        if isinstance(error, IsADirectoryError):
            raise Conflict(
                f"{shown(path)} is a directory: only a directory goes into its place",
                hint="remove it first, or copy to another name",
            ) from None
        raise


def entry(parent: int, name: bytes, kind: int, *, device: int = 0, target: bytes = b"") -> int:
    """A new entry of the type ``kind`` (stat.S_IFREG and so on), as an fd that is the caller's.

    A regular file's can be written; the others' is a place.
    """
    if kind == stat.S_IFREG:
        return os.open(name, _NEW, 0o600, dir_fd=parent)
    if kind == stat.S_IFLNK:
        os.symlink(target, name, dir_fd=parent)
    else:
        os.mknod(name, kind | 0o600, device, dir_fd=parent)
    return places.at(parent, name)


def link(place: int, parent: int, name: bytes, path: bytes, *, fresh: bool) -> bool:
    """Give the inode of a place a name, as ``named``; False if it can have none there."""
    try:
        with named(parent, name, path, fresh=fresh) as beside:
            os.link(places.link(place), beside, dst_dir_fd=parent, follow_symlinks=True)
    except OSError as error:
        if error.errno not in (errno.EMLINK, errno.EXDEV):
            raise
        return False
    return True


def dress(made: int, wanted: Attributes) -> bool:
    """Owner, mode, xattrs, time, in the order in which none undoes another.

    False if the filesystem did not take all the xattrs.
    """
    path, info = places.link(made), os.fstat(made)
    whole = True
    if (info.st_uid, info.st_gid) != (wanted.uid, wanted.gid):
        os.chown(path, wanted.uid, wanted.gid)
    _strip_acls(made)
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(path, wanted.mode)
    for name, value in wanted.xattrs.items():
        try:
            os.setxattr(path, name, value)
        except OSError as error:
            large = error.errno == errno.ENOSPC and not disk.is_full(made)
            if not large and error.errno not in _REFUSED:
                raise
            whole = False
    os.utime(path, ns=(wanted.mtime, wanted.mtime))
    return whole


def _strip_acls(place: int) -> None:
    """Take away what the directory above gave its new entry."""
    path = places.link(place)
    try:
        found = os.listxattr(path)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return
    for name in found:
        if os.fsencode(name) in ACLS:
            os.removexattr(path, name)

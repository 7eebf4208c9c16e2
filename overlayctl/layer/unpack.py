"""A layer as a directory, for kernels that mount no EROFS: made from the index alone.

The index is already normalised: no ``..``, no parent that is a symlink, nothing twice. All
the same every parent is opened below the tree's own fd, through no symlink, and every
entry is made by its name in that parent (openat2(2), the ``*at`` calls).

What comes out is what a mount of the layer's file shows. A filesystem that cannot hold it
is told apart by looking at what it made of each entry: some say nothing and store less.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from overlayctl.errors import HostCannot
from overlayctl.kernel import disk, libc
from overlayctl.kernel.rooted import Parents
from overlayctl.layer.attributes import ACLS
from overlayctl.layer.fields import shown
from overlayctl.layer.index import device_number

if TYPE_CHECKING:
    from overlayctl.layer.index import Index, Node

_PIECE = 1 << 20
# What filesystems answer to something that they have no room or no form for.
_CANNOT = (
    errno.ENOTSUP, errno.EPERM, errno.EINVAL, errno.ERANGE, errno.E2BIG, errno.ENAMETOOLONG,
    errno.EMLINK, errno.EOVERFLOW, errno.EFBIG,
)  # fmt: skip


def unpack(index: Index, root: int) -> None:
    """Make the layer's tree in ``root``, the fd of an empty directory, and sync it.

    Raises HostCannot naming the entry and what the filesystem cannot hold of it, Damaged for
    an index that contradicts itself.
    """
    first: dict[int, bytes] = {}
    directories: list[tuple[bytes, Node]] = []
    with Parents(root) as parents:
        for path, node in index.walk():
            if stat.S_ISDIR(node.mode):
                directories.append((path, node))
            if not path:
                continue
            parent, name = parents.of(path)
            with _named(path, root):
                linked = first.get(node.nid)
                if linked is not None:
                    _link(root, linked, parent, name)
                    continue
                _make(index, node, parent, name)
                if not stat.S_ISDIR(node.mode):
                    _dress(index, node, parent, name)
                    if node.nlink > 1:
                        first[node.nid] = path
        # A directory gets its attributes when it is full: a new name changes its time, and a
        # default ACL or a setgid bit would be inherited.
        for path, node in reversed(directories):
            with _named(path, root):
                if path:
                    _dress(index, node, *parents.of(path))
                else:
                    _dress(index, node, root, b".")
    libc.syncfs(root)


def difference(index: Index, root: int) -> bytes | None:
    """The first path at which the tree ``root`` is not what ``unpack`` made; None if it is.

    Reads every byte. Raises OSError, Damaged.
    """
    with Parents(root) as parents:
        for path, node in index.walk():
            try:
                parent, name = parents.of(path) if path else (root, b".")
                if not _is(index, node, parent, name):
                    return path
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENODATA):
                    raise
                return path
    return None


def _is(index: Index, node: Node, parent: int, name: bytes) -> bool:
    found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    time = node.mtime * 1_000_000_000 + node.mtime_ns
    if (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns) != (
        node.mode, node.uid, node.gid, time,
    ):  # fmt: skip
        return False
    for key, value in index.xattrs(node).items():
        if not _is_unreadable(node, key) and _xattr(_through(parent, name), key) != value:
            return False
    if stat.S_ISLNK(node.mode):
        return os.fsencode(os.readlink(name, dir_fd=parent)) == index.target(node)
    if stat.S_ISDIR(node.mode):
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=parent)
        try:
            return set(map(os.fsencode, os.listdir(fd))) == {name for name, _ in index.list(node)}
        finally:
            os.close(fd)
    if stat.S_ISREG(node.mode):
        return found.st_size == node.size and _same_content(index, node, parent, name)
    return found.st_rdev == os.makedev(*device_number(node))


def _same_content(index: Index, node: Node, parent: int, name: bytes) -> bool:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    done = 0
    try:
        # A file of exbibytes is read in a moment if it is all hole.
        for offset, length in (*index.extents(node), (node.size, 0)):
            if not _is_zero(fd, done, offset):
                return False
            done = offset + length
            for at in range(offset, done, _PIECE):
                wanted = index.read(node, at, min(_PIECE, done - at))
                if os.pread(fd, len(wanted), at) != wanted:
                    return False
    finally:
        os.close(fd)
    return True


def _is_zero(fd: int, at: int, end: int) -> bool:
    """Whether nothing but zeros, or a hole, lies between ``at`` and ``end``."""
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return True
            raise
        piece = os.pread(fd, max(0, min(_PIECE, end - at)), at)
        if piece.strip(b"\0"):
            return False
        at += len(piece) or end
    return True


def _make(index: Index, node: Node, parent: int, name: bytes) -> None:
    if stat.S_ISDIR(node.mode):
        os.mkdir(name, 0o700, dir_fd=parent)
    elif stat.S_ISLNK(node.mode):
        os.symlink(index.target(node), name, dir_fd=parent)
    elif stat.S_ISREG(node.mode):
        _file(index, node, parent, name)
    else:
        device = os.makedev(*device_number(node))
        os.mknod(name, stat.S_IFMT(node.mode) | 0o600, device, dir_fd=parent)


def _file(index: Index, node: Node, parent: int, name: bytes) -> None:
    """The content, its holes left out."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=parent)
    try:
        for offset, length in index.extents(node):
            for at in range(offset, offset + length, _PIECE):
                view = memoryview(index.read(node, at, min(_PIECE, offset + length - at)))
                while view:
                    written = os.pwrite(fd, view, at)
                    at += written  # noqa: PLW2901 - the next piece begins where it would
                    view = view[written:]
        os.ftruncate(fd, node.size)
    finally:
        os.close(fd)


def _link(root: int, linked: bytes, parent: int, name: bytes) -> None:
    with Parents(root) as other:
        source, old = other.of(linked)
        os.link(old, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)


def _dress(index: Index, node: Node, parent: int, name: bytes) -> None:
    """Owner, mode, xattrs, time, in the order in which none undoes another; then a look."""
    os.chown(name, node.uid, node.gid, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISLNK(node.mode):
        os.chmod(name, stat.S_IMODE(node.mode), dir_fd=parent)
    for key, value in index.xattrs(node).items():
        _set_xattr(node, parent, name, key, value)
    time = node.mtime * 1_000_000_000 + node.mtime_ns
    os.utime(name, ns=(time, time), dir_fd=parent, follow_symlinks=False)
    made = os.stat(name, dir_fd=parent, follow_symlinks=False)
    for what, wanted, got in (
        ("time", time, made.st_mtime_ns),
        ("mode", node.mode, made.st_mode),
        ("owner", (node.uid, node.gid), (made.st_uid, made.st_gid)),
    ):
        if wanted != got:
            raise OSError(errno.EOVERFLOW, f"its {what} would become another")


def _set_xattr(node: Node, parent: int, name: bytes, key: bytes, value: bytes) -> None:
    if _is_unreadable(node, key):
        return
    path = _through(parent, name)
    os.setxattr(path, key, value, follow_symlinks=False)
    if key in ACLS and _xattr(path, key) != value:
        raise OSError(errno.EINVAL, "its ACL would become another")


def _through(parent: int, name: bytes) -> bytes:
    """A path to the name. There is no setxattrat(2) before 6.13: the magic link has to do."""
    return b"/proc/self/fd/%d/%s" % (parent, name)


def _is_unreadable(node: Node, key: bytes) -> bool:
    """Whether no filesystem gives the xattr out, whatever it holds (xattr(7))."""
    return key.startswith(b"user.") and not (stat.S_ISREG(node.mode) or stat.S_ISDIR(node.mode))


def _xattr(path: bytes, key: bytes) -> bytes | None:
    try:
        return os.getxattr(path, key, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        raise


@contextmanager
def _named(path: bytes, root: int) -> Iterator[None]:
    """Turn what this filesystem refuses into HostCannot with the entry's name."""
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC and disk.is_full(root)
        if full or error.errno not in (*_CANNOT, errno.ENOSPC):
            raise
        raise HostCannot(
            f"the store's filesystem cannot hold {shown(path)} of an unpacked layer: "
            f"{error.strerror}",
            hint="overlayctl system info says why layers are unpacked here; else try another "
            "filesystem (--root)",
            path=os.fsdecode(path),
        ) from error

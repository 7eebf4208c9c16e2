"""Everything a directory tree says about itself, as values that can be compared.

A layer's diff path and a merged view are right when a program that looks at them sees what it would
see in a plain directory. So this looks as a program would: every name that readdir gives is looked
up again by name (a directory whose blocks are sorted wrongly lists everything and finds nothing),
every byte is read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

Type = Literal["file", "directory", "symlink", "char", "block", "fifo", "socket"]
Field = Literal[
    "type",
    "mode",
    "uid",
    "gid",
    "mtime_ns",
    "size",
    "sha256",
    "target",
    "rdev",
    "xattrs",
    "link_group",
]

_TYPES: dict[int, Type] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Entry(NamedTuple):
    """One path of a tree. What its type does not have is None."""

    type: Type
    mode: int
    """Permissions, setuid, setgid and sticky bit: 07777."""
    uid: int
    gid: int
    mtime_ns: int
    size: int | None
    sha256: str | None
    """Lower-case hexadecimal digest of a regular file's content."""
    target: bytes | None
    rdev: tuple[int, int] | None
    """Major and minor number of a device."""
    xattrs: dict[bytes, bytes]
    link_group: tuple[bytes, ...]
    """All paths of the tree that are this inode, sorted; empty if it is the only one."""


def snapshot(
    root: bytes | str | os.PathLike[str], ignore: Collection[bytes] = ()
) -> dict[bytes, Entry]:
    """Return every path below ``root`` with what it is; the root itself is ``b""``.

    No symlink is followed. Extended attributes of all namespaces count but those whose names are in
    ``ignore``. Directories' link counts and sizes say something about the filesystem and nothing
    about the tree, so they are left out; so are the link counts of whiteouts (overlayfs shares
    one inode between many).
    """
    root_fd = os.open(root, _DIRECTORY & ~os.O_NOFOLLOW)
    try:
        with ThreadPoolExecutor() as pool:
            return _Walk(root_fd, pool, frozenset(ignore)).run()
    finally:
        os.close(root_fd)


class _Walk:
    """One pass over a tree.

    Directories are opened by their path from the root's descriptor: a chain of descriptors would
    end at the limit of open files in a deep tree. None of the path's parts can be a symlink, for
    each was found to be a directory before.
    """

    def __init__(self, root: int, pool: ThreadPoolExecutor, ignore: frozenset[bytes]) -> None:
        self.root = root
        self.pool = pool
        self.ignore = ignore
        self.links: dict[tuple[int, int], list[bytes]] = {}
        self.hashes: dict[tuple[int, int] | bytes, Future[str]] = {}

    def run(self) -> dict[bytes, Entry]:
        seen: dict[bytes, tuple[Entry, tuple[int, int] | bytes]] = {}
        info = os.fstat(self.root)
        seen[b""] = self._entry(b"", info, self._xattrs(self.root, b"."), None)
        pending = [b""]
        while pending:
            parent = pending.pop()
            fd = os.open(parent or b".", _DIRECTORY, dir_fd=self.root)
            try:
                for name in map(os.fsencode, os.listdir(fd)):
                    path = parent + b"/" + name if parent else name
                    info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    target = os.readlink(name, dir_fd=fd) if stat.S_ISLNK(info.st_mode) else None
                    seen[path] = self._entry(path, info, self._xattrs(fd, name), target)
                    if stat.S_ISDIR(info.st_mode):
                        pending.append(path)
            finally:
                os.close(fd)
        return {path: self._complete(*seen[path]) for path in sorted(seen)}

    def _entry(
        self, path: bytes, info: os.stat_result, xattrs: dict[bytes, bytes], target: bytes | None
    ) -> tuple[Entry, tuple[int, int] | bytes]:
        kind = _TYPES[stat.S_IFMT(info.st_mode)]
        device = (os.major(info.st_rdev), os.minor(info.st_rdev))
        whiteout = kind == "char" and device == (0, 0)
        inode: tuple[int, int] | bytes = path
        if info.st_nlink > 1 and kind != "directory" and not whiteout:
            inode = (info.st_dev, info.st_ino)
            self.links.setdefault(inode, []).append(path)
        if kind == "file" and inode not in self.hashes:
            self.hashes[inode] = self.pool.submit(self._hash, path)
        entry = Entry(
            type=kind,
            mode=stat.S_IMODE(info.st_mode),
            uid=info.st_uid,
            gid=info.st_gid,
            mtime_ns=info.st_mtime_ns,
            size=info.st_size if kind == "file" else None,
            sha256=None,
            target=target,
            rdev=device if kind in ("char", "block") else None,
            xattrs=xattrs,
            link_group=(),
        )
        return entry, inode

    def _complete(self, entry: Entry, inode: tuple[int, int] | bytes) -> Entry:
        group = () if isinstance(inode, bytes) else tuple(sorted(self.links[inode]))
        if entry.type == "file":
            entry = entry._replace(sha256=self.hashes[inode].result())
        return entry._replace(link_group=group) if len(group) > 1 else entry

    def _xattrs(self, fd: int, name: bytes) -> dict[bytes, bytes]:
        # There is no listxattrat(2) before Linux 6.13; the magic link stands for the directory.
        path = b"/proc/self/fd/%d/%s" % (fd, name)
        try:
            names = os.listxattr(path, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                return {}
            raise
        return {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in sorted(map(os.fsencode, names))
            if key not in self.ignore
        }

    def _hash(self, path: bytes) -> str:
        fd = os.open(path, _FILE, dir_fd=self.root)
        with open(fd, "rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def differences(
    a: Mapping[bytes, Entry],
    b: Mapping[bytes, Entry],
    *,
    ignore_paths: Collection[bytes] = (),
    ignore_fields: Collection[Field] = (),
    ignore_fields_of: Mapping[bytes, Collection[Field]] | None = None,
    ignore_xattrs: Collection[bytes] = (),
) -> list[str]:
    """Return one line for each thing that is not the same in both; none means equal.

    ``ignore_fields`` holds for every path, ``ignore_fields_of`` for the paths that it names.
    """
    lines = []
    for path in sorted({*a, *b}.difference(ignore_paths)):
        left, right = a.get(path), b.get(path)
        if left is None or right is None:
            one = left or right
            lines.append(f"{path!r}: only in the {'second' if left is None else 'first'}: {one}")
            continue
        ignored = {*ignore_fields, *(ignore_fields_of or {}).get(path, ())}
        for field in Entry._fields:
            if field in ignored:
                continue
            here, there = getattr(left, field), getattr(right, field)
            if field == "xattrs":
                here = {key: here[key] for key in here if key not in ignore_xattrs}
                there = {key: there[key] for key in there if key not in ignore_xattrs}
            elif field == "link_group":
                here = tuple(other for other in here if other not in ignore_paths)
                there = tuple(other for other in there if other not in ignore_paths)
            if here != there:
                lines.append(f"{path!r}: {field}: {_show(field, here)} != {_show(field, there)}")
    return lines


def _show(field: str, value: object) -> str:
    return f"{value:#o}" if field == "mode" else repr(value)

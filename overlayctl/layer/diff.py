"""What an upper directory changes of the layers below it, as docker lists it.

The upper is walked once, through descriptors, and each of its paths is looked up once in the
indexes of the layers below: so it does not matter whether those are attached. ``A`` is new, ``D``
is gone (what lay below it is not listed), ``C`` is another than before, or a directory above
something of these. What was copied up and is as it was, is no change; nor is a directory's
time, or its size.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Literal, NamedTuple

from overlayctl.kernel import places
from overlayctl.kernel.rooted import Parents
from overlayctl.layer import acl
from overlayctl.layer.attributes import TYPES, check_complete, is_carried
from overlayctl.layer.index import device_number
from overlayctl.layer.stack import Shown, Stack
from overlayctl.whiteout import OPAQUE_XATTR, unescape

if TYPE_CHECKING:
    from overlayctl.layer.index import Index

Kind = Literal["A", "C", "D"]
Field = Literal["type", "mode", "owner", "device", "size", "time", "target", "xattrs", "content"]

_PIECE = 1 << 20


class Look(NamedTuple):
    """What is at a path, or was: ``type`` in words, ``mode`` without it.

    ``size`` is a file's, in bytes. For a directory that vanished it is that of all files in it,
    if sizes were asked for; for anything else it is 0.
    """

    type: str
    mode: int
    uid: int
    gid: int
    size: int


class Change(NamedTuple):
    """One line of the list. ``path`` is relative to the root, which is the empty path.

    ``fields`` says what of it is another than before; nothing for a directory that is listed
    for what is in it. ``content`` is among them only where nothing else gives the change away:
    it is read in no other case. ``linked`` is the first path in the upper directory that is the
    same inode.
    """

    kind: Kind
    path: bytes
    before: Look | None
    after: Look | None
    fields: tuple[Field, ...] = ()
    linked: bytes | None = None

    @property
    def is_parent(self) -> bool:
        """Whether it is as it was, and only something in it is not."""
        return self.kind == "C" and not self.fields


class _Due(NamedTuple):
    """A path to look at, and what the layers below show at its directory.

    ``alone`` is whether nothing of that is seen any more: an upper directory's mark says so
    once for all that is below it. ``lacking`` is whether the upper has nothing there.
    """

    path: bytes
    above: Shown | None
    alone: bool = False
    lacking: bool = False


def changes(
    upper: int,
    below: Sequence[Index],
    *,
    without: AbstractSet[bytes] = frozenset(),
    sizes: bool = False,
) -> Iterator[Change]:
    """The changes in an upper directory, by the bytes of each name, a directory before its own.

    ``upper`` is an fd that stays the caller's, ``below`` the layers, topmost first, ``without``
    are paths to leave out. What goes while this looks is left out. Raises BadInput for an
    upper that says nothing without those below, Damaged for an index, OSError.
    """
    return iter(_Walk(upper, Stack(below), without=without, sizes=sizes))


class _Walk:
    def __init__(
        self, upper: int, below: Stack, *, without: AbstractSet[bytes], sizes: bool
    ) -> None:
        self._upper = upper
        self._below = below
        self._without = without
        self._sizes = sizes
        self._links: dict[tuple[int, int], bytes] = {}
        self._pending = [_Due(b"", None)]

    def __iter__(self) -> Iterator[Change]:
        # The directories above that are as they were, as long as nothing in them is listed.
        unlisted: list[Change] = []
        with Parents(self._upper) as parents:
            while self._pending:
                due = self._pending.pop()
                while unlisted and not due.path.startswith(unlisted[-1].path + b"/"):
                    unlisted.pop()
                found = self._found(due, parents)
                if found is None:
                    continue
                if found.is_parent:
                    unlisted.append(found)
                    continue
                yield from unlisted
                unlisted.clear()
                yield found

    def _found(self, due: _Due, parents: Parents) -> Change | None:
        """What became of one path; None where nothing did, and no directory is there."""
        path = due.path
        if not path:
            shown = self._below.root()
        else:
            shown = due.above and due.above.child(path.rpartition(b"/")[2])
        if due.lacking:
            return self._gone(path, shown)
        try:
            place = places.at(*parents.of(path))
        except OSError as error:
            if error.errno not in places.GONE:
                raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error
            return None
        try:
            info = os.fstat(place)
            if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
                return self._gone(path, shown)
            return self._there(due, shown, place, info)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error
        finally:
            os.close(place)

    def _gone(self, path: bytes, shown: Shown | None) -> Change | None:
        if shown is None:
            return None
        return Change("D", path, self._before(shown, vanished=True), None)

    def _there(
        self, due: _Due, shown: Shown | None, place: int, info: os.stat_result
    ) -> Change | None:
        path = due.path
        xattrs = places.xattrs(place)
        check_complete(path, xattrs)
        is_directory = stat.S_ISDIR(info.st_mode)
        if is_directory:
            # The kernel ignores the mark of the root.
            opaque = bool(path) and xattrs.get(OPAQUE_XATTR) == b"y"
            self._descend(path, shown, place, alone=due.alone or opaque)
        after = _look(info.st_mode, info.st_uid, info.st_gid, info.st_size)
        linked = None
        if info.st_nlink > 1 and not is_directory:
            first = self._links.setdefault((info.st_dev, info.st_ino), path)
            linked = first if first != path else None
        if shown is None:
            return Change("A", path, None, after, (), linked) if path else None
        fields = _differing(shown, place, info, xattrs)
        if not fields and (not is_directory or not path):
            return None
        vanished = shown.is_directory and not is_directory
        before = self._before(shown, vanished=vanished)
        return Change("C", path, before, after, fields, linked)

    def _descend(self, path: bytes, shown: Shown | None, place: int, *, alone: bool) -> None:
        """Look at what is in a directory, and at what is not there any more, next."""
        above = shown if shown is not None and shown.is_directory else None
        names = places.names(place)
        lacking: AbstractSet[bytes] = frozenset()
        if alone and above is not None:
            lacking = set(above.names()).difference(names)
            names = sorted((*names, *lacking), reverse=True)
        start = path + b"/" if path else b""
        self._pending += [
            _Due(start + name, above, alone, name in lacking)
            for name in names
            if start + name not in self._without
        ]

    def _before(self, shown: Shown, *, vanished: bool) -> Look:
        node = shown.node
        look = _look(node.mode, node.uid, node.gid, node.size)
        if vanished and self._sizes and shown.is_directory:
            return look._replace(size=shown.size())
        return look


def _look(mode: int, uid: int, gid: int, size: int) -> Look:
    return Look(
        TYPES[stat.S_IFMT(mode)], stat.S_IMODE(mode), uid, gid, size if stat.S_ISREG(mode) else 0
    )


def _differing(
    shown: Shown, place: int, info: os.stat_result, xattrs: Mapping[bytes, bytes]
) -> tuple[Field, ...]:
    """What is not as it was below; nothing where all is the same."""
    layer, node = shown.layer, shown.node
    kind = stat.S_IFMT(info.st_mode)
    if kind != stat.S_IFMT(node.mode):
        return ("type",)
    found: list[Field] = []
    if info.st_mode != node.mode:
        found.append("mode")
    if (info.st_uid, info.st_gid) != (node.uid, node.gid):
        found.append("owner")
    if kind in (stat.S_IFCHR, stat.S_IFBLK) and device_number(node) != (
        os.major(info.st_rdev),
        os.minor(info.st_rdev),
    ):
        found.append("device")
    if kind == stat.S_IFREG and info.st_size != node.size:
        found.append("size")
    if kind != stat.S_IFDIR and info.st_mtime_ns != node.mtime * 1_000_000_000 + node.mtime_ns:
        found.append("time")
    if kind == stat.S_IFLNK and os.fsencode(os.readlink("", dir_fd=place)) != layer.target(node):
        found.append("target")
    if (xattrs or node.xattr_size) and carried(xattrs) != carried(layer.xattrs(node)):
        found.append("xattrs")
    # Programs set times back.
    if not found and kind == stat.S_IFREG and not _is_same_content(shown, place, info.st_size):
        found.append("content")
    return tuple(found)


def carried(stored: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The xattrs that are a file's own, ACLs as a filesystem gives them back."""
    found = {}
    for name, value in stored.items():
        own = unescape(name)
        if own is None or not is_carried(own):
            continue
        kept = acl.kept(own, value)
        if kept is not None:
            found[own] = kept
    return found


def _is_same_content(shown: Shown, place: int, size: int) -> bool:
    """Whether a file is what it was, of the same size: holes that both have are not read."""
    layer, node = shown.layer, shown.node
    fd = places.read(place)
    try:
        for begin, length in (*places.data(fd, size), *layer.extents(node)):
            end = min(begin + length, size)
            for offset in range(begin, end, _PIECE):
                count = min(_PIECE, end - offset)
                if os.pread(fd, count, offset) != layer.read(node, offset, count):
                    return False
    finally:
        os.close(fd)
    return True

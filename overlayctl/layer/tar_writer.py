"""A directory tree as a tar: the same tree gives the same bytes.

Names come in byte order, the root first, a directory before what it holds. Each entry is
opened once, as a place (O_PATH), and all that is said of it is asked of that descriptor: so
nothing is opened for its name but what turned out to be a regular file, and a tree that
changes meanwhile gives at worst an older or newer entry, never another file's content.

Two forms. A *merged tree* is told as it looks. A *layer* is an upper directory, whose marks
become those of a layer's tar (OCI image-spec, layer.md): a whiteout ``.wh.NAME``, an opaque
directory's mark ``.wh..wh..opq``; overlay's own xattrs are left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from overlayctl.errors import LimitExceeded
from overlayctl.kernel import places
from overlayctl.kernel.rooted import Parents
from overlayctl.layer import pack
from overlayctl.layer.attributes import check_complete, is_carried
from overlayctl.layer.fields import shown
from overlayctl.layer.header import END, header, padding
from overlayctl.layer.tar import Limits, Member
from overlayctl.whiteout import OPAQUE_MARKER, OPAQUE_XATTR, PREFIX, escape, unescape

if TYPE_CHECKING:
    from overlayctl.layer.tar import Extent, Xattrs

SOCKET = "a socket, left out"
CHANGED = "changed while it was read"
GONE = "gone before it was read"
NAMED_AS_WHITEOUT = "left out: its name would say that another one is deleted"
XATTR_LEFT_OUT = "an xattr left out: no tar can carry a name with '='"

_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}
_PIECE = 1 << 20
_HOLE = bytes(_PIECE)
_GATHERED = 1 << 18
# What fewer bytes of xattrs take is within every limit.
_FEW = 1 << 16


class TarWriter:
    """The tar of the tree below ``root``, an fd of a directory that stays the caller's.

    Iterate once for its bytes. Then ``entries`` is how many there are, and ``notes`` maps a kind
    of remark to the paths it is about: what could not be told, what changed meanwhile. Paths in
    ``leave_out`` are passed over, with what is below them; times after ``latest``, in seconds,
    become that. ``is_below`` tells whether what lies below a layer shows a path: it is deleted
    where a socket has it now. With ``start`` it is what lies there, named ``called``. Without
    ``sparse`` holes are written as zeros: so the tar does not depend on where the tree lies, and
    docker and podman can save what they have loaded (both keep a sparse layer, and cannot read it
    back). Raises OSError naming what cannot be read, BadInput for an upper directory that means
    nothing without the layers below, LimitExceeded for xattrs that no layer can have.
    """

    def __init__(
        self,
        root: int,
        *,
        layer: bool = False,
        sparse: bool = True,
        leave_out: Collection[bytes] = (),
        is_below: Callable[[bytes], bool] = lambda _: True,
        latest: int | None = None,
        start: bytes = b"",
        called: bytes = b"",
        end: bool = True,
    ) -> None:
        self.notes: dict[str, list[bytes]] = {}
        self._root = root
        self._layer = layer
        self._sparse = sparse
        self._leave_out = leave_out
        self._is_below = is_below
        self.entries = 0
        self._latest = latest
        self._start = start
        self._called = called
        self._end = END if end else b""
        self._names: dict[tuple[int, int], bytes] = {}

    def __iter__(self) -> Iterator[bytes]:
        gathered: list[bytes] = []
        length = 0
        for piece in self._pieces():
            gathered.append(piece)
            length += len(piece)
            if length >= _GATHERED:
                yield b"".join(gathered)
                gathered.clear()
                length = 0
        yield b"".join((*gathered, self._end))

    def _note(self, kind: str, path: bytes) -> None:
        self.notes.setdefault(kind, []).append(path)

    def _pieces(self) -> Iterator[bytes]:
        pending = [b""]
        with Parents(self._root) as parents:
            while pending:
                below = pending.pop()
                path = places.below(self._called, below)
                if path in self._leave_out:
                    continue
                try:
                    parent, name = parents.of(places.below(self._start, below))
                    place = places.at(parent, name)
                except OSError as error:
                    if error.errno not in places.GONE:
                        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error
                    self._note(GONE, path)
                    continue
                try:
                    info = os.fstat(place)
                    if self._layer and name.startswith(PREFIX):
                        self._note(NAMED_AS_WHITEOUT, path)
                        continue
                    if stat.S_ISDIR(info.st_mode):
                        pending += [places.below(below, child) for child in places.names(place)]
                    yield from self._entry(path, place, info)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error
                finally:
                    os.close(place)

    def _entry(self, path: bytes, place: int, info: os.stat_result) -> Iterator[bytes]:
        """One entry, and what comes with it."""
        kind = _TYPES.get(stat.S_IFMT(info.st_mode))
        if kind is None:
            self._note(SOCKET, path)
        # The kernel shares one inode between many whiteouts: they are no hard links.
        is_whiteout = kind == b"3" and info.st_rdev == 0
        if self._layer and (is_whiteout or (kind is None and self._is_below(path))):
            above, slash, name = path.rpartition(b"/")
            yield self._header(_mark(above + slash + PREFIX + name, info))
            return
        if kind is None:
            return
        if kind != b"5" and info.st_nlink > 1:
            first = self._names.setdefault((info.st_dev, info.st_ino), path)
            if first != path:
                yield self._header(_member(path, b"1", info, linkname=first))
                return
        xattrs = places.xattrs(place)
        carried = self._carried(path, xattrs) if xattrs else xattrs
        if kind == b"0":
            yield from self._file(path, carried, place, info)
            return
        target = os.fsencode(os.readlink("", dir_fd=place)) if kind == b"2" else b""
        yield self._header(_member(path, kind, info, linkname=target, xattrs=carried))
        # On the root of an upper directory the kernel ignores the mark.
        if self._layer and kind == b"5" and path and xattrs.get(OPAQUE_XATTR) == b"y":
            yield self._header(_mark(path + b"/" + OPAQUE_MARKER, info))

    def _header(self, member: Member) -> bytes:
        if self._latest is not None and (member.mtime, member.mtime_ns) > (self._latest, 0):
            member = member._replace(mtime=self._latest, mtime_ns=0)
        self.entries += 1
        return header(member)

    def _carried(self, path: bytes, xattrs: Xattrs) -> Xattrs:
        """The xattrs as a tar names them.

        A merged view shows none of overlay's own: what it calls so is what was put there.
        """
        if self._layer:
            check_complete(path, xattrs)
        carried: Xattrs = {}
        for stored, value in sorted(xattrs.items()):
            name = unescape(stored) if self._layer else stored
            if name is None or not is_carried(name):
                continue
            if b"=" in name:
                self._note(XATTR_LEFT_OUT, path)
                continue
            carried[name] = value
        if self._layer:
            _refuse_large(path, carried)
        return carried

    def _file(
        self, path: bytes, xattrs: Xattrs, place: int, info: os.stat_result
    ) -> Iterator[bytes]:
        """A regular file: exactly as long as its header says, whatever happens to it meanwhile."""
        fd = places.read(place)
        try:
            extents = _extents(fd, info.st_size)
            told = extents if self._sparse else None
            yield self._header(_member(path, b"0", info, xattrs=xattrs, extents=told))
            length = 0
            for offset, size in ((0, info.st_size),) if extents is None else extents:
                if told is None:
                    yield from _zeros(offset - length)
                    length = offset
                yield from _content(fd, offset, size)
                length += size
            yield padding(length)
            if places.version(os.fstat(fd)) != places.version(info):
                self._note(CHANGED, path)
        finally:
            os.close(fd)


def _refuse_large(path: bytes, carried: Xattrs) -> None:
    """Raises LimitExceeded for more xattrs than one file of a layer can have."""
    if sum(map(len, (*carried, *carried.values()))) < _FEW:
        return
    try:
        pack.inline_xattrs({escape(name): value for name, value in carried.items()})
    except LimitExceeded as error:
        raise LimitExceeded(
            f"{shown(path or b'/')}: {error}",
            hint="getfattr -dm - FILE shows them, setfattr -x takes one away",
        ) from None


def _member(path: bytes, kind: bytes, info: os.stat_result, **more: Any) -> Member:
    seconds, nanoseconds = divmod(info.st_mtime_ns, 1_000_000_000)
    device = kind in b"34"
    return Member(
        (path or b".") + b"/" if kind == b"5" else path,
        kind,
        stat.S_IMODE(info.st_mode),
        info.st_uid,
        info.st_gid,
        info.st_size if kind == b"0" else 0,
        seconds,
        nanoseconds,
        major=os.major(info.st_rdev) if device else 0,
        minor=os.minor(info.st_rdev) if device else 0,
        **more,
    )


def _mark(name: bytes, info: os.stat_result) -> Member:
    """A deletion marker: an empty file with the owner and the time of what it stands for."""
    return _member(name, b"0", info)._replace(mode=0o600, size=0)


def _extents(fd: int, size: int) -> tuple[Extent, ...] | None:
    """The pieces of a file that has holes, the last one ending where the file does; else None."""
    found = list(places.data(fd, size))
    if found == [(0, size)] or not size:
        return None
    if not found or sum(found[-1]) < size:
        found.append((size, 0))
    # Readers have limits, this one's too: then it is written whole.
    return tuple(found) if len(found) <= Limits().sparse_entries else None


def _content(fd: int, offset: int, length: int) -> Iterator[bytes]:
    """So many bytes from there; zeros for what is not there any more."""
    end = offset + length
    while offset < end:
        piece = os.pread(fd, min(_PIECE, end - offset), offset)
        piece = piece or bytes(min(_PIECE, end - offset))
        yield piece
        offset += len(piece)


def _zeros(length: int) -> Iterator[bytes]:
    """What a hole reads as."""
    while length > 0:
        yield _HOLE[:length]
        length -= len(_HOLE)

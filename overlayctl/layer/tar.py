r"""The tar header parser: blocks in, members out, with the meaning Go's archive/tar gives them.

Every engine reads layers with that package, so it defines what a layer says: POSIX
pax(1) "ustar Interchange Format" and "pax Extended Header", GNU tar's manual
("Extensions to the Archive Format") for base-256 numbers, long names, sparse files.

What becomes of a typeflag:

    0 7     a file (7, contiguous, is read as a file)
    \0      a file; a directory if its name ends in ``/`` (pre-POSIX archives)
    1       hard link           2  symbolic link
    3 4 6   character device, block device, fifo
    5       directory
    S       GNU sparse file     x  pax header of the next entry, last one counts
    L K     GNU long name, long link name of the next entry; they win over ``x``
    g       pax global header: checked and passed over, as Go's users do
    D M V N and all others      refused by name

Sizes on links, devices and directories are ignored. Unlike ``tarfile`` a bad
checksum, a cut header or cut data is an error; data may end the input (padding and
end marker are then implied), and whatever follows the end marker is not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from overlayctl.errors import BadTar, LimitExceeded
from overlayctl.layer.fields import check_sum, decimal, number, pax_records, shown, time

BLOCK = 512

Xattrs = dict[bytes, bytes]
Extent = tuple[int, int]
"""A piece of a sparse file: offset in the file, length; its bytes follow the one before."""


_NO_XATTRS: Xattrs = {}


class Limits(NamedTuple):
    """How much of a tar is believed. Each has its own LimitExceeded."""

    header_bytes: int = 1 << 20
    sparse_entries: int = 1 << 20
    entries: int = 20_000_000


class Member(NamedTuple):
    """One entry. ``data`` is the offset of its bytes in the input, ``stored`` their number.

    ``size`` is the size of the file they make (larger than ``stored`` if sparse);
    ``dirty_tail`` says that the padding behind the data is not all zero.
    """

    name: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    mtime_ns: int
    linkname: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: Xattrs = _NO_XATTRS
    offset: int = 0
    data: int = 0
    stored: int = 0
    extents: tuple[Extent, ...] | None = None
    dirty_tail: bool = False


_HEADER = Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")
_ZERO = bytes(BLOCK)
_WITHOUT_DATA = frozenset(b"123456")
_UNDERSTOOD = frozenset(b"01234567S")
_REFUSED = {
    b"D": "a GNU incremental dump directory",
    b"M": "a continuation of a multi-volume archive",
    b"V": "a volume label",
    b"N": "an old GNU long name list",
}
_XATTR = "SCHILY.xattr."


class TarReader:
    """The members of a tar that lies at ``start`` (bytes) in ``fd``, ``size`` bytes long.

    Iterate once. Afterwards ``end_marker`` says whether the two zero blocks were there.
    Raises BadTar with the offset of the header for what cannot be trusted.
    """

    def __init__(self, fd: int, start: int, size: int, limits: Limits | None = None) -> None:
        self._fd = fd
        self._start = start
        self._size = size
        self._limits = limits or Limits()
        self.end_marker = False

    def __iter__(self) -> Iterator[Member]:
        at = 0
        count = 0
        block = self._read(0, BLOCK)
        pax: dict[str, bytes] = {}
        long_name = long_link = b""
        while block:
            kind = block[156:157]
            if block == _ZERO:
                self._expect_end(at)
                return
            header = self._fields(block, at)
            if kind in b"xgLK" and kind:
                body = self._special(header, at)
                if kind == b"L":
                    long_name = body.split(b"\0", 1)[0]
                elif kind == b"K":
                    long_link = body.split(b"\0", 1)[0]
                else:
                    records = pax_records(body, at)
                    # A global header ends what came before it, as it does in Go.
                    pax = records if kind == b"x" else {}
                    if kind == b"g":
                        long_name = long_link = b""
                at = _aligned(at + BLOCK + len(body))
                block = self._read(at, BLOCK)
                continue
            count += 1
            if count > self._limits.entries:
                raise LimitExceeded(
                    f"the tar has more than {self._limits.entries} entries",
                    limit=self._limits.entries,
                )
            if pax:
                header = _merge_pax(header, pax, at)
            if long_name or long_link:
                header = header._replace(
                    name=long_name or header.name, linkname=long_link or header.linkname
                )
            member, end, block = self._finish(header, block, pax, at)
            yield member
            at = end
            pax = {}
            long_name = long_link = b""

    def _read(self, at: int, length: int) -> bytes:
        return os.pread(self._fd, max(0, min(length, self._size - at)), self._start + at)

    def _expect_end(self, at: int) -> None:
        follower = self._read(at + BLOCK, BLOCK)
        if follower and follower != _ZERO:
            if len(follower) < BLOCK:
                raise BadTar(f"the tar is cut inside a header at byte {at + BLOCK}", offset=at)
            raise BadTar(
                f"one zero block at byte {at} is followed by data: neither an entry nor the end",
                offset=at,
            )
        self.end_marker = bool(follower)

    def _fields(self, block: bytes, at: int) -> Member:
        """The header at ``at`` as a member whose data is not located yet."""
        if len(block) < BLOCK:
            raise BadTar(
                f"the tar is cut inside a header at byte {at}",
                hint="the file is incomplete: fetch or save it again",
                offset=at,
            )
        (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, _u, _g, major, minor,
         prefix, _rest) = _HEADER.unpack(block)  # fmt: skip
        check_sum(block, checksum, at)
        name = name.split(b"\0", 1)[0]
        posix = magic == b"ustar\x0000" or magic[:6] == b"ustar\0"
        gnu = magic == b"ustar  \0"
        if posix:
            if block[508:512] == b"tar\0":
                prefix = prefix[:131]
            prefix = prefix.split(b"\0", 1)[0]
            if prefix:
                name = prefix + b"/" + name
        elif gnu and prefix[0] and not _gnu_times(prefix):
            # Writers in Go before 1.8 put a ustar prefix into GNU headers.
            old = prefix.split(b"\0", 1)[0]
            if old.isascii():
                name = old + b"/" + name
        return Member(
            name,
            kind,
            number(mode, at) & 0o7777,
            number(uid, at),
            number(gid, at),
            number(size, at),
            number(mtime, at),
            0,
            link.split(b"\0", 1)[0],
            number(major, at) if posix or gnu else 0,
            number(minor, at) if posix or gnu else 0,
            {},
            at,
            at + BLOCK,
            0,
            None,
            False,
        )

    def _special(self, header: Member, at: int) -> bytes:
        """The body of an ``x``, ``g``, ``L`` or ``K`` header."""
        if not 0 <= header.size <= self._limits.header_bytes:
            raise LimitExceeded(
                f"an extended header of {header.size} bytes at byte {at}: "
                f"the limit is {self._limits.header_bytes}",
                limit=self._limits.header_bytes,
            )
        body = self._read(at + BLOCK, header.size)
        if len(body) < header.size:
            raise BadTar(f"the tar is cut inside an extended header at byte {at}", offset=at)
        return body

    def _finish(
        self, header: Member, block: bytes, pax: dict[str, bytes], at: int
    ) -> tuple[Member, int, bytes]:
        """The complete member, where the next header is, and that header's block."""
        kind = header.type
        if kind == b"\0":
            kind = b"5" if header.name.endswith(b"/") else b"0"
        if kind[0] not in _UNDERSTOOD:
            what = _REFUSED.get(kind, f"of the unknown type {kind!r}")
            raise BadTar(
                f"entry {shown(header.name)} is {what}, which no layer may hold", offset=at
            )
        data = at + BLOCK
        stored = 0 if kind[0] in _WITHOUT_DATA else header.size
        if stored < 0:
            raise BadTar(f"entry {shown(header.name)} has a negative size", offset=at)
        if stored > self._size - data:
            raise BadTar(
                f"entry {shown(header.name)} claims {stored} bytes but the tar ends after "
                f"{max(0, self._size - data)}",
                hint="the file is incomplete: fetch or save it again",
                offset=at,
                member=shown(header.name),
            )
        end = data + stored
        size = stored
        extents = None
        if kind == b"S":
            data, size, extents = self._gnu_sparse(block, header, at)
            end = data + stored
            kind = b"0"
        elif pax and kind in b"07":
            sparse = self._pax_sparse(header, pax, at)
            if sparse:
                header, data, size, extents = sparse
        if kind == b"7":
            kind = b"0"
        if extents is not None:
            _check_extents(extents, size, end - data, header.name, at)
        if header.uid < 0 or header.gid < 0:
            raise BadTar(f"entry {shown(header.name)} has a negative owner", offset=at)
        padding = -stored % BLOCK
        ahead = self._read(end, padding + BLOCK)
        member = header._replace(
            type=kind,
            size=size,
            data=data,
            stored=end - data,
            extents=extents,
            dirty_tail=padding > 0 and ahead[:padding].strip(b"\0") != b"",
        )
        return member, end + padding, ahead[padding:]

    def _gnu_sparse(
        self, block: bytes, header: Member, at: int
    ) -> tuple[int, int, tuple[Extent, ...]]:
        """Old GNU sparse: four pieces in the header, more in blocks before the data."""
        size = number(block[483:495], at)
        extents: list[Extent] = []
        table, more, where = block[386:482], block[482], at + BLOCK
        while True:
            for entry in range(0, len(table), 24):
                if not table[entry]:
                    break
                extents.append(
                    (
                        number(table[entry : entry + 12], at),
                        number(table[entry + 12 : entry + 24], at),
                    )
                )
            self._count_extents(extents, header.name)
            if not more:
                break
            # The extension blocks are not part of the recorded size.
            extension = self._read(where, BLOCK)
            if len(extension) < BLOCK:
                raise BadTar(f"the tar is cut inside a sparse map at byte {where}", offset=at)
            table, more = extension[:504], extension[504]
            where += BLOCK
        if where + header.size > self._size:
            raise BadTar(
                f"entry {shown(header.name)} is cut: its sparse data leaves the tar", offset=at
            )
        return where, size, tuple(extents)

    def _count_extents(self, extents: list[Extent], name: bytes) -> None:
        if len(extents) > self._limits.sparse_entries:
            raise LimitExceeded(
                f"entry {shown(name)} has a sparse map of more than "
                f"{self._limits.sparse_entries} pieces",
                limit=self._limits.sparse_entries,
            )

    def _pax_sparse(
        self, header: Member, pax: dict[str, bytes], at: int
    ) -> tuple[Member, int, int, tuple[Extent, ...]] | None:
        """PAX sparse 0.0, 0.1 (map in the header) and 1.0 (map before the data)."""
        version = (pax.get("GNU.sparse.major", b""), pax.get("GNU.sparse.minor", b""))
        recorded = pax.get("GNU.sparse.map")
        if version != (b"1", b"0") and version not in ((b"0", b"0"), (b"0", b"1")) and not recorded:
            return None
        header = header._replace(name=pax.get("GNU.sparse.name") or header.name)
        size_text = pax.get("GNU.sparse.realsize") or pax.get("GNU.sparse.size")
        size = decimal(size_text, at) if size_text else header.size
        data = at + BLOCK
        if version == (b"1", b"0"):
            data, numbers = self._sparse_map_1_0(header, at)
        else:
            numbers = [decimal(n, at) for n in recorded.split(b",")] if recorded else []
            declared = pax.get("GNU.sparse.numblocks", b"")
            if len(numbers) % 2 or (declared and decimal(declared, at) * 2 != len(numbers)):
                raise BadTar(f"entry {shown(header.name)} has a broken sparse map", offset=at)
        extents = list(zip(numbers[::2], numbers[1::2], strict=True))
        self._count_extents(extents, header.name)
        return header, data, size, tuple(extents)

    def _sparse_map_1_0(self, header: Member, at: int) -> tuple[int, list[int]]:
        where = at + BLOCK
        end = where + header.size
        text = b""
        wanted = 1
        while text.count(b"\n") < wanted:
            block = self._read(where, BLOCK) if where < end else b""
            if len(block) < BLOCK:
                raise BadTar(f"entry {shown(header.name)} has a cut sparse map", offset=at)
            text += block
            where += BLOCK
            if b"\n" in text and wanted == 1:
                wanted = 1 + 2 * decimal(text.split(b"\n", 1)[0], at)
                if wanted > 2 * self._limits.sparse_entries:
                    self._count_extents([(0, 0)] * (self._limits.sparse_entries + 1), header.name)
        return where, [decimal(n, at) for n in text.split(b"\n")[1:wanted]]


def _aligned(at: int) -> int:
    return at + -at % BLOCK


def _gnu_times(prefix: bytes) -> bool:
    """Whether bytes 345.. of a GNU header hold the access time a GNU writer may put there."""
    try:
        number(prefix[:12], 0)
        number(prefix[12:24], 0)
    except BadTar:
        return False
    return True


def _merge_pax(header: Member, pax: dict[str, bytes], at: int) -> Member:
    """The header with what its pax records say instead; an empty value keeps the header's."""
    changes: dict[str, object] = {}
    xattrs: Xattrs = {}
    for key, value in pax.items():
        if key.startswith(_XATTR):
            xattrs[key[len(_XATTR) :].encode("utf-8", "surrogateescape")] = value
        elif not value:
            continue
        elif key == "path":
            changes["name"] = value
        elif key == "linkpath":
            changes["linkname"] = value
        elif key in ("uid", "gid", "size"):
            changes[key] = decimal(value, at)
        elif key == "mtime":
            changes["mtime"], changes["mtime_ns"] = time(value, at)
    return header._replace(xattrs=xattrs, **changes)  # type: ignore[arg-type]


def _check_extents(
    extents: tuple[Extent, ...], size: int, stored: int, name: bytes, at: int
) -> None:
    """Pieces must be in order, apart, inside the file, and add up to the stored bytes."""
    last = 0
    for offset, length in extents:
        if offset < last or length < 0 or offset + length > size:
            raise BadTar(f"entry {shown(name)} has a sparse map out of order or range", offset=at)
        last = offset + length
    if sum(length for _, length in extents) != stored:
        raise BadTar(
            f"entry {shown(name)} stores {stored} bytes but its sparse map has another sum",
            offset=at,
        )

r"""The writer's half of the tar format: a member's header as bytes, as plain as it can be.

ustar where everything fits, else the rest in a pax header before it (POSIX pax(1), "ustar
Interchange Format", "pax Extended Header"): what is not ASCII, long, large, negative or finer
than seconds, the xattrs as ``SCHILY.xattr.NAME``, and sparse files in GNU's form 1.0 (GNU tar's
manual, "Storing Sparse Files"). No names of users or groups, nothing of this host or moment.

Law: what ``tar.TarReader`` reads back is the member that was written.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from overlayctl.layer.tar import BLOCK

if TYPE_CHECKING:
    from overlayctl.layer.tar import Extent, Member

END = bytes(2 * BLOCK)
"""The end marker."""

_USTAR = Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
_NAME_MAX, _PREFIX_MAX = 100, 155
_CHECKSUM = slice(148, 156)
# What a reader without the extension, and nobody else, calls the member.
_PAX_NAME = b"PaxHeaders.0"
_SPARSE_NAME = b"GNUSparseFile.0"


def header(member: Member) -> bytes:
    """What stands before the member's data: its headers, and the map of a sparse file.

    Of a sparse file the pieces that ``extents`` names follow, of another one ``size`` bytes;
    then ``padding`` of that many. Where the data lies and what was stored of it is not looked at.
    """
    pax: dict[bytes, bytes] = {
        b"SCHILY.xattr." + name: value for name, value in member.xattrs.items()
    }
    name, size, sparse = member.name, member.size if member.type == b"0" else 0, b""
    if member.extents is not None:
        sparse = _sparse_map(member.extents)
        size = len(sparse) + sum(length for _, length in member.extents)
        pax[b"GNU.sparse.major"], pax[b"GNU.sparse.minor"] = b"1", b"0"
        pax[b"GNU.sparse.name"] = name
        pax[b"GNU.sparse.realsize"] = b"%d" % member.size
        name = _SPARSE_NAME
    block = _ustar(member, name, size, pax)
    if not pax:
        return block + sparse
    records = b"".join(_record(key, value) for key, value in sorted(pax.items()))
    return _pax_header(len(records)) + records + padding(len(records)) + block + sparse


def padding(length: int) -> bytes:
    """The zeros behind so many bytes of data."""
    return bytes(-length % BLOCK)


def _ustar(member: Member, whole: bytes, size: int, pax: dict[bytes, bytes]) -> bytes:
    """The header block, with that name and size; what does not fit into it goes to ``pax``."""
    prefix, name = b"", whole
    if len(name) > _NAME_MAX:
        # The earliest slash that leaves a name that fits; it is not the last byte.
        at = name.find(b"/", len(name) - _NAME_MAX - 1, len(name) - 1)
        if 0 < at <= _PREFIX_MAX:
            prefix, name = name[:at], name[at + 1 :]
    if len(name) > _NAME_MAX or not whole.isascii():
        pax[b"path"] = whole
        prefix, name = b"", whole[:_NAME_MAX]
    link = member.linkname
    if not link.isascii() or len(link) > _NAME_MAX:
        pax[b"linkpath"] = link
        link = link[:_NAME_MAX]
    if member.mtime_ns:
        pax[b"mtime"] = _time(member.mtime, member.mtime_ns)
    return _block(
        name, b"%07o\0" % member.mode, _number(member.uid, 8, b"uid", pax),
        _number(member.gid, 8, b"gid", pax), _number(size, 12, b"size", pax),
        _number(member.mtime, 12, b"mtime", pax), member.type, link,
        b"%07o\0" % member.major, b"%07o\0" % member.minor, prefix,
    )  # fmt: skip


def _pax_header(size: int) -> bytes:
    zero = b"0000000\0"
    return _block(
        _PAX_NAME, b"0000644\0", zero, zero, b"%011o\0" % size, b"%011o\0" % 0, b"x", b"",
        zero, zero, b"",
    )  # fmt: skip


def _block(
    name: bytes, mode: bytes, uid: bytes, gid: bytes, size: bytes, mtime: bytes, kind: bytes,
    link: bytes, major: bytes, minor: bytes, prefix: bytes,
) -> bytes:  # fmt: skip
    """A header block with its checksum, in whose sum its own field counts as spaces."""
    block = bytearray(
        _USTAR.pack(
            name, mode, uid, gid, size, mtime, b" " * 8, kind, link, b"ustar\0", b"00", b"", b"",
            major, minor, prefix,
        )
    )  # fmt: skip
    block[_CHECKSUM] = b"%06o\0 " % sum(block)
    return bytes(block)


def _number(value: int, width: int, key: bytes, pax: dict[bytes, bytes]) -> bytes:
    """An octal field; what it cannot hold stands in ``pax``, and a zero here."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    pax.setdefault(key, b"%d" % value)
    return b"%0*o\0" % (width - 1, 0)


def _time(seconds: int, nanoseconds: int) -> bytes:
    """Decimal seconds: the sign stands before all of it."""
    whole = seconds * 1_000_000_000 + nanoseconds
    digits = b"%d.%09d" % divmod(abs(whole), 1_000_000_000)
    return (b"-" if whole < 0 else b"") + digits.rstrip(b"0")


def _record(key: bytes, value: bytes) -> bytes:
    """A pax record; its length counts its own digits."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def _sparse_map(extents: tuple[Extent, ...]) -> bytes:
    numbers = [len(extents), *(number for extent in extents for number in extent)]
    text = b"".join(b"%d\n" % number for number in numbers)
    return text + padding(len(text))

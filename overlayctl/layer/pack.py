"""The variable parts of an EROFS index as bytes: directory blocks and inline xattrs."""

from __future__ import annotations

from overlayctl.errors import LimitExceeded
from overlayctl.layer.format import (
    BLOCK,
    DIRENT,
    NAME_MAX,
    XATTR,
    XATTR_HEADER,
    XATTR_NAMES_MAX,
    XATTR_PREFIXES,
    XATTR_VALUE_MAX,
)

_XATTR_BODY_LIMIT = 12 + 4 * 65534
# A directory entry's type by mode >> 12 (fs_types.h's FT_* values).
_DIRENT_TYPE = bytes([0, 5, 3, 0, 2, 0, 4, 0, 1, 0, 7, 0, 6, 0, 0, 0])


def directory(blocks: bytearray, names: list[bytes], nids: list[int], modes: list[int]) -> int:
    """Append a directory's blocks; its size. Names are sorted, the dots among them."""
    if max(map(len, names)) > NAME_MAX:
        raise LimitExceeded(
            f"a name of {max(map(len, names))} bytes: the limit is {NAME_MAX}", limit=NAME_MAX
        )
    pack = DIRENT.pack_into
    begin, used, first, count = len(blocks), 0, 0, len(names)
    while first < count:
        base, used, last = len(blocks), 0, first
        while last < count and used + DIRENT.size + len(names[last]) <= BLOCK:
            used += DIRENT.size + len(names[last])
            last += 1
        blocks += bytes(BLOCK)
        entry, at = base, DIRENT.size * (last - first)
        blocks[base + at : base + used] = b"".join(names[first:last])
        for number in range(first, last):
            pack(blocks, entry, nids[number], at, _DIRENT_TYPE[modes[number] >> 12])
            entry += DIRENT.size
            at += len(names[number])
        first = last
    return len(blocks) - begin - BLOCK + used


def _split(name: bytes) -> tuple[int, bytes] | None:
    """An xattr's prefix number and the rest of its name."""
    for number, prefix in XATTR_PREFIXES.items():
        if name == prefix or (prefix[-1:] == b"." and name.startswith(prefix)):
            return (number, name[len(prefix) :]) if number in (2, 3) or name != prefix else None
    return None


def inline_xattrs(xattrs: dict[bytes, bytes]) -> bytes:
    """The bytes behind an inode that hold its xattrs. Raises LimitExceeded."""
    body = bytearray(XATTR_HEADER)
    for name, value in sorted(xattrs.items()):
        split = _split(name)
        if split is None:
            raise LimitExceeded(f"the xattr {name[:300]!r} is of a kind that EROFS cannot hold")
        if len(name) > NAME_MAX or len(value) > XATTR_VALUE_MAX:
            raise LimitExceeded(
                f"the xattr {name[:300]!r} has a name of {len(name)} bytes and a value of "
                f"{len(value)}: the limits are {NAME_MAX} and {XATTR_VALUE_MAX}"
            )
        number, rest = split
        body += XATTR.pack(len(rest), number, len(value)) + rest + value
        body += bytes(-len(body) % 4)
    names = sum(len(name) + 1 for name in xattrs)
    if len(body) > _XATTR_BODY_LIMIT or names > XATTR_NAMES_MAX:
        raise LimitExceeded(
            f"the xattrs of one file are {len(body)} bytes, their names {names}: the limits "
            f"are {_XATTR_BODY_LIMIT} and {XATTR_NAMES_MAX}"
        )
    return bytes(body)

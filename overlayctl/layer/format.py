"""The layer file's format: what lies where in it.

Linux Documentation/filesystems/erofs.rst ("On-disk details") and the structures of
fs/erofs/erofs_fs.h, as far as ``erofs`` writes them: extended inodes, flat or in chunks,
512-byte blocks, no compression.

    0     .. 1024   header: JSON, zeros, sha256 of bytes 0..992
    1024  .. 4096   superblock
    4096  .. +T     the tar
    aligned 4096    inodes with xattrs, short targets, chunk maps; directory blocks; long
                    targets; expanded data; inherited facts; zeros to 4096
"""

from __future__ import annotations

import hashlib
import json
from struct import Struct
from typing import NamedTuple

from overlayctl.digest import DiffID
from overlayctl.errors import Damaged, HostCannot

FORMAT = 1
BLOCK = 512
FILE = "layer.erofs"
"""What a layer file is called in the directory of its own."""

PAGE = 4096
"""Where the tar begins, and what the index is aligned to."""
HEADER = 1024
MAGIC = 0xE0F5E1E2
NULL_CHUNK = 0xFFFFFFFF
PLAIN, INLINE, CHUNKED = 0, 2, 4

SUPERBLOCK = Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
INODE = Struct("<HHHHQIIIIqII16x")
DIRENT = Struct("<QHBx")
XATTR = Struct("<BBH")
XATTR_HEADER = bytes(12)
XATTR_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}

# What a name, a symlink and the xattrs of one inode may hold: EROFS and the kernel agree.
NAME_MAX = 255
TARGET_MAX = 4095
XATTR_VALUE_MAX = 65_535
XATTR_NAMES_MAX = 65_536

_HASHED = 992
# Always set, so that the superblock follows from the header; without chunks it means nothing.
INCOMPAT_CHUNKED_FILE = 0x4


class Header(NamedTuple):
    """What the first 1024 bytes say. Offsets are bytes in the file.

    ``entries`` counts names, the root's excluded; ``size`` is the apparent size of all
    files, hard links once; ``index_sha256`` is that of bytes 1024..4096 and all after
    the tar, in hexadecimal.
    """

    format: int
    writer: int
    diff_id: DiffID
    tar_size: int
    entries: int
    wants: int
    size: int
    index_sha256: str
    facts_offset: int
    facts_size: int

    def encode(self) -> bytes:
        """The header block."""
        values = self._asdict()
        values["facts"] = {"offset": values.pop("facts_offset"), "size": values.pop("facts_size")}
        text = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
        text = text.ljust(_HASHED, b"\0")
        return text + hashlib.sha256(text).digest()

    @classmethod
    def parse(cls, block: bytes, name: str) -> Header:
        """The header in ``block``. Raises Damaged, or HostCannot for a later format."""
        text = block[:_HASHED]
        if hashlib.sha256(text).digest() != block[_HASHED:HEADER]:
            raise Damaged(f"{name}: the header is damaged or not a layer's", file=name)
        try:
            values = json.loads(text.rstrip(b"\0"))
            if values["format"] != FORMAT:
                raise HostCannot(
                    f"{name} has format {values['format']}, this overlayctl reads {FORMAT}",
                    hint="use the overlayctl that wrote it",
                )
            facts = values["facts"]
            numbers = [int(values[key]) for key in ("writer", "tar_size", "entries", "wants")]
            numbers += [int(values["size"]), int(facts["offset"]), int(facts["size"])]
            texts = str(values["diff_id"]), str(values["index_sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{name}: the header lacks what it must say", file=name) from error
        if min(numbers) < 0:
            raise Damaged(f"{name}: the header has a negative number", file=name)
        writer, tar_size, entries, wants, size, offset, length = numbers
        return cls(
            FORMAT, writer, DiffID(texts[0]), tar_size, entries, wants, size, texts[1],
            offset, length,
        )  # fmt: skip


def derived_uuid(text: str) -> bytes:
    """16 bytes that follow from ``text`` (RFC 9562, version 8); never zero."""
    uuid = bytearray(hashlib.sha256(text.encode()).digest()[:16])
    uuid[6] = uuid[6] & 0x0F | 0x80
    uuid[8] = uuid[8] & 0x3F | 0x80
    return bytes(uuid)


def layer_uuid(diff_id: DiffID, facts: bytes, writer: int) -> bytes:
    """The UUID of a layer's filesystem."""
    return derived_uuid(
        f"overlayctl layer\n{diff_id}\n{hashlib.sha256(facts).hexdigest()}\n{writer}\n"
    )


def index_start(tar_size: int) -> int:
    """Where the inodes begin, in bytes."""
    end = PAGE + tar_size
    return end + -end % PAGE


def superblock(uuid: bytes, start: int, names: int, end: int) -> bytes:
    """Bytes 1024..4096 of an image of ``end`` bytes whose inodes begin at byte ``start``."""
    return SUPERBLOCK.pack(
        MAGIC, 0, 0, 9, 0, 2, names + 1, 0, 0, end // BLOCK, start // BLOCK, 0,
        uuid, b"", INCOMPAT_CHUNKED_FILE, 0, 0, 0, 0, 0, 0, 0,
    ).ljust(PAGE - HEADER, b"\0")  # fmt: skip

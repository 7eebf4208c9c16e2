"""The reader: what a layer holds, from its own index, attached or not.

``format`` says what lies where. Law: whatever the file's bytes are, a reader gets an
answer or Damaged.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.errors import Damaged
from overlayctl.layer.format import (
    BLOCK,
    CHUNKED,
    DIRENT,
    HEADER,
    INCOMPAT_CHUNKED_FILE,
    INLINE,
    INODE,
    MAGIC,
    NULL_CHUNK,
    PAGE,
    PLAIN,
    SUPERBLOCK,
    TARGET_MAX,
    XATTR,
    XATTR_HEADER,
    XATTR_PREFIXES,
    Header,
    index_start,
    layer_uuid,
    superblock,
)
from overlayctl.whiteout import OPAQUE_XATTR

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_PIECE = 1 << 20
_NULL = NULL_CHUNK.to_bytes(4, "little")


class Node(NamedTuple):
    """An inode. The last four fields say where the reader finds the rest."""

    nid: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    mtime_ns: int
    nlink: int
    rdev: int
    layout: int
    start: int
    body: int
    xattr_size: int


class Index:
    """A layer file, open for reading. ``header`` is verified; the rest is on use."""

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._size = os.fstat(fd).st_size
        if self._size < 2 * PAGE:
            raise self._damaged(f"only {self._size} bytes long")
        self._map = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        try:
            self.header = Header.parse(self._map[:HEADER], name)
            self._check()
        except BaseException:
            self._map.close()
            raise

    @classmethod
    def open(cls, file: str | bytes | os.PathLike[str] | int) -> Index:
        """Open a layer file; a descriptor stays the caller's. Raises Damaged, OSError."""
        if isinstance(file, int):
            return cls(file, os.readlink(f"/proc/self/fd/{file}"))
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return cls(fd, os.fsdecode(file))
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of the file. Nodes stay valid values."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _check(self) -> None:
        (magic, _, _, bits, _, root, _, _, _, _, start, _, self.uuid, _, incompat,
         *_) = SUPERBLOCK.unpack_from(self._map, HEADER)  # fmt: skip
        header = self.header
        self._meta = start * BLOCK
        if magic != MAGIC or bits != 9 or incompat & ~INCOMPAT_CHUNKED_FILE:
            raise self._damaged("the superblock is not one that overlayctl writes")
        if self._meta != index_start(header.tar_size) or self._meta >= self._size:
            raise self._damaged("the index is not where the header puts it")
        if not self._meta <= header.facts_offset <= self._size - header.facts_size:
            raise self._damaged("the inherited facts are not inside the file")
        self._root = root

    def _damaged(self, what: str) -> Damaged:
        return Damaged(
            f"{self.name}: {what}",
            hint="overlayctl system check says what is damaged",
            file=self.name,
        )

    def _bytes(self, at: int, length: int) -> bytes:
        if not 0 <= at <= at + length <= self._size:
            raise self._damaged(f"it refers to {length} bytes at byte {at}, outside itself")
        return self._map[at : at + length]

    def facts(self) -> bytes:
        """The inherited facts as they were given to the writer."""
        return self._bytes(self.header.facts_offset, self.header.facts_size)

    @property
    def root(self) -> Node:
        """The layer's own root directory."""
        node = self._node(self._root)
        if not stat.S_ISDIR(node.mode):
            raise self._damaged("its root is no directory")
        return node

    def _node(self, nid: int) -> Node:
        at = self._meta + nid * 32
        if at > self._size - INODE.size:
            raise self._damaged(f"it refers to inode {nid}, outside itself")
        (kind, count, mode, high, size, start, _, uid, gid, mtime, mtime_ns, nlink) = (
            INODE.unpack_from(self._map, at)
        )
        if kind not in (1 | PLAIN << 1, 1 | INLINE << 1, 1 | CHUNKED << 1) or high or size >> 63:
            raise self._damaged(f"inode {nid} is of a form that overlayctl does not write")
        device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        return Node(
            nid, mode, uid, gid, size, mtime, mtime_ns, nlink, start if device else 0,
            kind >> 1, start, at + INODE.size, 8 + 4 * count if count else 0,
        )  # fmt: skip

    def read(self, node: Node, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes of a file, target or directory; holes read as zeros."""
        length = min(length, node.size - offset)
        if length <= 0 or offset < 0:
            return b""
        if node.layout == CHUNKED:
            return self._read_chunks(node, offset, length)
        at = node.start * BLOCK
        if node.layout == PLAIN:
            return self._bytes(at + offset, length)
        # The last block is the inline one, even if it is full.
        full = (node.size - 1) // BLOCK * BLOCK
        data = self._bytes(at + offset, min(length, full - offset)) if offset < full else b""
        if len(data) < length:
            after = node.body + node.xattr_size + max(0, offset - full)
            data += self._bytes(after, length - len(data))
        return data

    def _read_chunks(self, node: Node, offset: int, length: int) -> bytes:
        if node.start & ~0x1F:
            raise self._damaged(f"inode {node.nid} has a chunk map that overlayctl does not write")
        bits = 9 + node.start
        chunks = node.body + node.xattr_size
        pieces = []
        while length:
            number, inside = offset >> bits, offset & ((1 << bits) - 1)
            count = min(length, (1 << bits) - inside)
            block = int.from_bytes(self._bytes(chunks + 4 * number, 4), "little")
            if block == NULL_CHUNK:
                pieces.append(bytes(count))
            else:
                pieces.append(self._bytes(block * BLOCK + inside, count))
            offset += count
            length -= count
        return b"".join(pieces)

    def extents(self, node: Node) -> Iterator[tuple[int, int]]:
        """The offset and length of each part of a file that is no hole, in order."""
        if node.layout != CHUNKED:
            if node.size:
                yield 0, node.size
            return
        size = 1 << 9 + (node.start & 0x1F)
        count = -(-node.size // size)
        table = self._bytes(node.body + node.xattr_size, 4 * count)
        begin = None
        for number in range(count + 1):
            hole = number == count or table[4 * number : 4 * number + 4] == _NULL
            if hole and begin is not None:
                yield begin * size, min(number * size, node.size) - begin * size
                begin = None
            elif not hole and begin is None:
                begin = number

    def target(self, node: Node) -> bytes:
        """Where a symlink points."""
        if not stat.S_ISLNK(node.mode) or not 0 < node.size <= TARGET_MAX:
            raise self._damaged(f"inode {node.nid} has no usable symlink target")
        return self.read(node, 0, node.size)

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        """All xattrs by full name, as stored: overlay's marks included."""
        if not node.xattr_size:
            return {}
        body = self._bytes(node.body, node.xattr_size)
        found = {}
        at = len(XATTR_HEADER)
        if body[4]:
            raise self._damaged(f"inode {node.nid} shares xattrs, which overlayctl does not write")
        while at < len(body):
            length, number, size = XATTR.unpack_from(body, at)
            at += XATTR.size
            if number not in XATTR_PREFIXES or at + length + size > len(body):
                raise self._damaged(f"inode {node.nid} has broken xattrs")
            name = XATTR_PREFIXES[number] + body[at : at + length]
            found[name] = body[at + length : at + length + size]
            at += length + size
            at += -at % 4
        return found

    def is_opaque(self, node: Node) -> bool:
        """Whether a directory hides what lies below it."""
        return node.xattr_size > 0 and self.xattrs(node).get(OPAQUE_XATTR) == b"y"

    @staticmethod
    def is_whiteout(node: Node) -> bool:
        """Whether the node only says that a name is gone."""
        return stat.S_ISCHR(node.mode) and node.rdev == 0

    def _block(self, node: Node, number: int) -> tuple[list[bytes], list[int]]:
        """The names and nids in one block of a directory."""
        block = self.read(node, number * BLOCK, BLOCK)
        head = int.from_bytes(block[8:10], "little")
        if head % DIRENT.size or not DIRENT.size <= head <= len(block):
            raise self._damaged(f"directory {node.nid} has a broken block {number}")
        nids, begins, _ = zip(*DIRENT.iter_unpack(block[:head]), strict=True)
        ends = (*begins[1:], len(block))
        names = [block[begin:end] for begin, end in zip(begins, ends, strict=True)]
        names[-1] = names[-1].split(b"\0", 1)[0]
        if b"" in names or b"\0" in block[head : ends[-1]].rstrip(b"\0") or b"/" in block[head:]:
            raise self._damaged(f"directory {node.nid} has broken names in block {number}")
        return names, list(nids)

    def _first(self, node: Node, number: int) -> bytes:
        """The first name in one block of a directory: the others say nothing to a search."""
        block = self.read(node, number * BLOCK, BLOCK)
        head = int.from_bytes(block[8:10], "little")
        if head % DIRENT.size or not DIRENT.size <= head <= len(block):
            raise self._damaged(f"directory {node.nid} has a broken block {number}")
        if head > DIRENT.size:
            return block[head : int.from_bytes(block[20:22], "little")]
        return block[head:].split(b"\0", 1)[0]

    def list(self, node: Node) -> Iterator[tuple[bytes, Node]]:
        """A directory's names in byte order, without the dots. Nothing for other nodes."""
        if stat.S_ISDIR(node.mode):
            for number in range(-(-node.size // BLOCK)):
                for name, nid in zip(*self._block(node, number), strict=True):
                    if name not in (b".", b".."):
                        yield name, self._node(nid)

    def child(self, node: Node, name: bytes) -> Node | None:
        """What a directory has under ``name``; None in anything else."""
        if not stat.S_ISDIR(node.mode) or not node.size:
            return None
        low, high = 0, -(-node.size // BLOCK)
        while high - low > 1:
            middle = (low + high) // 2
            if self._first(node, middle) <= name:
                low = middle
            else:
                high = middle
        names, nids = self._block(node, low)
        at = bisect_left(names, name)
        return self._node(nids[at]) if at < len(names) and names[at] == name else None

    def lookup(self, path: bytes) -> Node | None:
        """The node at a path of this layer, relative to its root; symlinks are not followed."""
        node: Node | None = self.root
        for name in path.split(b"/"):
            if name not in (b"", b".") and node is not None:
                node = self.child(node, name)
        return node

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """Every path, ``b""`` for the root first, a directory before what it holds, sorted."""
        seen: set[int] = set()
        pending = [(b"", self.root)]
        while pending:
            path, node = pending.pop()
            yield path, node
            if stat.S_ISDIR(node.mode):
                if node.nid in seen:
                    raise self._damaged(f"directory {node.nid} appears twice, again at {path!r}")
                seen.add(node.nid)
                start = path + b"/" if path else b""
                pending += [(start + name, child) for name, child in self.list(node)][::-1]


def device_number(node: Node) -> tuple[int, int]:
    """Major and minor number of a device, as EROFS and the kernel encode them."""
    return node.rdev >> 8 & 0xFFF, node.rdev & 0xFF | node.rdev >> 12 & 0xFFF00


def verify(file: str | bytes | os.PathLike[str] | int) -> list[str]:
    """Which parts are not what they were: of ``header``, ``superblock``, ``tar``, ``index``.

    Reads the whole file; a descriptor stays the caller's. Without its header nothing else
    can be judged. Raises OSError.
    """
    ours = not isinstance(file, int)
    with open(file, "rb", buffering=0, closefd=ours) as stream:
        fd = stream.fileno()
        size = os.fstat(fd).st_size
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
            header = Header.parse(os.pread(fd, HEADER, 0), name)
        except Damaged:
            return ["header"]
        wrong = []
        if _sha256(fd, b"", PAGE, header.tar_size) != header.diff_id.removeprefix("sha256:"):
            wrong.append("tar")
        first = os.pread(fd, PAGE - HEADER, HEADER)
        after = PAGE + header.tar_size
        rest = max(0, size - after)
        if _sha256(fd, first, after, rest) == header.index_sha256:
            return wrong
        # The superblock follows from the header and the facts: which of the two parts is it?
        facts = os.pread(fd, min(header.facts_size, size), min(header.facts_offset, size))
        uuid = layer_uuid(header.diff_id, facts, header.writer)
        right = superblock(uuid, index_start(header.tar_size), header.entries, size - size % BLOCK)
        if first != right and _sha256(fd, right, after, rest) == header.index_sha256:
            return ["superblock", *wrong]
        # Where the facts are damaged the UUID (bytes 48..64) cannot be derived.
        if first[:48] + first[64:] != right[:48] + right[64:]:
            wrong.insert(0, "superblock")
        return [*wrong, "index"]


def _sha256(fd: int, first: bytes, at: int, length: int) -> str:
    """The digest of ``first`` and a range of the file."""
    digest = hashlib.sha256(first)
    while length:
        piece = os.pread(fd, min(_PIECE, length), at)
        if not piece:
            break
        digest.update(piece)
        at += len(piece)
        length -= len(piece)
    return digest.hexdigest()

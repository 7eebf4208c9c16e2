"""The writer: a tree becomes an EROFS index behind the tar that holds its files' bytes.

Linux Documentation/filesystems/erofs.rst ("On-disk details") and the structures of
fs/erofs/erofs_fs.h; block size 512, so a tar's records are blocks and are not copied.
``format`` says what lies where.

Law: every byte behind the tar and before it follows from (tar, facts, WRITER).
"""

from __future__ import annotations

import hashlib
import os
import sys
from array import array
from bisect import bisect_right
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from overlayctl.errors import BadTar, LimitExceeded
from overlayctl.layer import pack
from overlayctl.layer.format import (
    BLOCK,
    CHUNKED,
    FORMAT,
    HEADER,
    INLINE,
    INODE,
    PAGE,
    PLAIN,
    TARGET_MAX,
    Header,
    derived_uuid,
    index_start,
    layer_uuid,
    superblock,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from overlayctl.digest import DiffID
    from overlayctl.layer.attributes import Borrowed
    from overlayctl.layer.tree import Tree

WRITER = 1
"""Goes up with every change of a byte that is written for the same tar."""

_PIECE = 1 << 20
_IMAGE_LIMIT = 1 << 41
_CHUNK_MAP_ENTRIES = 65536
_CHUNK_BITS = range(12, 41)
_CHUNK_MAPS_LIMIT = 1 << 28
_EXPANSION_FREE = 1 << 30
_EXPANSION_RATIO = 16
_FORMAT_MASK = 0o170000
_REG, _DIR, _LNK, _CHR, _BLK = 0o100000, 0o040000, 0o120000, 0o020000, 0o060000


def write(fd: int, tree: Tree, tar_size: int, diff_id: DiffID, facts: bytes, wants: int) -> Header:
    """Complete the layer file ``fd``, which holds the tar at 4096, and return its header.

    What lay behind the tar is replaced. Nothing is synced. Raises LimitExceeded for
    what the format cannot hold, BadTar for file data that is not inside the tar.
    """
    layout = _Layout(fd, tree, tar_size)
    facts_offset = layout.end
    end = _up(facts_offset + len(facts), PAGE)
    if end >= _IMAGE_LIMIT:
        raise LimitExceeded(
            f"the layer would be a file of {end} bytes: a tar and its index stay below 2 TiB",
            limit=_IMAGE_LIMIT,
        )
    uuid = layer_uuid(diff_id, facts, WRITER)
    first = superblock(uuid, layout.start, layout.names, end)
    os.ftruncate(fd, PAGE + tar_size)
    out = _Out(fd, PAGE + tar_size, first)
    out.pad(layout.start)
    for part in layout.parts():
        out.put(part)
    out.put(facts)
    out.pad(end)
    _put(fd, HEADER, first)
    header = Header(
        FORMAT, WRITER, diff_id, tar_size, layout.names, wants, layout.bytes,
        out.sha256.hexdigest(), facts_offset, len(facts),
    )  # fmt: skip
    _put(fd, 0, header.encode())
    return header


def write_empty(path: str) -> None:
    """Make ``path`` the image of nothing: one directory, 0755, owned by root.

    It has no header. Raises FileExistsError.
    """
    blocks = bytearray()
    size = pack.directory(blocks, [b".", b".."], [2, 2], [_DIR, _DIR])
    image = bytearray(HEADER)
    image += superblock(derived_uuid("overlayctl empty\n"), PAGE, 0, 2 * PAGE)
    inodes = bytearray(BLOCK)
    start = (PAGE + BLOCK) // BLOCK
    INODE.pack_into(inodes, 64, 1, 0, _DIR | 0o755, 0, size, start, 0, 0, 0, 0, 0, 2)
    image += (inodes + blocks).ljust(PAGE, b"\0")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _put(fd, 0, image)
    finally:
        os.close(fd)


class _Layout:
    """Where everything goes; the inode area is packed when the constructor returns."""

    def __init__(self, fd: int, tree: Tree, tar_size: int) -> None:
        self._fd = fd
        self._tree = tree
        self._tar_size = tar_size
        self.start = index_start(tar_size)
        self.names = 0
        self.bytes = 0
        self._nids = array("q", bytes(8 * len(tree.mode)))
        self._order: list[int] = []
        self._listings: dict[int, list[bytes]] = {}
        self._bodies: dict[int, bytes] = {}
        # Files and symlinks that are not plain, and files that are copied whole.
        self._special: dict[int, int] = {}
        self._copied: set[int] = set()
        self._blocks = bytearray()
        self._where: dict[int, tuple[int, int]] = {}
        # Expanded data, in order: node, offset in the file, length.
        self._jobs: list[tuple[int, int, int]] = []
        self._maps = 0
        self._inodes = bytearray(_up(self._place(), BLOCK))
        self._list_directories()
        self._expanded = self._next = (self.start + len(self._inodes) + len(self._blocks)) // BLOCK
        self._pack_inodes()
        self.end = self._next * BLOCK

    def parts(self) -> Iterator[bytes | bytearray]:
        """The index up to ``end``, in order, expanded data in pieces."""
        yield self._inodes
        yield self._blocks
        for node, offset, length in self._jobs:
            read = _reader(self._fd, self._tree, node)
            for at in range(offset, offset + length, _PIECE):
                yield read(at, min(_PIECE, offset + length - at))
            yield bytes(-length % BLOCK)

    def _place(self) -> int:
        """Give every node its nid, in pre-order of sorted names; the end of the inodes."""
        tree, nids, order = self._tree, self._nids, self._order
        mode, children, xattrs, special = tree.mode, tree.children, tree.xattrs, self._special
        # nid 0 vanishes from readdir; the root comes first because its nid has 16 bits.
        position = 64
        stack = [0]
        while stack:
            node = stack.pop()
            if nids[node]:
                continue
            order.append(node)
            kind = mode[node] & _FORMAT_MASK
            length = 64
            if xattrs and xattrs.get(node):
                body = pack.inline_xattrs(xattrs[node])
                self._bodies[node] = body
                length += len(body)
            tail = 0
            if kind == _DIR:
                kids = children.get(node) or {}
                names = sorted(kids)
                self._listings[node] = names
                self.names += len(names)
                stack.extend(map(kids.__getitem__, reversed(names)))
            elif kind == _LNK:
                tail = self._inline_target(node, length)
            elif kind == _REG and tree.size[node]:
                self.bytes += tree.size[node]
                if node in tree.borrowed:
                    self._copied.add(node)
                elif node in tree.extents:
                    special[node] = CHUNKED
                    length += 4 * self._chunks(tree.size[node])
                elif node in tree.dirty:
                    tail = tree.size[node] % BLOCK
                    if length % 32 + tail <= BLOCK:
                        special[node] = INLINE
                    else:
                        self._copied.add(node)
                        tail = 0
            end = position + length
            if tail and end % BLOCK + tail > BLOCK:
                # An inline tail must lie inside one block; the inode itself may cross.
                end += -end % BLOCK + length % 32
                position = end - length
            nids[node] = position >> 5
            position = _up(end + tail, 32)
        return position

    def _inline_target(self, node: int, length: int) -> int:
        target = self._tree.target[node]
        if len(target) > TARGET_MAX:
            raise LimitExceeded(
                f"a symlink target of {len(target)} bytes: the limit is {TARGET_MAX}",
                limit=TARGET_MAX,
            )
        if len(target) >= BLOCK or length % 32 + len(target) > BLOCK:
            return 0
        self._special[node] = INLINE
        return len(target)

    def _chunks(self, size: int) -> int:
        """The number of chunks of a sparse file."""
        bits = _chunk_bits(size)
        count = -(-size // (1 << bits))
        self._maps += count * 4
        if bits not in _CHUNK_BITS or self._maps > _CHUNK_MAPS_LIMIT:
            raise LimitExceeded(
                f"a sparse file of {size} bytes, or too many large ones: a file may have 2^56 "
                f"bytes, and the maps of all files {_CHUNK_MAPS_LIMIT}",
                limit=_CHUNK_MAPS_LIMIT,
            )
        return count

    def _list_directories(self) -> None:
        tree, nids, blocks = self._tree, self._nids, self._blocks
        first = (self.start + len(self._inodes)) // BLOCK
        for node, listed in self._listings.items():
            kids = dict(tree.children.get(node) or {})
            kids[b"."] = node
            kids[b".."] = tree.parent[node]
            names = sorted([b".", b"..", *listed])
            nodes = [kids[name] for name in names]
            start = first + len(blocks) // BLOCK
            size = pack.directory(
                blocks, names, [nids[n] for n in nodes], [tree.mode[n] for n in nodes]
            )
            self._where[node] = (start, size)
        for node, target in tree.target.items():
            if nids[node] and node not in self._special:
                self._where[node] = (first + len(blocks) // BLOCK, len(target))
                blocks += target + bytes(-len(target) % BLOCK)

    def _pack_inodes(self) -> None:
        tree, inodes, nids, special = self._tree, self._inodes, self._nids, self._special
        mode, uid, gid, nlink = tree.mode, tree.uid, tree.gid, tree.nlink
        mtime, mtime_ns = tree.mtime, tree.mtime_ns
        pack = INODE.pack_into
        for node in self._order:
            position = nids[node] << 5
            kind = mode[node] & _FORMAT_MASK
            size = start = count = 0
            after = position + 64
            body = self._bodies.get(node)
            if body:
                count = 1 + (len(body) - 12) // 4
                inodes[after : after + len(body)] = body
                after += len(body)
            layout = special.get(node, PLAIN)
            if kind == _REG:
                size = tree.size[node]
                if size:
                    start = self._place_data(node, size, layout, after)
            elif kind in (_DIR, _LNK):
                if layout == INLINE:
                    target = tree.target[node]
                    size = len(target)
                    inodes[after : after + size] = target
                else:
                    start, size = self._where[node]
            elif kind in (_CHR, _BLK):
                start = tree.rdev[node]
            pack(
                inodes, position, 1 | layout << 1, count, mode[node], 0, size, start, 0,
                uid[node], gid[node], mtime[node], mtime_ns[node], nlink[node],
            )  # fmt: skip

    def _place_data(self, node: int, size: int, layout: int, after: int) -> int:
        """A file's start block (or chunk format); its tail or chunk map goes to ``after``."""
        if node in self._copied:
            return self._expand(node, 0, size)
        data = self._tree.data[node]
        stored = sum(n for _, n in self._tree.extents[node]) if layout == CHUNKED else size
        if (stored or layout != CHUNKED) and not (
            0 <= data <= self._tar_size - stored and data % BLOCK == 0
        ):
            # The kernel would read whatever lies there.
            raise BadTar(f"{stored} bytes of file data at byte {data} are not inside the tar")
        if layout == CHUNKED:
            return self._map_chunks(node, size, after)
        if layout == INLINE:
            tail = size % BLOCK
            self._inodes[after : after + tail] = _get(self._fd, PAGE + data + size - tail, tail)
        return (PAGE + data) // BLOCK

    def _map_chunks(self, node: int, size: int, after: int) -> int:
        bits = _chunk_bits(size)
        chunk = 1 << bits
        chunks = array("I", b"\xff" * (4 * -(-size // chunk)))
        done = -1
        stored = PAGE + self._tree.data[node]
        for offset, length in self._tree.extents[node]:
            end = offset + length
            for number in range(max(done + 1, offset >> bits), (end + chunk - 1) >> bits):
                at = number << bits
                source = stored + at - offset
                if offset <= at and at + chunk <= end and source % BLOCK == 0:
                    chunks[number] = source // BLOCK
                elif length:
                    chunks[number] = self._expand(node, at, min(chunk, size - at))
                done = number
            stored += length
        if sys.byteorder == "big":
            chunks.byteswap()
        self._inodes[after : after + 4 * len(chunks)] = chunks.tobytes()
        return bits - 9

    def _expand(self, node: int, offset: int, length: int) -> int:
        """The block where bytes of a file will be copied to."""
        block = self._next
        self._next += -(-length // BLOCK)
        if self._jobs:
            last, at, before = self._jobs[-1]
            if last == node and at + before == offset:
                self._jobs[-1] = (node, at, before + length)
                return block
        self._jobs.append((node, offset, length))
        limit = _EXPANSION_FREE + _EXPANSION_RATIO * self._tar_size
        if node in self._tree.extents and (self._next - self._expanded) * BLOCK > limit:
            raise LimitExceeded(
                f"sparse files whose scattered pieces fill more than {limit} bytes of chunks",
                limit=limit,
            )
        return block


class _Out:
    """Bytes appended to the layer file, hashed as they pass."""

    def __init__(self, fd: int, at: int, first: bytes) -> None:
        self._fd = fd
        self._at = at
        self.sha256 = hashlib.sha256(first)

    def put(self, data: bytes | bytearray) -> None:
        with memoryview(data) as view:
            for piece in range(0, len(view), _PIECE):
                part = view[piece : piece + _PIECE]
                _put(self._fd, self._at, part)
                self.sha256.update(part)
                self._at += len(part)

    def pad(self, end: int) -> None:
        self.put(bytes(end - self._at))


def _reader(fd: int, tree: Tree, node: int) -> Callable[[int, int], bytes | bytearray]:
    """A function (offset, length) -> exactly those bytes of a file that is copied."""
    borrowed = tree.borrowed.get(node)
    if borrowed is not None:
        return partial(_read_borrowed, borrowed)
    extents = tree.extents.get(node)
    base = PAGE + tree.data[node]
    if extents is None:
        return lambda offset, length: _get(fd, base + offset, length)
    ends = [offset + length for offset, length in extents]
    stored = list(accumulate((length for _, length in extents), initial=base))

    def read(offset: int, length: int) -> bytearray:
        piece = bytearray(length)
        for at in range(bisect_right(ends, offset), len(extents)):
            first = max(offset, extents[at][0])
            last = min(offset + length, ends[at])
            if extents[at][0] >= offset + length:
                break
            source = stored[at] + first - extents[at][0]
            piece[first - offset : last - offset] = _get(fd, source, last - first)
        return piece

    return read


def _read_borrowed(borrowed: Borrowed, offset: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = borrowed.read(offset + len(data), length - len(data))
        if not more:
            raise BadTar("a file of a lower layer, wanted for a hard link, is shorter than it says")
        data += more
    return data


def _chunk_bits(size: int) -> int:
    """The smallest chunk, as a power of two, with which a file's map has at most 65,536 entries."""
    return max(_CHUNK_BITS[0], (-(-size // _CHUNK_MAP_ENTRIES) - 1).bit_length())


def _up(value: int, to: int) -> int:
    return value + -value % to


def _put(fd: int, at: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        at += written
        view = view[written:]


def _get(fd: int, at: int, length: int) -> bytes:
    data = os.pread(fd, length, at)
    while len(data) < length:
        more = os.pread(fd, length - len(data), at + len(data))
        if not more:
            raise BadTar(f"the layer file ends at byte {at + len(data)}, inside its tar")
        data += more
    return data

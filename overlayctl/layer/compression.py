"""From the bytes of a blob, compressed or not, to the bytes of its tar.

RFC 1952 (gzip), RFC 8878 (zstd), the .xz file format, bzip2. The codec follows from the
content, as media types and file names are wrong often enough. Several members follow
one another as gzip(1) and zstd(1) read them; zeros and anything else that is no member
are ignored behind a complete one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from overlayctl.errors import BadArchive, DigestMismatch, HostCannot, LimitExceeded
from overlayctl.layer import magic

if TYPE_CHECKING:
    from overlayctl.digest import Digest

PIECE = 1 << 20
_FEED = 256 << 10
_FIRST_FEED = 32 << 10
_XZ_MEMORY = 512 << 20

Buffer = bytes | memoryview


class Source(NamedTuple):
    """``size`` bytes at ``offset`` of a seekable ``fd``; ``name`` is what messages call them.

    The fd belongs to whatever made the source and is closed with it.
    """

    fd: int
    offset: int
    size: int
    name: str


class Expansion(NamedTuple):
    """How far data may grow. ``ratio`` (out per in) counts once ``floor`` bytes came out.

    gzip cannot pass 1,032 to 1, so the default ratio only ever stops the other codecs.
    """

    total: int = 2 << 40
    ratio: int = 1100
    floor: int = 4 << 30


class _Decompressor(Protocol):
    """What bz2, lzma and compression.zstd have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: Buffer, max_length: int = -1) -> bytes: ...


class _Codec(NamedTuple):
    make: Callable[[], _Decompressor]
    errors: tuple[type[Exception], ...]


_MAGIC = {
    "gzip": (b"\x1f\x8b\x08",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes((0x50 + n,)) + b"\x2a\x4d\x18" for n in range(16))),
    "xz": (b"\xfd7zXZ\0",),
    # The block header follows the level: without it "BZh9" might begin a file name.
    "bzip2": tuple(
        b"BZh%d" % level + block for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")
    ),
}
LONGEST_MAGIC = 10


def codec(head: bytes) -> str:
    """``none``, ``gzip``, ``zstd``, ``xz`` or ``bzip2``, by the first bytes (10 are enough)."""
    for name, magics in _MAGIC.items():
        if head.startswith(magics):
            return name
    return "none"


def head(source: Source, length: int = 512) -> bytes:
    """The first bytes of ``source``, fewer if it is shorter."""
    # What is empty may have no fd.
    return os.pread(source.fd, min(length, source.size), source.offset) if source.size else b""


def begun(pieces: Iterator[Buffer], length: int) -> bytes:
    """The first ``length`` bytes or more of ``pieces``, fewer if there are not so many."""
    first = b""
    while len(first) < length and (piece := next(pieces, b"")):
        first += piece
    return first


def chunks(
    source: Source, *, limits: Expansion | None = None, hashed: Digest | None = None
) -> Iterator[Buffer]:
    """The uncompressed bytes of ``source`` in pieces of about 1 MiB.

    A memoryview lies in one of two buffers that take turns: it may still be read while
    the piece after it is, and changes when the one after that is asked for. ``bytes``
    stay what they are.

    With ``hashed``, every stored byte (trailing ones too) is hashed on the way and
    DigestMismatch is raised after the last piece. Raises BadArchive for damaged or cut
    data and for what is known to be no tar, LimitExceeded, HostCannot for zstd without a
    module that reads it.
    """
    bounds = limits or Expansion()
    name = codec(head(source))
    raw: Iterator[Buffer] = stored(source)
    if hashed is not None:
        raw = _verified(raw, source.name, hashed)
    if name == "none":
        if source.size > bounds.total:
            _too_large(source.name, bounds.total)
        expect_tar(head(source, magic.HEAD), source.name)
        return raw
    return decompressed(raw, name, source.name, bounds)


def expect_tar(start: bytes, what: str) -> None:
    """Raise BadArchive if ``start`` (magic.HEAD bytes) is known to begin something else."""
    found = magic.foreign(start)
    if found:
        hint = "a layer is a tar, plain or in gzip, zstd, xz or bzip2"
        if found.to_tar:
            hint = f"{found.to_tar}; then overlayctl import LAYER.tar... NAME:TAG"
        raise BadArchive(f"{what} is no layer: it is {found.words}", hint=hint)


def decompressed(
    raw: Iterable[Buffer], name: str, what: str, limits: Expansion | None = None
) -> Iterator[Buffer]:
    """The content of the ``raw`` pieces, which the codec ``name`` compressed.

    ``what`` is their name in messages; raises what ``chunks`` raises. ``raw`` is read to
    its end even where the content ends earlier, so that whoever hashes it sees it all.
    """
    if name == "none":
        return _counted(raw, what, limits or Expansion())
    return _gathered(_members(raw, _load(name), name, what, limits or Expansion()))


def stored(source: Source) -> Iterator[memoryview]:
    """The bytes of ``source`` as they are; for the life of a piece see ``chunks``."""
    size = max(1, min(PIECE, source.size))
    buffers = [memoryview(bytearray(size)), memoryview(bytearray(size))]
    at, left = source.offset, source.size
    while left:
        buffer = buffers[0][: min(PIECE, left)]
        count = os.preadv(source.fd, [buffer], at)
        if not count:
            raise BadArchive(
                f"{source.name} is cut: {left} of its {source.size} bytes are missing",
                hint="the file is incomplete: fetch or save it again",
                blob=source.name,
            )
        yield buffer[:count]
        buffers.reverse()
        at += count
        left -= count


def _verified(raw: Iterable[Buffer], what: str, expected: Digest) -> Iterator[Buffer]:
    import hashlib

    digest = hashlib.sha256()
    for piece in raw:
        digest.update(piece)
        yield piece
    actual = "sha256:" + digest.hexdigest()
    if actual != expected:
        raise DigestMismatch(what, expected=expected, actual=actual)


def _counted(raw: Iterable[Buffer], what: str, limits: Expansion) -> Iterator[Buffer]:
    total = 0
    for piece in raw:
        total += len(piece)
        if total > limits.total:
            _too_large(what, limits.total)
        yield piece


def _gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join small pieces: an eStargz layer has a gzip member for every file."""
    waiting: list[bytes] = []
    length = 0
    for piece in pieces:
        waiting.append(piece)
        length += len(piece)
        if length >= PIECE // 2:
            yield b"".join(waiting) if len(waiting) > 1 else piece
            waiting.clear()
            length = 0
    if waiting:
        yield b"".join(waiting)


def _members(
    raw: Iterable[Buffer], code: _Codec, name: str, what: str, limits: Expansion
) -> Iterator[bytes]:
    member: _Decompressor | None = None
    began = False
    carried = b""
    taken = made = 0
    stream = iter(raw)
    for piece in stream:
        data: Buffer = carried + bytes(piece) if carried else piece
        carried = b""
        at = 0
        while at < len(data) or (member is not None and not member.needs_input):
            first = member is None
            if member is None:
                at = _next_member(data, at)
                start = bytes(data[at : at + LONGEST_MAGIC])
                if len(start) < LONGEST_MAGIC and _may_begin(name, start):
                    carried = start
                    break
                if codec(start) != name:
                    _drain(stream)
                    return
                member = code.make()
            feed: Buffer = b""
            if member.needs_input:
                # Small at first, because what lies behind a member is copied at its end.
                feed = data[at : at + (_FIRST_FEED if first else _FEED)]
                at += len(feed)
                taken += len(feed)
            out = _step(member, feed, code, name, what)
            made += len(out)
            _check(made, taken, what, name, limits)
            if out:
                yield out
            if member.eof:
                at -= len(member.unused_data)
                taken -= len(member.unused_data)
                member = None
                began = True
    if member is not None or not began or carried:
        raise _damaged(name, what)


def _step(member: _Decompressor, feed: Buffer, code: _Codec, name: str, what: str) -> bytes:
    try:
        return member.decompress(feed, PIECE)
    except code.errors as error:
        raise _damaged(name, what, str(error)) from error


def _next_member(data: Buffer, at: int) -> int:
    """Skip the zeros that pad a member: tapes and the .xz stream padding have them."""
    if at < len(data) and data[at] == 0:
        rest = bytes(data[at:])
        at += len(rest) - len(rest.lstrip(b"\0"))
    return at


def _may_begin(name: str, start: bytes) -> bool:
    return (
        bool(start)
        and codec(start) == "none"
        and any(magic.startswith(start) for magic in _MAGIC[name])
    )


def _drain(stream: Iterable[Buffer]) -> None:
    for _ in stream:
        pass


def _check(made: int, taken: int, what: str, name: str, limits: Expansion) -> None:
    if made > limits.total:
        _too_large(what, limits.total)
    if made > limits.floor and made > taken * limits.ratio:
        raise LimitExceeded(
            f"{what} expands {made // max(taken, 1)} times from its {name} data, "
            f"the limit is {limits.ratio} times once {limits.floor} bytes came out",
            hint="nothing honest compresses like that: do not trust the file",
            blob=what,
            limit=limits.ratio,
        )


def _too_large(what: str, limit: int) -> None:
    raise LimitExceeded(
        f"{what} holds more than {limit} bytes uncompressed", blob=what, limit=limit
    )


def _damaged(name: str, what: str, said: str = "") -> BadArchive:
    return BadArchive(
        f"the {name} data of {what} is damaged or cut" + (f" ({said})" if said else ""),
        hint="the file is incomplete or damaged: fetch or save it again",
        blob=what,
        codec=name,
    )


class _Inflate:
    """A zlib decompressobj (or isal's) with the interface that the other modules have."""

    def __init__(self, inflate: _ZlibObject) -> None:
        self._inflate = inflate
        self._full = False

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def needs_input(self) -> bool:
        return not self._inflate.eof and not self._full and not self._inflate.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    def decompress(self, data: Buffer, max_length: int = -1) -> bytes:
        out = self._inflate.decompress(data or self._inflate.unconsumed_tail, max_length)
        self._full = len(out) == max_length
        return out


class _ZlibObject(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def unconsumed_tail(self) -> bytes: ...
    def decompress(self, data: Buffer, max_length: int = 0, /) -> bytes: ...


def _load(name: str) -> _Codec:
    match name:
        case "gzip":
            return _gzip()
        case "zstd":
            return _zstd()
        case "xz":
            import lzma

            return _Codec(
                lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY),
                (lzma.LZMAError, EOFError),
            )
        case "bzip2":
            import bz2

            return _Codec(bz2.BZ2Decompressor, (OSError, ValueError, EOFError))
        case _:
            raise ValueError(name)


def _gzip() -> _Codec:
    import zlib

    window = 16 + zlib.MAX_WBITS
    try:
        from isal import isal_zlib
    except ImportError:
        return _Codec(lambda: _Inflate(zlib.decompressobj(window)), (zlib.error,))
    # isal's stub has its error class as an instance.
    errors: tuple[Any, ...] = (isal_zlib.error, zlib.error)
    return _Codec(lambda: _Inflate(isal_zlib.decompressobj(window)), errors)


def _zstd() -> _Codec:
    from importlib import import_module

    for module in ("compression.zstd", "backports.zstd"):
        try:
            zstd = import_module(module)
        except ImportError:
            continue
        return _Codec(zstd.ZstdDecompressor, (zstd.ZstdError, EOFError))
    raise HostCannot(
        "this Python has no module that reads zstd",
        hint="python3 -m pip install backports.zstd",
    )

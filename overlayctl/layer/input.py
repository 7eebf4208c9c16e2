"""One input of a command: a file, a stream or a directory, made seekable."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Self

from overlayctl.errors import BadArchive, HostCannot, NotFound, Usage
from overlayctl.kernel import disk
from overlayctl.layer import compression
from overlayctl.layer.compression import PIECE, Buffer, Source, chunks, codec, head

if TYPE_CHECKING:
    from contextlib import ExitStack
    from types import TracebackType

_MODES = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


def what(mode: int) -> str:
    """The kind of a file, in words."""
    return next((words for test, words in _MODES if test(mode)), "something else")


class Closing:
    """What owns open files: leaving the ``with`` closes them. ``where`` is for messages."""

    def __init__(self, where: str, owned: ExitStack) -> None:
        self.where = where
        self._owned = owned

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._owned.close()


class Opened(NamedTuple):
    """An input that can be read at any offset. The fd belongs to the ExitStack it came with."""

    source: Source
    directory: bool


def open_file(path: str, spool: Callable[[], int], owned: ExitStack, *, expand: bool) -> Opened:
    """``path`` (``-`` is standard input) as a seekable source, or as a directory's fd.

    What cannot seek is written to the fd that ``spool`` returns, and with ``expand`` also
    what is compressed, uncompressed then. Raises NotFound, Usage, HostCannot, BadArchive,
    LimitExceeded for a bomb, DiskFull.
    """
    where = "standard input" if path == "-" else path
    fd = _descriptor(path)
    owned.callback(os.close, fd)
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        return Opened(Source(fd, 0, 0, where), directory=True)
    if path == "-" and os.isatty(fd):
        raise Usage("standard input is a terminal", hint="name a file, or pipe one in")
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        start = os.lseek(fd, 0, os.SEEK_CUR)
        source = Source(fd, start, max(0, os.lseek(fd, 0, os.SEEK_END) - start), where)
        os.lseek(fd, start, os.SEEK_SET)
        name = codec(head(source))
        if not expand or name == "none":
            return Opened(source, directory=False)
        return Opened(_spooled(chunks(source), where, spool, owned), directory=False)
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)) and path != "-":
        raise BadArchive(f"{where} is {what(mode)}", hint="name a file or a directory")
    os.set_blocking(fd, True)
    stream = _stream(fd)
    first = b""
    # A pipe may give less than a whole magic number at first.
    while len(first) < compression.LONGEST_MAGIC and (piece := next(stream, b"")):
        first += piece
    pieces = compression.decompressed(
        _chained(first, stream), codec(first) if expand else "none", where
    )
    return Opened(_spooled(pieces, where, spool, owned), directory=False)


def _descriptor(path: str) -> int:
    if path == "-":
        return os.dup(sys.stdin.fileno() if sys.stdin else 0)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotFound(f"{path} does not exist", path=path) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO):
            raise HostCannot(f"{path}: {os.strerror(error.errno)}", path=path) from error
        raise


def _stream(fd: int) -> Iterator[bytes]:
    while piece := os.read(fd, PIECE):
        yield piece


def _chained(first: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


def _spooled(
    pieces: Iterable[Buffer], where: str, spool: Callable[[], int], owned: ExitStack
) -> Source:
    fd = spool()
    owned.callback(os.close, fd)
    at = checked = 0
    for piece in pieces:
        if at >= checked:
            disk.look(fd)
            checked = at + disk.RESERVE // 2
        view = memoryview(piece)
        while view:
            written = os.pwrite(fd, view, at)
            at += written
            view = view[written:]
    return Source(fd, 0, at, where)

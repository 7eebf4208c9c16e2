"""One input of a command: a file, a stream or a directory."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Self

from overlayctl.errors import BadArchive, HostCannot, NotFound, Usage
from overlayctl.layer import compression
from overlayctl.layer.compression import PIECE, Buffer, Source, chunks, codec, head

if TYPE_CHECKING:
    from contextlib import ExitStack
    from types import TracebackType

STDIN = "standard input"

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
    """An input; what is None is what it is not.

    A ``directory`` is an fd, a ``source`` can be read at any offset (their fds belong to the
    ExitStack that they came with), and ``pieces`` come once.
    """

    where: str
    directory: int | None = None
    source: Source | None = None
    pieces: Iterator[Buffer] | None = None


def open_file(path: str, owned: ExitStack, *, expand: bool) -> Opened:
    """``path`` (``-`` is standard input); with ``expand``, the content of what is compressed.

    Raises NotFound, Usage, HostCannot, BadArchive; while the pieces are read, BadArchive and
    LimitExceeded for a bomb.
    """
    where = STDIN if path == "-" else path
    fd = _descriptor(path)
    owned.callback(os.close, fd)
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        return Opened(where, directory=fd)
    if path == "-" and os.isatty(fd):
        raise Usage("standard input is a terminal", hint="name a file, or pipe one in")
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        start = os.lseek(fd, 0, os.SEEK_CUR)
        source = Source(fd, start, max(0, os.lseek(fd, 0, os.SEEK_END) - start), where)
        os.lseek(fd, start, os.SEEK_SET)
        if not expand or codec(head(source)) == "none":
            return Opened(where, source=source)
        return Opened(where, pieces=chunks(source))
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)) and path != "-":
        raise BadArchive(f"{where} is {what(mode)}", hint="name a file or a directory")
    os.set_blocking(fd, True)
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIECE)
    stream = _stream(fd)
    # A pipe may give less than a whole magic number at first.
    first = compression.begun(stream, compression.LONGEST_MAGIC)
    kind = codec(first) if expand else "none"
    return Opened(where, pieces=compression.decompressed(_chained(first, stream), kind, where))


def _descriptor(path: str) -> int:
    if path == "-":
        return os.dup(sys.stdin.fileno() if sys.stdin else 0)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotFound(
                f"{path} does not exist", hint="it is a path of this host", path=path
            ) from error
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

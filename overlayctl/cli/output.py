"""Where a command's bytes go: standard output, or a file that is there only when it is whole."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from overlayctl.errors import NotFound, OverlayctlError, Usage

Write = Callable[[bytes | memoryview], None]


@contextmanager
def opened(path: str) -> Iterator[Write]:
    """A function that writes to the file ``path``, or to standard output for ``-``.

    A regular file is written under another name beside it, and gets its own when the block
    ends without an error: else nothing is left. It is private, or as open as the one that it
    replaces. Raises Usage for a terminal, OverlayctlError for a file that takes no more.
    """
    if path == "-":
        _refuse_terminal(sys.stdout.isatty())
        sys.stdout.flush()
        binary = sys.stdout.buffer
        raw = binary.raw if isinstance(binary, io.BufferedWriter) else binary
        yield _writing(raw, "standard output")
        return
    if not path:
        raise Usage("the name of a file is not empty", hint="-o FILE")
    # Through a symlink, which stays.
    place = os.path.realpath(path)
    try:
        there: os.stat_result | None = os.stat(place)
    except (FileNotFoundError, NotADirectoryError):
        there = None
    except OSError as error:
        raise refused(path, error) from error
    if there is None or stat.S_ISREG(there.st_mode):
        with _replacing(place, there) as file:
            yield _writing(file, path)
    elif stat.S_ISDIR(there.st_mode):
        raise Usage(f"{path} is a directory", hint="-o FILE")
    else:
        with open(os.open(place, os.O_WRONLY | os.O_CLOEXEC), "wb", buffering=0) as file:
            _refuse_terminal(file.isatty())
            yield _writing(file, path)


def _refuse_terminal(terminal: bool) -> None:  # noqa: FBT001
    if terminal:
        raise Usage("a tar is nothing for a terminal", hint="-o FILE, or redirect the output")


@contextmanager
def _replacing(place: str, there: os.stat_result | None) -> Iterator[io.FileIO]:
    directory, name = os.path.split(place)
    try:
        fd, beside = tempfile.mkstemp(dir=directory, prefix=f".{name[:50]}.")
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no directory {directory}", hint=f"mkdir -p {directory}") from None
    except OSError as error:
        raise refused(place, error) from error
    try:
        with open(fd, "wb", buffering=0) as file:
            if there is not None:
                os.fchown(fd, there.st_uid, there.st_gid)
                os.fchmod(fd, stat.S_IMODE(there.st_mode))
            yield file
        os.rename(beside, place)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def _writing(file: IO[bytes] | io.RawIOBase, name: str) -> Write:
    """Writes at once: what a buffer could not write it would try again when it is closed."""

    def write(piece: bytes | memoryview) -> None:
        view = memoryview(piece)
        try:
            while view:
                view = view[file.write(view) or 0 :]
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise refused(name, error) from error

    return write


def refused(path: str, error: OSError, *, what: str = "FILE") -> OverlayctlError:
    """What to raise for a file that cannot be made, or takes no more."""
    return OverlayctlError(
        f"cannot write to {path}: {error.strerror}", hint=f"-o {what} on another filesystem"
    )

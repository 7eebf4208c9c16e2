"""A terminal for a container's process: made on its side, served on the caller's (pty(7))."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import stat
import struct
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from overlayctl.kernel.waiting import drain

_TIOCGPTPEER = 0x5441
_SIZE = "HHHH"


def new() -> tuple[int, int]:
    """The two ends, of the devpts at /dev/pts: the one to serve, and the terminal itself.

    Raises OSError; ENODEV where /dev/ptmx is something else.
    """
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    info = os.fstat(master)
    if not stat.S_ISCHR(info.st_mode) or info.st_rdev != os.makedev(5, 2):
        raise OSError(errno.ENODEV, "no terminal multiplexer", "/dev/ptmx")
    # TIOCSPTLCK: unlocked.
    fcntl.ioctl(master, 0x40045431, struct.pack("i", 0))
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
    os.set_blocking(master, True)
    return master, slave


def take(slave: int) -> None:
    """Make the terminal this process's own, and its standard input and output.

    The process leads a session.
    """
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2):
        os.dup2(slave, fd)


def copy_size(master: int) -> None:
    """Give the terminal the size of the caller's."""
    for fd in (0, 1, 2):
        with suppress(OSError):
            size = fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(struct.calcsize(_SIZE)))
            fcntl.ioctl(master, termios.TIOCSWINSZ, size)
            return


@contextmanager
def raw(fd: int) -> Iterator[None]:
    """Let what is typed pass as it is; afterwards the terminal is as it was."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def serve(master: int, woken: int, again: Callable[[], float | None], *, typed: bool) -> None:
    """Copy between the caller's standard input and output and the terminal, until it hangs up.

    ``typed`` is whether the input counts. A change of the caller's window is passed on.
    ``woken`` and ``again`` are for signals, as ``waiting.end`` has them.
    """
    copy_size(master)
    before = signal.signal(signal.SIGWINCH, lambda *_: copy_size(master))
    source = [0] if typed else []
    try:
        with raw(0):
            while True:
                ready, _, _ = select.select([master, woken, *source], [], [], again())
                if woken in ready:
                    drain(woken)
                if 0 in ready:
                    piece = os.read(0, 1 << 16)
                    if not piece:
                        # The end of the input is a character to a terminal.
                        source, piece = [], b"\x04"
                    _write(master, piece)
                if master in ready:
                    try:
                        piece = os.read(master, 1 << 16)
                    except OSError as error:
                        if error.errno == errno.EIO:  # nobody has it open any more
                            return
                        raise
                    _write(1, piece)
    finally:
        signal.signal(signal.SIGWINCH, before)


def _write(fd: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view) :]

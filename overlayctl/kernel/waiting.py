"""Waiting for a child process while signals are passed on: none is lost between two looks.

Python runs a handler some time after its signal has come, and a system call that begins
meanwhile waits. So what waits is select(2), and each signal writes to a pipe that it looks at.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PASSED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGWINCH,
)  # fmt: skip
"""The signals that a container's process gets in the place of the command."""


@contextmanager
def passing(act: Callable[[int], None]) -> Iterator[int]:
    """Give each signal to ``act``; the value is an fd that can be read when one has come.

    What is ignored stays so. In the main thread alone.
    """
    woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def handle(number: int, _frame: object) -> None:
        with suppress(ProcessLookupError):
            act(number)

    earlier = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    before = {}
    try:
        for number in PASSED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # what nohup has set
                before[number] = signal.signal(number, handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED)
        yield woken
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(earlier)
        os.close(woken)
        os.close(wake)


def drain(woken: int) -> None:
    """Read what signals have written."""
    with suppress(BlockingIOError):
        os.read(woken, 1 << 12)


def end(child: int, woken: int, again: Callable[[], float | None] = lambda: None) -> int:
    """Wait for the end of a child; its exit status, as a shell has it.

    ``again`` is called whenever a signal has come, and after as many seconds as it returns.
    """
    fd = os.pidfd_open(child)
    try:
        while fd not in select.select([fd, woken], [], [], again())[0]:
            drain(woken)
    finally:
        os.close(fd)
    return exit_status(os.waitpid(child, 0)[1])


def exit_status(status: int) -> int:
    """What a shell makes of a wait status: 128 and the number for a signal."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def killing(child: int) -> Callable[[object, object, object], bool]:
    """What a context calls when it is left: if by an exception, the child is killed first."""
    fd = os.pidfd_open(child)

    def leave(kind: object, _error: object, _traceback: object) -> bool:
        with suppress(ProcessLookupError, ChildProcessError):
            if kind is not None:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                os.waitpid(child, 0)
        os.close(fd)
        return False

    return leave

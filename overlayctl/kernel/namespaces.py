"""Processes in namespaces of their own: started there, known again, entered, and ended.

A process that is the first of a pid namespace takes every other one there with it, by the
kernel's hand (pid_namespaces(7)). So what ends with its parent is such a process.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple, NoReturn

from overlayctl.kernel import libc, mounttable
from overlayctl.kernel.waiting import PASSED

# What a program, and what it is made of, may lie on.
_PROGRAMS = (
    "/bin", "/dev", "/etc", "/gnu", "/lib", "/lib32", "/lib64", "/libx32", "/nix", "/opt", "/proc",
    "/sbin", "/sys", "/usr",
)  # fmt: skip
_KINDS = {
    "cgroup": libc.CLONE_NEWCGROUP,
    "ipc": libc.CLONE_NEWIPC,
    "uts": libc.CLONE_NEWUTS,
    "net": libc.CLONE_NEWNET,
    "pid": libc.CLONE_NEWPID,
    "mnt": libc.CLONE_NEWNS,
}
"""The namespaces of a process in the order in which they are entered."""


class Known(NamedTuple):
    """A process that is not taken for a later one of its number; ``start`` in clock ticks."""

    pid: int
    start: int


def known(pid: int) -> Known | None:
    """The process of that number; None if there is none, or it has ended.

    One whose first thread has ended, and others not, still lives.
    """
    fields = _fields(pid)
    over = not fields or (fields[0] in (b"Z", b"X") and int(fields[17]) <= 1)
    return None if over else Known(pid, int(fields[19]))


def _fields(pid: int) -> list[bytes]:
    """What proc_pid_stat(5) has from the state on; nothing if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def ended(process: Known, timeout: float) -> bool:
    """Wait for the end of a process, seconds at most; whether it has ended.

    With the first process of a pid namespace all the others have ended, too. Its state does not
    tell: a process of several threads is a zombie when the first one of them has ended.
    """
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        fields = _fields(process.pid)
        if not fields or int(fields[19]) != process.start:
            return True
        return bool(select.select([fd], [], [], timeout)[0])
    finally:
        os.close(fd)


def send(process: Known, number: int) -> None:
    """Send a signal to that process and to no other."""
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(process.pid)
        try:
            if known(process.pid) == process:
                signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)


def start(act: Callable[[], NoReturn], *, alone: bool, keep: Iterable[int]) -> int:
    """Let a new process ``act``; its pid. It ends with this one, killed, whatever happens.

    ``alone`` has it be the first of a new pid namespace. Of the open files it gets the
    standard ones and ``keep``. The signals that are passed on wait until it says ``listen``.
    """
    # Nothing that is still in a buffer is written twice.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    parent = os.pidfd_open(os.getpid())
    # No handler of this process may run in the new one.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED)
    child = -1
    try:
        child = _fork_alone() if alone else os.fork()
    finally:
        if child:
            os.close(parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if child:
        return child
    try:
        libc.die_with_parent(signal.SIGKILL)
        # It may have ended before that; in another pid namespace it has no number.
        if not select.select([parent], [], [], 0)[0]:
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python
                signal.signal(number, signal.SIG_DFL)
            for number in PASSED:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            _close_all_but(keep)
            act()
    finally:
        # Nothing of the parent's may run in here.
        os._exit(125)


def listen() -> None:
    """Let the signals come that have waited since this process was started."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED)


def _fork_alone() -> int:
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc.unshare(libc.CLONE_NEWPID)
        child = -1
        try:
            child = os.fork()
        finally:
            if child:
                libc.setns(own, libc.CLONE_NEWPID)
        return child
    finally:
        os.close(own)


def _close_all_but(keep: Iterable[int]) -> None:
    last = 2
    for fd in sorted(keep):
        os.closerange(last + 1, fd)
        last = max(last, fd)
    os.closerange(last + 1, 1 << 20)


class _Nothing:
    """An importer that finds nothing."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> NoReturn:
        raise ImportError(f"{name} is not loaded yet, and from here on cannot be")


def import_nothing() -> None:
    """From here on no module is loaded: the paths of programs lead to files of others."""
    sys.meta_path[:] = [_Nothing()]


def own_mounts() -> None:
    """Give this process mounts of its own; those of a new pid namespace need their own /proc."""
    libc.unshare(libc.CLONE_NEWNS)
    libc.make_private("/")


def let_go(needed: Iterable[str] | None, above: str) -> None:
    """Unmount here all that programs do not need: it must be free to go where it was mounted.

    What is at or below ``needed`` paths stays, and what ``above`` lies on. For None all but
    what stores have mounted stays.
    """
    kept = ("",) if needed is None else (*_PROGRAMS, *needed)
    for mount in reversed(mounttable.read()):
        point = mount.mount_point
        inside = point.rstrip("/") + "/"
        ours = mount.source.startswith("overlayctl:")
        wanted = any(
            inside.startswith(f"{path}/") or f"{path}/".startswith(inside) for path in kept
        )
        if point != "/" and (ours or not wanted) and not above.startswith(inside):
            # What lay on one that is gone is gone with it.
            with suppress(OSError):
                libc.umount2(point, libc.MNT_DETACH | libc.UMOUNT_NOFOLLOW)


def enter(proc: str) -> None:
    """Enter the namespaces of a process, given by its directory in a /proc.

    Only children of this one come into its pid namespace. Raises ProcessLookupError if it
    has ended.
    """
    opened = []
    try:
        for kind, flag in _KINDS.items():
            with suppress(FileNotFoundError):
                fd = os.open(f"{proc}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
                opened.append((fd, flag))
        if len(opened) < len(_KINDS) - 1:
            raise ProcessLookupError(errno.ESRCH, "it has ended", proc)
        for fd, flag in opened:
            libc.setns(fd, flag)
    finally:
        for fd, _ in opened:
            os.close(fd)

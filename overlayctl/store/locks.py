"""The locks: flock(2) on directories, waited for in one order: upper, snapshot, root.

A directory needs no lock file, and can be locked on a read-only filesystem. After the
lock is had, the directory must still be the one at the path: it may have been removed
by whoever had the lock before.

The kernel gives a shared lock to whoever asks while another has it shared, so that two processes
which list in turns would keep a third from ever writing. Who wants the root therefore waits for it
at a turnstile, the lock on ``ingest/``: behind one that waits exclusively, nobody overtakes.

The lock on an upper is shared by the processes that run in the container. Exclusively it
is only tried, so that may come after the other locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from overlayctl.errors import Holder, Locked, NotFound

# Most holds are shorter than a millisecond, some last long: what waits looks ever less often.
_POLL, _POLL_MAX = 0.0005, 0.02
TIMEOUT = 30.0
_UNSEEN = [Holder("a process", "not visible here", "")]


@contextmanager
def hold(
    path: str, *, exclusive: bool, timeout: float = TIMEOUT, turnstile: str | None = None
) -> Iterator[int]:
    """Hold the lock on the directory ``path``; the value is its fd.

    ``turnstile`` is a directory whose lock is held while waiting. Raises Locked naming the
    holder after ``timeout`` seconds, NotFound if it is gone.
    """
    deadline = time.monotonic() + timeout
    while True:
        fd = _open(path)
        try:
            with ExitStack() as waiting:
                if turnstile is not None:
                    with suppress(NotFound):
                        gate = _open(turnstile)
                        waiting.callback(os.close, gate)
                        _acquire(gate, path, fd, exclusive=exclusive, deadline=deadline)
                _acquire(fd, path, fd, exclusive=exclusive, deadline=deadline)
            if _still_at(fd, path):
                yield fd
                return
        finally:
            os.close(fd)


@contextmanager
def attempt(path: str) -> Iterator[list[Holder]]:
    """Try for the exclusive lock without waiting; the value is who has it, nobody if we do.

    Raises NotFound if the directory is gone.
    """
    while True:
        fd = _open(path)
        try:
            taken = _try(fd, fcntl.LOCK_EX)
            if not taken or _still_at(fd, path):
                yield [] if taken else _holders(fd) or _UNSEEN
                return
        finally:
            os.close(fd)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"{path} is gone") from None


def _acquire(fd: int, path: str, named: int, *, exclusive: bool, deadline: float) -> None:
    """Lock ``fd``. Raises Locked naming who has ``named``, the directory at ``path``."""
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    pause = _POLL
    while not _try(fd, kind):
        if time.monotonic() >= deadline:
            # Who waits at the turnstile waits for who has the directory, mostly.
            holders = _holders(named) or _holders(fd) or _UNSEEN
            told = ", ".join(f"{holder.kind} {holder.name}" for holder in holders)
            raise Locked(
                f"{path} is locked by {told}",
                hint="wait for it, or give --lock-timeout SECONDS",
                path=path,
                holders=[holder._asdict() for holder in holders],
            )
        time.sleep(pause)
        pause = min(2 * pause, _POLL_MAX)


def _try(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            return False
        raise
    return True


def _still_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def sharers(path: str) -> list[Holder]:
    """The processes that have the directory's lock shared; nobody where it is gone."""
    with suppress(NotFound):
        fd = _open(path)
        try:
            return _holders(fd, ("READ",))
        finally:
            os.close(fd)
    return []


def shared() -> set[int]:
    """The inodes of everything whose lock somebody has shared, on whatever filesystem."""
    return {inode for _, kind, inode in _flocks() if kind == "READ"}


def _flocks() -> Iterator[tuple[str, str, int]]:
    """Pid, READ or WRITE, and inode of each lock of flock(2) on the machine (proc_locks(5)).

    The file leaves out the processes that have no number in this pid namespace.
    """
    lines: list[str] = []
    with suppress(FileNotFoundError, PermissionError), open("/proc/locks") as file:
        lines = file.readlines()
    for line in lines:
        # A waiter's line has "->" there.
        fields = line.split()
        if fields[1] == "FLOCK":
            yield fields[4], fields[3], int(fields[5].rpartition(":")[2])


def _holders(fd: int, kinds: tuple[str, ...] = ("READ", "WRITE")) -> list[Holder]:
    """Who holds a lock on the inode of ``fd``."""
    wanted = os.fstat(fd).st_ino
    found = []
    for pid, kind, inode in _flocks():
        # The device in the file is the superblock's, which on btrfs is not what stat gives:
        # so the process's descriptors decide.
        if kind in kinds and inode == wanted and _has(pid, fd):
            with (
                suppress(FileNotFoundError, ProcessLookupError),
                open(f"/proc/{pid}/comm", errors="replace") as comm,
            ):
                name = f"{pid} ({comm.read().strip()})"
                found.append(Holder("process", name, f"kill {pid}"))
    return found


def _has(pid: str, fd: int) -> bool:
    """Whether the process has the directory of ``fd`` open."""
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), os.fstat(fd)):
                    return True
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return False

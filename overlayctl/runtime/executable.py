"""Whether a container has a command, as far as its tree tells, before a runtime is asked.

A runtime tells what it could not execute in words of its own, in the middle of the command's
output. So what is certain is told here.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import TYPE_CHECKING

from overlayctl.kernel import libc
from overlayctl.runtime import builtin

if TYPE_CHECKING:
    from overlayctl.runtime.bundle import Process

_ELSEWHERE = ("/dev/", "/proc/", "/sys/")
# EM_X86_64 executes EM_386 as well, EM_AARCH64 EM_ARM.
_ALSO = {62: 3, 183: 40}


def refuse_missing(root: int, process: Process) -> None:
    """Raise CommandNotFound, CannotExecute where that is certain; ``root`` is an fd of the tree.

    Nothing but the usual filesystems may be mounted in it: a command may lie on what is.
    """
    word = process.words[0]
    path = next((one[5:] for one in process.environment if one.startswith("PATH=")), "")
    if "/" in word:
        places = [os.path.join(process.directory, word)]
    else:
        places = [os.path.join(process.directory, one, word) for one in path.split(":")]
    denied = False
    for place in places:
        try:
            fd = _open(root, place)
        except FileNotFoundError:
            continue
        if fd is None:
            return
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode) and mode & 0o111:
                _refuse_no_program(root, fd, word)
                return
        finally:
            os.close(fd)
        denied = True
    if denied:
        raise builtin.not_executed(word, os.strerror(errno.EACCES))
    raise builtin.not_executed(
        word, os.strerror(errno.ENOENT), FileNotFoundError(errno.ENOENT, word)
    )


def _refuse_no_program(root: int, fd: int, word: str) -> None:
    """Raise CannotExecute for a file that no kernel of this machine executes (execve(2)).

    Where others were registered (binfmt_misc), that cannot be told.
    """
    with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as file:
        start = file.read(256)
    if start.startswith(b"#!"):
        interpreter = os.fsdecode(b"".join(start[2:].split(b"\n")[0].split()[:1]))
        try:
            found = _open(root, os.path.join("/", interpreter))
        except FileNotFoundError as error:
            raise builtin.not_executed(
                word, f"its interpreter {interpreter} is not there", error
            ) from None
        if found is not None:
            os.close(found)
    elif not _may_be_known(start) and not _others_are_registered():
        raise builtin.not_executed(word, os.strerror(errno.ENOEXEC))


def _may_be_known(start: bytes) -> bool:
    """Whether it is a program, and of this machine (elf(5))."""
    if not start.startswith(b"\x7fELF"):
        return False
    with open("/proc/self/exe", "rb") as file:
        own = int.from_bytes(file.read(20)[18:], sys.byteorder)
    its = int.from_bytes(start[18:20], sys.byteorder)
    return its in {own, _ALSO.get(own)}


def _others_are_registered() -> bool:
    try:
        return bool(set(os.listdir("/proc/sys/fs/binfmt_misc")) - {"register", "status"})
    except OSError:
        return False


def _open(root: int, place: str) -> int | None:
    """An O_PATH fd of what is there; None where that cannot be told. Raises FileNotFoundError."""
    if place.startswith(_ELSEWHERE):
        return None
    rules = libc.RESOLVE_IN_ROOT | libc.RESOLVE_NO_MAGICLINKS
    try:
        return libc.openat2(root, place, os.O_PATH, resolve=rules)
    except (FileNotFoundError, NotADirectoryError):
        if _leads_elsewhere(root, place):
            return None
        raise FileNotFoundError(errno.ENOENT, "not there", place) from None
    except OSError:
        return None


def _leads_elsewhere(root: int, place: str) -> bool:
    """Whether it is a symlink: it may lead to what is mounted there later."""
    above, _, name = place.rpartition("/")
    try:
        fd = libc.openat2(root, above or "/", os.O_PATH, resolve=libc.RESOLVE_IN_ROOT)
    except OSError:
        return False
    try:
        return stat.S_ISLNK(os.lstat(name, dir_fd=fd).st_mode)
    except OSError:
        return False
    finally:
        os.close(fd)

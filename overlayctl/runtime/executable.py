"""Whether a container has a command, as far as its tree tells, before a runtime is asked.

A runtime tells what it could not execute in words of its own, in the middle of the command's
output. So what is certain is told here.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from overlayctl.kernel import libc
from overlayctl.runtime import builtin

if TYPE_CHECKING:
    from overlayctl.runtime.bundle import Process

_ELSEWHERE = ("/dev/", "/proc/", "/sys/")


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
            mode = _mode(root, place)
        except FileNotFoundError:
            continue
        if mode is None or (stat.S_ISREG(mode) and mode & 0o111):
            return
        denied = True
    if denied:
        raise builtin.not_executed(word, os.strerror(errno.EACCES))
    raise builtin.not_executed(
        word, os.strerror(errno.ENOENT), FileNotFoundError(errno.ENOENT, word)
    )


def _mode(root: int, place: str) -> int | None:
    """The mode of what is there; None where that cannot be told. Raises FileNotFoundError."""
    if place.startswith(_ELSEWHERE):
        return None
    rules = libc.RESOLVE_IN_ROOT | libc.RESOLVE_NO_MAGICLINKS
    try:
        fd = libc.openat2(root, place, os.O_PATH, resolve=rules)
    except (FileNotFoundError, NotADirectoryError):
        if _leads_elsewhere(root, place):
            return None
        raise FileNotFoundError(errno.ENOENT, "not there", place) from None
    except OSError:
        return None
    try:
        return os.fstat(fd).st_mode
    finally:
        os.close(fd)


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

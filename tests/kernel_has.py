"""What the kernel that the tests run on can do: asked with bare system calls, never by version.

For tests that expect something else where it cannot; ``overlayctl.kernel.probe`` is the program's
own way to find out, and is among what they test.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from overlayctl.kernel import libc
from overlayctl.mount import Rung


def erofs_from(image: str) -> bool:
    """Whether this kernel mounts an EROFS image that is a file, here where it lies."""
    context = libc.fsopen("erofs")
    try:
        libc.fsconfig_string(context, "source", image)
        libc.fsconfig_create(context)
    except OSError as error:
        if error.errno != errno.ENOTBLK:
            raise
        return False
    finally:
        os.close(context)
    return True


def rung() -> Rung:
    """The first way of giving layers to overlayfs that this kernel has."""
    context = libc.fsopen("overlay")
    here = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            libc.fsconfig_fd(context, "lowerdir+", here)
            return "fds"
        with suppress(OSError):
            # Before 6.5 nothing is looked at until the superblock is made.
            libc.fsconfig_string(context, "unknown", "/")
            return "mount"
        with suppress(OSError):
            libc.fsconfig_string(context, "lowerdir+", "/")
            return "strings"
        return "mount"
    finally:
        os.close(here)
        os.close(context)


def options_of(path: str) -> bool:
    """Whether statmount(2) has the options of the mount that ``path`` lies on."""
    fd = os.open(path, os.O_PATH)
    try:
        return "upperdir" in libc.mount_options(libc.mount_id(fd))
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOENT, errno.EINVAL):
            raise
        return False
    finally:
        os.close(fd)


def shown(upper: str) -> str:
    """How the mount table shows an upper: before 6.13 as it was given, every backslash twice."""
    return upper if rung() == "fds" else upper.replace("\\", "\\\\")


def user_xattrs(directory: Path) -> bool:
    """Whether files there can have attributes of users: on tmpfs since 6.6."""
    try:
        os.setxattr(directory, "user.probe", b"")
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    os.removexattr(directory, "user.probe")
    return True

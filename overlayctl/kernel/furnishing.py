"""A container's root, furnished by system calls with filesystems and files, and then entered.

Every place is found below the root's descriptor and nowhere else, and what is mounted goes to
the descriptor that was found: no path leads there a second time.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from contextlib import suppress

from overlayctl.kernel import libc

STRICT = libc.MOUNT_ATTR_NOSUID | libc.MOUNT_ATTR_NODEV | libc.MOUNT_ATTR_NOEXEC
_INSIDE = libc.RESOLVE_IN_ROOT | libc.RESOLVE_NO_MAGICLINKS
_NODES = {
    "null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9),
    "tty": (5, 0),
}  # fmt: skip
_LINKS = {
    "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx",
}  # fmt: skip


def place(root: int, path: str, *, directory: bool) -> int:
    """An O_PATH fd of ``path`` below ``root``, made where it is missing, with what leads there.

    Symlinks are followed inside. Raises OSError: ENOENT for a symlink that leads nowhere.
    """
    wanted = os.O_PATH | (os.O_DIRECTORY if directory else 0)
    names = [name for name in path.split("/") if name not in {"", "."}]
    try:
        return libc.openat2(root, "/".join(names) or ".", wanted, resolve=_INSIDE)
    except FileNotFoundError:
        above = place(root, "/".join(names[:-1]), directory=True)
    try:
        with suppress(FileExistsError):
            if directory:
                os.mkdir(names[-1], 0o755, dir_fd=above)
            else:
                mode = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                os.close(os.open(names[-1], mode, 0o644, dir_fd=above))
        return libc.openat2(above, names[-1], wanted, resolve=_INSIDE | libc.RESOLVE_NO_SYMLINKS)
    finally:
        os.close(above)


def mount_at(root: int, path: str, mount: int) -> None:
    """Attach the detached ``mount`` at ``path`` below ``root``; what it shows must fit there."""
    target = place(root, path, directory=stat.S_ISDIR(os.fstat(mount).st_mode))
    try:
        libc.move_mount(mount, target)
    finally:
        os.close(target)


def new(kind: str, options: Mapping[str, str | None], attributes: int) -> int:
    """An fd of a new filesystem of that kind, mounted nowhere yet."""
    context = libc.fsopen(kind)
    try:
        libc.fsconfig_string(context, "source", kind)
        for name, value in options.items():
            if value is None:
                libc.fsconfig_flag(context, name)
            else:
                libc.fsconfig_string(context, name, value)
        libc.fsconfig_create(context)
        return libc.fsmount(context, attributes)
    finally:
        os.close(context)


def mount_new(
    root: int, path: str, kind: str, options: Mapping[str, str | None], attributes: int
) -> None:
    """Mount a new filesystem at ``path`` below ``root``."""
    mount = new(kind, options, attributes)
    try:
        mount_at(root, path, mount)
    finally:
        os.close(mount)


def mount_copy(root: int, path: str, source: str | int, *, read_only: bool = False) -> None:
    """Mount what ``source`` is, and all that is mounted below it, at ``path`` below ``root``."""
    mount = libc.open_tree(source, clone=True, recursive=True)
    try:
        if read_only:
            libc.mount_setattr(mount, add=libc.MOUNT_ATTR_RDONLY, recursive=True)
        mount_at(root, path, mount)
    finally:
        os.close(mount)


def furnish(root: int) -> None:
    """Mount what every program expects: /proc of this pid namespace, /sys read-only, /dev.

    Raises OSError.
    """
    mount_new(root, "proc", "proc", {}, STRICT)
    mount_new(root, "sys", "sysfs", {}, STRICT | libc.MOUNT_ATTR_RDONLY)
    devices = new("tmpfs", {"mode": "0755", "size": "64m"}, libc.MOUNT_ATTR_NOSUID)
    try:
        before = os.umask(0)
        for name, (major, minor) in _NODES.items():
            os.mknod(name, stat.S_IFCHR | 0o666, os.makedev(major, minor), dir_fd=devices)
        os.umask(before)
        for name, target in _LINKS.items():
            os.symlink(target, name, dir_fd=devices)
        mount_at(root, "dev", devices)
    finally:
        os.close(devices)
    options = {"newinstance": None, "ptmxmode": "0666", "mode": "0620", "gid": "5"}
    unrunnable = libc.MOUNT_ATTR_NOSUID | libc.MOUNT_ATTR_NOEXEC
    mount_new(root, "dev/pts", "devpts", options, unrunnable)
    mount_new(root, "dev/shm", "tmpfs", {"mode": "1777", "size": "64m"}, STRICT)
    mount_new(root, "dev/mqueue", "mqueue", {}, STRICT)


def protect(root: int, path: str) -> None:
    """Make ``path`` below ``root`` read-only, if it is there."""
    try:
        fd = libc.openat2(root, path.lstrip("/"), os.O_PATH, resolve=_INSIDE)
    except FileNotFoundError:
        return
    try:
        mount_copy(root, path, fd, read_only=True)
    finally:
        os.close(fd)


def mask(root: int, path: str) -> None:
    """Let ``path`` below ``root``, if it is there, show nothing: no entry, or no byte."""
    try:
        fd = libc.openat2(root, path.lstrip("/"), os.O_PATH, resolve=_INSIDE)
    except FileNotFoundError:
        return
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            mount = new("tmpfs", {}, STRICT | libc.MOUNT_ATTR_RDONLY)
        else:
            null = place(root, "dev/null", directory=False)
            mount = libc.open_tree(null, clone=True)
            os.close(null)
        try:
            libc.move_mount(mount, fd)
        finally:
            os.close(mount)
    finally:
        os.close(fd)


def enter(root: int) -> None:
    """Make the mount that ``root`` is the root of this process's namespace, and go there."""
    os.fchdir(root)
    libc.pivot_root()
    os.chdir("/")


def directory(path: str) -> None:
    """Go to a directory of the root that this process is in, made if it is missing.

    Raises OSError.
    """
    os.chdir("/")
    for name in filter(None, path.split("/")):
        try:
            os.chdir(name)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(name, 0o755)
            os.chdir(name)


def is_missing(error: OSError) -> bool:
    """Whether what was to be executed is not there; else it cannot be executed."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR)

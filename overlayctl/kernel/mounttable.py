"""The mount table: /proc/PID/mountinfo as values (proc_pid_mountinfo(5))."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from overlayctl.kernel import libc

_ESCAPE = re.compile(rb"\\([0-7]{3})")


class MountInfo(NamedTuple):
    """One line. Paths and options are as they are, nothing escaped."""

    mount_id: int
    parent_id: int
    device: str
    root: str
    mount_point: str
    options: str
    fs_type: str
    source: str
    super_options: str

    def option(self, key: str) -> list[str]:
        """The values of a filesystem option; ``lowerdir+`` has one for each layer."""
        values = []
        for field in self.super_options.split(","):
            name, _, value = field.partition("=")
            if name == key:
                values.append(_plain(os.fsencode(value)))
        return values


def read(pid: int | str = "thread-self") -> list[MountInfo]:
    """The mounts that ``pid`` sees, or this thread, oldest first at each place.

    Raises OSError where the process is gone or may not be looked at.
    """
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return [_parse(line) for line in file.read().split(b"\n") if line]


def at(path: str) -> MountInfo | None:
    """The mount whose root is visible at ``path``; None if none is, or a link lies there.

    The kernel is asked: the table also lists what other mounts cover, and its order is
    that in which mounts were made, not in which they lie on one another.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if not libc.is_mount_root(fd):
            return None
        wanted = libc.table_id(fd)
    finally:
        os.close(fd)
    return next((mount for mount in read() if mount.mount_id == wanted), None)


def below(prefix: str) -> list[MountInfo]:
    """The mounts at ``prefix`` and deeper, in this namespace; ``prefix`` is absolute, resolved."""
    inside = prefix.rstrip("/") + "/"
    return [m for m in read() if m.mount_point == prefix or m.mount_point.startswith(inside)]


def everywhere() -> Iterator[tuple[int, MountInfo]]:
    """Every mount of every mount namespace that can be read, once, with a pid that sees it.

    A process with another root (chroot(2)) is told only what lies below that, so one for each
    root is asked, who sees most first.
    """
    found: dict[str, dict[tuple[int, int], tuple[int, list[MountInfo]]]] = {}
    for name in ["self", *sorted(filter(str.isdigit, os.listdir("/proc")), key=int)]:
        try:
            tables = found.setdefault(os.readlink(f"/proc/{name}/ns/mnt"), {})
            root = libc.place_at(f"/proc/{name}/root")
            if root not in tables:
                pid = os.getpid() if name == "self" else int(name)
                tables[root] = (pid, read(name))
        except OSError as error:
            # EINVAL: a process that is ending has no namespace any more.
            if error.errno not in (
                errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM, errno.EINVAL
            ):  # fmt: skip
                raise
    for tables in found.values():
        seen: set[int] = set()
        for pid, mounts in sorted(
            tables.values(), key=lambda asked: (asked[0] != os.getpid(), -len(asked[1]))
        ):
            yield from ((pid, mount) for mount in mounts if mount.mount_id not in seen)
            seen.update(mount.mount_id for mount in mounts)


def sees_all() -> bool:
    """Whether every process is visible here, and so every mount namespace that one is in."""
    # The first pid namespace (include/linux/proc_ns.h, PROC_PID_INIT_INO).
    return os.readlink("/proc/self/ns/pid") == "pid:[4026531836]"


def _parse(line: bytes) -> MountInfo:
    left, _, right = line.partition(b" - ")
    mount_id, parent_id, device, root, point, options = left.split(b" ")[:6]
    fs_type, source, super_options = [*right.split(b" "), b"", b""][:3]
    return MountInfo(
        int(mount_id),
        int(parent_id),
        device.decode(),
        _plain(root),
        _plain(point),
        options.decode(),
        fs_type.decode(),
        _plain(source),
        # Commas inside a value are escaped: undone by option(), after the split.
        os.fsdecode(super_options),
    )


def _plain(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))

"""Who keeps a mount busy, and whether a directory already belongs to a live overlay."""

from __future__ import annotations

import errno
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeVar

from overlayctl.errors import Holder, InUse, KernelRefused
from overlayctl.kernel import libc, mounttable

_T = TypeVar("_T")
UNSEEN = Holder("an overlay", "that cannot be seen from here", "")
"""Who has a directory that no mount table shows. It may be about to go."""
# What a process that ends, or that we may not look at, answers.
_GONE = (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM)

NO_RIGHT = (
    "mounting needs CAP_SYS_ADMIN and a seccomp profile that allows it: run as root, "
    "or start the container with --privileged"
)
"""What to do where the kernel says EPERM to a mount."""


def upper_in_use(path: str) -> bool:
    """Whether ``path`` is the upperdir or workdir of a live overlay in any mount namespace.

    An overlay whose upper is also its workdir is never mounted: the kernel says EBUSY if
    the directory has an owner, else EINVAL, before it touches anything. It leaves an error
    in the kernel log. Raises KernelRefused where the question cannot be asked.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelRefused("open", path, error.errno or errno.EIO) from error
    name = f"/proc/self/fd/{fd}"
    options = f"lowerdir={name},upperdir={name},workdir={name},index=on"
    try:
        libc.mount("overlayctl:probe", path, "overlay", options.encode())
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        if error.errno == errno.EINVAL:
            return False
        number = error.errno or errno.EIO
        hint = NO_RIGHT if number == errno.EPERM else ""
        raise KernelRefused("mount overlay", path, number, hint=hint) from error
    finally:
        os.close(fd)
    libc.umount2(path, libc.UMOUNT_NOFOLLOW | libc.MNT_DETACH)
    return False


def patiently(act: Callable[[], _T], seconds: float = 1.0) -> _T:
    """What ``act`` returns; while an overlay that nobody sees is in its way, it is tried again.

    With a process that has just ended its mounts go, but a moment later: the kernel leaves
    what an ending process unmounts last to a worker (fs/namespace.c, mntput_no_expire).
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return act()
        except InUse as error:
            if UNSEEN not in error.holders or time.monotonic() > until:
                raise
        time.sleep(0.01)


def refuse_used(uppers: Sequence[str]) -> None:
    """Raise InUse, naming the overlays, if a live one has one of these directories.

    One that is gone is nobody's.
    """
    for path in uppers:
        if os.path.isdir(path) and upper_in_use(path):
            raise InUse(path, _overlays_on(os.path.realpath(path)))


def refuse_mounts(path: str, *, but: str = "") -> None:
    """Raise InUse, naming them, if anything is mounted below ``path``, but for below ``but``.

    A deletion would not stop there, and delete what is another's. ``path`` is resolved.
    """
    inside = f"{but}/" if but else "\0"
    found = [
        Holder("mount", mount.mount_point, f"umount {shlex.quote(mount.mount_point)}")
        for mount in mounttable.below(path)
        if mount.mount_point != path and not f"{mount.mount_point}/".startswith(inside)
    ]
    if found:
        raise InUse(path, found)


def refuse_lowers(root: str, names: AbstractSet[str]) -> None:
    """Raise InUse if an overlay has one of these layers of the store at ``root`` below it.

    Of anyone who gave its diff path to mount(8): of an unpacked layer nothing would be left.
    """
    inside = f"{root}/"
    holders = [
        Holder("the overlay", f"at {m.mount_point} (seen by process {pid})", "")
        for pid, m in mounttable.everywhere()
        if m.fs_type == "overlay"
        and any(
            not names.isdisjoint(path.split("/"))
            for option in m.option("lowerdir") + m.option("lowerdir+")
            for path in option.split(":")
            if path.startswith(inside) or not path.startswith("/")
        )
    ]
    if holders:
        raise InUse(f"layer {min(names)[:12]}", holders)


def _overlays_on(path: str) -> list[Holder]:
    # Given by name, before 6.13, it is shown as it was given: every backslash twice.
    shown = {path, path.replace("\\", "\\\\")}
    return [
        Holder("the overlay", f"at {m.mount_point} (seen by process {pid})", "")
        for pid, m in mounttable.everywhere()
        if m.fs_type == "overlay"
        and not shown.isdisjoint(m.option("upperdir") + m.option("workdir"))
    ] or [UNSEEN]


def users(target: str) -> list[Holder]:
    """The processes and mounts for which the mount at ``target`` cannot go.

    A working directory, root, program, open file or mapping on that very mount. Copies of
    it in other mount namespaces have other ids, and their users are not in the way.
    """
    fd = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        wanted = libc.table_id(fd)
    finally:
        os.close(fd)
    found = [
        Holder("mount", m.mount_point, f"umount {m.mount_point}")
        for m in mounttable.read()
        if m.parent_id == wanted
    ]
    for pid in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        link = next((link for link in _links(pid) if _lies_on(link, wanted)), None)
        if link is None:
            continue
        try:
            inside = os.readlink(link)
            with open(f"/proc/{pid}/comm", errors="surrogateescape") as file:
                name = file.read().rstrip("\n")
        except OSError as error:
            if error.errno in _GONE:
                continue
            raise
        release = f"kill {pid}" if int(pid) != os.getpid() else ""
        found.append(Holder("process", f"{pid} ({name}: {inside})", release))
    return found


def _lies_on(link: str, wanted: int) -> bool:
    """Whether a magic link of /proc leads to the mount: a path could be another namespace's."""
    try:
        return libc.table_id_at(link) == wanted
    except OSError as error:
        # EIO and the like: the file of a filesystem in trouble is not ours.
        if error.errno in (*_GONE, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT):
            return False
        raise


def _links(pid: str) -> Iterator[str]:
    yield from (f"/proc/{pid}/{name}" for name in ("cwd", "root", "exe"))
    for directory in ("fd", "map_files"):
        try:
            names = os.listdir(f"/proc/{pid}/{directory}")
        except OSError as error:
            if error.errno in _GONE:
                continue
            raise
        yield from (f"/proc/{pid}/{directory}/{name}" for name in names)

"""What an image has where a new volume is mounted, copied into that volume: once, or not at all."""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING

from overlayctl.kernel import libc, mounttable, places
from overlayctl.layer import copy
from overlayctl.layer.attributes import is_carried
from overlayctl.store import staging, volumes

if TYPE_CHECKING:
    from overlayctl.runtime.targets import Targets
    from overlayctl.store.opened import Store


def fill(store: Store, name: str, targets: Targets, path: bytes) -> None:
    """Fill the volume with what the container's own tree has at ``path``, resolved.

    Its owner, mode and xattrs go with it. Only a volume that we made and that was never filled
    nor written in, and that nobody has at the moment (``hold``, or by a mount of their own). The
    copy is made and synced in staging, then renamed over the empty directory under the store's
    lock: of two at once one counts. Raises DiskFull, OSError naming the file.
    """
    layout = store.layout
    if not volumes.is_fresh(layout, name):
        return
    try:
        above, last = targets.open_parent(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        if not _has_content(above, last):
            return
        with staging.staging(layout) as own:
            staged = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                copy.copy_tree(above, last, staged, b"_data")
                libc.syncfs(staged)
            finally:
                os.close(staged)
            with store.deciding(), ExitStack() as held:
                if (
                    volumes.is_fresh(layout, name)
                    and _take(layout.volume(name), fcntl.LOCK_EX, held)
                    and not _is_seen(volumes.data(layout, name))
                ):
                    volumes.fill(layout, name, os.path.join(own, "_data"))
    finally:
        os.close(above)


def hold(store: Store, name: str, lives: ExitStack) -> None:
    """While ``lives``, nobody fills the volume: who uses it would not see the new directory."""
    place = store.layout.volume(name)
    if volumes.is_fresh(store.layout, name):
        with store.locked(exclusive=False):
            if volumes.is_fresh(store.layout, name):
                _take(place, fcntl.LOCK_SH, lives)


def _take(path: str, kind: int, held: ExitStack) -> bool:
    """Whether the lock on the directory could be had, which is then held."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    held.callback(os.close, fd)
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_content(above: int, name: bytes) -> bool:
    """Whether a directory is there that differs from the one we make for a mount."""
    try:
        place = places.at(above, name)
    except FileNotFoundError:
        return False
    try:
        info = os.fstat(place)
        if not stat.S_ISDIR(info.st_mode):
            return False
        plain = (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o755, 0, 0)
        return not plain or bool(places.names(place)) or any(map(is_carried, places.xattrs(place)))
    finally:
        os.close(place)


def _is_seen(path: str) -> bool:
    """Whether the directory is mounted somewhere: who is there would not see the new one."""
    here = os.stat(path)
    ending = path[path.rindex("/volumes/") :]
    for pid, mount in mounttable.everywhere():
        if mount.root.endswith(ending):
            try:
                seen = os.stat(f"/proc/{pid}/root{mount.mount_point}")
            except OSError:
                # It went meanwhile, or is covered: then the root of the mount has to do.
                return True
            if os.path.samestat(seen, here):
                return True
    return False

"""What a run leaves in the writable layer only to have something to mount on.

A runtime mounts files over ``/etc/hosts`` and its kin, and filesystems over ``/proc``, ``/sys``
and ``/dev``. Where the image lacks one, an empty one is made. Nobody wrote it, so it is no
change: ``diff``, ``commit`` and ``export`` leave it out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from overlayctl.layer.stack import Stack

FILES = (b"etc/hostname", b"etc/hosts", b"etc/resolv.conf")
DIRECTORIES = (b"dev", b"proc", b"sys")
_ABOVE = b"etc"
_PLACE = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def found(upper: int, below: Stack) -> frozenset[bytes]:
    """The paths of such stubs in the upper directory, an fd that stays the caller's.

    What the layers below show is none; nor is any more what something was written to, or into.
    """

    def is_below(path: bytes) -> bool:
        return below.find(path) is not None

    names = _listed(upper, b".")
    files = [path for path in FILES if _is_empty_file(upper, path) and not is_below(path)]
    stubs = {name for name in DIRECTORIES if name in names and _is_stub(upper, name, is_below)}
    stubs.update(files)
    inside = {path.rpartition(b"/")[2] for path in files}
    if inside and inside == _listed(upper, _ABOVE) and not is_below(_ABOVE):
        stubs.add(_ABOVE)
    return frozenset(stubs)


def _is_stub(upper: int, name: bytes, is_below: Callable[[bytes], bool]) -> bool:
    return _is_directory(upper, name) and not _listed(upper, name) and not is_below(name)


def _is_directory(upper: int, name: bytes) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(name, dir_fd=upper).st_mode)
    except FileNotFoundError:
        return False


def _is_empty_file(upper: int, path: bytes) -> bool:
    above, _, name = path.rpartition(b"/")
    try:
        directory = os.open(above, _PLACE, dir_fd=upper)
    except OSError:
        return False  # No directory: then there is no such file in it.
    try:
        info = os.lstat(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    finally:
        os.close(directory)
    return stat.S_ISREG(info.st_mode) and not info.st_size


def _listed(upper: int, name: bytes) -> set[bytes]:
    try:
        fd = os.open(name, _PLACE, dir_fd=upper)
    except OSError:
        return set()
    try:
        return set(map(os.fsencode, os.listdir(fd)))
    finally:
        os.close(fd)

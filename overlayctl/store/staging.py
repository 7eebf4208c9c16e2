"""Staging: a directory of its own for long work, alive as long as its lock is held."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from overlayctl.kernel import disk, rooted

if TYPE_CHECKING:
    from overlayctl.layout import Layout


@contextmanager
def staging(layout: Layout) -> Iterator[str]:
    """A fresh locked directory in ``ingest/``; whatever is left in it goes at the end.

    Raises HostCannot for a filesystem that cannot be written, and DiskFull, which the block
    has from here, too.
    """
    disk.refuse_unfit(layout.root)
    with disk.told(layout.root):
        path, fd = _own(layout)
    try:
        with disk.told(layout.root):
            yield path
    finally:
        rooted.remove_tree(path, ignore_errors=True)
        os.close(fd)


def _own(layout: Layout) -> tuple[str, int]:
    """A new directory and the fd that holds its lock."""
    while True:
        path = layout.path("ingest", secrets.token_hex(8))
        os.mkdir(path, 0o700)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            # A sweep came between the directory and its lock.
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return path, fd
        os.close(fd)


def sweep(layout: Layout) -> None:
    """Remove staging whose owner is gone; the caller holds the store's lock."""
    for name in abandoned(layout):
        path = layout.path("ingest", name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in {errno.ENOTDIR, errno.ELOOP}:
                os.unlink(path)
            elif error.errno != errno.ENOENT:
                raise
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            rooted.remove_tree(path, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)


def abandoned(layout: Layout) -> list[str]:
    """The names in ``ingest/`` that no running command owns, sorted."""
    found = []
    with suppress(FileNotFoundError):
        found = sorted(os.listdir(layout.ingest))
    return [name for name in found if not _alive(layout.path("ingest", name))]


def _alive(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ENOTDIR, errno.ELOOP}:
            return False
        if error.errno == errno.ENOENT:
            return True  # It went by itself.
        raise
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False

"""Staging: a directory of its own for long work, alive as long as its lock is held."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from overlayctl.layout import Layout


@contextmanager
def staging(layout: Layout) -> Iterator[str]:
    """A fresh locked directory in ``ingest/``; whatever is left in it goes at the end."""
    path = layout.path("ingest", secrets.token_hex(8))
    os.mkdir(path, 0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def sweep(layout: Layout) -> None:
    """Remove staging whose owner is gone; the caller holds the store's lock."""
    for name in os.listdir(layout.ingest):
        path = layout.path("ingest", name)
        if not os.path.isdir(path) or os.path.islink(path):
            os.unlink(path)
            continue
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)

"""Things that take a while to make and are the same every time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def making(place: Path) -> Iterator[Path | None]:
    """Give an empty directory to make ``place`` in, or None where ``place`` is there already.

    What is at ``place`` is complete: the directory is renamed when the block ends, and removed when
    it fails. Of two sessions that want the same, one makes it and the other waits.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            yield None
            return
        staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            yield staging
            staging.chmod(0o755)
            staging.rename(place)
        except BaseException:
            shutil.rmtree(staging)
            raise
    finally:
        os.close(lock)

"""What this host can do, found out by doing it, never by version."""

from __future__ import annotations

import errno
import os

from overlayctl.errors import OverlayctlError
from overlayctl.kernel import mounter
from overlayctl.mount import Erofs

_BLOCK = 512


def attach_ways(image: str) -> dict[str, str]:
    """Each way to attach a layer: ``works``, or why not. ``image`` is any small EROFS file."""
    ways = {}
    for name, mount in (
        ("buffered", Erofs(image)),
        ("directio", Erofs(image, directio=True)),
        ("loop", Erofs(image, loop=True)),
    ):
        try:
            with mounter.detached(mount) as fd:
                root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
                try:
                    os.listdir(root)
                finally:
                    os.close(root)
                ways[name] = "works"
        except OverlayctlError as error:
            ways[name] = str(error)
        except OSError as error:
            # Mounted, and yet nothing can be read from it.
            if error.errno not in (errno.EIO, errno.EUCLEAN):
                raise
            ways[name] = f"reading it: {os.strerror(error.errno)}"
    if ways["directio"] == "works":
        ways["directio"] = _direct_reads(image)
    return ways


def _direct_reads(image: str) -> str:
    """On a disk with 4,096-byte sectors a directio mount succeeds and every read of it fails."""
    import mmap

    try:
        fd = os.open(image, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return "the filesystem under the store has no direct I/O"
        raise
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page) as view:
            os.preadv(fd, [view[:_BLOCK]], _BLOCK)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return "the disk's sectors are larger than 512 bytes"
        raise
    finally:
        os.close(fd)
    return "works"

"""What this host can do, found out by doing it, never by version."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Literal, get_args

from overlayctl.errors import HostCannot, KernelRefused, OverlayctlError
from overlayctl.kernel import mounter
from overlayctl.mount import Bind, Erofs, Lower, Mount, Overlay, Rung, Tmpfs

if TYPE_CHECKING:
    from collections.abc import Iterable

Way = Literal["buffered", "directio", "loop", "unpacked"]
"""How a layer is attached; ``layer.attach`` says what each means."""
Setting = Literal["auto", "buffered", "directio", "loop", "unpacked"]
WORKS = "works"
LADDER: tuple[Way, ...] = ("buffered", "loop", "unpacked")
RUNGS: tuple[Rung, ...] = ("fds", "strings", "mount")
_BLOCK = 512


def attach_way(images: Iterable[str], setting: Setting) -> Way:
    """The way to attach layers: the one that was chosen, or the first that works.

    With any of ``images``, EROFS files on the store's filesystem: one alone may be damaged.
    Raises HostCannot if none works, or if the chosen one does not.
    """
    failed: dict[str, None] = {}
    for way in LADDER if setting == "auto" else (setting,):
        for image in images:
            answer = _attach_answer(image, way)
            if answer == WORKS:
                return way
            failed[f"{way}: {answer}"] = None
    raise HostCannot(
        "layers cannot be attached here: " + "; ".join(failed),
        hint="mounting needs CAP_SYS_ADMIN and a seccomp profile that allows it"
        if setting == "auto"
        else "OVERLAYCTL_ATTACH=auto takes the first way that works here",
    )


def attach_ways(image: str) -> dict[str, str]:
    """Each way to attach a layer: ``works``, or why not."""
    return {way: _attach_answer(image, way) for way in get_args(Way)}


def _attach_answer(image: str, way: Way) -> str:
    mount: Mount = Erofs(image, loop=way == "loop", directio=way == "directio")
    if way == "unpacked":
        mount = Bind(os.path.dirname(image))
    try:
        if way == "directio" and (answer := _direct_reads(image)) != WORKS:
            return answer
        with mounter.detached(mount) as fd:
            root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
            try:
                os.listdir(root)
            finally:
                os.close(root)
    except KernelRefused as error:
        if error.errno != errno.ENOTBLK:
            return str(error)
        return "not from a file on this filesystem, or not by this kernel"
    except OverlayctlError as error:
        return str(error)
    except OSError as error:
        # Mounted, and yet nothing can be read from it.
        if error.errno not in (errno.EIO, errno.EUCLEAN):
            raise
        return f"reading it: {os.strerror(error.errno)}"
    return WORKS


def _direct_reads(image: str) -> str:
    """On a disk with 4,096-byte sectors a directio mount succeeds and every read of it fails."""
    import mmap

    try:
        fd = os.open(image, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return "the filesystem under the store has no direct I/O"
        return error.strerror or str(error)
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page) as view:
            os.preadv(fd, [view[:_BLOCK]], _BLOCK)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return "the disk's sectors are larger than 512 bytes"
        raise
    finally:
        os.close(fd)
    return WORKS


def mount_rungs(directory: str) -> dict[str, str]:
    """Each way to give the kernel an overlay: ``works``, or why not.

    Tried with nothing, over any ``directory``, in a mount namespace of the trial's own.
    """
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_rungs_aside, directory).result()


def _rungs_aside(directory: str) -> dict[str, str]:
    lowers = tuple(Lower(os.path.join(directory, name), b"", "") for name in "ab")
    found: dict[str, str] = {}
    try:
        with mounter.aside():
            mounter.mount(Tmpfs("overlayctl:probe"), directory)
            for lower in lowers:
                os.mkdir(lower.path)
                mounter.mount(Tmpfs("overlayctl:probe", read_only=True), lower.path)
            for rung in RUNGS:
                found[rung] = _rung_answer(Overlay("overlayctl:probe", lowers, rung=rung))
    except OSError as error:
        return dict.fromkeys(RUNGS, os.strerror(error.errno or errno.EPERM))
    except OverlayctlError as error:
        return dict.fromkeys(RUNGS, str(error))
    return found


def _rung_answer(what: Overlay) -> str:
    try:
        with mounter.detached(what):
            return WORKS
    except OverlayctlError as error:
        return str(error)

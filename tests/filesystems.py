"""Real filesystems for tests: of any kind, small, in a file by loop device, filled to the brim.

    with mounted("ext4", tmp_path, inodes=2000) as disk:
        store = disk / "store"
        ...
        filled = fill_bytes(disk)
        ...
        filled.empty()

They are mounted in the test's own namespace and go with the block. A loop device is told
to go with its mount, so that not even a test which dies in between leaves one.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.rootmount import require

KINDS = ("ext4", "xfs", "btrfs")
"""Those that live on a disk; ``tmpfs`` can be had, too."""

MIB = 1 << 20


@contextmanager
def mounted(
    kind: str,
    place: Path,
    *,
    size: int = 320 * MIB,
    inodes: int | None = None,
    sector: int = 512,
    options: str = "defaults",
    name: str = "",
) -> Iterator[Path]:
    """A new filesystem, mounted at ``place/<name>`` (the kind if there is no name); its root.

    ``size`` is in bytes: xfs takes no less than 300 MiB, and the file behind it is sparse.
    ``inodes`` is how many there are about (ext4, tmpfs), for xfs whatever is given means a
    hundredth of the disk, some 6,000; btrfs has no such number. ``sector`` 4096 makes a
    disk with such sectors. ``options`` are mount(8)'s.
    """
    root = place / (name or kind)
    root.mkdir()
    if kind == "tmpfs":
        limits = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
        _run("mount", "-t", "tmpfs", "-o", f"{limits},{options}", "tmpfs", root)
    else:
        disk = place / f"{root.name}.disk"
        _make(kind, disk, size, inodes, sector)
        _mount(kind, disk, root, sector, options)
    try:
        yield root
    finally:
        _run("umount", root)


@contextmanager
def through_fuse(directory: Path, place: Path) -> Iterator[Path]:
    """The same directory once more, through FUSE, at ``place``."""
    require("bindfs")
    place.mkdir()
    _run("bindfs", directory, place)
    try:
        yield place
    finally:
        _run("umount", place)


def remount(root: Path, options: str) -> None:
    """Change the options of the whole filesystem at ``root``, ``ro`` or ``rw`` mostly."""
    _run("mount", "-o", f"remount,{options}", root)


def _make(kind: str, disk: Path, size: int, inodes: int | None, sector: int) -> None:
    require(f"mkfs.{kind}", "losetup", "mount")
    with disk.open("wb") as file:
        file.truncate(size)
    more: tuple[str, ...]
    if kind == "ext4":
        # No blocks kept for root, or a disk that df calls full would still take its writes.
        more = ("-F", "-m", "0", "-b", "4096", *(("-N", str(inodes)) if inodes else ()))
    elif kind == "xfs":
        more = ("-f", "-s", f"size={sector}", *(("-i", "maxpct=1") if inodes else ()))
    else:
        more = ("-f",)
    _run(f"mkfs.{kind}", "-q", *more, disk)


def _mount(kind: str, disk: Path, root: Path, sector: int, options: str) -> None:
    device = _run("losetup", "--find", "--show", "--sector-size", str(sector), disk).strip()
    try:
        _run("mount", "-t", kind, "-o", options, device, root)
    finally:
        # While something is mounted, this only asks for the device to go with the mount.
        _run("losetup", "--detach", device)


class Filled(NamedTuple):
    """What takes all the room of a filesystem."""

    directory: Path

    def empty(self) -> None:
        """Give the room back, at once."""
        shutil.rmtree(self.directory)
        # btrfs frees what a transaction removed when it is committed, others in the background.
        _run("sync", "--file-system", self.directory.parent)

    def give_back(self, number: int, size: int = 0) -> None:
        """Give back so many inodes, and so many bytes."""
        for name in sorted(os.listdir(self.directory))[:number]:
            (self.directory / name).unlink()
        if size:
            os.truncate(self.directory / "most", (self.directory / "most").stat().st_size - size)
        _run("sync", "--file-system", self.directory.parent)


def fill_bytes(root: Path) -> Filled:
    """Take every free byte of the filesystem at ``root``: a write of one byte fails then."""
    filled = _filler(root)
    # A full disk takes names in directories for a while yet, so the file is there before.
    last = os.open(filled.directory / "last", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    fd = os.open(filled.directory / "most", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    try:
        _allocate(fd)
        # What was set aside for delayed work comes back with a sync, sometimes.
        os.fsync(fd)
        _allocate(fd)
        _write_until_full(fd)
        assert _is_full(last), "the filesystem takes another byte"
    finally:
        os.close(fd)
        os.close(last)
    free = os.statvfs(root)
    # What xfs shows to the end are blocks that the next allocation would need beside its own.
    assert free.f_bavail < 8, free
    return filled


def _allocate(fd: int) -> None:
    step = 64 * MIB
    while step >= 4096:
        try:
            os.posix_fallocate(fd, os.fstat(fd).st_size, step)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            step //= 2


def _write_until_full(fd: int) -> None:
    os.lseek(fd, 0, os.SEEK_END)
    while not _is_full(fd, 4096):
        pass


def _is_full(fd: int, count: int = 1) -> bool:
    try:
        os.write(fd, b"x" * count)
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return True
    return False


def fill_inodes(root: Path) -> Filled:
    """Make files until there can be no more; bytes are left, but on btrfs no metadata."""
    filled = _filler(root)
    if os.statvfs(root).f_files == 0:
        _fill_trees(filled.directory)
    _until_full(lambda number: os.mknod(filled.directory / f"file-{number}"))
    free = os.statvfs(root)
    assert free.f_favail == 0, free
    assert free.f_bavail > 0, free
    return filled


def _fill_trees(directory: Path) -> None:
    """Btrfs has no table of inodes: what takes the room of one is in its trees, all of it."""
    # A disk that is all data for a moment has none left for more metadata, later either.
    data = directory / "data"
    fd = os.open(data, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    try:
        _allocate(fd)
    finally:
        os.close(fd)
    # A symlink's target lies in the tree.
    _until_full(lambda number: os.symlink("x" * 4000, directory / f"link-{number}"))
    _until_full(lambda number: os.mknod(directory / f"node-{number}"))
    data.unlink()
    _run("sync", "--file-system", directory)


def _until_full(make: Callable[[int], None]) -> None:
    for number in itertools.count():
        try:
            make(number)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return


def _filler(root: Path) -> Filled:
    directory = root / "filler"
    directory.mkdir()
    return Filled(directory)


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout

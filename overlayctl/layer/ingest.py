"""From a stream of tar bytes to a finished layer.erofs, in one pass over the data.

``receive`` hashes and writes the tar where it will stay, ``describe`` reads its headers
back from the page cache, ``seal`` writes the index behind it and the header before it.
Nothing here is durable until the caller syncs the file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.digest import DiffID
from overlayctl.errors import BadTar, DigestMismatch
from overlayctl.kernel import disk, libc
from overlayctl.layer import erofs
from overlayctl.layer.format import FILE, PAGE
from overlayctl.layer.tar import Limits, TarReader
from overlayctl.layer.tree import Tree

if TYPE_CHECKING:
    from io import FileIO

    from overlayctl.layer.attributes import Wants
    from overlayctl.layer.format import Header
    from overlayctl.layer.stack import Inheritance

CORES = os.cpu_count() or 1
MODE = 0o400
"""Of a layer file."""
_WRITEBACK = 8 << 20
_COPY = 64 << 20
_HOLE = 64 << 10


class Advance:
    """Tells ``told`` how far things are, from any thread, until ``stop``: then it raises.

    A thread in the middle of a layer ends soon, when the command is to.
    """

    class StoppedError(Exception):
        """The command ends."""

    def __init__(self, told: Callable[[int], None]) -> None:
        self._told = told
        self._stopped = False

    def __call__(self, count: int) -> None:
        """Tell it. Raises StoppedError."""
        if self._stopped:
            raise self.StoppedError
        self._told(count)

    def stop(self) -> None:
        """Let whoever calls next know."""
        self._stopped = True


@contextmanager
def threads(told: Callable[[int], None]) -> Iterator[tuple[ThreadPoolExecutor, Advance]]:
    """Threads, one for each core, and what ``told`` is told through.

    None is left at the end of the block: what is not begun is not done, what is in the middle
    of a layer is stopped.
    """
    advance = Advance(told)
    pool = ThreadPoolExecutor(CORES)
    try:
        yield pool, advance
    finally:
        # Before they are waited for.
        advance.stop()
        pool.shutdown(wait=True, cancel_futures=True)


class Received(NamedTuple):
    """A tar at its place in a layer file."""

    diff_id: DiffID
    size: int


class Described(NamedTuple):
    """A tar whose headers were read; ``wants`` is what the layers below have to tell."""

    tree: Tree
    wants: Wants
    end_marker: bool


def new_file(directory: str, mode: int = MODE) -> FileIO:
    """A new layer file, open, in the new ``directory``."""
    os.mkdir(directory, 0o700)
    path = os.path.join(directory, FILE)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    return os.fdopen(fd, "r+b", buffering=0)


def receive(
    fd: int,
    chunks: Iterable[bytes | memoryview],
    *,
    expected: DiffID | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Received:
    """Write the tar to ``fd`` from byte 4096 (PAGE) on, hashing it as it passes.

    Raises DigestMismatch if it is not ``expected``, DiskFull before the disk is full.
    ``progress`` is told the number of bytes of each piece. Zeros take no room in the file.
    """
    digest = hashlib.sha256()
    at = flushed = PAGE
    checked = 0
    for chunk in chunks:
        digest.update(chunk)
        if at >= checked:
            # How long a compressed layer is, its end tells; a bomb must not fill the disk.
            disk.look(fd)
            checked = at + disk.RESERVE // 2
        view = memoryview(chunk)
        if _is_hole(view):
            # What follows makes the file longer: the index at last.
            at += len(view)
            view = view[:0]
        while view:
            written = os.pwrite(fd, view, at)
            at += written
            view = view[written:]
        progress(len(chunk))
        if at - flushed >= _WRITEBACK:
            # Starts the write-back that fdatasync would have to wait for (sync_file_range(2)).
            libc.sync_file_range(fd, flushed, at - flushed, libc.SYNC_FILE_RANGE_WRITE)
            flushed = at
    diff_id = DiffID("sha256:" + digest.hexdigest())
    if expected is not None and diff_id != expected:
        raise DigestMismatch("a layer's tar", expected=expected, actual=diff_id)
    return Received(diff_id, at - PAGE)


def _is_hole(view: memoryview) -> bool:
    """Whether a large piece is all zeros: looked through only where it seems so."""
    size = len(view)
    seems = size >= _HOLE and not (view[0] or view[size // 3] or view[size // 2] or view[-1])
    return seems and view.tobytes().count(0) == size


def describe(fd: int, received: Received, limits: Limits | None = None) -> Described:
    """The tree of the tar that ``receive`` wrote. Raises BadTar, LimitExceeded."""
    reader = TarReader(fd, PAGE, received.size, limits)
    tree = Tree()
    for member in reader:
        tree.add(member)
    return Described(tree, tree.wants(), reader.end_marker)


def seal(fd: int, received: Received, described: Described, inherited: Inheritance) -> Header:
    """Finish the layer file; it is not synced. Raises BadTar for a hard link to nowhere."""
    wants = described.wants
    described.tree.finish(inherited.below)
    return erofs.write(
        fd,
        described.tree,
        received.size,
        received.diff_id,
        inherited.facts,
        len(wants.directories) + len(wants.links),
    )


def copy_tar(source: int, fd: int, size: int) -> None:
    """Copy the tar of one layer file into another, through the kernel where it can."""
    at, end = PAGE, PAGE + size
    while at < end:
        count = os.copy_file_range(source, fd, min(_COPY, end - at), at, at)
        if not count:
            raise BadTar("a stored layer is shorter than its header says")
        at += count

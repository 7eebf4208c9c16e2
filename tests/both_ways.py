"""A layer mounted and the same layer unpacked: what must be equal, and every layer to try it on.

Each layer file that a test of this session writes is kept (small ones: larger ones have
tests of their own), and the last test compares both ways of attaching on all of them.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlayctl.kernel import mounter
from overlayctl.layer import erofs
from overlayctl.layer.format import Header
from overlayctl.layer.index import Index
from overlayctl.layer.unpack import unpack
from overlayctl.mount import Erofs
from tests.oracles import trees

_FILE_MAX = 4 << 20
_CONTENT_MAX = 64 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip


@pytest.fixture(scope="session")
def written_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with every small layer that this session wrote, each once."""
    return tmp_path_factory.getbasetemp() / "written-layers"


@pytest.fixture(scope="session", autouse=True)
def _keep_written_layers(written_layers: Path) -> Iterator[None]:
    written_layers.mkdir(exist_ok=True)
    real = erofs.write

    def write(fd: int, *arguments: object) -> Header:
        header = real(fd, *arguments)  # type: ignore[arg-type]
        size = os.fstat(fd).st_size
        if size <= _FILE_MAX and header.size <= _CONTENT_MAX:
            copy = written_layers / header.index_sha256
            if not copy.exists():
                copy.write_bytes(os.pread(fd, size, 0))
        return header

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erofs, "write", write)
        yield
    shutil.rmtree(written_layers)


@contextmanager
def mounted(layer: Path, place: Path) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    mounter.mount(Erofs(str(layer)), str(place))
    try:
        yield place
    finally:
        mounter.unmount(str(place))


def unpacked(layer: Path, place: Path) -> Path:
    """The layer as a tree at ``place``, which must not be there. Raises HostCannot."""
    place.mkdir()
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with Index.open(layer) as index:
            unpack(index, fd)
    finally:
        os.close(fd)
    return place


def differences(mount: Path, tree: Path) -> list[str]:
    """What a program that looks at both would see differ."""
    # xfs keeps ACLs in xattrs of its own, and lists these to root beside the ACLs.
    own = (b"trusted.SGI_ACL_FILE", b"trusted.SGI_ACL_DEFAULT")
    one, other = trees.snapshot(mount), trees.snapshot(tree, ignore=own)
    found = trees.differences(one, other)
    for path, entry in one.items():
        if entry.type == "file" and entry.size and path in other:
            names = [os.path.join(os.fsencode(place), path) for place in (mount, tree)]
            if _last_page(names[0]) != _last_page(names[1]):
                found.append(f"{path!r}: its last page differs through mmap")
    return found


def _last_page(path: bytes) -> bytes:
    """The page that holds a file's end, with what the kernel maps behind it (mmap(2))."""
    with open(path, "rb") as file:
        start = (os.fstat(file.fileno()).st_size - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        # Python's own mmap shows no byte behind the end.
        at = _libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, file.fileno(), start)
    try:
        return ctypes.string_at(at, mmap.PAGESIZE)
    finally:
        _libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(mmap.PAGESIZE))


def extents(path: Path) -> list[tuple[int, int]]:
    """Offset and length of a file's data, its holes left out, as lseek(2) tells it."""
    found = []
    with path.open("rb") as file:
        fd, at, size = file.fileno(), 0, path.stat().st_size
        while at < size:
            try:
                begin = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            at = os.lseek(fd, begin, os.SEEK_HOLE)
            found.append((begin, at - begin))
    return found

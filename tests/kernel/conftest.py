"""Layers for these tests: small EROFS images made by mkfs.erofs, mounted by the code itself."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overlayctl.kernel import libc, mounter, mounttable
from overlayctl.layer import erofs
from overlayctl.mount import Erofs, Lower
from tests import kernel_has
from tests.rootmount import require

Image = Callable[..., str]


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """Return a function that makes an image of the files given by name and content."""
    require("mkfs.erofs")

    def make(place: str, **files: str) -> str:
        tree = tmp_path / "trees" / str(len(os.listdir(tmp_path)))
        tree.mkdir(parents=True)
        for name, content in files.items():
            (tree / name).write_text(content)
        subprocess.run(["mkfs.erofs", "--quiet", os.fsencode(place), tree], check=True)
        for name in files:
            (tree / name).unlink()
        tree.rmdir()
        return place

    return make


@pytest.fixture
def empty(tmp_path: Path) -> str:
    path = str(tmp_path / "empty.erofs")
    erofs.write_empty(path)
    return path


@pytest.fixture(autouse=True)
def unmounted(tmp_path: Path) -> Iterator[None]:
    """Take down what a test mounted below its directory, newest first."""
    yield
    for mount in reversed(mounttable.below(str(tmp_path))):
        libc.umount2(mount.mount_point, libc.MNT_DETACH | libc.UMOUNT_NOFOLLOW)


class Place:
    """A directory with attached layers, an upper, a work directory and a mountpoint."""

    def __init__(self, root: str, empty: str) -> None:
        self.root = root
        self.empty = empty
        self.images: dict[str, str] = {}
        for name in ("upper", "work", "merged"):
            os.mkdir(self.path(name))

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def attach(self, name: str, image: str, *, loop: bool | None = None) -> str:
        """Attach ``image`` at ``name``; where the kernel mounts no file, by a loop device."""
        if loop is None:
            loop = not kernel_has.erofs_from(self.empty)
        if loop and image in self.images.values():
            # libmount takes the loop device that a file has: two layers of an overlay would be one.
            image = shutil.copy(image, f"{image}-{len(self.images)}")
        os.mkdir(self.path(name))
        mounter.mount(Erofs(image, loop=loop), self.path(name))
        self.images[self.path(name)] = image
        return self.path(name)

    def lower(self, path: str) -> Lower:
        """What must be seen at ``path``: the image attached there, else the empty one."""
        image = self.images.get(path, self.empty)
        with open(image, "rb") as file:
            uuid = file.read(4096)[1024 + 48 : 1024 + 64]
        return Lower(path, uuid, os.path.join(*image.split("/")[-2:]))

    @property
    def merged(self) -> str:
        return self.path("merged")


@pytest.fixture
def place(tmp_path: Path, empty: str) -> Place:
    root = tmp_path / "place"
    root.mkdir()
    return Place(str(root), empty)

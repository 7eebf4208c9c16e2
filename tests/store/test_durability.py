"""What a command said is done survives losing everything that was not synced.

The store's filesystem lies in a file. At the moment a call returns the file is copied: it holds
what the filesystem has handed to its disk, and nothing of what still waits in memory. That is
more than a power loss leaves, as the disk may lose what came after its last flush; that the
flushes come is not tested here.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlayctl.engine import Engine
from tests import filesystems
from tests.archives import docker_archive
from tests.cli.conftest import reset
from tests.layer.tars import directory, entry, tar
from tests.store.stores import Silent

CONTENT = os.urandom(1 << 20)
LAYERS = [tar(directory("./"), entry("large", data=CONTENT)), tar(entry("small", data=b"2"))]
KINDS = pytest.mark.parametrize("kind", filesystems.KINDS)


class Disk:
    """A filesystem whose file can be copied while it is in use."""

    def __init__(self, kind: str, place: Path, root: Path) -> None:
        self.kind = kind
        self.file = place / f"{kind}.disk"
        self.copies = place / "copies"
        self.copies.mkdir()
        self.root = root
        self.store = str(root / "store")

    def pull_the_plug(self, name: str) -> None:
        """Keep, under a name, what is on the disk now."""
        subprocess.run(["cp", "--sparse=always", self.file, self.copies / name], check=True)


@contextmanager
def after_reboot(kind: str, copy: Path) -> Iterator[Path]:
    """The copy of a filesystem that nobody unmounted, mounted: its journal is replayed."""
    place = copy.with_suffix(".mounted")
    place.mkdir()
    if kind == "btrfs":
        # The kernel knows a later state of this filesystem, and refuses the older one.
        subprocess.run(["btrfs", "device", "scan", "--forget"], check=True)
    subprocess.run(["mount", "-t", kind, "-o", "loop", copy, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def whole(store: str) -> Engine:
    """The store, of which check finds nothing to say but what the next writer sweeps."""
    engine = Engine.open(store)
    assert {found["Tag"] for found in engine.check(quick=False)} <= {"staging-left"}
    with engine.store.deciding():
        pass
    assert engine.check(quick=False) == []
    return engine


@KINDS
def test_what_returned_is_there_after_a_power_loss(tmp_path: Path, kind: str) -> None:
    archive = str(docker_archive(tmp_path / "a.tar", LAYERS))
    plain = tmp_path / "plain.tar"
    plain.write_bytes(LAYERS[0])
    with filesystems.mounted(kind, tmp_path) as root:
        disk = Disk(kind, tmp_path, root)
        try:
            engine = Engine.open(disk.store, create=True)
            engine.load(archive, tag=None, platform=None, progress=Silent())
            disk.pull_the_plug("load")
            engine.create("demo", name="cc")
            disk.pull_the_plug("create")
            engine.tag("demo", "other:1")
            disk.pull_the_plug("tag")
            engine.import_layers([str(plain)], reference="plain:1", progress=Silent())
            disk.pull_the_plug("import")
            # Without a tag, whose own sync would take along what was not synced before.
            plain.write_bytes(LAYERS[1])
            unnamed = engine.import_layers([str(plain)], reference=None, progress=Silent())
            disk.pull_the_plug("unnamed")
            os.unlink(archive)
        finally:
            reset(disk.store)
    with after_reboot(kind, disk.copies / "load") as place:
        engine = whole(str(place / "store"))
        assert [row["RepoTags"] for row in engine.images()] == [["demo:latest"]]
        assert b"".join(engine.layer_cat("demo:1", b"large")) == CONTENT
        assert b"".join(engine.layer_cat("demo:2", b"small")) == b"2"
    with after_reboot(kind, disk.copies / "create") as place:
        engine = whole(str(place / "store"))
        merged = Path(engine.mount_container("cc", volatile=False, xino=False))
        assert (merged / "large").read_bytes() == CONTENT
        reset(engine.layout.root)
    with after_reboot(kind, disk.copies / "tag") as place:
        engine = whole(str(place / "store"))
        assert engine.image_exists("other:1")
    with after_reboot(kind, disk.copies / "import") as place:
        engine = whole(str(place / "store"))
        assert b"".join(engine.layer_cat("plain:1:1", b"large")) == CONTENT
    with after_reboot(kind, disk.copies / "unnamed") as place:
        assert whole(str(place / "store")).image_exists(unnamed.image_id)


@KINDS
def test_a_file_that_nobody_synced_is_not_there(tmp_path: Path, kind: str) -> None:
    """What the test above would find of a store that does not sync."""
    with filesystems.mounted(kind, tmp_path) as root:
        disk = Disk(kind, tmp_path, root)
        (root / "lost").write_bytes(CONTENT)
        with (root / "kept").open("wb") as file:
            file.write(CONTENT)
            file.flush()
            os.fsync(file.fileno())
        # fsync(2) of one file takes along the names that others have, but not their content.
        (root / "late").write_bytes(CONTENT)
        (root / "kept").rename(root / "renamed")
        disk.pull_the_plug("now")
    with after_reboot(kind, disk.copies / "now") as place:
        names = {path.name for path in place.iterdir()} - {"lost+found"}
        assert names <= {"kept", "lost"}
        assert "kept" in names
        assert (place / "kept").read_bytes() == CONTENT
        assert "lost" not in names or (place / "lost").read_bytes() != CONTENT

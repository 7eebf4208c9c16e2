"""A store on a disk that is full, that cannot be written, or that keeps no locks."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from overlayctl.engine import Engine
from overlayctl.errors import DiskFull, KernelRefused
from overlayctl.kernel import disk
from tests.archives import docker_archive
from tests.cli.conftest import Shell, reset
from tests.filesystems import (
    KINDS,
    MIB,
    fill_bytes,
    fill_inodes,
    mounted,
    remount,
    through_fuse,
)
from tests.layer.tars import directory, entry, tar
from tests.store.stores import Silent

LAYERS = 20
FULL = {"bytes": fill_bytes, "inodes": fill_inodes}
# btrfs takes seconds until it is that full.
QUICK = [(kind, full) for kind in KINDS for full in FULL if (kind, full) != ("btrfs", "inodes")]


class Place(NamedTuple):
    """A disk, a store on it with an image of 20 layers and a container, and an image to load."""

    root: Path
    run: Shell
    another: Path


def _layer(number: int, size: int) -> bytes:
    return tar(directory("./"), entry(f"file-{number}", data=bytes([number]) * size))


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    options = "commit=1" if request.param == "btrfs" else "defaults"
    with mounted(request.param, tmp_path, inodes=2000, options=options) as root:
        run = Shell(str(root / "store"))
        image = [_layer(number, 2 * MIB) for number in range(LAYERS)]
        run("load", docker_archive(tmp_path / "a.tar", image), sound=False)
        run("create", "--name", "cc", "demo", sound=False)
        merged = run.path("mount", "cc")
        (merged / "directory").mkdir()
        (merged / "directory/file").write_bytes(b"w" * MIB)
        run("umount", "cc", sound=False)
        another = docker_archive(tmp_path / "b.tar", [_layer(99, 4 * MIB)], tags=("another:1",))
        try:
            yield Place(root, run, another)
        finally:
            remount(root, "rw")
            reset(run.store)


def _paths(store: str) -> list[str]:
    """Every path of a store but for what is mounted."""
    found = []
    for where, names, files in os.walk(store):
        names[:] = [name for name in names if not os.path.ismount(os.path.join(where, name))]
        found += [os.path.join(where, name) for name in (*names, *files)]
    return sorted(found)


def _read(run: Shell, *commands: str) -> None:
    for command in commands:
        assert run(*command.split(), sound=False).out


def _see_the_image(run: Shell, there: Path) -> None:
    """The image's view, in the store and at a directory."""
    there.mkdir(exist_ok=True)
    view = run.path("image", "mount", "demo")
    assert sorted(os.listdir(view)) == sorted(f"file-{number}" for number in range(LAYERS))
    run("umount", "demo", sound=False)
    run("image", "mount", "demo", there, sound=False)
    assert (there / "file-19").read_bytes() == b"\x13" * 2 * MIB
    run("umount", there, sound=False)


def _load_again(place: Place) -> None:
    """What was removed is room for a load: at once, on btrfs when its cleaner has passed.

    It gives empty block groups of data back, for metadata to take: after a commit (here each
    second) and, where the device can discard, ten seconds more.
    """
    deadline = time.monotonic() + 60
    waits = not os.statvfs(place.root).f_files
    while waits and time.monotonic() < deadline:
        try:
            engine = Engine.open(place.run.store)
            engine.load(str(place.another), tag=None, platform=None, progress=Silent())
            waits = False
        except DiskFull as full:
            assert "within a minute" in full.hint  # noqa: PT017
            time.sleep(0.5)
    assert place.run("load", place.another).out == "Loaded image: another:1\n"


@pytest.mark.parametrize("full", FULL)
@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_a_full_disk_is_read_and_emptied(place: Place, full: str, tmp_path: Path) -> None:
    run = place.run
    FULL[full](place.root)
    run("layer", "detach", "--all")
    _read(
        run,
        "images",
        "inspect demo",
        "inspect cc",
        "ps -a",
        "system info",
        "rm --dry-run cc",
    )
    _see_the_image(run, tmp_path / "there")
    before = _paths(run.store)
    refused = json.loads(run("--json", "load", place.another, ok=1).err)
    assert refused["code"] == "disk-full"
    assert "overlayctl image rm" in refused["hint"]
    needed, missing = refused["details"]["needed_bytes"], refused["details"]["missing_bytes"]
    if full == "bytes":
        assert needed - 8 * 4096 <= missing <= needed
        assert needed >= 4 * MIB
        assert f"{missing:,} are missing" in refused["message"]
    elif refused["details"]["free_inodes"] is not None:
        assert refused["details"]["missing_inodes"] == refused["details"]["needed_inodes"] > 2
        assert " inodes are needed, 0 are free, " in refused["message"]
    else:
        # btrfs counts no inodes: only trying tells.
        assert "No space left on device" in refused["message"]
    # A compressed archive is unpacked in the store first, and what it needs is not known.
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(place.another.read_bytes(), 1))
    assert "disk is full" in run("load", packed, ok=1).err
    assert _paths(run.store) == before
    run("layer", "detach", "--all")
    run("rm", "cc")
    freed = run("rmi", "demo").out
    assert freed.count("Deleted: ") >= LAYERS
    assert os.listdir(os.path.join(run.store, "layers")) == []
    _load_again(place)
    view = run.path("image", "mount", "another:1")
    assert (view / "file-99").read_bytes() == b"c" * 4 * MIB
    run("umount", "another:1")


@pytest.mark.parametrize(("place", "full"), QUICK, indirect=["place"])
def test_what_a_killed_command_left_goes_from_a_full_disk(place: Place, full: str) -> None:
    run = place.run
    killed = -signal.SIGKILL
    run("load", place.another, ok=killed, sound=False, fault="image:before-rename")
    assert os.listdir(os.path.join(run.store, "ingest"))
    run("rm", "cc", ok=killed, sound=False, fault="snapshot:after-unlink")
    FULL[full](place.root)
    # The layer that the load had moved in stays an orphan until it is loaded again.
    run("rmi", "demo", sound=False)
    assert os.listdir(os.path.join(run.store, "ingest")) == []
    assert os.listdir(os.path.join(run.store, "snapshots")) == []
    _load_again(place)


@pytest.mark.parametrize(("place", "full"), QUICK, indirect=["place"])
def test_a_full_disk_can_be_reset(place: Place, full: str) -> None:
    FULL[full](place.root)
    place.run("system", "reset", "--yes")
    assert _paths(place.run.store) == []


@pytest.mark.parametrize("place", ["ext4"], indirect=True)
def test_a_write_that_the_disk_cuts_short_leaves_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if others took what was there when the load looked.
    monkeypatch.setattr(disk, "look", lambda *_: None)
    engine = Engine.open(place.run.store)
    filled = fill_inodes(place.root)

    def load() -> None:
        engine.load(str(place.another), tag=None, platform=None, progress=Silent())

    def create() -> None:
        engine.create("demo", name="new")

    def mount() -> None:
        engine.mount_container("cc", volatile=False, xino=False)

    def tag() -> None:
        engine.tag("demo", "more:1")

    writes: tuple[Callable[[], None], ...] = (load, create, tag, mount)
    for write in writes:
        before = _paths(place.run.store)
        for _ in range(30):
            try:
                write()
            except (DiskFull, KernelRefused) as error:
                # Overlay makes a directory, too, and says itself that it could not.
                full = isinstance(error, DiskFull)
                assert full or "errno: 28" in str(error)  # noqa: PT017
                assert _paths(place.run.store) == before
                assert engine.check() == []
                filled.give_back(1)
            else:
                break
        else:
            pytest.fail("it never works")
        assert _paths(place.run.store) != before
        assert engine.check() == []
        filled.empty()
        filled = fill_inodes(place.root)
    engine.unmount_container("cc", lazy=False)


@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_a_load_that_runs_out_of_bytes_leaves_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "look", lambda *_: None)
    engine = Engine.open(place.run.store)
    filled = fill_bytes(place.root)
    before = _paths(place.run.store)
    failed = 0
    while True:
        try:
            engine.load(str(place.another), tag=None, platform=None, progress=Silent())
        except DiskFull:
            assert _paths(place.run.store) == before
            failed += 1
            assert failed < 40
            filled.give_back(0, MIB)
        else:
            break
    assert failed >= 4
    assert engine.check() == []


@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_a_read_only_disk_is_read(place: Place, tmp_path: Path) -> None:
    run = place.run
    run("layer", "detach", "--all")
    remount(place.root, "ro")
    _read(
        run, "images", "inspect demo", "inspect cc", "ps -a", "system info", "history demo",
        "layer ls", "layer inspect demo:1", "layer path demo:1", "layer files demo:1",
        "layer cat demo:1 file-0", "rm --dry-run cc",
        "system reset --dry-run",
    )  # fmt: skip
    for command in ("system check", "layer verify", "image exists demo", "container exists cc"):
        run(*command.split())
    _see_the_image(run, tmp_path / "there")
    for command in (
        f"load {place.another}", "create demo", "tag demo more:1", "mount cc", "rm cc",
        "rmi -f demo", "system reset --yes",
    ):  # fmt: skip
        refused = run(*command.split(), ok=5, sound=False).err
        assert f"{run.store} is on a read-only filesystem" in refused, command
        assert f"mount -o remount,rw {place.root}" in refused
    run("layer", "detach", "--all")
    remount(place.root, "rw")
    run("rm", "cc")
    run("rmi", "demo")


def test_a_store_is_not_made_on_a_read_only_disk(tmp_path: Path) -> None:
    archive = docker_archive(tmp_path / "a.tar", [_layer(1, 10)])
    with mounted("tmpfs", tmp_path, options="ro") as root:
        run = Shell(str(root / "store"))
        assert "is on a read-only filesystem" in run("load", archive, ok=5).err
        assert run("images").out
        assert run("system", "info").out


def test_a_store_is_not_made_on_a_full_disk(tmp_path: Path) -> None:
    archive = docker_archive(tmp_path / "a.tar", [_layer(1, 10)])
    with mounted("tmpfs", tmp_path, size=32 * MIB, inodes=100) as root:
        run = Shell(str(root / "store"))
        filled = fill_inodes(root)
        assert "disk is full" in run("load", archive, ok=1).err
        assert run("system", "info").out
        filled.give_back(50)
        run("load", archive)
        reset(run.store)


def test_through_fuse_a_store_is_read_and_written_only_by_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = docker_archive(tmp_path / "a.tar", [_layer(1, 10)])
    another = docker_archive(tmp_path / "b.tar", [_layer(2, 10)], tags=("another:1",))
    (tmp_path / "local").mkdir()
    local = Shell(str(tmp_path / "local/store"))
    local("load", archive)
    local("create", "--name", "cc", "demo")
    local("layer", "detach", "--all")
    assert not os.path.ismount(os.path.join(local.store, "attached"))
    with through_fuse(tmp_path / "local", tmp_path / "through"):
        run = Shell(str(tmp_path / "through/store"))
        for command in (f"load {another}", "create demo", "tag demo more:1", "rm cc", "rmi demo"):
            refused = run(*command.split(), ok=5).err
            assert "is on FUSE or virtiofs" in refused
            assert "OVERLAYCTL_ANY_FILESYSTEM=1" in refused
        new = Shell(str(tmp_path / "through/new"))
        assert "FUSE" in new("load", archive, ok=5).err
        assert os.listdir(tmp_path / "local") == ["store"]
        _read(run, "images", "ps -a", "system info", "layer files demo:1", "history demo")
        assert run("layer", "cat", "demo:1", "file-1").out == "\x01" * 10
        view = run.path("image", "mount", "demo")
        assert os.listdir(view) == ["file-1"]
        run("umount", "demo")
        monkeypatch.setenv("OVERLAYCTL_ANY_FILESYSTEM", "1")
        # What is compressed needs a file without a name, which not every FUSE can make.
        packed = tmp_path / "b.tar.gz"
        packed.write_bytes(gzip.compress(another.read_bytes()))
        run("load", packed)
        new("load", archive)
        assert "demo" in new("images").out
        run("rm", "cc")
        run("rmi", "demo")
        assert "another" in run("images").out
        reset(new.store)
        reset(run.store)

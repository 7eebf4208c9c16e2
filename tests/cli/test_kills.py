"""A command killed in the middle: the store opens, the command can be repeated, nothing is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from overlayctl import placed
from overlayctl.engine import Engine
from overlayctl.errors import Conflict, NotFound
from overlayctl.runtime import volumes
from overlayctl.runtime.commit import Wish
from overlayctl.store import containers
from overlayctl.store.containers import Config
from overlayctl.store.records import POINTS, fault
from tests import filesystems
from tests.archives import docker_archive
from tests.cli.conftest import Shell, reset
from tests.layer.tars import directory, entry, tar
from tests.store.stores import Silent
from tests.store.test_repair import REPAIR_POINTS

KILLED = -signal.SIGKILL
SHARED = tar(directory("./"), entry("shared", data=b"0"))
LAYERS = [SHARED, tar(entry("a", data=b"1")), tar(entry("b", data=b"2"))]
OTHER = [SHARED, tar(entry("c", data=b"3"))]

FINISHED_LATER = {
    "staging-left", "layer-orphan", "layer-empty", "image-damaged", "name-dangling",
    "snapshot-orphan", "snapshot-unfinished", "container-unfinished", "volume-unfinished",
}  # fmt: skip
"""What check may say of a store in which a command was killed. A damaged image has no record."""


class World:
    """A store with an image and a container that no test means, and the archive of another."""

    def __init__(self, store: str, place: Path) -> None:
        self.store = store
        self.archive = str(docker_archive(place / "demo.tar", LAYERS))
        self.other = str(docker_archive(place / "other.tar", OTHER, tags=("other:latest",)))
        self.tar = str(place / "plain.tar")
        Path(self.tar).write_bytes(LAYERS[1])

    @property
    def engine(self) -> Engine:
        return Engine.open(self.store)

    def populate(self) -> None:
        self.open().load(self.other, tag=None, platform=None, progress=Silent())
        self.engine.create("other", name="bystander")

    def open(self) -> Engine:
        return Engine.open(self.store, create=True)

    def load(self) -> None:
        self.open().load(self.archive, tag=None, platform=None, progress=Silent())

    def load_plain(self) -> None:
        self.open().import_layers([self.tar], reference="demo", progress=Silent())

    def tag(self) -> None:
        self.engine.tag("other", "demo")

    def create(self) -> None:
        self.engine.create("demo", name="cc")

    def mount(self) -> None:
        self.engine.mount_container("cc", volatile=False, xino=False)

    def view(self) -> None:
        self.engine.mount_image("demo")

    def unmount(self) -> None:
        self.engine.unmount_container("cc", lazy=False)

    def remove(self) -> None:
        self.engine.remove_container("cc", force=True, dry_run=False)

    def remove_image(self) -> None:
        self.engine.remove_image("demo", force=False, dry_run=False)

    def make_volume(self) -> None:
        self.engine.create_volume("data", {})

    def make_with_volumes(self) -> None:
        mounts = placed.wanted(volumes=["data:/data", "/anonymous"], here="/")
        self.engine.create("demo", name="cc", asked=Config(mounts=mounts))

    def write_in_volumes(self) -> None:
        for row in self.engine.volumes(sizes=False):
            Path(row["Mountpoint"], "directory").mkdir()
            Path(row["Mountpoint"], "directory/file").write_text("v")

    def write_where_a_volume_will_be(self) -> None:
        merged = Path(self.engine.mount_container("cc", volatile=False, xino=False))
        (merged / "data").mkdir()
        (merged / "data/file").write_text("v")

    def fill(self) -> None:
        engine = self.engine
        merged = engine.mount_container("cc", volatile=False, xino=False)
        root = os.open(merged, os.O_RDONLY | os.O_DIRECTORY)
        volumes.prepare(engine.store, containers.resolve(engine.layout, "cc"), root)
        os.close(root)
        data = Path(self.store, "volumes/data/_data/file")
        assert data.read_text() == "v"

    def remove_volume(self) -> None:
        self.engine.remove_volume("data", force=False, dry_run=False)

    def remove_with_volumes(self) -> None:
        self.engine.remove_container("cc", force=False, dry_run=False, volumes=True)

    def write(self) -> None:
        """Write in the mounted container, and find what is below."""
        merged = Path(self.engine.mount_container("cc", volatile=False, xino=False))
        (merged / "written").write_text("4")

    def commit(self) -> None:
        self.engine.commit("cc", reference="made", wish=Wish(), progress=Silent())

    def findings(self) -> set[str]:
        return {found["Tag"] for found in self.engine.check(quick=False)}

    def names(self, kind: str) -> list[str]:
        return sorted(os.listdir(os.path.join(self.store, kind)))


class Command(NamedTuple):
    """A command, what comes before it, and the points where it is killed."""

    before: tuple[Callable[[World], None], ...]
    run: Callable[[World], None]
    points: tuple[str, ...]


STORE = ("store:after-directories", "store:after-empty", "store:after-marker")
INGEST = (
    "ingest:after-sync", "layer:after-rename", "image:before-rename", "image:after-rename",
    "tag:before-rename", "tag:after-rename",
)  # fmt: skip
COMMIT = ("commit:after-tar", "layer:after-rename", "image:before-rename", "tag:before-rename")
TEARDOWN = (
    "umount:after-umount", "snapshot:after-unlink", "snapshot:after-upper",
    "snapshot:after-removal", "container:after-unlink",
)  # fmt: skip
CREATE = (
    "snapshot:before-rename", "snapshot:after-rename", "container:after-name",
    "container:after-rename",
)  # fmt: skip
MOUNT = (
    "mount:after-attach", "snapshot:after-workdir", "mount:after-mountpoint", "mount:after-mount"
)  # fmt: skip
REMOVE_IMAGE = (
    "image:after-detach", "tag:after-unlink", "image:after-unlink", "image:after-removal",
    "layer:after-unlink", "layer:after-removal",
)  # fmt: skip

MAKE_VOLUME = ("volume:before-rename", "volume:after-rename")
REMOVE_VOLUME = (
    "volume:after-keep", "volume:after-unlink", "volume:after-data", "volume:after-removal",
)  # fmt: skip

WITH_VOLUMES = (
    World.populate, World.load, World.make_with_volumes, World.write_in_volumes,
)  # fmt: skip
FILL = ("volume:before-fill", "volume:after-fill")
FILLED = (
    World.populate, World.load, World.make_with_volumes, World.write_where_a_volume_will_be,
)  # fmt: skip
MOUNTED = (World.populate, World.load, World.create, World.mount, World.write)
COMMANDS = {
    "first load": Command((), World.load, STORE),
    "load": Command((World.populate,), World.load, INGEST),
    "import": Command((World.populate,), World.load_plain, INGEST),
    "tag": Command((World.populate,), World.tag, ("tag:before-rename", "tag:after-rename")),
    "create": Command((World.populate, World.load), World.create, CREATE),
    "mount": Command((World.populate, World.load, World.create), World.mount, MOUNT),
    "mount again": Command((*MOUNTED, World.unmount), World.mount, MOUNT),
    "image mount": Command((World.populate, World.load), World.view, ("mount:after-mountpoint",)),
    "umount": Command(MOUNTED, World.unmount, ("umount:after-umount",)),
    "commit": Command(MOUNTED, World.commit, COMMIT),
    "rm": Command(MOUNTED, World.remove, TEARDOWN),
    "volume create": Command((World.populate, World.load), World.make_volume, MAKE_VOLUME),
    "create -v": Command((World.populate, World.load), World.make_with_volumes, MAKE_VOLUME),
    "a volume's first use": Command(FILLED, World.fill, FILL),
    "volume rm": Command((*WITH_VOLUMES, World.remove), World.remove_volume, REMOVE_VOLUME),
    "rm -v": Command(WITH_VOLUMES, World.remove_with_volumes, REMOVE_VOLUME),
    "image rm": Command((World.populate, World.load), World.remove_image, REMOVE_IMAGE),
}


REMOVALS = {
    World.remove, World.remove_image, World.unmount, World.remove_volume, World.remove_with_volumes,
}  # fmt: skip


def killed(point: str, action: Callable[[], None]) -> None:
    """Do it in another process, which must die at the fault point."""

    def run() -> None:
        os.environ["OVERLAYCTL_FAULT"] = point
        action()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == KILLED


def listed_things_are_complete(world: World) -> None:
    """Whatever a list shows can be looked at and mounted, and holds what it should."""
    engine = world.engine
    engine.layers()
    for image in engine.images():
        view = Path(engine.mount_image(image["Id"]))
        assert "".join(sorted(path.read_text() for path in view.iterdir())) in {
            "012",
            "0124",
            "03",
            "1",
        }
        engine.unmount_image(image["Id"])
        engine.history(image["Id"])
    for row in engine.volumes(sizes=False):
        inside = Path(row["Mountpoint"])
        assert [path.read_text() for path in inside.rglob("file")] == ["v"] * len(
            list(inside.iterdir())
        )
    for row in engine.containers(everything=True):
        found = engine.inspect_container(row["Id"])
        merged = Path(engine.mount_container(row["Id"], volatile=False, xino=False))
        assert (merged / "shared").read_text() == "0"
        if not found["GraphDriver"]["Data"].get("MergedDir"):
            engine.unmount_container(row["Id"], lazy=False)


def everything_can_go(world: World) -> None:
    """What the killed command made, then all the rest: nothing is pinned, no name is left."""
    world.load()
    with contextlib.suppress(NotFound):
        world.engine.unmount_image("demo")
    for name in ("cc", "bystander"):
        with contextlib.suppress(NotFound):
            world.engine.remove_container(name, force=True, dry_run=False)
    for row in world.engine.images():
        world.engine.remove_image(row["Id"], force=True, dry_run=False)
    world.engine.prune_volumes(everything=True, labels={}, dry_run=False)
    # No image may name the layer of a commit, and no archive has it.
    world.engine.prune(everything=False, dry_run=False)
    for kind in ("layers", "volumes", "images", "tags", "snapshots", "containers/names", "ingest"):
        assert world.names(kind) == [], kind
    assert world.names("attached/merged") == []
    assert world.findings() == set()


def cases() -> list[tuple[str, str]]:
    return [(name, point) for name, command in COMMANDS.items() for point in command.points]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    # In memory, as what a kill leaves has nothing to do with disks, and syncing takes its time.
    with filesystems.mounted("tmpfs", tmp_path) as memory:
        yield World(str(memory / "store"), tmp_path)
        reset(str(memory / "store"))


@pytest.mark.parametrize("then", ["others go on", "it is repeated", "all is taken away"])
@pytest.mark.parametrize(("name", "point"), cases())
def test_killed(world: World, name: str, point: str, then: str) -> None:
    command = COMMANDS[name]
    for step in command.before:
        step(world)
    killed(point, lambda: command.run(world))
    if os.path.exists(os.path.join(world.store, "overlayctl.json")):
        assert world.findings() <= FINISHED_LATER
        if then == "others go on" and command.before:
            listed_things_are_complete(world)
            world.engine.tag("other", "another")
            # Nobody may take a layer away but who says so.
            assert world.findings() <= {"layer-orphan"}
    if then != "all is taken away":
        # Nothing is to be done once more: so who comes next takes the staging away.
        left = {"staging-left"} if point == "volume:after-fill" else set()
        try:
            command.run(world)
        except NotFound:
            # What is taken away by name went with its name.
            assert command.run in REMOVALS
            left = FINISHED_LATER
        except Conflict:
            assert point == "container:after-rename"
        listed_things_are_complete(world)
        assert world.findings() <= left
    everything_can_go(world)


def test_every_point_is_one_where_a_command_is_killed() -> None:
    assert {point for _, point in cases()}.union(REPAIR_POINTS) == POINTS
    with pytest.raises(LookupError):
        fault("no:such-point")


def test_the_commands_die_there_too(run: Shell, tmp_path: Path) -> None:
    archive = docker_archive(tmp_path / "a.tar", LAYERS)
    run("load", archive, ok=KILLED, sound=False, fault="image:after-rename")
    # The image has no name yet.
    assert "<none>" in run("images", sound=False).out
    assert run("load", archive).out == "Loaded image: demo:latest\n"
    run("rmi", "demo")

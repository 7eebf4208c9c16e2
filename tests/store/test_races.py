"""Races: several processes do to one store, at the same moment, what must not be mixed up.

A round is one operation of each process. Whatever order the kernel gives them, afterwards
the store is sound: nothing is half there, no view lacks a layer, nobody waits for ever.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest

from overlayctl.engine import Engine
from overlayctl.errors import Conflict, InUse, NotFound, OverlayctlError
from overlayctl.kernel import inuse, libc
from overlayctl.layer import attach
from overlayctl.store import images, layers, records
from tests.archives import diff_id, docker_archive
from tests.filesystems import mounted
from tests.layer.tars import entry, tar
from tests.rootmount import enter_new_namespace
from tests.store.stores import Silent, add_layers

TIMEOUT = 60
"""Seconds after which a process hangs: twice what a lock is waited for."""


class Party(NamedTuple):
    """A process of a race: what it does in a round, and the errors that are an answer, too.

    One that is ``apart`` has a mount namespace of its own.
    """

    act: Callable[[Engine, int], object]
    may: tuple[type[OverlayctlError], ...] = ()
    apart: bool = False


def _take_part(party: Party, root: str, place: Connection) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if party.apart:
        enter_new_namespace()
    engine = Engine.open(root)
    chance = random.Random(os.getpid())
    while (number := place.recv()) is not None:
        # Operations take milliseconds: they are to meet at every point of one another.
        time.sleep(chance.random() * 0.006)
        try:
            party.act(engine, number)
            place.send("done")
        except party.may as error:
            place.send(type(error).__name__)
        except BaseException:  # noqa: BLE001 - told to the test, which fails by it
            place.send(traceback.format_exc())


class Race:
    """Processes that wait for the next round."""

    def __init__(self, root: Path | str, *parties: Party) -> None:
        context = multiprocessing.get_context("fork")
        self.places = []
        self.processes = []
        self.told: collections.Counter[tuple[str, ...]] = collections.Counter()
        for party in parties:
            ours, theirs = context.Pipe()
            process = context.Process(target=_take_part, args=(party, os.fspath(root), theirs))
            process.start()
            theirs.close()
            self.places.append(ours)
            self.processes.append(process)

    def run(self, number: int) -> tuple[str, ...]:
        """How each process's part of the round ended: done, or the name of an error it may meet."""
        for place in random.sample(self.places, len(self.places)):
            place.send(number)
        deadline = time.monotonic() + TIMEOUT
        told = []
        for party, (place, process) in enumerate(zip(self.places, self.processes, strict=True)):
            if not place.poll(max(0.0, deadline - time.monotonic())):
                os.kill(process.pid or 0, signal.SIGUSR1)
                time.sleep(0.2)
                pytest.fail(f"round {number}: process {party} hangs; where, stderr says")
            said = place.recv()
            if "\n" in said:
                pytest.fail(f"round {number}, process {party}:\n{said}")
            told.append(said)
        self.told[tuple(told)] += 1
        return tuple(told)

    def end(self) -> None:
        for place, process in zip(self.places, self.processes, strict=True):
            with contextlib.suppress(BrokenPipeError):
                place.send(None)
            process.join(0.5)
            process.kill()
            process.join()
            place.close()
        for told, times in self.told.most_common():
            print(f"{times} x {', '.join(told)}")


@contextlib.contextmanager
def racing(root: Path | str, *parties: Party) -> Iterator[Race]:
    race = Race(root, *parties)
    try:
        yield race
    finally:
        race.end()


@pytest.fixture(params=[50, pytest.param(2000, marks=pytest.mark.long)])
def rounds(request: pytest.FixtureRequest) -> range:
    return range(int(request.param))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    opened = Engine.open(str(tmp_path / "store"), create=True)
    yield opened
    opened.reset(dry_run=False)


def layer(letter: str) -> bytes:
    """A layer that shows who it is."""
    return tar(entry(letter, data=letter.encode() * 5000), entry("top", data=letter.encode()))


LETTERS = {diff_id(layer(letter)).removeprefix("sha256:"): letter for letter in "abcdef"}


class Archive(NamedTuple):
    """An image of these layers, in a file, that carries this tag."""

    path: Path
    letters: str
    tag: str

    def load(self, engine: Engine, _: int = 0) -> None:
        engine.load(str(self.path), tag=None, platform=None, progress=Silent())

    def remove(self, engine: Engine, _: int = 0) -> None:
        engine.remove_image(self.tag, force=False, dry_run=False)

    def mount(self, engine: Engine, _: int = 0) -> None:
        look(engine.mount_image(self.tag), self.letters)

    def unmount(self, engine: Engine, _: int = 0) -> None:
        engine.unmount_image(self.tag)


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., Archive]:
    def make(letters: str, tag: str | None = "") -> Archive:
        tag = f"{letters}:latest" if tag == "" else tag
        path = tmp_path / f"{tag}.tar"
        made = [layer(letter) for letter in letters]
        return Archive(docker_archive(path, made, tags=(tag,) if tag else ()), letters, tag or "")

    return make


def look(view: str, letters: str) -> None:
    """A view shows all its layers; one that was taken down meanwhile is none."""
    try:
        fd = os.open(view, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        if libc.is_mount_root(fd):
            for letter in letters:
                assert _read(letter, fd) == letter * 5000
            assert _read("top", fd) == letters[-1]
    finally:
        os.close(fd)


def _read(name: str, directory: int) -> str:
    with open(os.open(name, os.O_RDONLY, dir_fd=directory)) as file:
        return file.read()


def attached_layers(engine: Engine) -> list[str]:
    """The letters of the layers whose diff path is there; each shows its layer."""
    with engine.store.locked(exclusive=False):
        found = attach.attached(engine.layout)
        for name in found:
            if name != attach.EMPTY:
                assert attach.is_mounted(engine.layout.diff(name)), name
                look(engine.layout.diff(name), LETTERS[name])
    return [LETTERS[name] for name in found if name != attach.EMPTY]


def sound(engine: Engine, *, quick: bool = True) -> None:
    """Every layer of every image is here, every diff path shows its layer, check is content."""
    assert engine.check(quick=quick) == []
    for image in images.readable(engine.layout):
        assert all(layers.exists(engine.layout, name) for name in image.layers)
    attached_layers(engine)


def test_mount_against_detach(
    engine: Engine, rounds: range, archive: Callable[..., Archive]
) -> None:
    abc = archive("abc")
    abc.load(engine)
    container = engine.create(abc.tag, name="box").id

    def mount(engine: Engine, _: int) -> None:
        look(engine.mount_container(container, volatile=False, xino=False), "abc")
        engine.unmount_container(container, lazy=False)

    def show(engine: Engine, number: int) -> None:
        look(engine.layer_path(f"abc:latest:{number % 3 + 1}"), "abc"[number % 3])

    def detach(engine: Engine, number: int) -> None:
        engine.detach(f"abc:latest:{number % 3 + 1}" if number % 2 else None)

    with racing(
        engine.layout.root,
        Party(mount),
        Party(lambda engine, _: (abc.mount(engine), abc.unmount(engine))),
        Party(show),
        Party(detach, (InUse,)),
    ) as race:
        for number in rounds:
            race.run(number)
            attached_layers(engine)
    sound(engine, quick=False)


def test_mount_against_image_rm(
    engine: Engine, rounds: range, archive: Callable[..., Archive], tmp_path: Path
) -> None:
    abc = archive("abc")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def mount_elsewhere(engine: Engine, _: int) -> None:
        look(engine.mount_image(abc.tag, str(elsewhere)), "abc")

    with racing(
        engine.layout.root,
        Party(abc.mount, (NotFound,)),
        Party(mount_elsewhere, (NotFound,)),
        Party(abc.remove, (InUse,)),
    ) as race:
        for number in rounds:
            abc.load(engine)
            *mounting, removed = race.run(number)
            assert (removed == "done") == ("done" not in mounting)
            assert ("done" in mounting) == engine.image_exists(abc.tag)
            sound(engine)
            if engine.image_exists(abc.tag):
                abc.unmount(engine)
                abc.remove(engine)
            assert layers.listed(engine.layout) == attached_layers(engine) == []
    sound(engine, quick=False)


def test_mount_in_other_namespaces_against_image_rm_and_detach(
    engine: Engine, rounds: range, archive: Callable[..., Archive]
) -> None:
    abc = archive("abc")

    def mount(engine: Engine, _: int) -> None:
        view = engine.mount_image(abc.tag)
        assert os.path.ismount(view)
        look(view, "abc")
        abc.unmount(engine)

    with racing(
        engine.layout.root,
        Party(mount, (NotFound,), apart=True),
        Party(mount, (NotFound,), apart=True),
        Party(abc.remove, (InUse,)),
        Party(lambda engine, _: engine.detach(None), apart=True),
    ) as race:
        for number in rounds:
            abc.load(engine)
            race.run(number)
            sound(engine)
            if engine.image_exists(abc.tag):
                abc.remove(engine)
            assert layers.listed(engine.layout) == attached_layers(engine) == []
    sound(engine, quick=False)


def test_create_against_image_rm(
    engine: Engine, rounds: range, archive: Callable[..., Archive]
) -> None:
    abc = archive("abc")

    def create(engine: Engine, number: int) -> None:
        made = engine.create(abc.tag, name=f"box{number}", mount=True)
        look(made.merged or "", "abc")

    def remove(engine: Engine, number: int) -> None:
        engine.remove_image(abc.tag, force=number % 2 == 0, dry_run=False)

    with racing(
        engine.layout.root,
        Party(create, (NotFound,)),
        Party(remove, (InUse,)),
    ) as race:
        for number in rounds:
            abc.load(engine)
            created, removed = race.run(number)
            assert "done" in (created, removed)
            sound(engine)
            if created == "done":
                # Mounted once more: with its name gone the image is still what it was.
                engine.unmount_container(f"box{number}", lazy=False)
                look(engine.mount_container(f"box{number}", volatile=False, xino=False), "abc")
                engine.remove_container(f"box{number}", force=True, dry_run=False)
            for left in engine.images():
                engine.remove_image(left["Id"], force=False, dry_run=False)
            assert layers.listed(engine.layout) == attached_layers(engine) == []
    sound(engine, quick=False)


def test_two_loads_of_one_image(
    engine: Engine, rounds: range, archive: Callable[..., Archive]
) -> None:
    abc, also = archive("abc"), archive("abc", "also:1")
    with racing(engine.layout.root, Party(abc.load), Party(abc.load), Party(also.load)) as race:
        for number in rounds:
            race.run(number)
            sound(engine)
            (row,) = engine.images()
            assert row["RepoTags"] == ["abc:latest", "also:1"]
            abc.mount(engine)
            abc.unmount(engine)
            abc.remove(engine)
            also.remove(engine)
            assert layers.listed(engine.layout) == []
    sound(engine, quick=False)


def test_load_against_image_rm_of_a_shared_layer(
    engine: Engine, rounds: range, archive: Callable[..., Archive]
) -> None:
    old, new, third = archive("ab"), archive("acb"), archive("ad")
    with racing(engine.layout.root, Party(new.load), Party(old.remove), Party(third.load)) as race:
        for number in rounds:
            old.load(engine)
            race.run(number)
            sound(engine)
            assert not engine.image_exists(old.tag)
            for loaded in (new, third):
                loaded.mount(engine)
                loaded.unmount(engine)
                loaded.remove(engine)
            assert layers.listed(engine.layout) == attached_layers(engine) == []
    sound(engine, quick=False)


def test_a_tag_that_moves_against_image_rm(
    engine: Engine, rounds: range, archive: Callable[..., Archive]
) -> None:
    ac, moving, newer = archive("ac"), archive("ab", "moving:1"), archive("ad", "moving:1")

    def mount(engine: Engine, _: int) -> None:
        view = engine.mount_image(moving.tag)
        image = images.get(engine.layout, os.path.basename(view))
        look(view, "".join(LETTERS[name] for name in image.layers))

    with racing(
        engine.layout.root,
        Party(lambda engine, _: engine.tag(ac.tag, "moving:1")),
        Party(moving.remove, (NotFound, InUse)),
        Party(newer.load),
        Party(mount, (NotFound,)),
    ) as race:
        for number in rounds:
            moving.load(engine)
            ac.load(engine)
            race.run(number)
            sound(engine)
            assert engine.image_exists(ac.tag)
            for view in engine.mounts():
                engine.unmount_image(view["Id"])
            for left in engine.images():
                engine.remove_image(left["Id"], force=True, dry_run=False)
            assert layers.listed(engine.layout) == attached_layers(engine) == []
    sound(engine, quick=False)


def test_creates_of_one_name(
    engine: Engine, rounds: range, archive: Callable[..., Archive]
) -> None:
    abc = archive("abc")
    abc.load(engine)

    def create(engine: Engine, number: int) -> None:
        engine.create(abc.tag, name="box", mount=number % 2 == 0)

    with racing(engine.layout.root, *[Party(create, (Conflict,))] * 3) as race:
        for number in rounds:
            assert sorted(race.run(number)) == ["Conflict", "Conflict", "done"]
            sound(engine)
            (row,) = engine.containers(everything=True)
            assert row["Names"] == "box"
            assert len(records.names(engine.layout.path("snapshots"))) == 1
            engine.remove_container("box", force=True, dry_run=False)
    sound(engine, quick=False)


@pytest.mark.parametrize("many", [2, 4])
def test_containers_mounted_at_the_same_moment_are_never_taken_for_one(
    engine: Engine, rounds: range, archive: Callable[..., Archive], many: int, tmp_path: Path
) -> None:
    abc = archive("abc")
    abc.load(engine)
    boxes = [engine.create(abc.tag, name=f"box{n}").id for n in range(many)]

    busy = engine.create(abc.tag, name="busy", mount=True).id
    upper, lower = engine.layout.snapshot(busy, "upper"), engine.layout.diff(attach.EMPTY)
    second = tmp_path / "second"
    second.mkdir()

    def make_the_kernel_complain(_: Engine, number: int) -> None:
        """Its line about an upper in use goes to the one log of the whole machine."""
        for turn in range(4):
            assert inuse.upper_in_use(upper)
            work = tmp_path / f"work{number}-{turn}"
            work.mkdir()
            options = f"lowerdir={lower},upperdir={upper},workdir={work},index=off,volatile"
            libc.mount("second", str(second), "overlay", options.encode())
            libc.umount2(str(second), 0)

    def mount(engine: Engine, number: int, box: str) -> None:
        view = engine.mount_container(box, volatile=False, xino=False)
        look(view, "abc")
        Path(view, "written").write_text(str(number))
        engine.unmount_container(box, lazy=False)
        assert Path(
            engine.layout.snapshot(
                box,
                "upper",
            ),
            "written",
        ).read_text() == str(number)

    parties = [Party(partial(mount, box=box)) for box in boxes]
    engine.store.attach([attach.EMPTY])
    with racing(engine.layout.root, *parties, Party(make_the_kernel_complain)) as race:
        for number in rounds:
            assert set(race.run(number)) == {"done"}
    sound(engine, quick=False)


def test_prune_against_everything(
    engine: Engine, rounds: range, archive: Callable[..., Archive]
) -> None:
    ab, cf, nameless = archive("ab"), archive("cf"), archive("ae", None)
    (loaded,) = engine.load(str(nameless.path), tag=None, platform=None, progress=Silent())
    mounted = loaded.image_id

    def prune(engine: Engine, number: int) -> None:
        assert not engine.prune(everything=number % 2 == 0, dry_run=False).unread

    def create(engine: Engine, number: int) -> None:
        made = engine.create(ab.tag, name=f"box{number}", mount=True)
        look(made.merged or "", "ab")

    def mount(engine: Engine, _: int) -> None:
        look(engine.mount_image(mounted), "ae")

    with racing(
        engine.layout.root,
        Party(prune),
        Party(cf.load),
        Party(create, (NotFound,)),
        Party(mount, (NotFound,)),
    ) as race:
        for number in rounds:
            ab.load(engine)
            nameless.load(engine)
            # What a killed load leaves, and what the next one of this layer finds there.
            add_layers(engine.layout, layer("f"))
            _, _, created, viewed = race.run(number)
            sound(engine)
            assert engine.image_exists(mounted) == (viewed == "done")
            assert engine.image_exists(ab.tag) >= (created == "done")
            if number % 2:
                assert created == "done"
                assert engine.image_exists(cf.tag)
            if viewed == "done":
                engine.unmount_image(mounted)
            if created == "done":
                engine.remove_container(f"box{number}", force=True, dry_run=False)
            engine.prune(everything=True, dry_run=False)
            assert layers.listed(engine.layout) == attached_layers(engine) == []
    sound(engine, quick=False)


@pytest.fixture(params=["btrfs", "tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with mounted(request.param, tmp_path) as root:
        yield root


def test_what_is_always_there_is_always_listed(
    disk: Path, rounds: range, archive: Callable[..., Archive]
) -> None:
    """Nor does a directory lack a name that is replaced while it is read: on btrfs it does."""
    engine = Engine.open(str(disk / "store"), create=True)
    first, second, other = archive("a"), archive("ab"), archive("ac")
    for image in (first, second):
        image.load(engine)
    engine.tag(first.tag, "moves:1")
    box = engine.create(first.tag, name="box").id

    def move(engine: Engine, _: int) -> None:
        for image in (second, first) * 2:
            engine.tag(image.tag, "moves:1")

    def come_and_go(engine: Engine, _: int) -> None:
        other.load(engine)
        engine.create(other.tag, name="other")
        engine.remove_container("other", force=False, dry_run=False)
        other.remove(engine)

    def show(engine: Engine, _: int) -> None:
        for _ in range(3):
            listed = {tag for row in engine.images() for tag in row["RepoTags"]}
            assert listed - {other.tag} == {first.tag, second.tag, "moves:1"}
            assert box in {row["Id"] for row in engine.containers(everything=True)}
            assert {LETTERS[row["Name"]] for row in engine.layers()} >= {"a", "b"}
            assert engine.image_exists("moves:1")
            assert engine.kind_of("box") == "container"
            assert "moves:1" in engine.inspect_image("moves:1")["RepoTags"]
            assert engine.inspect_container("box")["Id"] == box
        assert engine.check() == []

    parties = Party(move), Party(come_and_go), Party(show), Party(show)
    try:
        with racing(engine.layout.root, *parties) as race:
            for number in rounds:
                race.run(number)
    finally:
        engine.reset(dry_run=False)

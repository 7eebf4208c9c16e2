"""One file of a store deleted, cut or overwritten by hand: the others work, ``check`` names it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from overlayctl import names
from overlayctl.engine import Engine
from overlayctl.errors import Damaged, NotFound
from overlayctl.kernel import mounter, mounttable
from overlayctl.layout import Layout
from overlayctl.store import images
from tests.layer.tars import directory, entry, tar
from tests.store import stores

SHARED = tar(directory("etc"), entry("etc/shared", data=b"shared"))
ONE = tar(entry("etc/one", data=b"one"))
OTHER = tar(entry("etc/other", data=b"other"))


class Pair(NamedTuple):
    """Two images that share their bottom layer, and a container of each; ``one`` gets hurt."""

    layout: Layout
    one: images.Image
    other: images.Image

    @property
    def own_layer(self) -> str:
        return self.layout.layer_file(self.one.layers[1])

    @property
    def upper(self) -> Path:
        return Path(self.layout.snapshot(stores.KEY, "upper"))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    layout = stores.new(tmp_path / "store")
    one = stores.add_image(layout, SHARED, ONE, tag="docker.io/library/one:latest")
    other = stores.add_image(layout, SHARED, OTHER, tag="docker.io/library/other:latest")
    stores.add_container(layout, one, "web")
    stores.add_container(layout, other, "db", stores.OTHER_KEY)
    made = Pair(layout, one, other)
    (made.upper / "mine").write_text("mine")
    yield made
    for mount in [*mounttable.below(layout.attached)][::-1]:
        mounter.unmount(mount.mount_point)
    if os.path.ismount(layout.attached):
        mounter.unmount(layout.attached)


FILES: dict[str, Callable[[Pair], str]] = {
    "its layer": lambda p: p.own_layer,
    "image.json": lambda p: p.layout.image(p.one.hex, "image.json"),
    "config.json": lambda p: p.layout.image(p.one.hex, "config.json"),
    "manifest.json": lambda p: p.layout.image(p.one.hex, "manifest.json"),
    "tag": lambda p: p.layout.path("tags", names.tag_file("docker.io/library/one:latest")),
    "snapshot.json": lambda p: p.layout.snapshot(stores.KEY, "snapshot.json"),
    "keep": lambda p: p.layout.snapshot(stores.KEY, "keep"),
    "container": lambda p: p.layout.container(stores.KEY),
    "name": lambda p: p.layout.container_name("web"),
    "empty.erofs": lambda p: p.layout.empty,
}


def _delete(path: str) -> None:
    os.unlink(path)


def _cut(path: str, part: int) -> None:
    if os.path.islink(path):
        target = os.readlink(path)
        os.unlink(path)
        os.symlink(target[: len(target) // part] or "x", path)
        return
    os.chmod(path, 0o600)
    os.truncate(path, os.path.getsize(path) // part)


def _overwrite(path: str) -> None:
    mode = os.lstat(path).st_mode
    os.unlink(path)
    Path(path).write_bytes(b"\xff garbage {\0\n" * 700)
    os.chmod(path, mode & 0o7777)


DAMAGE: dict[str, Callable[[str], None]] = {
    "gone": _delete,
    "empty": lambda path: _cut(path, 1 << 40),
    "half": lambda path: _cut(path, 2),
    "garbage": _overwrite,
}
# A tag less is an image without a name, and what stands in keep means nothing.
UNSEEN = {("tag", "gone"), ("keep", "empty"), ("keep", "half"), ("keep", "garbage")}


def test_no_kind_of_file_is_left_out(pair: Pair) -> None:
    found = {
        os.path.join(place, name)
        for place, directories, files in os.walk(pair.layout.root)
        for name in [*files, *(d for d in directories if os.path.islink(os.path.join(place, d)))]
        if "/upper" not in place
    }
    hurt = {file(pair) for file in FILES.values()}
    assert hurt <= found
    # The rest is of the other image and container, or the layer of both, or the marker.
    left = {os.path.relpath(path, pair.layout.root) for path in found - hurt}
    assert {path.replace(pair.other.hex, "<image>") for path in left} == {
        "overlayctl.json",
        *(f"layers/{name}/layer.erofs" for name in pair.other.layers),
        *(f"images/<image>/{name}.json" for name in ("image", "config", "manifest")),
        f"tags/{names.tag_file('docker.io/library/other:latest')}",
        *(f"snapshots/{stores.OTHER_KEY}/{name}" for name in ("snapshot.json", "keep")),
        f"containers/{stores.OTHER_KEY}.json",
        "containers/names/db",
    }


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_what_is_not_damaged_works_and_the_damage_is_named(
    pair: Pair, file: str, damage: str
) -> None:
    path = FILES[file](pair)
    DAMAGE[damage](path)
    engine = Engine.open(pair.layout.root)
    findings = engine.check()
    # Without keep a snapshot is one that is being removed.
    wanted = os.path.dirname(path) if file == "keep" else path
    seen = any(wanted in finding["Path"] + finding["Message"] for finding in findings)
    assert seen != ((file, damage) in UNSEEN), findings
    _works(engine, pair)
    # What the next writer finishes is nothing of what is left.
    engine.tag("other", "third")
    assert (pair.upper / "mine").exists() or (file, damage) == ("keep", "gone")
    _works(engine, pair)


def _works(engine: Engine, pair: Pair) -> None:
    assert pair.other.id in [row["Id"] for row in engine.images()]
    assert stores.OTHER_KEY in [row["Id"] for row in engine.containers(everything=True)]
    assert set(pair.other.layers) <= {row["Name"] for row in engine.layers()}
    assert engine.inspect_image("other")["Id"] == pair.other.id
    assert engine.history("other")
    assert engine.inspect_container("db")["Id"] == stores.OTHER_KEY
    for merged in (
        engine.mount_image("other"),
        engine.mount_container("db", volatile=False, xino=False),
    ):
        assert Path(merged, "etc/shared").read_text() == "shared"
        assert Path(merged, "etc/other").read_text() == "other"
    engine.unmount_container("db", lazy=False)
    engine.unmount_image("other")


@pytest.mark.parametrize("damage", DAMAGE)
def test_of_a_layer_in_both_images_everything_is_still_listed(pair: Pair, damage: str) -> None:
    path = pair.layout.layer_file(pair.one.layers[0])
    DAMAGE[damage](path)
    engine = Engine.open(pair.layout.root)
    assert len(engine.images()) == len(engine.containers(everything=True)) == 2
    assert set(pair.other.layers[1:]) <= {row["Name"] for row in engine.layers()}
    users = [finding["Users"] for finding in engine.check() if finding["Path"] == path]
    assert [len(harmed) for harmed in users] == [4] * len(users) != []
    wanted = names.short(pair.one.layers[0])
    with pytest.raises((Damaged, NotFound), match=wanted):
        engine.mount_image("other")
    with pytest.raises((Damaged, NotFound), match=wanted):
        engine.mount_container("db", volatile=False, xino=False)


@pytest.mark.parametrize("damage", DAMAGE)
def test_without_its_marker_a_store_says_so(pair: Pair, damage: str) -> None:
    DAMAGE[damage](pair.layout.marker)
    with pytest.raises((Damaged, NotFound), match=pair.layout.root):
        Engine.open(pair.layout.root)


# -- an upper without its records ---------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_container_without_its_record_answers_to_its_key(pair: Pair, damage: str) -> None:
    DAMAGE[damage](pair.layout.container(stores.KEY))
    engine = Engine.open(pair.layout.root)
    (row,) = [r for r in engine.containers(everything=True) if r["Id"] == stores.KEY]
    assert (row["Status"], row["Names"]) == ("no record", stores.KEY[:12])
    inspected = engine.inspect_container(stores.KEY[:12])
    assert inspected["GraphDriver"]["Data"]["UpperDir"] == str(pair.upper)
    assert inspected["GraphDriver"]["Data"]["LowerDir"]
    merged = Path(engine.mount_container(stores.KEY, volatile=False, xino=False))
    assert (merged / "mine").read_text() == "mine"
    assert (merged / "etc/one").read_text() == "one"
    (row,) = engine.containers(everything=False)
    assert row["Status"] == "mounted, no record"
    engine.unmount_container(stores.KEY, lazy=False)
    assert engine.remove_container(stores.KEY, force=False, dry_run=False) == stores.KEY
    assert not os.path.exists(pair.layout.snapshot(stores.KEY))
    engine.tag("one", "again")
    assert engine.check() == []


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("both", [False, True])
def test_a_container_without_its_layers_is_shown_and_removed(
    pair: Pair, damage: str, *, both: bool
) -> None:
    if both:
        os.unlink(pair.layout.container(stores.KEY))
    DAMAGE[damage](pair.layout.snapshot(stores.KEY, "snapshot.json"))
    engine = Engine.open(pair.layout.root)
    (row,) = [r for r in engine.containers(everything=True) if r["Id"] == stores.KEY]
    assert row["Status"] == "no record"
    name = row["Names"]
    assert name == (stores.KEY[:12] if both else "web")
    data = engine.inspect_container(name)["GraphDriver"]["Data"]
    assert (data["UpperDir"], data["LowerDir"]) == (str(pair.upper), None)
    with pytest.raises((Damaged, NotFound), match="snapshot"):
        engine.mount_container(name, volatile=False, xino=False)
    engine.tag("one", "again")
    assert (pair.upper / "mine").read_text() == "mine"
    engine.remove_container(name, force=False, dry_run=False)
    assert engine.check() == []


def test_a_container_whose_upper_is_gone_is_removed(pair: Pair) -> None:
    shutil.rmtree(pair.upper)
    engine = Engine.open(pair.layout.root)
    assert str(pair.upper.parent) in [finding["Path"] for finding in engine.check()]
    engine.remove_container("web", force=False, dry_run=False)
    assert engine.check() == []
    _works(engine, pair)


def test_a_snapshot_that_is_being_made_is_no_container(pair: Pair) -> None:
    stores.add_snapshot(pair.layout, pair.one.layers, "ef" * 32)
    engine = Engine.open(pair.layout.root)
    assert len(engine.containers(everything=True)) == 2
    with pytest.raises(NotFound):
        engine.inspect_container("ef" * 32)

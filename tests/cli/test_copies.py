"""A store that was copied or moved is a store of its own: it sees no mount of the other's."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayctl.engine import Engine
from tests import filesystems
from tests.archives import docker_archive
from tests.cli.conftest import Shell, reset
from tests.cli.test_in_use import vanish
from tests.layer.tars import directory, entry, tar
from tests.store.stores import Silent

LAYERS = [
    tar(directory("./"), entry("a", data=b"1"), directory("dir"), entry("dir/old")),
    tar(entry("gone"), entry("b", data=b"2")),
]
MERGED = {"a": "1", "b": "2 and more", "dir/new": "3"}


@pytest.fixture
def first(run: Shell, tmp_path: Path) -> Shell:
    """A store with an image and a container in which something of every kind was written."""
    archive = str(docker_archive(tmp_path / "a.tar", LAYERS))
    engine = Engine.open(run.store, create=True)
    engine.load(archive, tag=None, platform=None, progress=Silent())
    made = engine.create("demo", name="cc", mount=True)
    merged = Path(made.merged or "")
    with (merged / "b").open("a") as file:
        file.write(" and more")
    (merged / "gone").unlink()
    (merged / "dir/old").unlink()
    (merged / "dir").rmdir()
    (merged / "dir").mkdir()
    (merged / "dir/new").write_text("3")
    assert content(merged) == MERGED
    engine.unmount_container("cc", lazy=False)
    return run


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Shell]:
    """Where the copy is to lie."""
    place = str(tmp_path / "second")
    yield Shell(place)
    reset(place)


def content(merged: Path) -> dict[str, str]:
    return {
        str(path.relative_to(merged)): path.read_text()
        for path in merged.rglob("*")
        if path.is_file()
    }


def mounted(run: Shell) -> list[str]:
    """Where its views are, as it says itself."""
    return [row["MountPoint"] for row in json.loads(run("--json", "mounts", sound=False).out)]


def copy(first: Shell, second: Shell) -> None:
    subprocess.run(["cp", "-a", first.store, second.store], check=True)


@pytest.mark.parametrize("live", [False, True])
def test_both_mount_the_same_container_at_once(first: Shell, second: Shell, *, live: bool) -> None:
    if live:
        # cp -a walks through what is mounted, too: the copy has it as files, and hides them.
        first.path("mount", "cc")
    else:
        vanish(first.store)
    copy(first, second)
    assert mounted(second) == []
    assert json.loads(second("--json", "ps").out) == []
    views = [run.path("mount", "cc") for run in (first, second)]
    relative = [os.path.relpath(views[0], first.store), os.path.relpath(views[1], second.store)]
    assert relative[0] == relative[1]
    assert [content(view) for view in views] == [MERGED, MERGED]
    assert [mounted(run) for run in (first, second)] == [[str(view)] for view in views]
    for view, run in zip(views, (first, second), strict=True):
        (view / "mine").write_text(run.store)
    for view, run in zip(views, (first, second), strict=True):
        (row,) = json.loads(run("--json", "inspect", "cc", sound=False).out)
        assert row["GraphDriver"]["Data"]["MergedDir"] == str(view)
        assert (view / "mine").read_text() == run.store
    second("umount", "cc")
    assert mounted(first) == [str(views[0])]
    assert content(views[0]) == {**MERGED, "mine": first.store}


def test_what_one_removes_the_other_keeps(first: Shell, second: Shell) -> None:
    view, image = first.path("mount", "cc"), first.path("image", "mount", "demo")
    copy(first, second)
    # Neither refused for the sake of the other's mounts, nor, forced, taking them away.
    second("rm", "cc")
    second("rmi", "demo")
    assert os.listdir(os.path.join(second.store, "layers")) == []
    assert content(view) == MERGED
    assert content(image)["b"] == "2"
    assert sorted(mounted(first)) == sorted(map(str, (view, image)))
    first("umount", "demo")
    reset(second.store)
    assert not os.path.exists(second.store) or os.listdir(second.store) == []
    assert content(view) == MERGED
    first("umount", "cc")
    first("mount", "cc")


def test_forced_removal_leaves_the_others_mount(first: Shell, second: Shell) -> None:
    copy(first, second)
    views = [run.path("mount", "cc") for run in (first, second)]
    second("rm", "-f", "cc")
    assert not views[1].exists()
    assert content(views[0]) == MERGED
    assert first("--json", "ps").out != "[]\n"
    assert "cc" in second("mount", "cc", ok=3).err


def test_moved_by_a_rename_with_everything_mounted(first: Shell, second: Shell) -> None:
    view = first.path("mount", "cc")
    os.rename(first.store, second.store)
    # The mounts went along, and are the store's as before.
    moved = Path(second.store, view.relative_to(first.store))
    assert mounted(second) == [str(moved)]
    assert content(moved) == MERGED
    assert second.path("mount", "cc") == moved
    second("rmi", "demo", ok=4)
    second("umount", "cc")
    assert mounted(second) == []
    assert content(second.path("image", "mount", "demo"))["b"] == "2"
    second("umount", "demo")
    second("rm", "cc")
    second("rmi", "demo")


@pytest.mark.parametrize("kind", ["xfs", "tmpfs"])
def test_moved_to_another_filesystem(first: Shell, tmp_path: Path, kind: str) -> None:
    vanish(first.store)
    with filesystems.mounted(kind, tmp_path) as disk:
        second = Shell(str(disk / "store"))
        subprocess.run(["mv", first.store, second.store], check=True)
        try:
            assert content(second.path("mount", "cc")) == MERGED
            # A new one grows where the old one was, and the same things have the same names.
            archive = str(tmp_path / "a.tar")
            first("load", archive, sound=False)
            first("create", "--name", "cc", "demo", sound=False)
            assert mounted(first) == []
            assert content(first.path("mount", "cc"))["b"] == "2"
            assert len(mounted(second)) == 1
            second("rm", "-f", "cc")
            second("rmi", "demo")
            assert len(mounted(first)) == 1
        finally:
            reset(second.store)

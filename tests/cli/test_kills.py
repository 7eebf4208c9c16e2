"""A command killed in the middle: the store opens, the command can be repeated, nothing is left."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.archives import docker_archive
from tests.cli.conftest import Shell
from tests.layer.tars import directory, entry, tar

KILLED = -signal.SIGKILL
LAYERS = [tar(directory("./"), entry("a", data=b"1")), tar(entry("b", data=b"2"))]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return docker_archive(tmp_path / "a.tar", LAYERS)


@pytest.mark.parametrize(
    "point", ["layer:after-rename", "image:before-rename", "image:after-rename", "tag:after-rename"]
)
def test_load(run: Shell, archive: Path, point: str) -> None:
    run("load", archive, ok=KILLED, sound=False, fault=point)
    run("images", sound=False)
    assert run("load", archive).out == "Loaded image: demo:latest\n"
    view = run.path("image", "mount", "demo")
    assert (view / "a").read_text() + (view / "b").read_text() == "12"
    run("umount", "demo")
    run("rmi", "demo")


@pytest.mark.parametrize(
    "point",
    [
        "snapshot:before-rename",
        "snapshot:after-rename",
        "container:after-name",
        "container:after-rename",
    ],
)
def test_create(run: Shell, archive: Path, point: str) -> None:
    run("load", archive)
    run("create", "--name", "cc", "demo", ok=KILLED, sound=False, fault=point)
    visible = run("container", "ls", "-aq", sound=False).out.split()
    if point == "container:after-rename":
        # Its record was there before the kill, so the container is whole and has its name.
        assert len(visible) == 1
        assert "taken" in run("create", "--name", "cc", "demo", ok=4).err
    else:
        assert visible == []
        run("create", "--name", "cc", "demo")
    (run.path("mount", "cc") / "new").write_text("3")
    run("umount", "cc")
    run("rm", "cc")
    run("rmi", "demo")


@pytest.mark.parametrize("point", ["image:after-unlink", "layer:after-unlink"])
def test_rmi(run: Shell, store: str, archive: Path, point: str) -> None:
    run("load", archive)
    run("rmi", "demo", ok=KILLED, sound=False, fault=point)
    assert "demo" not in run("images", sound=False).out
    # The name went before the kill.
    run("rmi", "demo", ok=3, sound=False)
    run("load", archive)
    run("rmi", "demo")
    assert list(Path(store, "layers").iterdir()) == list(Path(store, "images").iterdir()) == []


@pytest.mark.parametrize("point", ["image:after-unlink", "layer:after-unlink"])
def test_rmi_is_finished_by_the_next_writer(run: Shell, tmp_path: Path, point: str) -> None:
    """All but its layers: those are orphans, which no writer takes away by itself."""
    other = docker_archive(tmp_path / "b.tar", [tar(entry("c"))], tags=("other:1",))
    archive = docker_archive(tmp_path / "a.tar", LAYERS)
    run("load", archive)
    run("rmi", "demo", ok=KILLED, sound=False, fault=point)
    run("load", other, sound=False)
    found = run.findings().splitlines()
    assert found
    assert all(line.startswith("layer-orphan: ") for line in found)
    run("load", archive)
    run("rmi", "demo")


def test_rm(run: Shell, store: str, archive: Path) -> None:
    run("load", archive)
    run("create", "--name", "cc", "demo")
    (run.path("mount", "cc") / "new").write_text("3")
    run("umount", "cc")
    run("rm", "cc", ok=KILLED, sound=False, fault="snapshot:after-unlink")
    assert "cc" not in run("container", "ls", "-a", sound=False).out
    # It is gone for every command already, and the next that writes takes its files away.
    run("rm", "cc", ok=3, sound=False)
    run("create", "--name", "cc", "demo")
    assert len(list(Path(store, "snapshots").iterdir())) == 1
    run("rm", "cc")
    run("rmi", "demo")

"""``system check --repair`` and ``--deep`` as a person types them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.archives import docker_archive
from tests.cli.conftest import Shell
from tests.layer.tars import directory, entry, tar

LAYERS = [tar(directory("./"), entry("a", data=b"1")), tar(entry("b", data=b"2"))]


@pytest.fixture
def demo(run: Shell, tmp_path: Path) -> list[str]:
    """A loaded image; the files of its layers."""
    run("load", docker_archive(tmp_path / "a.tar", LAYERS), sound=False)
    found = json.loads(run("image", "inspect", "demo", sound=False).out)[0]["Layers"]
    return [layer["File"] for layer in found]


def _overwrite(path: str, at: int, data: bytes) -> None:
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def test_an_index_is_made_again_and_the_image_is_what_it_was(run: Shell, demo: list[str]) -> None:
    assert run("system", "check", "--repair").err == "no damage found\n"
    _overwrite(demo[0], 0, bytes(1024))
    run("system", "check", ok=6, sound=False)
    done = run("system", "check", "--repair")
    first, second = done.out.splitlines()
    assert first.startswith(f"made again: layer-damaged: {demo[0]}: ")
    assert second.startswith("detached: attach-stale: ")
    assert Path(demo[0]).with_name("layer-2.erofs").exists()
    view = run.path("image", "mount", "demo")
    assert (view / "a").read_text() + (view / "b").read_text() == "12"
    run("umount", "demo")
    run("rmi", "demo")


def test_what_remains_is_said_and_is_the_exit_status(run: Shell, demo: list[str]) -> None:
    _overwrite(demo[0], 4096, b"x")
    _overwrite(demo[1], 1024, bytes(100))
    os.mkdir(os.path.join(run.store, "ingest", "dead"))
    plain = json.loads(run("system", "check", "--json", ok=6, sound=False).out)
    assert isinstance(plain, list)
    done = json.loads(run("system", "check", "--repair", "--json", ok=6, sound=False).out)
    assert [(one["Action"], one["Tag"]) for one in done["Repaired"]] == [
        ("removed", "staging-left"),
        ("made again", "layer-damaged"),
        ("detached", "attach-stale"),
    ]
    (found,) = done["Findings"]
    assert (found["Tag"], found["Path"]) == ("layer-damaged", demo[0])
    assert "load an image that has the layer" in found["Message"]
    (line,) = run("system", "check", "--repair", ok=6, sound=False).out.splitlines()
    assert "used by image " in line
    # What the hint says works.
    healed = run("load", Path(run.store).parent / "a.tar")
    assert "was damaged in the store: made again" in healed.err


def test_a_repair_beside_a_mounted_container_leaves_what_it_wrote(
    run: Shell, demo: list[str]
) -> None:
    run("create", "--name", "cc", "demo")
    merged = run.path("mount", "cc")
    (merged / "new").write_text("3")
    _overwrite(demo[0], 0, bytes(1024))
    told = run("system", "check", "--repair", ok=6, sound=False).out
    assert f"view-stale: {merged}: mounted before layer" in told
    assert run.findings() == ""
    assert (merged / "a").read_text() + (merged / "new").read_text() == "13"
    run("umount", "cc")
    merged = run.path("mount", "cc")
    assert (merged / "a").read_text() + (merged / "new").read_text() == "13"
    run("umount", "cc")


def test_a_deep_check_through_the_command(run: Shell, demo: list[str]) -> None:
    run("system", "check", "--deep")
    run("system", "check", "--repair", "--deep")
    for also in ("--deep", "--repair"):
        assert "--quick" in run("system", "check", "--quick", also, ok=2).err
    assert all(map(os.path.exists, demo))


@pytest.mark.parametrize("point", ["repair:before-rename", "repair:after-rename"])
def test_killed_and_repeated(run: Shell, demo: list[str], point: str) -> None:
    _overwrite(demo[0], 0, bytes(1024))
    run("system", "check", "--repair", ok=-signal.SIGKILL, sound=False, fault=point)
    assert run.findings() != ""
    assert "demo" in run("images", sound=False).out
    run("system", "check", "--repair")
    view = run.path("image", "mount", "demo")
    assert (view / "a").read_text() == "1"
    run("umount", "demo")


def test_a_load_finishes_what_a_killed_repair_left(run: Shell, demo: list[str]) -> None:
    """All but the file that no longer counts, which stays until the repair is repeated."""
    _overwrite(demo[0], 0, bytes(1024))
    run("layer", "detach", "--all", sound=False)
    point = "repair:after-rename"
    run("system", "check", "--repair", ok=-signal.SIGKILL, sound=False, fault=point)
    run("load", Path(run.store).parent / "a.tar", sound=False)
    tags = {line.split(":")[0] for line in run.findings().splitlines()}
    assert tags == {"layer-superseded"}
    run("system", "check", "--repair")


@pytest.mark.parametrize(
    ("gone", "tag", "remedy"),
    [
        ("layers/{layer}", "layer-missing", [("load",)]),
        ("images/{image}/manifest.json", "manifest-missing", [("rmi", "demo"), ("load",)]),
        ("images/{image}", "tag-dangling", [("load",)]),
        ("images/{image}", "tag-dangling", [("tag", "other", "demo")]),
    ],
)
def test_the_advice_for_what_remains_is_right(
    run: Shell, demo: list[str], tmp_path: Path, gone: str, tag: str, remedy: list[tuple[str, ...]]
) -> None:
    (image,) = json.loads(run("inspect", "demo", sound=False).out)
    if ("load",) not in remedy:
        other = docker_archive(tmp_path / "b.tar", [tar(entry("c"))], tags=("other:latest",))
        run("load", other, sound=False)
    layer = Path(demo[0]).parent.name
    path = os.path.join(run.store, gone.format(image=image["Id"][7:], layer=layer))
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
    (line,) = run("system", "check", "--repair", ok=6, sound=False).out.splitlines()[-1:]
    assert line.startswith(f"{tag}: ")
    assert "again" in line or "or tag" in line
    for number, words in enumerate(remedy, 1):
        archive = [tmp_path / "a.tar"] if words == ("load",) else []
        run(*words, *archive, sound=number == len(remedy))
    run("image", "mount", "demo", sound=False)
    run("umount", "demo", sound=False)

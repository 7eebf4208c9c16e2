"""What is attached, seen from where nothing is: after a reboot, from another mount namespace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from overlayctl.engine import Engine
from overlayctl.kernel import mounter
from tests import filesystems
from tests.archives import docker_archive
from tests.cli.conftest import Shell, reset
from tests.cli.test_in_use import elsewhere, process, vanish
from tests.layer.tars import directory, entry, tar
from tests.store.stores import Silent

LAYERS = [tar(directory("./"), entry("a", data=b"1")), tar(entry("b", data=b"2"))]


@pytest.fixture
def paths(run: Shell, tmp_path: Path) -> list[Path]:
    """The diff paths of an image, bottom to top; a container of it is named cc."""
    archive = str(docker_archive(tmp_path / "a.tar", LAYERS))
    engine = Engine.open(run.store, create=True)
    engine.load(archive, tag=None, platform=None, progress=Silent())
    engine.create("demo", name="cc")
    return [Path(engine.layer_path(f"demo:{number}")) for number in (1, 2)]


def fails(*command: str | Path) -> str:
    """What a command says on failing."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0, command
    return done.stderr


def not_there(paths: list[Path], place: Path) -> None:
    """Neither ls nor mount(8) takes the diff paths for empty layers, all of them or one."""
    place.mkdir(exist_ok=True)
    for path in paths:
        assert "No such file" in fails("ls", path)
    for lowers in (paths, [*paths, place]):
        options = "lowerdir=" + ":".join(map(str, lowers))
        fails("mount", "-t", "overlay", "-o", options, "overlay", place)
    assert not os.path.ismount(place)


BACK = {
    "layer path": (["layer", "path", "demo:1"], ["layer", "path", "demo:2"]),
    "layer inspect": (["layer", "inspect", "demo:1"], ["layer", "inspect", "demo:2"]),
    "image inspect": (["image", "inspect", "demo"],),
    "container inspect": (["container", "inspect", "cc"],),
    "history": (["history", "demo"],),
    "image mount": (["image", "mount", "demo"],),
    "mount": (["mount", "cc"],),
}


@pytest.mark.parametrize("name", BACK)
def test_after_a_reboot(run: Shell, paths: list[Path], tmp_path: Path, name: str) -> None:
    vanish(run.store)
    assert os.listdir(os.path.join(run.store, "attached")) == []
    not_there(paths, tmp_path / "place")
    for command in BACK[name]:
        run(*command, sound=False)
    assert [sorted(os.listdir(path)) for path in paths] == [["a"], ["b"]]
    assert run.findings() == ""


def test_after_a_reboot_everything_can_be_removed(run: Shell, paths: list[Path]) -> None:
    (run.path("mount", "cc") / "new").write_text("3")
    vanish(run.store)
    assert json.loads(run("--json", "ps").out) == []
    assert (run.path("mount", "cc") / "new").read_text() == "3"
    vanish(run.store)
    run("rm", "cc")
    run("rmi", "demo")
    assert os.listdir(os.path.join(run.store, "layers")) == []


def test_a_mountpoint_that_lost_its_mount_is_no_layer(run: Shell, paths: list[Path]) -> None:
    """What is left if somebody unmounts by hand: an empty directory, which no command trusts."""
    for path in paths:
        mounter.unmount(str(path))
        assert os.listdir(path) == []
    merged = run.path("mount", "cc")
    assert sorted(os.listdir(merged)) == ["a", "b"]
    run("umount", "cc")
    mounter.unmount(str(paths[0]))
    assert run.path("layer", "path", "demo:1") == paths[0]
    assert os.listdir(paths[0]) == ["a"]


def test_another_namespace_attaches_for_itself(run: Shell, tmp_path: Path) -> None:
    archive = docker_archive(tmp_path / "a.tar", LAYERS)
    (tmp_path / "place").mkdir()
    lower = Path(run.store, "attached", "layers")
    overlayctl = f"{sys.executable} -m overlayctl --root {run.store}"
    script = f"""echo ready; read line
        ! ls {lower} || exit 1
        for path in $line; do
            ! ls $path || exit 1
            ! mount -t overlay -o lowerdir=$path:{tmp_path} overlay {tmp_path}/place || exit 1
        done
        test "$({overlayctl} layer path demo:1)" = "${{line% *}}"
        view=$({overlayctl} image mount demo)
        cat $view/a $view/b"""
    other = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-ec", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    run("load", archive, sound=False)
    paths = [run.path("layer", "path", f"demo:{number}") for number in (1, 2)]
    out, err = other.communicate(" ".join(map(str, paths)) + "\n", timeout=20)
    assert (other.returncode, out) == (0, "12"), err
    # Here nothing is as it was there: its mounts went with it.
    assert json.loads(run("--json", "mounts").out) == []
    assert [os.listdir(path) for path in paths] == [["a"], ["b"]]


def test_what_is_attached_later_is_not_there_where_its_tmpfs_was_inherited(
    run: Shell, paths: list[Path], tmp_path: Path
) -> None:
    """The other namespace has its own copy of ``attached/``, on which the layer's place is made."""
    (tmp_path / "place").mkdir()
    with process(*elsewhere(":")) as other:
        inside = ("nsenter", "-m", "-t", str(other.pid))
        run("load", docker_archive(tmp_path / "b.tar", [*LAYERS[::-1], tar()], tags=("later:x",)))
        run("layer", "detach", "--all")
        for number in (1, 2, 3):
            path = run.path("layer", "path", f"later:x:{number}")
            assert "No such file" in fails(*inside, "ls", path)
            options = f"lowerdir={path}:{tmp_path}"
            place = tmp_path / "place"
            fails(*inside, "mount", "-t", "overlay", "-o", options, "overlay", place)
        overlayctl = (sys.executable, "-m", "overlayctl", "--root", run.store)
        path = run.path("layer", "path", "later:x:2")
        for command in ((*overlayctl, "layer", "path", "later:x:2"), ("ls", path)):
            done = subprocess.run([*inside, *command], capture_output=True, text=True, check=True)
            assert done.stdout.strip() in (str(path), "a")


def test_what_is_detached_here_is_gone_where_it_was_inherited(
    run: Shell, paths: list[Path], tmp_path: Path
) -> None:
    with process(*elsewhere(":")) as other:
        there = [Path(f"/proc/{other.pid}/root{path}") for path in paths]
        assert [os.listdir(path) for path in there] == [["a"], ["b"]]
        run("layer", "detach", "--all")
        assert not any(path.exists() for path in there)
        inside = ("nsenter", "-m", "-t", str(other.pid))
        assert "No such file" in fails(*inside, "ls", paths[0])
        options = f"lowerdir={paths[0]}:{paths[1]}"
        fails(*inside, "mount", "-t", "overlay", "-o", options, "overlay", "/mnt")
        # A view there is of the layers, whatever is attached where.
        overlayctl = (sys.executable, "-m", "overlayctl", "--root", run.store)
        done = subprocess.run(
            [*inside, *overlayctl, "image", "mount", "demo"], stdout=subprocess.PIPE, check=True
        )
        view = os.fsdecode(done.stdout.removesuffix(b"\n"))
        assert sorted(os.listdir(f"/proc/{other.pid}/root{view}")) == ["a", "b"]
        assert sorted(os.listdir(run.path("image", "mount", "demo"))) == ["a", "b"]
        run("umount", "demo")


def test_a_removed_image_leaves_no_space_in_use_elsewhere(tmp_path: Path) -> None:
    content = os.urandom(20 * filesystems.MIB)
    archive = docker_archive(tmp_path / "a.tar", [tar(directory("./"), entry("a", data=content))])
    with filesystems.mounted("ext4", tmp_path, size=64 * filesystems.MIB) as disk:
        run = Shell(str(disk / "store"))
        try:
            run("load", docker_archive(tmp_path / "b.tar", LAYERS, tags=("other:1",)))
            before = free(disk)
            run("load", archive, sound=False)
            path = run.path("layer", "path", "demo:1")
            assert before - free(disk) >= len(content)
            with process(*elsewhere(":")) as other:
                # It holds its copy of the mount in a way that no unmount here changes.
                assert Path(f"/proc/{other.pid}/root{path}/a").stat().st_size == len(content)
                run("rmi", "demo")
                assert not Path(f"/proc/{other.pid}/root{path}").exists()
                # The kernel ends a mount a moment after it was taken out of sight.
                deadline = time.monotonic() + 5
                while before - free(disk) > filesystems.MIB and time.monotonic() < deadline:
                    time.sleep(0.02)
                assert before - free(disk) < filesystems.MIB
        finally:
            reset(run.store)


def free(disk: Path) -> int:
    """How many bytes of a filesystem are free."""
    state = os.statvfs(disk)
    return state.f_bfree * state.f_frsize

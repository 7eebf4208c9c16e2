"""A host whose kernel mounts no layer file: the same commands, on trees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overlayctl.kernel import mounttable
from overlayctl.layer import erofs
from tests import kernel_has
from tests.archives import docker_archive
from tests.cli.conftest import Shell
from tests.layer.tars import directory, entry, symlink, tar
from tests.rootmount import require

LAYERS = [
    tar(directory("./"), entry("etc/conf", data=b"one"), entry("etc/old")),
    tar(entry("etc/.wh.old"), entry("etc/new", data=b"two")),
]


@pytest.fixture(autouse=True)
def _unpacked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OVERLAYCTL_ATTACH", "unpacked")
    yield
    monkeypatch.delenv("OVERLAYCTL_ATTACH")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return docker_archive(tmp_path / "a.tar", LAYERS)


def trees(store: str) -> list[Path]:
    return sorted(Path(store, "layers").glob("*/tree"))


def test_loaded_shown_changed_and_removed(run: Shell, store: str, archive: Path) -> None:
    run("load", archive)
    assert len(trees(store)) == 2
    path = run.path("layer", "path", "demo:1")
    assert (path / "etc/conf").read_text() == "one"
    mount = mounttable.at(str(path))
    assert mount is not None
    assert mount.fs_type != "erofs"
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(mount.options.split(","))
    with pytest.raises(OSError, match="Read-only"):
        (path / "x").touch()
    run("create", "--name", "cc", "demo")
    merged = run.path("mount", "cc")
    assert sorted(os.listdir(merged / "etc")) == ["conf", "new"]
    (merged / "etc/conf").write_text("changed")
    assert (path / "etc/conf").read_text() == "one"
    run("umount", "cc")
    run("rm", "cc")
    run("rmi", "demo")
    assert os.listdir(os.path.join(store, "layers")) == []


def test_a_layer_of_an_image_without_others_lies_on_nothing(run: Shell, tmp_path: Path) -> None:
    run("load", docker_archive(tmp_path / "one.tar", LAYERS[:1], tags=("one:1",)))
    view = run.path("image", "mount", "one:1")
    assert sorted(os.listdir(view / "etc")) == ["conf", "old"]
    run("umount", "one:1")


def test_a_store_that_comes_from_a_host_with_erofs(
    run: Shell, store: str, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("OVERLAYCTL_ATTACH", "buffered")
        run("load", archive)
        run("layer", "detach", "--all")
    assert trees(store) == []
    assert sorted(os.listdir(run.path("image", "mount", "demo") / "etc")) == ["conf", "new"]
    assert len(trees(store)) == 2
    run("umount", "demo")
    run("layer", "detach", "--all")
    # Both are there now, and either does.
    monkeypatch.setenv("OVERLAYCTL_ATTACH", "loop")
    assert (run.path("layer", "path", "demo:1") / "etc/conf").read_text() == "one"
    monkeypatch.setenv("OVERLAYCTL_ATTACH", "unpacked")
    assert sorted(os.listdir(run.path("image", "mount", "demo") / "etc")) == ["conf", "new"]
    run("umount", "demo")


def test_a_tree_that_is_gone_is_no_empty_layer(run: Shell, store: str, archive: Path) -> None:
    run("load", archive)
    run("layer", "detach", "--all")
    for tree in trees(store):
        shutil.rmtree(tree)
    assert sorted(os.listdir(run.path("image", "mount", "demo") / "etc")) == ["conf", "new"]
    run("umount", "demo")


def test_a_view_that_cannot_be_seen_keeps_its_layers(run: Shell, store: str, archive: Path) -> None:
    """From a container, say: deleting a tree would empty a view of the host."""
    require("unshare")
    run("load", archive)
    view = run.path("image", "mount", "demo")
    command = [sys.executable, "-m", "overlayctl", "--root", store, "rmi", "demo"]
    inside = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"]
    refused = subprocess.run(
        [*inside, "sh", "-c", 'umount "$0" && exec "$@"', view, *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 4, refused
    assert "not seen from here" in refused.stderr
    assert sorted(os.listdir(view / "etc")) == ["conf", "new"]
    run("umount", "demo")
    again = subprocess.run([*inside, *command], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr


def test_without_the_right_to_mount_a_path_is_null_with_the_reason(
    run: Shell, store: str, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("setpriv")
    monkeypatch.setenv("OVERLAYCTL_ATTACH", "auto")
    call = [sys.executable, "-m", "overlayctl", "--root", store]
    without = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]

    def weak(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*without, *call, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done
        return done

    assert "the layers are not attached: " in weak("load", archive).stderr
    image = json.loads(weak("inspect", "demo").stdout)[0]
    assert [layer["DiffPath"] for layer in image["Layers"]] == [None, None]
    assert image["GraphDriver"]["Data"]["LowerDir"] is None
    assert "not permitted" in image["AttachError"]
    assert "CAP_SYS_ADMIN" in weak("layer", "path", "demo:1", status=5).stderr
    assert "etc/conf" in weak("layer", "files", "demo:1").stdout
    image = json.loads(run("inspect", "demo").out)[0]
    assert image["AttachError"] is None
    assert None not in [layer["DiffPath"] for layer in image["Layers"]]


def test_a_setting_that_is_none(
    run: Shell, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERLAYCTL_ATTACH", "magic")
    assert "buffered" in run("load", archive, ok=2, sound=False).err
    monkeypatch.setenv("OVERLAYCTL_ATTACH", "auto")
    told = json.loads(run("system", "info", "--json").out)
    empty = str(tmp_path / "empty.erofs")
    erofs.write_empty(empty)
    best = "buffered" if kernel_has.erofs_from(empty) else "loop"
    assert told["AttachBy"].startswith(f"{best}: the first that works")
    assert told["MountBy"].startswith(f"{kernel_has.rung()}: the first that works")
    monkeypatch.setenv("OVERLAYCTL_ATTACH", "loop")
    again = json.loads(run("system", "info", "--json").out)
    assert again["AttachBy"] == "loop: OVERLAYCTL_ATTACH says so"
    assert set(told["Attach"]) == {"buffered", "directio", "loop", "unpacked"}
    assert set(told["Mount"]) == {"fds", "strings", "mount"}


DAMAGE: dict[str, Callable[[Path], object]] = {
    "content": lambda tree: (tree / "etc/conf").write_text("two"),
    "a file gone": lambda tree: (tree / "etc/old").unlink(),
    "a file more": lambda tree: (tree / "etc/more").touch(),
    "mode": lambda tree: (tree / "etc/conf").chmod(0o600),
    "xattr": lambda tree: os.removexattr(tree / "etc", "user.x"),
    "time": lambda tree: os.utime(tree / "etc/conf", (1, 1)),
    "empty": lambda tree: shutil.rmtree(tree / "etc"),
    "link": lambda tree: os.replace(tree / "other", tree / "l"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_changed_tree_is_named_and_made_again_beside_it(
    run: Shell, store: str, tmp_path: Path, what: str
) -> None:
    layer = tar(
        directory("etc", xattrs={"user.x": "1"}),
        entry("etc/conf", data=b"one"),
        entry("etc/old"),
        symlink("l", "etc"),
        symlink("other", "nowhere"),
    )
    run("load", docker_archive(tmp_path / "b.tar", [layer]))
    run("create", "--name", "cc", "demo")
    (tree,) = trees(store)
    DAMAGE[what](tree)
    assert run.findings().startswith("tree-damaged: ")
    run("mount", "cc", sound=False)
    # The overlay above has the old one, and goes on with it.
    out = run("system", "check", "--repair", ok=6, sound=False).out
    assert "made again: tree-damaged" in out
    assert "view-stale: " in out
    run("umount", "cc")
    assert run.findings() == ""
    assert (run.path("layer", "path", "demo:1") / "etc/conf").read_text() == "one"
    assert sorted(os.listdir(tree.parent)) == ["layer.erofs", "tree", "tree-2"]
    run("rm", "cc")
    run("rmi", "demo")
    assert os.listdir(os.path.join(store, "layers")) == []

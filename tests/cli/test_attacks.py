"""What an attacker, an unlucky moment or a hand in the store must not achieve."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overlayctl.errors import LimitExceeded
from overlayctl.kernel import mounter
from overlayctl.layer.tar import Member
from overlayctl.layer.tree import Tree
from tests.archives import diff_id, docker_archive
from tests.cli.conftest import Shell
from tests.layer.tars import directory, entry, members, symlink, tar

LAYERS = [tar(directory("./"), entry("a", data=b"1"))]


@pytest.fixture
def demo(run: Shell, tmp_path: Path) -> str:
    run("load", docker_archive(tmp_path / "a.tar", LAYERS))
    return "demo:latest"


def _elsewhere(*command: str) -> subprocess.Popen[bytes]:
    """A shell in a mount namespace of its own; it answers a line when ``command`` is done."""
    script = f"{' '.join(command)} >&2; echo done; read line; cat /proc/self/mountinfo"
    shell = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert shell.stdout is not None
    assert shell.stdout.readline() == b"done\n"
    return shell


def _mounts_of(shell: subprocess.Popen[bytes]) -> str:
    out, _ = shell.communicate(b"\n", timeout=20)
    return out.decode()


def _call(run: Shell, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "overlayctl", "--root", run.store, *arguments)


def test_an_unmount_here_leaves_the_view_of_another_namespace(run: Shell, demo: str) -> None:
    run("layer", "path", "demo:1")
    other = _elsewhere(*_call(run, "image", "mount", demo))
    view = str(run.path("image", "mount", demo))
    run("umount", demo)
    assert f" {view} " in _mounts_of(other)


def test_a_refused_mount_leaves_the_one_that_is_there(run: Shell, demo: str) -> None:
    run("create", "--name", "cc", demo)
    run("layer", "path", "demo:1")
    other = _elsewhere(*_call(run, "mount", "cc"))
    assert f"-t {other.pid}" in run("mount", "cc", ok=4).err
    assert "nsenter" in run("rm", "-f", "cc", ok=4).err
    assert "/attached/merged/" in _mounts_of(other)
    run("rm", "cc")


def test_rm_asks_the_kernel_whether_somebody_writes(run: Shell, demo: str) -> None:
    run("create", "--name", "cc", demo)
    merged = run.path("mount", "cc")
    with (merged / "open").open("w") as file:
        mounter.unmount(str(merged), lazy=True)
        run("rm", "cc", ok=4)
        run("system", "reset", "-f", ok=4)
        file.write("kept")
    run("rm", "cc")


def test_depth_by_way_of_symlinks_is_limited(tmp_path: Path) -> None:
    entries = []
    prefix = ""
    for number in range(10):
        entries += [entry(f"{prefix}{'x/' * 900}f"), symlink(f"s{number}", f"{prefix}{'x/' * 900}")]
        prefix = f"s{number}/"
    tree = Tree()

    def add_all(found: list[Member]) -> None:
        for member in found:
            tree.add(member)

    with pytest.raises(LimitExceeded, match="a path to"):
        add_all(members(tar(*entries), tmp_path))


def _with_config(path: Path, config: object, **more: object) -> Path:
    archive = docker_archive(path, LAYERS, tags=("odd:1",))
    data = json.dumps(
        {"rootfs": {"type": "layers", "diff_ids": [diff_id(LAYERS[0])]}, "config": config, **more}
    ).encode()
    manifest = [{"Config": "config.json", "RepoTags": ["odd:1"], "Layers": ["0/layer.tar"]}]
    archive.write_bytes(
        tar(
            entry("manifest.json", data=json.dumps(manifest).encode()),
            entry("config.json", data=data),
            entry("0/layer.tar", data=LAYERS[0]),
        )
    )
    return archive


@pytest.mark.parametrize(
    "config", [5, "s", [1], True, {"Cmd": 5}, {"Cmd": "sh"}, {"Cmd": ["\ud800", 5]}], ids=repr
)
def test_odd_configs_disturb_nobody(run: Shell, tmp_path: Path, config: object) -> None:
    run("load", _with_config(tmp_path / "a.tar", config, created="\ud800\x1b[31m"))
    run("create", "--name", "cc", "odd:1")
    for command in (["images"], ["ps", "-a"], ["inspect", "cc"], ["history", "odd:1"]):
        assert "\x1b" not in run(*command).out


RECORDS: dict[str, list[dict[str, object]]] = {
    "overlayctl.json": [{"version": 1, "incompatible": 5}, {"version": 1, "incompatible": [5]}],
    "containers": [{"version": 1, "command": 5}, {"version": 1, "labels": [1]}],
    "images": [
        {"version": 1, "loaded": "x", "layers": [{"name": "n", "diff_id": "d", "size": "y"}]},
        {"version": 1, "loaded": "x", "layers": 5},
    ],
}


JUNK: tuple[object, ...] = (None, 10**400, "../x", "\ud800\x1b[31m", [], [1], {"a": 1})


def _replaced(value: Any, junk: object) -> Iterator[Any]:
    """The JSON value with one of all that is in it being something else, each in turn."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            for inner in (junk, *_replaced(value[key], junk)):
                copied = value.copy()
                copied[key] = inner
                yield copied


@pytest.mark.parametrize(
    "junk", [5, *(pytest.param(one, marks=pytest.mark.long, id=repr(one)[:20]) for one in JUNK)]
)
def test_no_field_of_another_type_hinders_more_than_its_container(
    run: Shell, demo: str, junk: object
) -> None:
    words = ("-v", "vol:/v", "--tmpfs", "/t", "-e", "A=1", "-l", "a=b", "--entrypoint", "sh")
    identifier = run("create", "--name", "cc", *words, demo, "-c", "x").out.strip()
    record = Path(run.store, "containers", f"{identifier}.json")
    snapshot = Path(run.store, "snapshots", identifier, "snapshot.json")
    commands = [
        ("ps", "-as"), ("container", "inspect", identifier), ("diff", identifier),
        ("commit", identifier), ("rm", "--dry-run", identifier), ("system", "check"),
    ]  # fmt: skip
    # That nothing is mounted in it may be true.
    commands += [("volume", "prune", "-af")] if junk != [] else []
    commands += [("exec", identifier, "no")] if junk in ("../x", None) else []
    for path in (record, snapshot):
        good = path.read_bytes()
        for bad in _replaced(json.loads(good), junk):
            path.write_text(json.dumps(bad))
            for command in commands:
                done = run._run(command, "")
                assert done.status in {*range(7), 125, 127}, (command, bad)
                assert "\x1b" not in done.out + done.err
                assert not done.err or "hint: " in done.err or done.status in (0, 6), (bad, done)
            assert run("volume", "ls", "-q", sound=False).out == "vol\n", bad
        path.write_bytes(good)
    run("rm", "cc")


@pytest.mark.parametrize("text", ["\ud800", "\udcff"], ids=["none", "a byte"])  # noqa: PT014
def test_text_of_a_config_that_is_none_is_replaced(run: Shell, tmp_path: Path, text: str) -> None:
    config = {
        "Cmd": [text], "Env": [f"A={text}"], "Labels": {text: text}, "User": text,
        "WorkingDir": f"/{text}", "Volumes": {f"/{text}": {}},
    }  # fmt: skip
    run("load", _with_config(tmp_path / "a.tar", config, created=text))
    run("create", "--name", "cc", "odd:1")
    for command in (["images"], ["ps", "-a"], ["inspect", "cc"], ["mount", "cc"], ["umount", "cc"]):
        run(*command)
    assert "hint: " in run("run", "--rm", "odd:1", ok=125).err
    run("commit", "cc", "made")


@pytest.mark.parametrize("kind", ["containers", "images"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_record_that_lies_is_named_and_hinders_nobody(
    run: Shell, demo: str, tmp_path: Path, kind: str, number: int
) -> None:
    identifier = run("create", "--name", "cc", demo).out.strip()
    run("load", docker_archive(tmp_path / "b.tar", [tar(entry("b"))], tags=("other:1",)))
    (image,) = json.loads(run("inspect", demo).out)
    record = (
        Path(run.store)
        / {
            "containers": f"containers/{identifier}.json",
            "images": f"images/{image['Id'].removeprefix('sha256:')}/image.json",
        }[kind]
    )
    good = record.read_bytes()
    record.write_text(json.dumps(RECORDS[kind][number]))
    for command in (["images"], ["ps", "-a"], ["inspect", "other:1"], ["mounts"]):
        run(*command, sound=False)
    assert str(record.name.removesuffix(".json")) in run.findings() or kind in run.findings()
    record.write_bytes(good)
    run("rm", "cc")


@pytest.mark.parametrize("number", [0, 1])
def test_a_marker_that_lies_is_damage(run: Shell, demo: str, number: int) -> None:
    marker = Path(run.store, "overlayctl.json")
    good = marker.read_bytes()
    marker.write_text(json.dumps(RECORDS["overlayctl.json"][number]))
    assert "overlayctl.json" in run("images", ok=6, sound=False).err
    marker.write_bytes(good)


def test_a_config_nested_by_hand_is_damage(run: Shell, demo: str) -> None:
    (image,) = json.loads(run("inspect", demo).out)
    config = Path(run.store, "images", image["Id"].removeprefix("sha256:"), "config.json")
    good = config.read_bytes()
    config.write_text("[" * 100_000)
    run("inspect", demo, ok=6, sound=False)
    config.write_bytes(good)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_load_that_is_stopped_leaves_nothing(
    run: Shell, demo: str, tmp_path: Path, number: int
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    load = subprocess.Popen(_call(run, "load", str(pipe)), stderr=subprocess.DEVNULL)
    with pipe.open("wb", buffering=0) as feed:
        feed.write(entry("0/layer.tar", data=bytes(600_000))[:300_000])
        time.sleep(0.5)
        assert os.listdir(os.path.join(run.store, "ingest"))
        load.send_signal(number)
        assert load.wait(20) == 128 + number
    assert os.listdir(os.path.join(run.store, "ingest")) == []
    run("images")


def test_loads_and_removals_of_one_image_at_once(run: Shell, demo: str, tmp_path: Path) -> None:
    """Either may come first; no command fails for another reason than that."""
    archive = str(tmp_path / "a.tar")
    for _ in range(10):
        commands = [
            subprocess.Popen(_call(run, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for arguments in (
                ("load", archive),
                ("rmi", demo),
                ("inspect", demo),
                ("load", archive),
            )
        ]
        for command, allowed in zip(commands, [(0,), (0, 3), (0, 3), (0,)], strict=True):
            _, err = command.communicate(timeout=60)
            assert command.returncode in allowed, err
            assert command.returncode == 0 or b"there is no" in err, err
        run("load", archive)

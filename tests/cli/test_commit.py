"""A container as an image: what is in its layer, what its config says, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests import archives, filesystems
from tests.archives import docker_archive
from tests.cli.conftest import Shell, reset
from tests.layer.tars import directory, entry, hardlink, symlink, tar
from tests.oracles import trees
from tests.rootmount import missing, require

# Not docker's, so that it is seen: its own layers' roots are 0755 and root's.
BELOW = tar(
    directory("./", mode=0o711, mtime=1),
    directory("etc/", mtime=1),
    entry("etc/conf", data=b"one\n", mtime=1),
    entry("a", data=b"linked", mtime=1),
    hardlink("b", "a"),
    directory("tree/", mtime=1),
    entry("tree/old", mtime=1),
)
ACL = bytes.fromhex(
    "0200000001000700ffffffff02000500d204000004000500ffffffff10000500ffffffff20000400ffffffff"
)
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


def loaded(run: Shell, place: Path) -> None:
    run("load", docker_archive(place / "demo.tar", [BELOW]))
    run("create", "--name", "cc", "demo")


def change(run: Shell, where: str = "cc") -> None:
    """One of everything, with times of its own."""
    merged = Path(run("mount", where).out[:-1])
    (merged / "etc/conf").write_text("two\n")
    (merged / "a").write_bytes(b"no link any more")
    (merged / "tree/old").unlink()
    (merged / "tree").rmdir()
    (merged / "tree").mkdir()
    (merged / "tree/new").write_bytes(b"new")
    os.link(merged / "tree/new", merged / "link")
    os.mkfifo(merged / "pipe")
    os.mknod(merged / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with (merged / "holes").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
        file.truncate(4 << 20)
    os.symlink(b"to-\xff", os.fsencode(merged) + b"/name-\xff")
    os.setxattr(merged / "link", "user.note", b"x")
    os.setxattr(merged / "etc/conf", "security.capability", CAPABILITY)
    os.setxattr(merged / "tree", "system.posix_acl_access", ACL)
    os.chown(merged / "link", 1234, 4_000_000_000)
    for number, path in enumerate(sorted(merged.rglob("*"), reverse=True)):
        if path.name != "b":
            os.utime(path, ns=(0, 10**18 + number * 1_000_001), follow_symlinks=False)
    os.utime(merged, ns=(0, 10**18))
    run("umount", where)


def config_of(run: Shell, image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("inspect", image).out)[0]
    path = Path(run.store, "images", found["Id"].removeprefix("sha256:"), "config.json")
    config: dict[str, Any] = json.loads(path.read_bytes())
    return config


def test_the_image_looks_as_the_container(run: Shell, tmp_path: Path) -> None:
    loaded(run, tmp_path)
    change(run)
    merged = run("mount", "cc").out[:-1]
    before = trees.snapshot(merged)
    done = run("commit", "cc", "made:1")
    assert "the container is mounted" in done.err
    view = run("image", "mount", "made:1").out[:-1]
    assert trees.differences(before, trees.snapshot(view)) == []
    run("umount", "cc")
    files = run("layer", "files", "made:1:2").out
    assert "opaque" in files
    # What is not changed is not in it.
    assert " b\n" not in files
    assert run("commit", "cc").err == ""
    (row,) = [
        row for row in json.loads(run("images", "--json").out) if row["RepoTags"] == ["made:1"]
    ]
    assert row["Id"] == done.out.strip()
    run("umount", "made:1")


def test_the_same_upper_gives_the_same_layer(run: Shell, tmp_path: Path) -> None:
    """Twice, after another mount, and on other filesystems."""
    loaded(run, tmp_path)
    change(run)

    def diff_id(shell: Shell) -> str:
        committed: dict[str, str] = json.loads(shell("commit", "--json", "cc").out)
        return committed["DiffID"]

    first = diff_id(run)
    merged = run("mount", "cc").out
    assert diff_id(run) == first
    assert merged
    run("umount", "cc")
    assert diff_id(run) == first
    for kind in ("ext4", "xfs", "tmpfs"):
        with filesystems.mounted(kind, tmp_path) as disk:
            other = Shell(str(disk / "store"))
            loaded(other, tmp_path)
            change(other)
            assert diff_id(other) == first, kind
            reset(other.store)


@pytest.mark.parametrize("way", ["unpacked", "loop"])
def test_layers_that_are_attached_otherwise(
    run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("OVERLAYCTL_ATTACH", way)
    loaded(run, tmp_path)
    change(run)
    run("commit", "cc", "made")
    before = trees.snapshot(run.path("mount", "cc"))
    after = trees.snapshot(run.path("image", "mount", "made"))
    assert trees.differences(before, after) == []
    run("umount", "cc", "made")


def test_a_container_that_runs_goes_on(run: Shell, tmp_path: Path) -> None:
    """And what a run only needs to mount on, as what lies on a volume, is in no image."""
    archive = docker_archive(tmp_path / "sh.tar", [programs()], tags=("sh:1",))
    run("load", archive)
    run("run", "--name", "idle", "sh:1", "true")
    config = config_of(run, run("commit", "idle").out.strip())
    assert config["history"][-1] == {
        "created": config["created"], "created_by": "true", "empty_layer": True
    }  # fmt: skip
    script = "echo 1 > /w; echo 2 > /data/v; until [ -e /stop ]; do sleep 0.05; done; echo 3 > /w"
    program = [sys.executable, "-m", "overlayctl", "--root", run.store]
    with subprocess.Popen(
        [*program, "run", "--name", "rr", "-v", "/data", "sh:1", "sh", "-c", script]
    ) as process:
        while subprocess.run(
            [*program, "exec", "rr", "cat", "/data/v"], capture_output=True, check=False
        ).stdout != b"2\n":  # fmt: skip
            time.sleep(0.05)
        done = run("--lock-timeout", "0", "commit", "rr", "live", sound=False)
        assert process.poll() is None
        run("exec", "rr", "sh", "-c", ": > /stop", sound=False)
    assert process.returncode == 0
    assert "not in the image: what is mounted at /data" in done.err
    assert run("layer", "cat", "live:2", "/w").out == "1\n"
    run("commit", "rr", "later")
    assert run("layer", "cat", "later:2", "/w").out == "3\n"
    files = [line.split()[-1] for line in run("layer", "files", "later:2").out.splitlines()]
    assert files == [".", "data", "stop", "w"]
    assert config_of(run, "live")["config"]["Volumes"] == {"/data": {}}


def programs() -> bytes:
    """A root layer with a shell in it, and nothing to mount on."""
    require("busybox")
    busybox = Path(shutil.which("busybox") or "").read_bytes()
    if b"/ld-" in busybox:
        missing("a static busybox")
    names = ("cat", "sh", "sleep", "true")
    return tar(
        directory("./"),
        directory("bin/"),
        entry("bin/busybox", data=busybox, mode=0o755),
        *(symlink(f"bin/{name}", "busybox") for name in names),
    )


def test_an_unchanged_container_gives_no_layer(run: Shell, tmp_path: Path) -> None:
    """As docker has it: a line of history that says so. Mounting alone changes nothing."""
    loaded(run, tmp_path)
    for step in ("", "mount", "umount"):
        if step:
            run(step, "cc")
        image = run("commit", "cc").out.strip()
        config = config_of(run, image)
        assert len(config["rootfs"]["diff_ids"]) == 1
        assert config["history"][-1]["empty_layer"] is True
    merged = Path(run("mount", "cc").out[:-1])
    os.utime(merged, ns=(5, 5))
    run("umount", "cc")
    assert len(config_of(run, run("commit", "cc").out.strip())["rootfs"]["diff_ids"]) == 2


def test_what_only_something_is_mounted_on_is_left_out(run: Shell, tmp_path: Path) -> None:
    loaded(run, tmp_path)
    merged = Path(run("mount", "cc").out[:-1])
    for name in ("proc", "sys", "dev"):
        (merged / name).mkdir()
    for name in ("hosts", "resolv.conf"):
        (merged / "etc" / name).touch()
    run("umount", "cc")
    assert config_of(run, run("commit", "cc").out.strip())["history"][-1]["empty_layer"] is True
    merged = Path(run("mount", "cc").out[:-1])
    (merged / "etc/hosts").write_text("::1 localhost\n")
    run("umount", "cc")
    run("commit", "cc", "made")
    files = [line.split()[-1] for line in run("layer", "files", "made:2").out.splitlines()]
    assert files == [".", "etc", "etc/hosts"]


def test_a_directory_made_anew_deletes_though_only_something_is_mounted_in_it(
    run: Shell, tmp_path: Path
) -> None:
    loaded(run, tmp_path)
    merged = Path(run("mount", "cc").out[:-1])
    shutil.rmtree(merged / "etc")
    (merged / "etc").mkdir()
    (merged / "etc/hosts").touch()
    run("umount", "cc")
    assert run("diff", "cc").out == "C /etc\nD /etc/conf\n"
    run("commit", "cc", "made")
    view = run("image", "mount", "made").out[:-1]
    assert os.listdir(f"{view}/etc") == []
    run("umount", "made")


def test_a_socket_hides_what_was_there(run: Shell, tmp_path: Path) -> None:
    """It is left out itself: what it took the place of is not there again."""
    loaded(run, tmp_path)
    merged = Path(run("mount", "cc").out[:-1])
    for name in ("a", "tree"):
        shutil.rmtree(merged / name) if name == "tree" else (merged / name).unlink()
        os.mknod(merged / name, stat.S_IFSOCK | 0o600)
    os.mknod(merged / "etc/new", stat.S_IFSOCK | 0o600)
    run("umount", "cc")
    assert "note: a: a socket, left out\n" in run("commit", "cc", "made").err
    view = run("image", "mount", "made").out[:-1]
    assert sorted(os.listdir(view)) == ["b", "etc"]
    run("umount", "made")
    assert "new" not in run("layer", "files", "made:2").out


def test_an_acl_that_the_filesystem_does_not_keep_is_no_change(run: Shell, tmp_path: Path) -> None:
    """One of owner, group and others says what the mode says (acl(5))."""
    plain = "02000000" + "01000700ffffffff" + "04000500ffffffff" + "20000500ffffffff"
    acl = os.fsdecode(bytes.fromhex(plain))
    root = directory("./", mode=0o755, xattrs={"system.posix_acl_access": acl})
    run("load", docker_archive(tmp_path / "demo.tar", [tar(root)]))
    run("create", "--name", "cc", "demo")
    config = config_of(run, run("commit", "cc").out.strip())
    assert config["history"][-1]["empty_layer"] is True


def test_the_config(run: Shell, tmp_path: Path) -> None:
    loaded(run, tmp_path)
    words = ("--env", "A=1", "--label", "l=1", "--workdir", "/w", "--user", "5")
    run("create", "--name", "more", *words, "demo", "sh", "-c", "true")
    said = ("-m", "why", "-a", "Jo <jo@doe.org>")
    image = run("commit", *said, "-c", "ENV=B=two", "-c", "EXPOSE 80", "more", "made").out.strip()
    config = config_of(run, image)
    assert config["config"] == {
        "Cmd": ["sh", "-c", "true"],
        "Env": ["A=1", "B=two"],
        "ExposedPorts": {"80/tcp": {}},
        "Labels": {"l": "1"},
        "User": "5",
        "WorkingDir": "/w",
    }
    assert config["author"] == "Jo <jo@doe.org>"
    last = config["history"][-1]
    assert last == {
        "created": config["created"],
        "author": "Jo <jo@doe.org>",
        "created_by": "sh -c true",
        "comment": "why",
        "empty_layer": True,
    }
    assert (config["os"], config["architecture"]) == ("linux", "amd64")
    manifest = json.loads(
        Path(run.store, "images", image.removeprefix("sha256:"), "manifest.json").read_bytes()
    )
    assert manifest["config"]["digest"] == image
    found = json.loads(run("inspect", "made").out)[0]
    assert [layer["digest"] for layer in manifest["layers"]] == found["RootFS"]["Layers"]


def test_the_moment_can_be_given(
    run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(run, tmp_path)
    merged = Path(run("mount", "cc").out[:-1])
    (merged / "old").touch()
    os.utime(merged / "old", ns=(0, 5_500_000_000))
    (merged / "new").touch()
    run("umount", "cc")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    first = run("commit", "cc", "made:1").out
    assert run("commit", "cc", "made:2").out == first
    config = config_of(run, first.strip())
    assert config["created"] == config["history"][-1]["created"] == "2001-09-09T01:46:40Z"
    view = Path(run("image", "mount", "made:1").out[:-1])
    assert (view / "old").stat().st_mtime_ns == 5_500_000_000
    assert (view / "new").stat().st_mtime_ns == view.stat().st_mtime_ns == 10**18
    run("umount", "made:1")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    assert "SOURCE_DATE_EPOCH=soon is no time" in run("commit", "cc", ok=2).err


def test_what_is_said_of_it(run: Shell, tmp_path: Path) -> None:
    """Sockets, and what is mounted in it, are no part of an image; a tag that moves is told."""
    loaded(run, tmp_path)
    run("create", "--name", "placed", "-v", "/data", "-v", "/srv:/srv", "demo")
    done = run("commit", "placed", "demo")
    assert "not in the image: what is mounted at /data, /srv" in done.err
    assert "note: demo:latest was " in done.err
    assert config_of(run, "demo")["config"]["Volumes"] == {"/data": {}}
    merged = run("mount", "cc").out[:-1]
    os.mknod(f"{merged}/socket", stat.S_IFSOCK | 0o666)
    done = run("commit", "--json", "cc")
    assert "note: socket: a socket, left out" in done.err
    assert {"Note": "a socket, left out", "Path": "socket"} in json.loads(done.out)["Notes"]
    run("umount", "cc")


def test_it_is_written_to_meanwhile(run: Shell, tmp_path: Path) -> None:
    """The container goes on; what changes while it is read is named, and no layer is broken."""
    loaded(run, tmp_path)
    merged = Path(run("mount", "cc").out[:-1])
    stop = threading.Event()

    def write() -> None:
        with (merged / "log").open("ab") as file:
            while not stop.is_set():
                file.write(b"x" * 65536)
                if file.tell() > 64 << 20:
                    file.truncate(0)

    writer = threading.Thread(target=write)
    writer.start()
    said = ""
    try:
        for _ in range(50):
            said += run("commit", "--quiet", "cc", "made", sound=False).err
            if "log: changed while it was read" in said:
                break
    finally:
        stop.set()
        writer.join()
    assert "log: changed while it was read" in said
    run("image", "mount", "made")
    run("umount", "made")
    (merged / "log").unlink()
    run("umount", "cc")


@pytest.mark.parametrize("name", ["redirect", "metacopy"])
def test_an_upper_that_means_nothing_alone(run: Shell, tmp_path: Path, name: str) -> None:
    loaded(run, tmp_path)
    key = json.loads(run("inspect", "cc").out)[0]["Id"]
    upper = Path(run.store, "snapshots", key, "upper")
    (upper / "moved").mkdir()
    os.setxattr(upper / "moved", f"trusted.overlay.{name}", b"/etc")
    refused = run("commit", "cc", "made", ok=1)
    assert "another program mounted it" in refused.err
    assert os.listdir(Path(run.store, "ingest")) == []
    run("image", "exists", "made", ok=1)


def test_more_xattrs_than_a_layer_may_have(tmp_path: Path) -> None:
    """Xfs takes any number: the file is named."""
    with filesystems.mounted("xfs", tmp_path) as disk:
        run = Shell(str(disk / "store"))
        try:
            loaded(run, tmp_path)
            merged = Path(run("mount", "cc").out[:-1])
            for number in range(5):
                os.setxattr(merged / "etc/conf", f"trusted.{number}", bytes(60 << 10))
            done = run("commit", "cc", ok=1)
            assert "'etc/conf': the xattrs of one file are " in done.err
            assert "hint: " in done.err
            os.removexattr(merged / "etc/conf", "trusted.0")
            run("commit", "cc")
            run("umount", "cc")
        finally:
            reset(run.store)


def test_a_full_disk(tmp_path: Path) -> None:
    with filesystems.mounted("ext4", tmp_path) as disk:
        run = Shell(str(disk / "store"))
        loaded(run, tmp_path)
        merged = Path(run("mount", "cc").out[:-1])
        (merged / "big").write_bytes(os.urandom(1 << 20) * 64)
        run("umount", "cc")
        filled = filesystems.fill_bytes(disk)
        refused = run("commit", "cc", "made", ok=1)
        assert "the store's disk is full" in refused.err
        filled.give_back(1, 40 << 20)
        assert "the store's disk is full" in run("commit", "cc", "made", ok=1).err
        assert os.listdir(Path(run.store, "ingest")) == []
        assert len(os.listdir(Path(run.store, "layers"))) == 1
        filled.empty()
        run("commit", "cc", "made")
        reset(run.store)


def test_refusals(run: Shell, tmp_path: Path) -> None:
    loaded(run, tmp_path)
    assert "there is no container 'no'" in run("commit", "no", ok=3).err
    assert "is no valid image name" in run("commit", "cc", "UPPER", ok=2).err
    assert "FROM is no change" in run("commit", "-c", "FROM x", "cc", ok=2).err
    assert "pauses no process" in run("commit", "--pause", "cc", ok=2).err
    run("commit", "--no-pause", "cc")
    key = json.loads(run("inspect", "cc").out)[0]["Id"]
    upper = Path(run.store, "snapshots", key, "upper")
    upper.rename(tmp_path / "upper")
    assert "is gone, with what was written" in run("commit", "cc", ok=6, sound=False).err
    (tmp_path / "upper").rename(upper)
    (upper / "x").touch()
    Path(run.store, "containers", f"{key}.json").unlink()
    refused = run("commit", key, ok=6, sound=False)
    assert f"overlayctl export -o FILE {key[:12]}" in refused.err


def test_a_config_of_odd_types(run: Shell, tmp_path: Path) -> None:
    """What is not of the type that it has to be is not there; what is not known stays."""
    odd = {"Env": "A=1", "Labels": ["x"], "Volumes": 5, "Cmd": "sh", "User": [], "Odd": [1]}
    config = json.loads(archives.config(BELOW))
    config |= {"config": odd, "history": [None, 3], "os.version": "7", "container": "none"}
    data = json.dumps(config).encode()
    manifest = archives.manifest(data, BELOW)
    described = archives.descriptor(manifest, archives.OCI + "manifest.v1+json")
    layout = archives.layout(tmp_path / "in", archives.index(described), data, manifest, BELOW)
    run("load", "--tag", "odd:1", layout)
    run("create", "--name", "cc", "odd:1")
    config = config_of(run, run("commit", "-c", "ENV B=2", "-c", "LABEL l=1", "cc").out.strip())
    assert config["config"] == {"Env": ["B=2"], "Labels": {"l": "1"}, "Odd": [1]}
    # Each layer has its line of history.
    assert config["history"][:-1] == [None, 3, {}]
    assert config["os.version"] == "7"
    assert "container" not in config


def test_holes_are_zeros_that_take_no_room(run: Shell, tmp_path: Path) -> None:
    """Docker and podman cannot save a layer again that has sparse files, though they load it."""
    loaded(run, tmp_path)
    merged = Path(run("mount", "cc").out[:-1])
    with (merged / "holes").open("wb") as file:
        file.truncate(200 << 20)
        file.seek(100 << 20)
        file.write(b"middle")
    run("umount", "cc")
    whole = json.loads(run("commit", "--json", "cc", "whole").out)
    assert whole["Size"] > 200 << 20
    layer = Path(run.store, "layers", whole["DiffID"].removeprefix("sha256:"), "layer.erofs")
    assert layer.stat().st_blocks * 512 < 4 << 20
    few = json.loads(run("commit", "--json", "--sparse", "cc", "few").out)
    assert few["Size"] < 1 << 20
    for name in ("whole", "few"):
        view = Path(run("image", "mount", name).out[:-1])
        assert (view / "holes").read_bytes().strip(b"\0") == b"middle"
        assert (view / "holes").stat().st_size == 200 << 20
        run("umount", name)


@pytest.mark.long
def test_commits_saves_and_removals_at_once(run: Shell, tmp_path: Path) -> None:
    """On one container that is written to: each image is whole, and nothing is left."""
    loaded(run, tmp_path)
    merged = run.path("mount", "cc")
    (merged / "big").write_bytes(os.urandom(8 << 20))
    program = f"{sys.executable} -m overlayctl --root {run.store}"
    # Equal images of two of them are one, which the other may have removed.
    script = f"""
    for turn in 1 2 3 4 5 6; do
        echo $1.$turn > {merged}/$1
        image=$({program} commit -q -m $1.$turn cc made:$1 2> /dev/null) || exit 1
        {program} save -o {tmp_path}/$1.tar $image || exit 2
        {program} rmi -f $image > /dev/null 2>&1 || exit 3
        tar -tf {tmp_path}/$1.tar > /dev/null || exit 4
    done
    """
    running = [subprocess.Popen(["sh", "-c", script, "sh", str(number)]) for number in range(4)]
    assert [one.wait() for one in running] == [0] * 4
    (image,) = json.loads(run("images", "--json").out)
    assert image["RepoTags"] == ["demo:latest"]
    assert len(os.listdir(Path(run.store, "layers"))) == 1
    assert os.listdir(Path(run.store, "ingest")) == []
    (merged / "big").unlink()
    run("umount", "cc")

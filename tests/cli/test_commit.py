"""A container as an image: what is in its layer, what its config says, and what is refused."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from overlayctl.errors import Usage
from overlayctl.runtime.changes import changed
from tests import filesystems
from tests.archives import docker_archive
from tests.cli.conftest import Shell, reset
from tests.layer.tars import directory, entry, hardlink, tar
from tests.oracles import trees

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
    (Path(run.store, "snapshots", key, "upper") / "x").touch()
    Path(run.store, "containers", f"{key}.json").unlink()
    refused = run("commit", key, ok=6, sound=False)
    assert f"overlayctl export -o FILE {key[:12]}" in refused.err


CONFIG = {"Env": ["A=1", "B=2"], "Cmd": ["/bin/sh"], "WorkingDir": "/bin", "Labels": {"one": "1"},
          "Healthcheck": {"Test": ["CMD-SHELL", "true"], "Interval": 5_000_000_000}}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("CMD a b", "Cmd", ["/bin/sh", "-c", "a b"]),
        ('CMD ["a", "b"]', "Cmd", ["a", "b"]),
        ('CMD=["a"]', "Cmd", ["a"]),
        ("cmd x", "Cmd", ["/bin/sh", "-c", "x"]),
        ("CMD [a", "Cmd", ["/bin/sh", "-c", "[a"]),
        ("CMD []", "Cmd", None),
        ("ENTRYPOINT a", "Cmd", None),
        ("ENTRYPOINT a", "Entrypoint", ["/bin/sh", "-c", "a"]),
        ("ENTRYPOINT []", "Cmd", ["/bin/sh"]),
        ('ENV A=7 Z="q w"', "Env", ["A=7", "B=2", "Z=q w"]),
        ("ENV=C=3", "Env", ["A=1", "B=2", "C=3"]),
        ("ENV A b c", "Env", ["A=b c", "B=2"]),
        ('ENV A="b\\"c"', "Env", ['A=b"c', "B=2"]),
        ("ENV A='$A'", "Env", ["A=$A", "B=2"]),
        ("ENV A=${A}-${Q:-d}-$NO", "Env", ["A=1-d-", "B=2"]),
        ("ENV X=$A\\ny", "Env", ["A=1", "B=2", "X=1ny"]),
        ("ENV X=${A:+set}${Q:+not}", "Env", ["A=1", "B=2", "X=set"]),
        ("LABEL a b", "Labels", {"one": "1", "a": "b"}),
        ("LABEL a=b\\ c", "Labels", {"one": "1", "a": "b c"}),
        ('LABEL "a b"=c d=\'e f\'', "Labels", {"one": "1", "a b": "c", "d": "e f"}),
        ("WORKDIR sub", "WorkingDir", "/bin/sub"),
        ("WORKDIR $A/x", "WorkingDir", "/bin/1/x"),
        ("WORKDIR /x/../y", "WorkingDir", "/y"),
        ("USER bob", "User", "bob"),
        ("EXPOSE 99/udp 1-3 7:8", "ExposedPorts",
         {"99/udp": {}, "1/tcp": {}, "2/tcp": {}, "3/tcp": {}, "8/tcp": {}}),
        ("VOLUME /a /b", "Volumes", {"/a": {}, "/b": {}}),
        ('VOLUME ["/a b"]', "Volumes", {"/a b": {}}),
        ("ONBUILD RUN y", "OnBuild", ["RUN y"]),
        ("STOPSIGNAL SIGKILL", "StopSignal", "SIGKILL"),
        ("STOPSIGNAL 9", "StopSignal", "9"),
        ("HEALTHCHECK NONE", "Healthcheck", {"Test": ["NONE"], "Interval": 5_000_000_000}),
        ('HEALTHCHECK --retries=3 --timeout=1m1.5s CMD ["a","b"]', "Healthcheck",
         {"Test": ["CMD", "a", "b"], "Interval": 5_000_000_000, "Timeout": 61_500_000_000,
          "Retries": 3}),
        ("HEALTHCHECK CMD a b", "Healthcheck",
         {"Test": ["CMD-SHELL", "a b"], "Interval": 5_000_000_000}),
    ],
)  # fmt: skip
def test_a_change(change: str, key: str, value: object) -> None:
    result = changed(CONFIG, [change])
    assert result[key] == value
    touched = {key, "Cmd", "Entrypoint"} if change.startswith("ENTRYPOINT") else {key}
    assert {k: v for k, v in result.items() if k not in touched} == {
        k: v for k, v in CONFIG.items() if k not in touched
    }


def test_a_command_before_or_after_the_entrypoint_stays() -> None:
    for both in (["CMD b", 'ENTRYPOINT ["a"]'], ['ENTRYPOINT ["a"]', "CMD b"]):
        assert changed(CONFIG, both)["Cmd"] == ["/bin/sh", "-c", "b"]


@pytest.mark.parametrize(
    "change",
    [
        "", "#x", "FROM x", "RUN x", "MAINTAINER x", 'SHELL ["a"]', "CMD", "USER", "WORKDIR",
        "ENV A", "LABEL a", "ENV A=1 B", 'ENV "A=b"', "ENV =b", "ENV A=${x", "ENV A='x",
        "EXPOSE x", "EXPOSE 80/foo", "EXPOSE 70000", "EXPOSE 3-1", "VOLUME []", 'CMD ["a", 1]',
        "ONBUILD FROM x", "STOPSIGNAL nosuch", "STOPSIGNAL 99", "HEALTHCHECK x",
        "HEALTHCHECK --retries=0 CMD x", "HEALTHCHECK --interval=1us CMD x",
        "HEALTHCHECK --interval=5 CMD x", "HEALTHCHECK --x=1 NONE",
    ],
)  # fmt: skip
def test_no_change(change: str) -> None:
    with pytest.raises(Usage) as error:
        changed(CONFIG, [change])
    assert repr(change) in str(error.value)
    assert error.value.hint


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

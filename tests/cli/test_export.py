"""``container export``: the merged tree of a container as a tar, whatever state it is in."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from overlayctl.kernel import mounttable
from tests import filesystems
from tests.archives import docker_archive
from tests.cli.conftest import Shell
from tests.cli.test_in_use import elsewhere, process
from tests.layer.tars import directory, entry, hardlink, members, symlink, tar
from tests.layer.test_tar_writer import by_gnu_tar
from tests.layer.test_tree import build, shape
from tests.oracles import trees

LAYERS = [
    tar(
        directory("./", mode=0o711),
        directory("etc", mode=0o750, uid=7, mtime=5),
        entry("etc/conf", data=b"one", mode=0o4755, mtime=6),
        entry("etc/old", data=b"old"),
        hardlink("etc/conf2", "etc/conf"),
        entry("usr/share/big", data=b"b" * 100_000),
        entry("opq/below", data=b"1"),
    ),
    tar(
        entry("etc/.wh.old"),
        entry("etc/new", data=b"two", xattrs={"user.note": "x"}),
        symlink("link", "/etc/conf"),
        directory("empty", xattrs={"trusted.overlay.redirect": "/r"}),
    ),
]


@pytest.fixture
def run(store: str, tmp_path: Path) -> Shell:
    """A store with a container ``cc`` in which something was written."""
    run = Shell(store)
    run("load", docker_archive(tmp_path / "a.tar", LAYERS))
    run("create", "--name", "cc", "demo")
    merged = run.path("mount", "cc")
    (merged / "etc/conf").write_text("changed")
    (merged / "usr/share/mine").write_bytes(b"m" * 5000)
    os.link(merged / "usr/share/mine", merged / "usr/share/too")
    (merged / "etc/new").unlink()
    shutil.rmtree(merged / "opq")
    (merged / "opq").mkdir()
    (merged / "opq/inside").write_text("i")
    run("umount", "cc")
    return run


def seen(run: Shell, *options: str) -> dict[bytes, trees.Entry]:
    """The container's tree as a program sees it in its mount."""
    merged = run.path("mount", *options, "cc")
    found = trees.snapshot(merged)
    run("umount", "cc")
    return found


def state(store: str) -> list[str]:
    """All names in the store, what is attached left out."""
    attached = os.path.join(store, "attached")
    return sorted(
        os.path.join(place, name)
        for place, directories, files in os.walk(store)
        for name in (*directories, *files)
        if not place.startswith(attached)
    )


def test_what_is_exported_is_what_is_mounted(run: Shell, store: str, tmp_path: Path) -> None:
    real = seen(run)
    assert real[b"etc/conf"].sha256 != real[b"etc/conf2"].sha256
    before, mounts = state(store), len(mounttable.read())
    file = tmp_path / "out.tar"
    done = run("container", "export", "-o", file, "cc")
    assert (done.out, done.err) == ("", "")
    assert (state(store), len(mounttable.read())) == (before, mounts)
    assert (
        trees.differences(real, trees.snapshot(by_gnu_tar(file.read_bytes(), tmp_path / "x"))) == []
    )
    # To standard output, by docker's short form, by the id's start: the same bytes.
    identifier = json.loads(run("inspect", "cc").out)[0]["Id"]
    assert os.fsencode(run("export", identifier[:8]).out) == file.read_bytes()
    # And through its mount, which stays.
    merged = run.path("mount", "cc")
    assert os.fsencode(run("export", "cc").out) == file.read_bytes()
    assert (merged / "etc/conf").read_text() == "changed"
    run("umount", "cc")
    # An image of it looks the same: only inode numbers and what overlay hides could differ.
    run("import", file, "flat:1")
    run("create", "--name", "flat", "flat:1")
    assert os.fsencode(run("export", "flat").out) == file.read_bytes()


@pytest.mark.parametrize("rung", ["fds", "strings", "mount"])
def test_by_every_way_to_mount(
    run: Shell, tmp_path: Path, rung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run("export", "cc").out
    monkeypatch.setenv("OVERLAYCTL_MOUNT", rung)
    assert run("export", "cc").out == expected


def test_of_layers_that_are_unpacked(
    run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run("export", "cc").out
    run("layer", "detach", "--all")
    monkeypatch.setenv("OVERLAYCTL_ATTACH", "unpacked")
    assert run("export", "cc").out == expected


def test_in_a_store_with_an_odd_path(odd_run: Shell, tmp_path: Path) -> None:
    odd_run("load", docker_archive(tmp_path / "a.tar", LAYERS))
    odd_run("create", "--name", "cc", "demo")
    expected = odd_run("export", "cc").out
    odd_run("mount", "cc")
    assert odd_run("export", "cc").out == expected
    odd_run("umount", "cc")


def test_of_as_many_layers_as_the_kernel_takes(run: Shell, store: str, tmp_path: Path) -> None:
    """The upper would be one more: then it is exported while it is mounted."""
    layers = [tar(directory("./"), entry(f"f{number}")) for number in range(500)]
    run("load", docker_archive(tmp_path / "b.tar", layers, tags=("many:1",)))
    run("create", "--name", "many", "many:1")
    refused = run("export", "many", ok=5, sound=False).err
    assert "hint: overlayctl mount" in refused
    run("mount", "many", sound=False)
    with tarfile.open(fileobj=io.BytesIO(os.fsencode(run("export", "many", sound=False).out))) as t:
        assert len(t.getnames()) == 501
    run("umount", "many", sound=False)


def test_what_is_mounted_in_a_container_is_not_in_it(run: Shell, tmp_path: Path) -> None:
    expected = run("export", "cc").out
    merged = run.path("mount", "cc")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", merged / "empty"], check=True)
    try:
        (merged / "empty/volume").touch()
        assert run("export", "cc").out == expected
    finally:
        subprocess.run(["umount", merged / "empty"], check=True)
    run("umount", "cc")


def test_of_a_container_that_another_mount_namespace_has(
    run: Shell, store: str, tmp_path: Path
) -> None:
    script = (
        'place=$("$@" mount cc) && printf more > "$place/empty/more" && '
        'mount -t tmpfs tmpfs "$place/opq" && touch "$place/opq/volume"'
    )
    command = [sys.executable, "-m", "overlayctl", "--root", store]
    with process(*elsewhere(script, "sh", *command)):
        assert not any(m.fs_type == "overlay" for m in mounttable.below(store))
        data = os.fsencode(run("export", "cc").out)
    tree = by_gnu_tar(data, tmp_path / "x")
    assert (tree / "empty/more").read_text() == "more"
    assert os.listdir(tree / "opq") == ["inside"]


def test_records_that_are_lost(run: Shell, store: str, tmp_path: Path) -> None:
    """What was written is listed, exported and removed by its key."""
    key = json.loads(run("inspect", "cc").out)[0]["Id"]
    os.unlink(os.path.join(store, "containers", f"{key}.json"))
    os.unlink(os.path.join(store, "containers", "names", "cc"))
    os.unlink(os.path.join(store, "snapshots", key, "snapshot.json"))
    assert run("ps", "-a", "-q", "--no-trunc", sound=False).out == f"{key}\n"
    file = tmp_path / "upper.tar"
    assert "record of its layers is lost" in run("export", "-o", file, key[:12], sound=False).err
    with build(tmp_path / "upper.erofs", file.read_bytes()) as index:
        found = shape(index)
    assert found == {
        b"etc": "directory", b"etc/conf": "changed", b"etc/new": "whiteout", b"opq": "opaque",
        b"opq/inside": "i", b"usr": "directory", b"usr/share": "directory",
        b"usr/share/mine": "m" * 5000, b"usr/share/too": "m" * 5000,
    }  # fmt: skip
    run("rm", key, sound=False)
    assert run("ps", "-a", "-q").out == ""
    assert not os.path.exists(os.path.join(store, "snapshots", key))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}'])
def test_a_record_that_is_damaged(run: Shell, store: str, content: str) -> None:
    key = json.loads(run("inspect", "cc").out)[0]["Id"]
    Path(store, "snapshots", key, "snapshot.json").write_text(content)
    done = run("export", "cc", sound=False)
    assert "as a layer" in done.err
    assert "etc/.wh.new" in done.out


def test_a_lost_record_of_a_mounted_container_is_no_matter(run: Shell, store: str) -> None:
    expected = run("export", "cc").out
    run("mount", "cc")
    key = json.loads(run("inspect", "cc").out)[0]["Id"]
    os.rename(os.path.join(store, "snapshots", key, "snapshot.json"), f"{store}/kept")
    assert run("export", "cc", sound=False).out == expected
    os.rename(f"{store}/kept", os.path.join(store, "snapshots", key, "snapshot.json"))
    run("umount", "cc")


def test_an_overlay_that_no_mount_table_shows(run: Shell) -> None:
    merged = run.path("mount", "cc")
    with (merged / "etc/conf").open():
        run("umount", "--lazy", "cc")
        assert "in use by an overlay" in run("export", "cc", ok=4).err
    run("export", "cc")


def test_what_cannot_be_told_is_noted(
    run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = run.path("mount", "cc")
    # The address of a socket is short.
    monkeypatch.chdir(merged)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s\n")
    monkeypatch.chdir("/")
    file = tmp_path / "out.tar"
    done = run("export", "-o", file, "--json", "cc")
    assert done.err == "note: s\\x0a: a socket, left out\n"
    told = json.loads(done.out)
    assert told["Notes"] == [{"Note": "a socket, left out", "Path": "s\n"}]
    assert (told["Size"], told["UpperOnly"]) == (file.stat().st_size, False)
    run("umount", "cc")


# --- where it goes ------------------------------------------------------------------------------


def test_a_terminal_is_no_place_for_a_tar(run: Shell, store: str) -> None:
    main, terminal = pty.openpty()
    call = [sys.executable, "-m", "overlayctl", "--root", store, "export", "cc"]
    for more in ([], ["-o", os.ttyname(terminal)]):
        done = subprocess.run(
            [*call, *more], stdout=terminal, stderr=subprocess.PIPE, text=True, check=False
        )
        assert done.returncode == 2
        assert "hint: -o FILE" in done.stderr
    os.close(terminal)
    os.close(main)


def test_a_file_is_replaced_when_it_is_whole(run: Shell, tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    run("export", "-o", place / "new.tar", "cc")
    assert (place / "new.tar").stat().st_mode & 0o777 == 0o600
    (place / "there").write_text("before")
    (place / "there").chmod(0o640)
    os.chown(place / "there", 5, 6)
    (place / "link").symlink_to("there")
    run("export", "-o", place / "link", "cc")
    assert (place / "link").is_symlink()
    found = (place / "there").stat()
    assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o640, 5, 6)
    assert (place / "there").read_bytes() == (place / "new.tar").read_bytes()
    run("export", "-o", place / "there", "nobody", ok=3)
    assert (place / "there").read_bytes() == (place / "new.tar").read_bytes()
    assert sorted(os.listdir(place)) == ["link", "new.tar", "there"]
    assert "is a directory" in run("export", "-o", place, "cc", ok=2).err
    assert "no directory" in run("export", "-o", place / "no/x", "cc", ok=3).err
    run("export", "-o", "/dev/null", "cc")
    assert os.stat("/dev/null").st_rdev == os.makedev(1, 3)


def test_a_disk_that_takes_no_more(run: Shell, store: str, tmp_path: Path) -> None:
    with filesystems.mounted("tmpfs", tmp_path, size=64 << 10) as small:
        (small / "out").write_text("before")
        told = run("export", "-o", small / "out", "cc", ok=1).err
        assert "cannot write to " in told
        assert "No space left" in told
        assert os.listdir(small) == ["out"]
        assert (small / "out").read_text() == "before"
    assert "No space left" in run("export", "-o", "/dev/full", "cc", ok=1).err
    with open("/dev/full", "wb") as full:
        call = [sys.executable, "-m", "overlayctl", "--root", store, "export", "cc"]
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "No space left" in done.stderr) == (1, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(
    run: Shell, store: str, tmp_path: Path, number: signal.Signals
) -> None:
    merged = run.path("mount", "cc")
    for count in range(40):
        # Real bytes: a hole would be passed over.
        (merged / f"large{count}").write_bytes(os.urandom(8 << 20))
    run("umount", "cc")
    before, mounts = state(store), len(mounttable.read())
    place = tmp_path / "out"
    place.mkdir()
    call = [sys.executable, "-m", "overlayctl", "--root", store, "export", "cc"]
    child = subprocess.Popen([*call, "-o", place / "file.tar"])
    deadline = time.monotonic() + 30
    while not any(file.stat().st_size > 1 << 20 for file in place.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.send_signal(number)
    assert child.wait() == 128 + number
    assert os.listdir(place) == []
    assert (state(store), len(mounttable.read())) == (before, mounts)
    run("mount", "cc")
    run("umount", "cc")


def test_a_reader_that_leaves_ends_it_silently(run: Shell, store: str) -> None:
    merged = run.path("mount", "cc")
    (merged / "large").write_bytes(b"x" * (1 << 20))
    call = [sys.executable, "-m", "overlayctl", "--root", store, "export", "cc"]
    child = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(100)
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 141)
    child.stderr.close()
    run("umount", "cc")


def test_it_waits_for_nobody_who_reads_and_is_not_unmounted_meanwhile(
    run: Shell, store: str, tmp_path: Path
) -> None:
    merged = run.path("mount", "cc")
    (merged / "large").write_bytes(b"x" * (4 << 20))
    call = [sys.executable, "-m", "overlayctl", "--root", store, "export", "cc"]
    child = subprocess.Popen(call, stdout=subprocess.PIPE)
    assert child.stdout is not None
    begun = child.stdout.read(100)
    expected = os.fsencode(run("export", "cc").out)
    assert f"process {child.pid} " in run("umount", "cc", "--lock-timeout", "0", ok=7).err
    assert begun + child.stdout.read() == expected
    assert child.wait() == 0
    child.stdout.close()
    run("umount", "cc")
    assert {m.name for m in members(expected, tmp_path)} >= {b"./", b"large", b"opq/inside"}


def test_on_a_store_that_is_read_only(tmp_path: Path) -> None:
    with filesystems.mounted("ext4", tmp_path) as disk:
        run = Shell(str(disk / "store"))
        run("load", docker_archive(tmp_path / "a.tar", LAYERS))
        run("create", "--name", "cc", "demo")
        merged = run.path("mount", "cc")
        (merged / "mine").write_text("mine")
        run("umount", "cc")
        expected = run("export", "cc").out
        filesystems.remount(disk, "ro")
        assert run("export", "cc", sound=False).out == expected
        filesystems.remount(disk, "rw")
        run("system", "reset", "--yes", sound=False)

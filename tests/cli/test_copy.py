"""``cp`` in and out of containers in every state, and what no container gets by it."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlayctl.kernel import mounttable
from tests import filesystems
from tests.archives import docker_archive
from tests.cli.conftest import Shell
from tests.cli.test_in_use import elsewhere, process
from tests.layer.tars import directory, entry, symlink, tar
from tests.layer.test_copy import every_kind, swapping
from tests.oracles import trees

LAYER = tar(
    directory("./"),
    directory("etc"),
    entry("etc/conf", data=b"one", mtime=6),
    entry("etc/passwd", data=b"root:x:0:0:in the container:/:/bin/sh\n"),
    directory("dir", mode=0o751, uid=7, gid=8, mtime=9),
    entry("dir/file", data=b"two", uid=7),
    directory("proc"),
    symlink("passwd", "/etc/passwd"),
    symlink("far", "../../../../../../../../etc/passwd"),
    symlink("self", "/proc/self/root/etc/passwd"),
    symlink("root", "/proc/self/root"),
    symlink("cwd", "/proc/self/cwd"),
    symlink("fd", "/proc/self/fd/0"),
    symlink("etcdir", "/../../etc"),
    symlink("loop", "loop"),
    symlink("var", "/tmp"),
    symlink("host", "/HOST"),
)


@pytest.fixture
def run(store: str, tmp_path: Path) -> Shell:
    run = Shell(store)
    run("load", docker_archive(tmp_path / "a.tar", [LAYER]))
    run("create", "--name", "cc", "demo")
    return run


@contextmanager
def standard_input(data: bytes) -> Iterator[None]:
    """Let the commands of this process read a pipe."""
    before = sys.stdin
    reading, writing = os.pipe()

    def feed() -> None:
        with open(writing, "wb") as pipe:
            try:
                pipe.write(data)
            except BrokenPipeError:
                return

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        with open(reading) as sys.stdin:
            yield
    finally:
        sys.stdin = before
        thread.join()


def is_idle(run: Shell) -> bool:
    """Whether nothing tells that the container was ever mounted, and it can be."""
    mounted = [mount for mount in mounttable.below(run.store) if mount.fs_type == "overlay"]
    return not mounted and run("ps", "-q").out == ""


# --- whatever its state -------------------------------------------------------------------------


def test_everything_goes_in_and_out_again(run: Shell, tmp_path: Path) -> None:
    every_kind(tmp_path / "tree")
    before = trees.snapshot(tmp_path / "tree")
    told = json.loads(run("cp", "--json", tmp_path / "tree", "cc:/new").out)
    assert (told["Entries"], told["Notes"]) == (len(before), [])
    assert told["Size"] < 1 << 20
    assert is_idle(run)
    run("cp", "-a", "cc:/new", tmp_path / "out")
    assert trees.differences(before, trees.snapshot(tmp_path / "out")) == []
    upper = json.loads(run("inspect", "cc").out)[0]["GraphDriver"]["Data"]["UpperDir"]
    assert os.stat(f"{upper}/new/holes").st_blocks * 512 < 1 << 20
    # By a tar, out and in again.
    data = os.fsencode(run("cp", "cc:/new", "-").out)
    with standard_input(data):
        told = json.loads(run("cp", "--json", "-", "cc:/dir").out)
    assert told["Entries"] == len(before)
    run("cp", "-a", "cc:/dir/new", tmp_path / "again")
    assert trees.differences(before, trees.snapshot(tmp_path / "again")) == []
    assert is_idle(run)


def test_nothing_is_seen_of_reading(run: Shell, store: str, tmp_path: Path) -> None:
    from tests.cli.test_export import state

    before, mounts = state(store), len(mounttable.read())
    run("cp", "cc:/etc/conf", tmp_path / "conf")
    assert (state(store), len(mounttable.read())) == (before, mounts)
    assert (tmp_path / "conf").read_text() == "one"
    assert (tmp_path / "conf").stat().st_mtime == 6


def test_of_a_mounted_container(run: Shell, tmp_path: Path) -> None:
    merged = run.path("mount", "cc")
    (tmp_path / "in").write_text("in")
    with (merged / "etc/conf").open() as file:
        run("cp", tmp_path / "in", "cc:/etc/conf")
        assert file.read() == "one"
    assert (merged / "etc/conf").read_text() == "in"
    (merged / "mine").write_text("mine")
    run("cp", "cc:mine", tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
    # A person mounted it: it stays so.
    assert run("mounts").out.count(str(merged)) == 1
    assert (merged / "mine").exists()
    run("umount", "cc")


def test_of_a_container_with_processes_in_it(run: Shell, tmp_path: Path) -> None:
    """They see what comes in; what is mounted over its tree does not count."""
    merged = run.path("mount", "cc")
    script = 'mount -t tmpfs tmpfs "$0/proc"; echo; cd "$0"; read -r _; cat etc/conf > done'
    child = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script, merged], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    (tmp_path / "in").write_text("in")
    run("cp", tmp_path / "in", "cc:/etc/conf")
    run("cp", tmp_path / "in", "cc:/proc/in")
    child.communicate(b"\n", timeout=20)
    assert (merged / "done").read_text() == "in"
    assert (merged / "proc/in").read_text() == "in"
    run("umount", "cc")


def test_of_a_container_that_another_mount_namespace_has(
    run: Shell, store: str, tmp_path: Path
) -> None:
    script = 'place=$("$@" mount cc) && echo more | tee "$place/more" > /dev/null'
    command = [sys.executable, "-m", "overlayctl", "--root", store]
    (tmp_path / "in").write_text("in")
    with process(*elsewhere(script, "sh", *command)) as child:
        run("cp", "cc:/more", tmp_path)
        assert (tmp_path / "more").read_text() == "more\n"
        run("cp", tmp_path / "in", "cc:/in")
        place = f"/proc/{child.pid}/root{store}/attached/merged"
        (key,) = os.listdir(place)
        assert Path(place, key, "in").read_text() == "in"
        assert not any(mount.fs_type == "overlay" for mount in mounttable.below(store))
    run("cp", "cc:/in", tmp_path / "out")


def test_what_goes_on_meanwhile(run: Shell, tmp_path: Path) -> None:
    """Reading commands and other copies do not wait for a copy into an idle container."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number in range(4000):
            one = tarfile.TarInfo(f"many/{number}")
            one.size = 3
            archive.addfile(one, io.BytesIO(b"abc"))
    command = [sys.executable, "-m", "overlayctl", "--root", run.store, "cp", "-", "cc:/dir"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert child.stdin is not None
    with child.stdin:
        child.stdin.write(stream.getvalue())
    upper = json.loads(run("inspect", "cc").out)[0]["GraphDriver"]["Data"]["UpperDir"]
    deadline = time.monotonic() + 20
    while not os.path.exists(f"{upper}/dir/many/1"):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    (tmp_path / "f").write_text("f")
    refused = run("rm", "cc", ok=4, sound=False).err
    run("--lock-timeout", "0", "cp", tmp_path / "f", "cc:/f", sound=False)
    run("--lock-timeout", "0", "cp", "cc:/f", tmp_path / "g", sound=False)
    run("--lock-timeout", "0", "diff", "cc", sound=False)
    assert child.poll() is None, "the copy was over too soon"
    assert child.wait(timeout=30) == 0
    assert f"{child.pid}" in refused
    assert is_idle(run)
    run("cp", "cc:/dir/many", tmp_path)
    assert len(os.listdir(tmp_path / "many")) == 4000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_copy_that_is_stopped(run: Shell, tmp_path: Path, number: signal.Signals) -> None:
    """No half file has the name; killed at once, the mount is the next one's to put away."""
    with (tmp_path / "big").open("wb") as file:
        for _ in range(200):
            file.write(os.urandom(1 << 20))
    (tmp_path / "before").write_text("before")
    run("cp", tmp_path / "before", "cc:/big")
    upper = json.loads(run("inspect", "cc").out)[0]["GraphDriver"]["Data"]["UpperDir"]
    command = [sys.executable, "-m", "overlayctl", "--root", run.store]
    child = subprocess.Popen([*command, "cp", tmp_path / "big", "cc:/big"])
    deadline = time.monotonic() + 20
    while not any(name.startswith(".overlayctl-") for name in os.listdir(upper)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.send_signal(number)
    killed = number == signal.SIGKILL
    assert child.wait() == (-number if killed else 128 + number)
    assert (Path(upper) / "big").read_text() == "before"
    if not killed:
        assert is_idle(run)
        assert os.listdir(upper) == ["big"]
    run("cp", tmp_path / "before", "cc:/big")
    assert is_idle(run)


# --- nothing outside ----------------------------------------------------------------------------

OUTSIDE = ("passwd", "far", "self", "root/etc/passwd", "cwd/etc/passwd", "etcdir/passwd", "fd")


@pytest.mark.parametrize("mounted", [False, True])
def test_no_link_leads_out(run: Shell, tmp_path: Path, mounted: bool) -> None:  # noqa: FBT001
    """Each that leads somewhere leads to the container's own file; /proc is an empty directory."""
    if mounted:
        run("mount", "cc")
    mine = tmp_path / "mine"
    mine.write_text("mine")
    host = Path("/etc/passwd").read_bytes()
    for number, path in enumerate(OUTSIDE):
        out = tmp_path / f"out{number}"
        real = path in {"passwd", "far", "etcdir/passwd"}
        run("cp", "-L", f"cc:/{path}", out, ok=0 if real else 3)
        if real:
            assert "in the container" in out.read_text()
            run("cp", f"cc:/{path}", tmp_path / f"as{number}")
        else:
            assert not out.exists()
    for path in OUTSIDE:
        real = path in {"passwd", "far", "etcdir/passwd"}
        run("cp", mine, f"cc:/{path}", ok=0 if real else 3)
    assert Path("/etc/passwd").read_bytes() == host
    run("cp", "cc:/etc/passwd", tmp_path / "changed")
    assert (tmp_path / "changed").read_text() == "mine"
    assert "symbolic links" in run("cp", "-L", "cc:/loop", tmp_path / "no", ok=1).err
    assert "no directory '/tmp'" in run("cp", mine, "cc:/var/x", ok=3).err
    # What is a link in a tree is copied as one.
    run("cp", "cc:/.", tmp_path / "all")
    assert os.readlink(tmp_path / "all/self") == "/proc/self/root/etc/passwd"
    if mounted:
        run("umount", "cc")


def test_a_tar_does_not_lead_out(run: Shell, tmp_path: Path) -> None:
    host = Path("/etc/passwd").read_bytes()
    for bad in (
        entry("../x", data=b"x"),
        entry("a/../../x"),
        entry("b", type=b"1", linkname="../c"),
    ):
        with standard_input(tar(bad)):
            assert "leads out" in run("cp", "-", "cc:/dir", ok=1).err
    with standard_input(
        tar(
            symlink("abs", "/etc"),
            entry("abs/passwd", data=b"inside", mode=0o600),
            symlink("up", "../../../../../../.."),
            entry("up/etc/other", data=b"inside"),
            entry("/rooted", data=b"inside"),
        )
    ):
        run("cp", "-", "cc:/dir")
    assert Path("/etc/passwd").read_bytes() == host
    for path in ("etc/passwd", "etc/other", "dir/rooted"):
        run("cp", f"cc:/{path}", tmp_path / "out")
        assert (tmp_path / "out").read_text() == "inside"


@pytest.mark.parametrize("mounted", [False, True])
def test_no_fifo_and_no_device_is_opened(run: Shell, tmp_path: Path, mounted: bool) -> None:  # noqa: FBT001
    """One that was would wait for ever, or read what it has."""
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "zero", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    if mounted:
        run("mount", "cc")
    for name in ("fifo", "zero"):
        run("cp", tmp_path / name, f"cc:/{name}")
        run("cp", f"cc:/{name}", tmp_path / f"{name}2")
        kinds = [os.lstat(tmp_path / one).st_mode for one in (name, f"{name}2")]
        assert kinds[0] == kinds[1]
        (tmp_path / "file").write_text("file")
        run("cp", tmp_path / "file", f"cc:/{name}")
        run("cp", f"cc:/{name}", tmp_path / "got")
        assert (tmp_path / "got").read_text() == "file"
    if mounted:
        run("umount", "cc")


def test_a_source_that_is_raced_gives_nothing_of_the_host(run: Shell, tmp_path: Path) -> None:
    """A file and a directory become links to the host's, all the time."""
    secret = tmp_path / "HOST"
    secret.mkdir()
    (secret / "file").write_text("secret")
    merged = run.path("mount", "cc")
    (merged / "there/sub").mkdir(parents=True)
    for path in ("there/sub/file", "there/file"):
        (merged / path).write_text("public")
    (merged / "swap").symlink_to(secret)
    (merged / "swapped").symlink_to(secret / "file")
    until = time.monotonic() + 2
    copies = 0
    with (
        swapping(merged / "there/sub", merged / "swap"),
        swapping(merged / "there/file", merged / "swapped"),
    ):
        while time.monotonic() < until:
            for number, path in enumerate(("there", "there/sub/file", "there/sub/.", "there/file")):
                for follow in ((), ("-L",)):
                    out = tmp_path / f"out{copies}-{number}{len(follow)}"
                    run._run(("cp", *follow, f"cc:/{path}", str(out)), "")
            copies += 1
    assert copies > 3
    read = set()
    for out in tmp_path.glob("out*"):
        names = [os.path.join(at, name) for at, _, names in os.walk(out) for name in names]
        for path in (str(out), *names):
            if stat.S_ISREG(os.lstat(path).st_mode):
                read.add((path, Path(path).read_text()))
    assert read
    assert {path for path, text in read if text != "public"} == set()
    run("umount", "cc")


def test_a_target_that_is_raced_writes_nothing_on_the_host(run: Shell, tmp_path: Path) -> None:
    outside = tmp_path / "HOST"
    outside.mkdir(0o700)
    (outside / "file").write_text("secret")
    os.utime(outside, ns=(0, 5))
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for name in ("file", "sub/file", "sub/new"):
        (tree / name).write_text("from the host")
    merged = run.path("mount", "cc")
    (merged / "there/tree/sub").mkdir(parents=True)
    (merged / "there/tree/file").write_text("x")
    (merged / "swap").symlink_to(outside)
    (merged / "swapped").symlink_to(outside / "file")
    until = time.monotonic() + 2
    done = 0
    with (
        swapping(merged / "there/tree/sub", merged / "swap"),
        swapping(merged / "there/tree/file", merged / "swapped"),
    ):
        while time.monotonic() < until:
            done += not run._run(("cp", str(tree), "cc:/there"), "").status
            run._run(("cp", str(tree / "file"), "cc:/there/tree/sub/file"), "")
            run._run(("cp", str(tree / "file"), "cc:/there/tree/file"), "")
    assert done
    assert os.listdir(outside) == ["file"]
    assert (outside / "file").read_text() == "secret"
    assert (outside.stat().st_mode & 0o777, outside.stat().st_mtime_ns) == (0o700, 5)
    assert not list(merged.rglob(".overlayctl-*"))
    run("umount", "cc")


# --- what cannot be -----------------------------------------------------------------------------


def test_refusals_tell_what_to_do(run: Shell, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    f = str(tmp_path / "f")
    for words, status, said in (
        ((f, f), 2, "one of the two has to be in a container"),
        (("cc:/a", "cc:/b"), 2, "overlayctl cp cc:/a - | overlayctl cp - cc:/b"),
        ((f, "nobody:/x"), 3, "no container 'nobody'"),
        (("cc:/no", f), 3, "has no '/no'"),
        (("cc:/no/no", f), 3, "no directory"),
        (("cc:/etc", f), 4, "is no directory"),
        ((f, "cc:/etc/conf/"), 4, "is no directory"),
        ((f, "cc:"), 2, "empty"),
        ((f"{f}/", "cc:/x"), 1, "no directory"),
        ((str(tmp_path / "no"), "cc:/x"), 3, "does not exist"),
        (("cc:/etc/conf", str(tmp_path / "no/x")), 3, "mkdir -p"),
    ):
        done = run("cp", *words, ok=status)
        assert said in done.err
        assert "hint: " in done.err
    assert is_idle(run)


def test_a_path_of_the_host_with_a_colon(
    run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:b").write_text("colon")
    run("cp", "./a:b", "cc:/a:b")
    run("cp", "cc:/a:b", f"{tmp_path}/c:d")
    assert Path("c:d").read_text() == "colon"
    assert "no container 'a'" in run("cp", "a:b", "x", ok=3).err
    odd = os.fsdecode(b"\xff\n")
    Path(odd).write_text("odd")
    run("cp", odd, f"cc:/{odd}")
    run("cp", f"cc:/{odd}", "got")
    assert Path("got").read_text() == "odd"


def test_a_socket_is_told(run: Shell, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "tree/s\n"))
    done = run("cp", tmp_path / "tree", "cc:/new")
    assert done.err == "note: s\\x0a: a socket, left out\n"


def test_a_full_disk_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(24 << 20))
    with filesystems.mounted("ext4", tmp_path, size=64 << 20) as disk:
        run = Shell(str(disk / "store"))
        run("load", docker_archive(tmp_path / "a.tar", [LAYER]))
        run("create", "--name", "cc", "demo")
        (tmp_path / "f").write_text("before")
        run("cp", tmp_path / "f", "cc:/big")
        with (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(disk).f_bavail * 4096 - (20 << 20))
        told = run("cp", tmp_path / "big", "cc:/big", ok=1, sound=False).err
        assert "disk is full" in told
        assert "hint: " in told
        assert is_idle(run)
        run("cp", "cc:/.", tmp_path / "out")
        assert (tmp_path / "out/big").read_text() == "before"
        assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]
        with standard_input(tar(entry("big", data=(tmp_path / "big").read_bytes()))):
            assert "disk is full" in run("cp", "-", "cc:/", ok=1, sound=False).err
        (disk / "filler").unlink()
        run("cp", tmp_path / "big", "cc:/big")
        run("system", "reset", "-f")


def test_a_full_disk_of_the_host(run: Shell, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(1 << 20))
    run("cp", tmp_path / "big", "cc:/")
    with filesystems.mounted("tmpfs", tmp_path, size=64 << 10) as small:
        (small / "big").write_text("before")
        told = run("cp", "cc:/big", small, ok=1).err
        assert "No space left" in told
        assert "store" not in told
        assert os.listdir(small) == ["big"]
        assert (small / "big").read_text() == "before"


def test_a_store_that_is_read_only(tmp_path: Path) -> None:
    with filesystems.mounted("ext4", tmp_path) as disk:
        run = Shell(str(disk / "store"))
        run("load", docker_archive(tmp_path / "a.tar", [LAYER]))
        run("create", "--name", "cc", "demo")
        run("layer", "detach", "--all")
        filesystems.remount(disk, "ro")
        run("cp", "cc:/etc/conf", tmp_path / "conf")
        assert (tmp_path / "conf").read_text() == "one"
        assert "read-only" in run("cp", tmp_path / "conf", "cc:/x", ok=5).err
        filesystems.remount(disk, "rw")
        run("system", "reset", "-f")


@pytest.mark.parametrize("data", [b"garbage" * 1000, tar(entry("x", data=b"x" * 9000))[:3000]])
def test_what_is_no_tar_changes_nothing(run: Shell, data: bytes) -> None:
    with standard_input(data):
        run("cp", "-", "cc:/dir", ok=1)
    assert run("diff", "cc").out == ""
    with standard_input(tar(entry("x"))):
        assert "is no directory" in run("cp", "-", "cc:/etc/conf", ok=3).err


# --- volumes ------------------------------------------------------------------------------------


def test_volumes_are_where_the_container_has_them(run: Shell, tmp_path: Path) -> None:
    host = tmp_path / "bind"
    host.mkdir()
    (host / "there").write_text("there")
    options = ("-v", "data:/dir/data", "-v", f"{host}:/bind", "-v", f"{host}:/ro:ro")
    run("create", "--name", "vv", *options, "--tmpfs", "/etc/mem", "demo")
    (tmp_path / "f").write_text("f")
    run("cp", tmp_path / "f", "vv:/dir/data/f")
    run("cp", tmp_path / "f", "vv:/bind")
    volume = json.loads(run("volume", "inspect", "data").out)[0]["Mountpoint"]
    assert Path(volume, "f").read_text() == "f"
    assert (host / "f").read_text() == "f"
    assert "read-only" in run("cp", tmp_path / "f", "vv:/ro/x", ok=4).err
    run("cp", "vv:/ro/there", tmp_path / "got")
    run("cp", "vv:/dir", tmp_path / "dir")
    assert sorted(os.listdir(tmp_path / "dir")) == ["data", "file"]
    assert (tmp_path / "dir/data/f").read_text() == "f"
    with standard_input(tar(entry("data/by tar", data=b"t"))):
        run("cp", "-", "vv:/dir")
    assert Path(volume, "by tar").read_text() == "t"
    with tarfile.open(fileobj=io.BytesIO(os.fsencode(run("cp", "vv:/dir", "-").out))) as archive:
        names = ["dir", "dir/file", "dir/data", "dir/data/by tar", "dir/data/f"]
        assert archive.getnames() == names
    # None of it is in the container's own tree.
    assert "/bind/" not in run("diff", "vv").out
    with tarfile.open(fileobj=io.BytesIO(os.fsencode(run("export", "vv").out))) as archive:
        assert not [name for name in archive.getnames() if name.endswith(("/f", "by tar"))]


def test_a_root_that_is_read_only(run: Shell, tmp_path: Path) -> None:
    run("create", "--name", "ro", "--read-only", "-v", "data:/dir/data", "demo")
    (tmp_path / "f").write_text("f")
    assert "is read-only" in run("cp", tmp_path / "f", "ro:/f", ok=4).err
    run("cp", tmp_path / "f", "ro:/dir/data/")
    assert run("diff", "ro").out.count("f\n") == 0

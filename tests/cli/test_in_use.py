"""One upper, one overlay; one lock, one holder: the second comer is refused and told by whom."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlayctl.cli import main
from overlayctl.engine import Engine
from overlayctl.errors import InUse, NotFound
from overlayctl.kernel import mounter, mounttable
from overlayctl.layer import attach
from overlayctl.mount import Overlay
from overlayctl.store import snapshots
from tests import filesystems, kernel_has
from tests.archives import docker_archive
from tests.cli.conftest import Shell, reset
from tests.layer.tars import directory, entry, tar
from tests.store.stores import Silent

LAYER = tar(
    directory("./"),
    *(entry(name, data=b"low") for name in ("changed", "gone", "moved")),
    directory("dir"),
    directory("emptied"),
    entry("emptied/file"),
)


@pytest.fixture
def cc(run: Shell, tmp_path: Path) -> str:
    """The id of a container named so."""
    archive = str(docker_archive(tmp_path / "a.tar", [LAYER]))
    engine = Engine.open(run.store, create=True)
    engine.load(archive, tag=None, platform=None, progress=Silent())
    return engine.create("demo", name="cc").id


def works(merged: Path) -> None:
    """Everything for which an overlay needs its work directory, and what must come of it."""
    (merged / "new").write_text("new")
    with (merged / "changed").open("a") as file:
        file.write("er")
    (merged / "gone").unlink()
    (merged / "moved").rename(merged / "there")
    (merged / "dir").rmdir()
    (merged / "dir").mkdir()
    (merged / "emptied/file").unlink()
    (merged / "emptied").rmdir()
    assert sorted(path.name for path in merged.iterdir()) == ["changed", "dir", "new", "there"]
    assert (merged / "changed").read_text() + (merged / "there").read_text() == "lowerlow"


def vanish(store: str) -> None:
    """Unmount what a reboot would."""
    for mount in reversed(mounttable.below(os.path.join(store, "attached"))):
        mounter.unmount(mount.mount_point)


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has said a line, and ends when the block does."""
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline()
        yield child
    finally:
        child.communicate(timeout=20)


def elsewhere(script: str, *arguments: str) -> tuple[str, ...]:
    """The command of a shell in a mount namespace of its own, which then waits for its end."""
    return (
        *("unshare", "-m", "--propagation", "private", "sh", "-ec"),
        f"{script} >&2; echo done; read line || true",
        *arguments,
    )


def options(run: Shell, cc: str, tmp_path: Path) -> str:
    """What mount(8) takes for another overlay on the container's upper."""
    (tmp_path / "work").mkdir()
    (tmp_path / "hand").mkdir()
    # On the store's filesystem, as a work directory must be.
    work = Path(run.store, "work-by-hand")
    work.mkdir()
    lower = run.path("layer", "path", "demo:1")
    return f"lowerdir={lower},upperdir={Path(run.store, 'snapshots', cc, 'upper')},workdir={work}"


# --- the second mount of one upper -----------------------------------------------------------


def test_a_second_mount_here_is_the_first(run: Shell, cc: str) -> None:
    merged = run.path("mount", "cc")
    assert run.path("mount", "cc") == merged
    assert [m.mount_point for m in mounttable.read()].count(str(merged)) == 1
    works(merged)
    run("umount", "cc")


def test_a_second_overlay_here_is_refused(run: Shell, cc: str, tmp_path: Path) -> None:
    merged = run.path("mount", "cc")
    layout = Engine.open(run.store).layout
    lowers = [attach.lower(layout, name) for name in snapshots.get(layout, cc).layers]
    upper = layout.snapshot(cc, "upper")
    (tmp_path / "second").mkdir()
    work = Path(run.store, "snapshots", cc, "work.7")
    work.mkdir()
    # What was given to mount(2) is a number in the mount table.
    unseen = kernel_has.rung() == "mount"
    named = "an overlay that cannot be seen from here" if unseen else f"at {merged} "
    with pytest.raises(InUse, match=named):
        mounter.mount(Overlay("second", tuple(lowers), upper, str(work)), str(tmp_path / "second"))
    assert not os.path.ismount(tmp_path / "second")
    works(merged)
    run("umount", "cc")


@pytest.mark.parametrize("inherited", [True, False])
def test_a_mount_in_another_namespace_is_named(run: Shell, cc: str, *, inherited: bool) -> None:
    # Inherited or made there, attached/ is one tmpfs for both or not.
    if not inherited:
        vanish(run.store)
    mount = f"{sys.executable} -m overlayctl --root {run.store} mount cc"
    with process(*elsewhere(mount)) as other:
        merged = Path(run.store, "attached", "merged", cc)
        assert not os.path.ismount(merged)
        named = f"{merged} in the mount namespace of process {other.pid}"
        assert named in run("mount", "cc", ok=4, sound=False).err
        assert named in run("rm", "-f", "cc", ok=4, sound=False).err
        works(Path(f"/proc/{other.pid}/root{merged}"))
    assert (run.path("mount", "cc") / "new").read_text() == "new"
    run("umount", "cc")


@pytest.mark.parametrize("here", [True, False])
def test_a_mount_made_by_hand_is_named(run: Shell, cc: str, tmp_path: Path, *, here: bool) -> None:
    hand = tmp_path / "hand"
    command = ["mount", "-t", "overlay", "-o", options(run, cc, tmp_path), "hand", str(hand)]
    if here:
        subprocess.run(command, check=True)
        try:
            refused = run("mount", "cc", ok=4, sound=False).err
            assert f"at {hand} (seen by process " in refused
            works(hand)
        finally:
            mounter.unmount(str(hand))
    else:
        with process(*elsewhere('"$@"', "sh", *command)) as other:
            refused = run("mount", "cc", ok=4, sound=False).err
            assert f"at {hand} (seen by process {other.pid})" in refused
            assert "in use" in run("rm", "cc", ok=4, sound=False).err
            works(Path(f"/proc/{other.pid}/root{hand}"))
    assert (run.path("mount", "cc") / "new").read_text() == "new"
    run("umount", "cc")


def test_a_mount_unmounted_lazily_still_counts(run: Shell, cc: str) -> None:
    merged = run.path("mount", "cc")
    with (merged / "open").open("w") as file:
        inside = os.open(merged, os.O_RDONLY | os.O_DIRECTORY)
        try:
            subprocess.run(["umount", "-l", merged], check=True)
            assert "an overlay that cannot be seen from here" in run("mount", "cc", ok=4).err
            file.write("kept")
            # The mount has no path any more, but for this one.
            os.unlink("open", dir_fd=inside)
            works(Path(f"/proc/self/fd/{inside}"))
        finally:
            os.close(inside)
    assert (run.path("mount", "cc") / "new").read_text() == "new"
    run("umount", "cc")


def kernel_log(fd: int) -> list[str]:
    """Warnings and errors since the last look, of what mounting is made of."""
    found: list[str] = []
    while True:
        try:
            head, _, text = os.read(fd, 8192).decode(errors="replace").partition(";")
        except BlockingIOError:
            return found
        # The first number is the facility times 8, plus the level: 0 to 4 are no small talk.
        named = any(word in text for word in ("overlay", "erofs", "loop", "tmpfs", "EXT4"))
        if int(head.split(",")[0]) <= 4 and named:
            found.append(text.partition("\n")[0])


def said_in_ordinary_use(store: str, archive: Path, log: int) -> list[str]:
    """What the kernel says while all is used once; run in this process, to look only shortly."""
    kernel_log(log)

    def run(*arguments: str | Path) -> None:
        assert main(["--root", store, *map(str, arguments)]) == 0

    run("load", archive)
    run("image", "mount", "demo")
    run("create", "--name", "cc", "demo")
    run("mount", "cc")
    ((name, view),) = Engine.open(store)._views().items()
    works(Path(view.target))
    run("export", "-o", "/dev/null", "cc")
    run("umount", name)
    run("export", "-o", "/dev/null", "cc")
    run("mount", "cc")
    assert Path(view.target, "new").read_text() == "new"
    run("umount", "cc")
    run("umount", "demo")
    said = kernel_log(log)
    # To remove an upper the kernel is asked who has it, which leaves a line.
    run("rm", "cc")
    run("rmi", "demo")
    return said


def test_ordinary_use_leaves_no_warning_in_the_kernel_log(store: str, tmp_path: Path) -> None:
    archive = docker_archive(tmp_path / "a.tar", [LAYER])
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.lseek(fd, 0, os.SEEK_END)
        # The log is the whole machine's, and its lines name no path. What we cause comes always.
        deadline = time.monotonic() + 30
        while said := said_in_ordinary_use(store, archive, fd):
            assert time.monotonic() < deadline, said
        # What would have been found: that a second overlay is mounted on one upper.
        work = os.path.join(store, "work")
        upper = os.path.join(store, "upper")
        for path in (work, upper, tmp_path / "one", tmp_path / "two"):
            os.mkdir(path)
        options = f"lowerdir={tmp_path},upperdir={upper},workdir={work}"
        for place in ("one", "two"):
            hand = ["mount", "-t", "overlay", "-o", options, "hand", str(tmp_path / place)]
            subprocess.run(hand, check=True)
        assert any("in-use" in line for line in kernel_log(fd))
        for place in ("one", "two"):
            mounter.unmount(str(tmp_path / place))
    finally:
        os.close(fd)


# --- locks -----------------------------------------------------------------------------------

HOLDER = """
import sys
from overlayctl.cli import main
from overlayctl.engine import Engine
store = Engine.open(sys.argv[1]).store
key = sys.argv[3:]
with getattr(store, sys.argv[2])(*key):
    print(flush=True)
    sys.stdin.read()
"""


def holding(run: Shell, lock: str, *key: str) -> tuple[str, ...]:
    """The command of a process that holds a lock of the store."""
    return (sys.executable, "-c", HOLDER, run.store, lock, *key)


@pytest.mark.parametrize("kind", ["ext4", "btrfs", "tmpfs"])
def test_who_has_a_lock_is_named(tmp_path: Path, kind: str) -> None:
    with filesystems.mounted(kind, tmp_path) as disk:
        run = Shell(str(disk / "store"))
        try:
            run("load", docker_archive(tmp_path / "a.tar", [LAYER]), sound=False)
            key = run("create", "--name", "cc", "demo", sound=False).out.strip()
            with process(*holding(run, "locked")) as other:
                for command in (["tag", "demo", "other"], ["mount", "demo"], ["rm", "cc"]):
                    err = run("--lock-timeout", "0.1", *command, ok=7, sound=False).err
                    assert f"{run.store} is locked by process {other.pid} (python" in err
            with process(*holding(run, "holding", key)) as other:
                for command in (["mount", "cc"], ["rm", "cc"]):
                    err = run("--lock-timeout", "0.1", *command, ok=7, sound=False).err
                    assert f"snapshots/{key} is locked by process {other.pid} (python" in err
                # It concerns nobody else.
                run("--lock-timeout", "0.1", "tag", "demo", "other", sound=False)
        finally:
            reset(run.store)


def test_a_holder_that_cannot_be_seen_is_told_as_such(run: Shell, cc: str) -> None:
    with process(*holding(run, "locked")):
        done = subprocess.run(
            [
                *("unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "overlayctl"),
                *("--root", run.store, "--lock-timeout", "0.1", "tag", "demo", "other"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 7
    assert f"{run.store} is locked by a process not visible here" in done.stderr


def test_a_lock_that_is_let_go_in_time_is_waited_for(run: Shell, cc: str) -> None:
    with process(*holding(run, "locked")) as other:
        waiting = subprocess.Popen(
            [sys.executable, "-m", "overlayctl", "--root", run.store, "tag", "demo", "other"]
        )
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.8)
        other.communicate(timeout=20)
        assert waiting.wait(20) == 0
    run("image", "inspect", "other")


def test_a_container_with_a_process_in_it_is_in_use(run: Shell, cc: str) -> None:
    merged = run.path("mount", "cc")
    with process(*holding(run, "running", cc)) as one, process(*holding(run, "running", cc)):
        for command in (["umount", "cc"], ["rm", "-f", "cc"], ["system", "reset", "-f"]):
            err = run(*command, ok=4).err
            assert "in use by process " in err
            assert f"process {one.pid} (python" in err
            assert f"kill {one.pid}" in err
        assert os.path.ismount(merged)
        # Whoever may run in it may mount it, too.
        assert run.path("mount", "cc") == merged
        run("umount", "--lazy", "cc")
        run("rm", "cc", ok=4)
    run("rm", "cc")
    with pytest.raises(NotFound), Engine.open(run.store).store.running(cc):
        pass


def test_long_readers_keep_out_only_who_changes(run: Shell, cc: str) -> None:
    store = Engine.open(run.store, lock_timeout=0.1).store
    with store.holding(cc, exclusive=False), store.holding(cc, exclusive=False):
        run("--lock-timeout", "0.1", "mount", "cc", ok=7)
        with store.running(cc):
            run("images")
    run("mount", "cc")
    run("umount", "cc")


def test_a_container_whose_upper_was_deleted_can_be_removed(run: Shell, cc: str) -> None:
    Path(run.store, "snapshots", cc, "upper").rmdir()
    assert "its upper directory is gone" in run.findings()
    run("rm", "cc")

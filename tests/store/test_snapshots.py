"""Snapshots and attaching, on real mounts."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from overlayctl.errors import BadInput, Damaged
from overlayctl.kernel import libc, mounter, mounttable
from overlayctl.kernel.probe import Setting
from overlayctl.layer import attach
from overlayctl.layout import Layout
from overlayctl.mount import Erofs
from overlayctl.store import check, layers, snapshots
from tests.layer.tars import directory, entry, tar
from tests.store import stores

BELOW = tar(directory("etc"), entry("etc/hosts", data=b"below"), entry("old", data=b"old"))
ABOVE = tar(
    directory("./", mode=0o1751, uid=7, gid=8, mtime=1_000_000.25, xattrs={"user.a": "b"}),
    entry("etc/hosts", data=b"above"),
)
OPAQUE = tar(entry(".wh..wh..opq"), entry("new", data=b"new"))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return stores.new(os.path.join(tmp_path, os.fsdecode(b"st ore:,\n\\\xff")))


def test_the_upper_looks_like_the_merged_root(layout: Layout) -> None:
    names = stores.add_layers(layout, BELOW, ABOVE).names
    stores.add_snapshot(layout, names)
    upper = layout.snapshot(stores.KEY, "upper")
    seen = os.stat(upper)
    assert (stat.S_IMODE(seen.st_mode), seen.st_uid, seen.st_gid) == (0o1751, 7, 8)
    assert seen.st_mtime_ns == 1_000_000_250_000_000
    assert {name: os.getxattr(upper, name) for name in os.listxattr(upper)} == {"user.a": b"b"}
    assert snapshots.get(layout, stores.KEY).layers == names
    assert snapshots.listed(layout) == [stores.KEY]
    assert os.stat(layout.snapshot(stores.KEY, "keep")).st_size == 0


def test_an_upper_without_layers_does_not_depend_on_the_umask(layout: Layout) -> None:
    before = os.umask(0o077)
    try:
        stores.add_snapshot(layout, [])
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(layout.snapshot(stores.KEY, "upper")).st_mode) == 0o755


def test_lowers_are_topmost_first_once_and_end_at_an_opaque_root(layout: Layout) -> None:
    below, above, opaque = stores.add_layers(layout, BELOW, ABOVE, OPAQUE).names
    assert snapshots.lowers(layout, [below, above]) == [above, below]
    assert snapshots.lowers(layout, [below, above, below]) == [below, above]
    assert snapshots.lowers(layout, [below, opaque, above]) == [above, opaque]
    view = snapshots.view(layout, "overlayctl:x:image:y", [below])
    paths = tuple(lower.path for lower in view.lowers)
    assert paths == (layout.diff(below), layout.diff(attach.EMPTY))
    assert (view.upperdir, view.workdir) == ("", "")
    with pytest.raises(BadInput):
        snapshots.view(layout, "overlayctl:x:image:y", [])


def test_every_mount_gets_a_work_directory_of_its_own(layout: Layout) -> None:
    names = stores.add_layers(layout, BELOW).names
    stores.add_snapshot(layout, names)
    for number in (1, 2):
        overlay = snapshots.mounts(layout, "s", stores.KEY, volatile=False, xino=False)
        assert overlay.workdir == layout.snapshot(stores.KEY, f"work.{number}")
        assert overlay.upperdir == layout.snapshot(stores.KEY, "upper")
    assert snapshots.work_directories(layout, stores.KEY) == ["work.1", "work.2"]


def test_a_snapshot_mounted_and_written(layout: Layout, tmp_path: Path) -> None:
    names = stores.add_layers(layout, BELOW, ABOVE).names
    stores.add_snapshot(layout, names)
    merged = tmp_path / "merged"
    merged.mkdir()
    with stores.attached(layout, names):
        mounter.mount(
            snapshots.mounts(layout, "overlayctl:x:container:y", stores.KEY,
                             volatile=False, xino=False),
            str(merged),
        )  # fmt: skip
        try:
            assert (merged / "etc/hosts").read_text() == "above"
            with open(merged / "old", "a") as file:
                file.write("er")
            os.link(merged / "old", merged / "older")
            (merged / "etc/hosts").unlink()
        finally:
            mounter.unmount(str(merged))
        with layers.open_index(layout, names[0]) as index:
            node = index.lookup(b"old")
            assert node is not None
            assert index.read(node, 0, 100) == b"old"
    upper = Path(layout.snapshot(stores.KEY, "upper"))
    assert (upper / "old").read_text() == "older"
    gone = os.lstat(upper / "etc/hosts")
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    # etc, its whiteout, and the one file with two names.
    assert snapshots.usage(layout, stores.KEY).inodes == 3
    snapshots.remove(layout, stores.KEY)
    assert not os.path.exists(layout.snapshot(stores.KEY))


@pytest.mark.parametrize("mode", ["auto", "buffered", "loop"])
def test_attached_once_and_gone_after(layout: Layout, mode: Setting) -> None:
    names = stores.add_layers(layout, BELOW, ABOVE).names
    assert not os.path.exists(layout.diff(names[0]))
    with stores.attached(layout, ()):
        for _ in range(2):
            attach.attach(layout, "test", names, mode)
        assert attach.attached(layout) == sorted(names)
        places = [mount.mount_point for mount in mounttable.read()]
        for name in names:
            assert places.count(layout.diff(name)) == 1
            mount = mounttable.at(layout.diff(name))
            assert mount is not None
            assert {"ro", "nosuid", "nodev", "noexec"} <= set(mount.options.split(","))
        assert Path(layout.diff(names[0]), "etc/hosts").read_text() == "below"
        assert attach.detach(layout, names[0])
        assert not attach.detach(layout, names[0])
        assert not os.path.exists(layout.diff(names[0]))


@pytest.mark.parametrize("mode", ["buffered", "loop"])
@pytest.mark.parametrize("uuid", [True, False])
def test_a_diff_path_that_shows_something_else_is_refused(
    layout: Layout, mode: Setting, *, uuid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = stores.add_layers(layout, BELOW, ABOVE).names
    if not uuid:
        # What a kernel before 6.9 answers; the mounts stay real.
        monkeypatch.setattr(libc, "fs_uuid", lambda _: None)
    with stores.attached(layout, ()):
        attach.attach(layout, "test", names, mode)
        assert attach.is_attached(layout, names[0])
        attach.detach(layout, names[0])
        os.makedirs(layout.diff(names[0]))
        assert not attach.is_attached(layout, names[0])
        attach.attach(layout, "test", names[:1], mode)
        attach.detach(layout, names[0])
        other = shutil.copy(layout.layer_file(names[1]), layout.path("ingest", "other"))
        os.makedirs(layout.diff(names[0]))
        mounter.mount(Erofs(other, loop=mode == "loop"), layout.diff(names[0]))
        with pytest.raises(Damaged):
            attach.attach(layout, "test", names, mode)


def test_a_removed_layer_is_detached(layout: Layout) -> None:
    (name,) = stores.add_layers(layout, BELOW).names
    with stores.attached(layout, [name]):
        assert layers.stat(layout, name).disk > 0
        assert layers.remove(layout, name) > 0
        assert attach.attached(layout) == []
        assert layers.listed(layout) == []


def test_a_volatile_mount_is_noted_until_what_it_wrote_is_synced(layout: Layout) -> None:
    names = stores.add_layers(layout, BELOW).names
    stores.add_snapshot(layout, names)
    note = Path(layout.snapshot(stores.KEY, "volatile"))
    snapshots.mounts(layout, "s", stores.KEY, volatile=True, xino=False)
    assert note.read_text().strip() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert not snapshots.lost_writes(layout, stores.KEY)
    snapshots.mounts(layout, "s", stores.KEY, volatile=False, xino=False)
    assert note.exists()
    snapshots.forget_volatile(layout, stores.KEY)
    assert not note.exists()


def test_a_host_that_stopped_after_a_volatile_mount_is_told_of(layout: Layout) -> None:
    names = stores.add_layers(layout, BELOW).names
    stores.add_snapshot(layout, names)
    note = Path(layout.snapshot(stores.KEY, "volatile"))
    note.write_text("00000000-another-boot\n")
    for volatile in (True, False):
        snapshots.mounts(layout, "s", stores.KEY, volatile=volatile, xino=False)
        snapshots.forget_volatile(layout, stores.KEY)
        assert snapshots.lost_writes(layout, stores.KEY)
    assert "snapshot-volatile" in {found.tag for found in check.check(layout)}

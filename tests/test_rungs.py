"""Every way to attach and to mount, on every filesystem: one and the same tree, or a named no."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest

from overlayctl.engine import Engine
from overlayctl.errors import HostCannot
from overlayctl.kernel import mounttable, probe
from overlayctl.kernel.probe import Setting, Way
from overlayctl.mount import Rung
from tests import filesystems, kernel_has
from tests.layer.tars import directory, entry, symlink, tar
from tests.oracles import trees
from tests.store import stores

WAYS: tuple[Way, ...] = get_args(Way)
RUNGS: tuple[Rung, ...] = ("fds", "strings", "mount")
Tree = dict[bytes, trees.Entry]


def layer(number: int) -> bytes:
    """Layer ``number`` from 1: a file of its own, a file that it replaces, one that it removes."""
    entries = [
        directory("./", mtime=1),
        directory("d", mtime=2),
        entry(f"d/{number:03}", data=b"%d" % number, mtime=3),
        entry("top", data=b"%d" % number, mode=0o640, uid=number, xattrs={"user.n": str(number)}),
    ]
    if number % 7 == 0:
        entries += [entry(f"d/.wh.{number - 1:03}"), symlink(f"l{number}", f"d/{number:03}")]
    if number % 50 == 2:
        entries += [directory("o"), entry("o/.wh..wh..opq"), entry(f"o/{number}", mtime=4)]
    return tar(*entries)


def names(count: int) -> list[bytes]:
    """What an image of that many layers shows."""
    gone = {number - 1 for number in range(7, count + 1, 7)}
    found = [b"", b"d", b"top"]
    found += [b"d/%03d" % n for n in range(1, count + 1) if n not in gone]
    found += [b"l%d" % n for n in range(7, count + 1, 7)]
    opaque = [n for n in range(2, count + 1) if n % 50 == 2]
    found += [b"o", b"o/%d" % opaque[-1]] if opaque else []
    return sorted(found)


def store(root: Path, *counts: int) -> str:
    """A store with an image ``n:<count>`` for each of the counts."""
    layout = stores.new(root)
    tars = [layer(number) for number in range(1, max(counts) + 1)]
    for count in counts:
        stores.add_image(layout, *tars[:count], tag=f"docker.io/library/n:{count}")
    return layout.root


def rungs() -> tuple[Rung, ...]:
    """Those that this kernel has: the first that it has, and all below."""
    return RUNGS[RUNGS.index(kernel_has.rung()) :]


def ways(empty: str) -> tuple[Way, ...]:
    """The ways to attach that this kernel has, on a filesystem that serves the file ``empty``."""
    return WAYS if kernel_has.erofs_from(empty) else ("loop", "unpacked")


def through_all_rungs(root: str, way: Setting, count: int) -> list[Tree]:
    """The merged trees by each rung: of the image, and of a container in which things changed."""
    found = []
    for rung in rungs():
        engine = Engine.open(root, attach=way, rung=rung)
        view = engine.mount_image(f"n:{count}")
        mount = mounttable.at(view)
        assert mount is not None
        assert mount.source.startswith(f"overlayctl:{engine.store.mark}:image:")
        found.append(trees.snapshot(view))
        engine.unmount_image(f"n:{count}")
        engine.create(f"n:{count}", name="cc")
        place = Path(engine.mount_container("cc", volatile=False, xino=False))
        (place / "top").write_text("changed")
        (place / "d" / f"{count:03}").unlink()
        os.utime(place / "top", (9, 9))
        os.utime(place / "d", (9, 9))
        found.append(trees.snapshot(place))
        engine.unmount_container("cc", lazy=False)
        engine.remove_container("cc", force=False, dry_run=False)
    return found


def all_equal(found: list[Tree], count: int) -> None:
    views, containers = found[::2], found[1::2]
    assert sorted(views[0]) == names(count)
    assert containers[0][b"top"] != views[0][b"top"]
    assert b"d/%03d" % count not in containers[0]
    for same in (views, containers):
        for other in same[1:]:
            assert trees.differences(same[0], other) == []


@contextmanager
def unmounted(root: str) -> Iterator[None]:
    """Nothing of the store stays mounted after the block."""
    try:
        yield
    finally:
        if mounttable.below(os.path.join(root, "attached")):
            subprocess.run(["umount", "--recursive", os.path.join(root, "attached")], check=True)


def test_every_way_and_rung_with_1_2_100_and_500_layers(tmp_path: Path) -> None:
    root = store(tmp_path / "store", 1, 2, 100, 500)
    found: dict[int, list[Tree]] = {count: [] for count in (1, 2, 100, 500)}
    here = ways(os.path.join(root, "empty.erofs"))
    with unmounted(root):
        for way in here:
            for count in found:
                found[count] += through_all_rungs(root, way, count)
            Engine.open(root).detach(None)
        assert Engine.open(root).check() == []
    for count, seen in found.items():
        assert len(seen) == len(here) * len(rungs()) * 2
        all_equal(seen, count)


@pytest.mark.parametrize("kind", ["ext4 4096", *filesystems.KINDS[1:], "tmpfs"])
def test_every_way_and_rung_on_every_filesystem(tmp_path: Path, kind: str) -> None:
    kind, _, sector = kind.partition(" ")
    with filesystems.mounted(kind, tmp_path, sector=int(sector or 512)) as disk:
        root = store(disk / "store", 9)
        works = probe.attach_ways(os.path.join(root, "empty.erofs"))
        found = []
        with unmounted(root):
            for way in WAYS:
                if way == "unpacked" and not kernel_has.user_xattrs(disk):
                    with pytest.raises(HostCannot, match="cannot hold 'top'"):
                        Engine.open(root, attach=way).mount_image("n:9")
                elif works[way] == probe.WORKS:
                    found += through_all_rungs(root, way, 9)
                else:
                    with pytest.raises(HostCannot, match=way):
                        Engine.open(root, attach=way).mount_image("n:9")
                Engine.open(root).detach(None)
            through_all_rungs(root, "auto", 9)
            assert Engine.open(root).check() == []
        all_equal(found, 9)
        assert {"loop", "unpacked"} <= {way for way in WAYS if works[way] == probe.WORKS}
        # A kernel that can do more than this one only makes more of the above.
        if kind == "tmpfs":
            assert "not from a file on this filesystem" in works["buffered"]
        if sector:
            assert "sectors" in works["directio"]
            assert (works["buffered"] == probe.WORKS) == kernel_has.erofs_from(
                root + "/empty.erofs"
            )


def test_a_store_on_an_overlay(tmp_path: Path) -> None:
    """As in a container without a volume: images can be seen, nothing can be written."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = ",".join(f"{n}dir={tmp_path / n}" for n in ("lower", "upper", "work"))
    merged = tmp_path / "merged"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True)
    root = store(merged / "store", 9)
    with unmounted(root):
        engine = Engine.open(root)
        view = engine.mount_image("n:9")
        assert sorted(trees.snapshot(view)) == names(9)
        mount = mounttable.at(engine.layer_path("n:9:1"))
        assert mount is not None
        assert mount.source.startswith("/dev/loop")
        with pytest.raises(HostCannot, match="lies on an overlay") as refused:
            engine.create("n:9", name="cc")
        assert "volume" in refused.value.hint
        assert os.listdir(os.path.join(root, "snapshots")) == []
        assert os.listdir(os.path.join(root, "ingest")) == []
        engine.unmount_image("n:9")
        engine.detach(None)
        # A whiteout is a device that overlayfs lets nobody make.
        with pytest.raises(HostCannot, match="006"):
            Engine.open(root, attach="unpacked").mount_image("n:9")
        assert os.listdir(os.path.join(root, "ingest")) == []
    subprocess.run(["umount", merged], check=True)

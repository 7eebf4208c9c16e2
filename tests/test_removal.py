"""Nothing that somebody needs goes: neither below a foreign overlay nor behind an unusual mount."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayctl.engine import Engine
from overlayctl.errors import InUse, NotFound
from overlayctl.kernel.probe import Setting
from overlayctl.store import snapshots
from tests.layer.tars import directory, entry, tar
from tests.store import stores

TAR = tar(directory("d"), entry("d/f", data=b"f"))
TAG = "docker.io/library/n:1"
pytestmark = pytest.mark.root


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The place of a store, of which nothing stays mounted."""
    yield tmp_path / "store"
    subprocess.run(["umount", "--recursive", tmp_path / "store" / "attached"], check=True)


def opened(root: Path, attach: Setting = "unpacked") -> Engine:
    layout = stores.new(root)
    stores.add_image(layout, TAR, tag=TAG)
    return Engine.open(layout.root, attach=attach)


@pytest.mark.parametrize("relative", [False, True])
def test_an_unpacked_layer_stays_below_a_foreign_overlay(
    tmp_path: Path, root: Path, *, relative: bool
) -> None:
    engine = opened(root)
    diff = Path(engine.layer_path("n:1:1"))
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    lower = os.path.relpath(diff, tmp_path) if relative else diff
    options = f"lowerdir={lower},upperdir=upper,workdir=work"
    subprocess.run(
        ["mount", "-t", "overlay", "o", "-o", options, "merged"], check=True, cwd=tmp_path
    )
    try:
        with pytest.raises(InUse, match="merged"):
            engine.remove_image("n:1", force=True, dry_run=False)
        (kept,) = engine.prune(everything=True, dry_run=False).kept
        assert "merged" in str(kept)
        assert (tmp_path / "merged" / "d" / "f").read_text() == "f"
        assert engine.image_exists("n:1")
    finally:
        subprocess.run(["umount", tmp_path / "merged"], check=True)
    engine.remove_image("n:1", force=False, dry_run=False)


def test_a_view_of_a_store_that_lay_here_before_is_not_this_ones(root: Path) -> None:
    engine = opened(root)
    engine.mount_image("n:1")
    subprocess.run(["rm", "-rf", root], check=False, stderr=subprocess.DEVNULL)
    engine = opened(root)
    engine.detach(None)
    assert os.listdir(engine.mount_image("n:1")) == ["d"]
    subprocess.run(["rm", "-rf", root], check=False, stderr=subprocess.DEVNULL)
    engine = opened(root)
    engine.remove_image("n:1", force=False, dry_run=False)
    assert engine.check() == []


def test_a_view_that_was_never_mounted_leaves_no_note(root: Path) -> None:
    engine = opened(root)
    with pytest.raises(NotFound):
        engine.mount_image("n:1", str(root / "none"))
    (image,) = (root / "images").iterdir()
    assert sorted(os.listdir(image)) == ["config.json", "image.json", "manifest.json"]


def test_a_volatile_mount_that_nobody_sees_stays_noted(root: Path) -> None:
    engine = opened(root, "auto")
    key = engine.create("n:1", name="cc").id
    note = Path(engine.layout.snapshot(key, "volatile"))
    merged = Path(engine.mount_container("cc", volatile=True, xino=False))
    with (merged / "open").open("w"):
        engine.unmount_container("cc", lazy=True)
        with pytest.raises(InUse):
            engine.mount_container("cc", volatile=False, xino=False)
        assert note.exists()
    engine.mount_container("cc", volatile=False, xino=False)
    assert not note.exists()
    engine.unmount_container("cc", lazy=False)
    assert not snapshots.lost_writes(engine.layout, key)


def test_an_acl_that_new_directories_inherit_reaches_nothing(tmp_path: Path) -> None:
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + mode.to_bytes(2, "little") + who.to_bytes(4, "little")
        for tag, mode, who in (
            (1, 7, 0xFFFFFFFF), (2, 7, 1234), (4, 5, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF),
            (32, 5, 0xFFFFFFFF),
        )
    )  # fmt: skip
    os.setxattr(tmp_path, "system.posix_acl_default", acl)
    engine = opened(tmp_path / "store")
    key = engine.create("n:1", name="cc").id
    merged = Path(engine.mount_container("cc", volatile=False, xino=False))
    try:
        for path in (merged, merged / "d", Path(engine.layout.snapshot(key))):
            assert [name for name in os.listxattr(path) if "acl" in name] == []
    finally:
        subprocess.run(["umount", "--recursive", tmp_path / "store" / "attached"], check=True)


def test_reset_takes_nothing_away_from_who_reads_it(root: Path) -> None:
    engine = opened(root, "auto")
    engine.create("n:1", name="cc")

    def write(_: bytes) -> None:
        with pytest.raises(InUse, match="container"):
            Engine.open(os.fspath(root)).reset(dry_run=False)

    assert engine.export_container("cc", write).size > 0
    assert engine.check() == []

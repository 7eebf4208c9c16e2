"""Trees are deleted and summed however deep they are, and nothing that is mounted below."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from overlayctl.errors import InUse
from overlayctl.kernel import inuse, mounter, rooted
from overlayctl.layout import Layout
from overlayctl.mount import Bind
from overlayctl.store import snapshots

DEPTH = 3000


def deep(top: Path) -> None:
    """Directories in one another; the path to the last is longer than any call takes."""
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(DEPTH):
        os.mkdir("deep", dir_fd=fd)
        below = os.open("deep", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("last", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)


def test_a_tree_of_any_depth_is_counted_and_deleted(tmp_path: Path) -> None:
    upper = tmp_path / "snapshots" / "k" / "upper"
    upper.mkdir(parents=True)
    deep(upper)
    try:
        assert snapshots.usage(Layout(os.fspath(tmp_path)), "k").inodes == DEPTH + 1
    finally:
        rooted.remove_tree(os.fspath(upper))
    assert not upper.exists()


def test_a_symlink_is_deleted_and_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").touch()
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(other)
    (tmp_path / "top").symlink_to(other)
    rooted.remove_tree(os.fspath(tree))
    with pytest.raises(NotADirectoryError):
        rooted.remove_tree(os.fspath(tmp_path / "top"))
    assert (other / "kept").exists()
    assert not tree.exists()


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        rooted.remove_tree(os.fspath(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        list(rooted.stats(os.fspath(tmp_path / "none")))
    rooted.remove_tree(os.fspath(tmp_path / "none"), ignore_errors=True)
    rooted.remove_tree(os.fspath(tmp_path / "none" / "below"), ignore_errors=True)


@pytest.mark.root
def test_a_deletion_stops_at_what_is_mounted(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").touch()
    tree = tmp_path / "tree"
    (tree / "a" / "mounted").mkdir(parents=True)
    (tree / "b").mkdir()
    mounter.mount(Bind(os.fspath(tmp_path / "other")), os.fspath(tree / "a" / "mounted"))
    try:
        with pytest.raises(OSError, match="mounted") as caught:
            rooted.remove_tree(os.fspath(tree))
        assert caught.value.errno == errno.EBUSY
        rooted.remove_tree(os.fspath(tree), ignore_errors=True)
        with pytest.raises(InUse, match="mounted"):
            inuse.refuse_mounts(os.fspath(tree))
        inuse.refuse_mounts(os.fspath(tree), but=os.fspath(tree / "a"))
    finally:
        mounter.unmount(os.fspath(tree / "a" / "mounted"))
    assert (tmp_path / "other" / "kept").exists()
    assert [path.name for path in tree.rglob("*")] == ["a", "mounted"]

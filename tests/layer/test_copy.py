"""Trees copied through descriptors: compared, raced, and in the way of what is there."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlayctl.errors import Conflict
from overlayctl.layer import copy
from overlayctl.layer.copy import Copied, copy_tree
from tests import filesystems
from tests.layer.test_tar_writer import ACL, CAPABILITY
from tests.oracles import command, trees

# Where xfs keeps ACLs, listed to root beside the ACLs themselves.
OF_XFS = (b"trusted.SGI_ACL_FILE", b"trusted.SGI_ACL_DEFAULT")
LONG = b"n" * 255
ODD = [b"new\nline", b"\xff\xfe", b" ", b"-rf", b"a:b", b"\x1b[31m", LONG]


def copied(
    source: Path, target: Path, name: bytes = b".", renamed: bytes = b".",
    owner: tuple[int, int] | None = None,
) -> Copied:  # fmt: skip
    fds = [os.open(place, os.O_RDONLY | os.O_DIRECTORY) for place in (source, target)]
    try:
        return copy_tree(fds[0], name, fds[1], renamed, owner=owner)
    finally:
        for fd in fds:
            os.close(fd)


def every_kind(tree: Path) -> None:
    """Make one of everything that a tree can hold."""
    tree.mkdir()
    (tree / "file").write_bytes(b"content" * 1000)
    os.setxattr(tree / "file", "user.note", b"\0bytes")
    os.setxattr(tree / "file", "trusted.mark", b"")
    os.setxattr(tree / "file", "security.capability", CAPABILITY)
    os.setxattr(tree / "file", "system.posix_acl_access", ACL)
    (tree / "setuid").write_bytes(b"x")
    os.chown(tree / "setuid", 5, 6)
    os.chmod(tree / "setuid", 0o6711)
    os.link(tree / "file", tree / "link")
    (tree / "empty").touch(0o000)
    (tree / "deep/er").mkdir(parents=True)
    os.link(tree / "file", tree / "deep/er/link")
    os.setxattr(tree / "deep", "system.posix_acl_default", ACL)
    os.setxattr(tree / "deep", "system.posix_acl_access", ACL)
    (tree / "deep/plain").write_bytes(b"made before the ACL would be inherited")
    os.removexattr(tree / "deep/plain", "system.posix_acl_access")
    os.chmod(tree / "deep/er", 0o3755)
    os.symlink("/etc/passwd", tree / "absolute")
    os.symlink(b"\xff" * 200, tree / "dangling")
    os.lchown(tree / "dangling", 7, 8)
    os.setxattr(tree / "dangling", "trusted.on", b"link", follow_symlinks=False)
    os.mknod(tree / "char", stat.S_IFCHR | 0o620, os.makedev(4, 300))
    os.mknod(tree / "block", stat.S_IFBLK | 0o660, os.makedev(300, 70_000))
    os.mkfifo(tree / "fifo", 0o604)
    os.link(tree / "fifo", tree / "fifo too")
    os.link(tree / "dangling", tree / "dangling too", follow_symlinks=False)
    with (tree / "holes").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"middle")
        file.truncate(40 << 20)
    with (tree / "all hole").open("wb") as file:
        file.truncate(64 << 20)
    for name in ODD:
        Path(os.fsdecode(os.fsencode(tree) + b"/" + name)).write_bytes(name)
    for path in sorted(tree.rglob("*"), reverse=True):
        os.utime(path, ns=(0, 1_500_000_000_000_000_000 + len(str(path))), follow_symlinks=False)
    os.chmod(tree, 0o710)
    os.utime(tree, ns=(0, -1_000_000_001))


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("across", [False, True])
def test_everything_is_copied_as_it_is(tmp_path: Path, kind: str, across: bool) -> None:  # noqa: FBT001
    with filesystems.mounted(kind, tmp_path) as disk:
        tree = (tmp_path if across else disk) / "tree"
        every_kind(tree)
        before = trees.snapshot(tree)
        (disk / "to").mkdir()
        done = copied(tree.parent, disk / "to", b"tree", b"new")
        found = trees.snapshot(disk / "to/new")
        assert trees.differences(before, found, ignore_xattrs=OF_XFS) == []
        assert (done.entries, done.notes) == (len(before), {})
        assert done.size < 1 << 20
        assert (disk / "to/new/holes").stat().st_blocks <= (tree / "holes").stat().st_blocks + 8
        assert (disk / "to/new/all hole").stat().st_blocks == 0
        assert os.listdir(disk / "to") == ["new"]
        # Once more over what is there: the same again, and nothing left beside it.
        assert copied(tree.parent, disk / "to", b"tree", b"new") == done
        again = trees.snapshot(disk / "to/new")
        assert trees.differences(before, again, ignore_xattrs=OF_XFS) == []


def test_a_directory_itself_keeps_its_attributes(tmp_path: Path) -> None:
    every_kind(tmp_path / "tree")
    (tmp_path / "to").mkdir(0o701)
    copied(tmp_path / "tree", tmp_path / "to")
    before, found = trees.snapshot(tmp_path / "tree"), trees.snapshot(tmp_path / "to")
    assert found[b""].mode == 0o701
    assert trees.differences(before, found, ignore_paths=[b""]) == []


def test_what_all_belongs_to_another(tmp_path: Path) -> None:
    every_kind(tmp_path / "tree")
    (tmp_path / "to").mkdir()
    copied(tmp_path, tmp_path / "to", b"tree", b"new", owner=(11, 12))
    before, found = trees.snapshot(tmp_path / "tree"), trees.snapshot(tmp_path / "to/new")
    assert {(one.uid, one.gid) for one in found.values()} == {(11, 12)}
    # A file that ran as user 5 does not run as user 11; a directory is no program.
    assert (before[b"setuid"].mode, found[b"setuid"].mode) == (0o6711, 0o711)
    assert found[b"deep/er"].mode == 0o3755
    assert found[b"file"].xattrs == before[b"file"].xattrs


def test_what_is_inherited_is_taken_away(tmp_path: Path) -> None:
    """A default ACL and a setgid bit above give a new entry what it had not."""
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/file").touch(0o640)
    (tmp_path / "to").mkdir()
    os.chown(tmp_path / "to", 0, 99)
    os.chmod(tmp_path / "to", 0o2755)
    os.setxattr(tmp_path / "to", "system.posix_acl_default", ACL)
    copied(tmp_path, tmp_path / "to", b"tree", b"new")
    before, found = trees.snapshot(tmp_path / "tree"), trees.snapshot(tmp_path / "to/new")
    assert trees.differences(before, found) == []


def test_what_is_there_is_merged_and_replaced(tmp_path: Path) -> None:
    every_kind(tmp_path / "tree")
    new = tmp_path / "to/new"
    new.mkdir(parents=True)
    (new / "stays").write_text("stays")
    (tmp_path / "outside").write_text("outside")
    for name in ("file", "fifo", "dangling"):
        (new / name).symlink_to(tmp_path / "outside")
    os.mkfifo(new / "setuid")
    os.link(tmp_path / "outside", new / "empty")
    copied(tmp_path, tmp_path / "to", b"tree", b"new")
    assert (tmp_path / "outside").read_text() == "outside"
    assert (tmp_path / "outside").stat().st_nlink == 1
    before, found = trees.snapshot(tmp_path / "tree"), trees.snapshot(new)
    assert trees.differences(before, found, ignore_paths=[b"stays"]) == []
    assert (new / "stays").read_text() == "stays"


@pytest.mark.parametrize(
    ("source", "there"),
    [
        (Path.mkdir, Path.touch),
        (Path.touch, Path.mkdir),
        (Path.mkdir, lambda path: path.symlink_to("/etc")),
        (lambda path: path.symlink_to("/etc"), Path.mkdir),
        (os.mkfifo, Path.mkdir),
    ],
)
def test_a_directory_and_what_is_none_do_not_replace_each_other(
    tmp_path: Path, source: Callable[[Path], None], there: Callable[[Path], None]
) -> None:
    for name, make in (("a", source), ("b", there)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "x")
    with pytest.raises(Conflict, match=r"^'x' is "):
        copied(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "b") == ["x"]


def test_sockets_and_what_overlay_keeps_are_left_out(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tree / "socket"))
    os.setxattr(tree, "trusted.overlay.opaque", b"y")
    os.setxattr(tree, "trusted.other", b"y")
    (tmp_path / "to").mkdir()
    done = copied(tmp_path, tmp_path / "to", b"tree", b"new")
    assert done.notes == {"a socket, left out": [b"socket"]}
    assert os.listdir(tmp_path / "to/new") == []
    assert os.listxattr(tmp_path / "to/new") == ["trusted.other"]


def test_xattrs_that_a_filesystem_does_not_take_are_told(tmp_path: Path) -> None:
    with filesystems.mounted("ext4", tmp_path) as disk, filesystems.mounted("xfs", tmp_path) as xfs:
        (xfs / "file").write_text("content")
        os.setxattr(xfs / "file", "user.large", b"x" * 20_000)
        done = copied(xfs, disk, b"file", b"new")
        assert (disk / "new").read_text() == "content"
        assert done.notes == {copy.XATTR_REFUSED: [b""]}


@pytest.mark.parametrize("path", ["/proc/sys/kernel/ostype", "/proc/version", "/sys/kernel/fscaps"])
def test_files_that_the_kernel_makes_up(tmp_path: Path, path: str) -> None:
    """Their size is 0, or more than there is."""
    above, name = os.path.split(path)
    copied(Path(above), tmp_path, name.encode(), b"new")
    assert (tmp_path / "new").read_bytes() == Path(path).read_bytes() != b""


def test_a_path_that_is_longer_than_a_path_may_be(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    os.mkdir("tree", dir_fd=fd)
    os.mkdir("to", dir_fd=fd)
    at = os.open("tree", os.O_RDONLY, dir_fd=fd)
    for _ in range(40):
        os.mkdir("d" * 200, dir_fd=at)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=at))
    os.link("leaf", "too", src_dir_fd=at, dst_dir_fd=at)
    os.close(at)
    os.close(fd)
    done = copied(tmp_path, tmp_path / "to", b"tree", b"new")
    assert done.entries == 43
    listed = [command.output("find", tmp_path / name, "-printf", "%P %m %n\n") for name in TREES]
    assert listed[0] == listed[1]
    for name in ("tree", "to"):
        command.output("rm", "-rf", tmp_path / name)


TREES = ("tree", "to/new")


def test_a_tree_is_not_copied_into_itself_for_ever(tmp_path: Path) -> None:
    (tmp_path / "tree/a").mkdir(parents=True)
    (tmp_path / "tree/file").touch()
    done = copied(tmp_path, tmp_path / "tree/a", b"tree", b"new")
    assert done.notes == {copy.ITSELF: [b"a/new"]}
    assert sorted(os.listdir(tmp_path / "tree/a/new")) == ["a", "file"]


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_a_full_disk_leaves_no_half_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "big").write_bytes(os.urandom(8 << 20))
    with filesystems.mounted(kind, tmp_path) as disk:
        (disk / "big").write_text("before")
        filled = filesystems.fill_bytes(disk)
        with pytest.raises(OSError, match="big") as refused:
            copied(tmp_path, disk, b"big", b"big")
        assert refused.value.errno == errno.ENOSPC
        filled.empty()
        assert (disk / "big").read_text() == "before"
        assert [name for name in os.listdir(disk) if name.startswith(".")] == []


# --- what changes meanwhile ---------------------------------------------------------------------


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Exchange two names all the time (renameat2, RENAME_EXCHANGE)."""
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    done = threading.Event()

    def run() -> None:
        names = os.fsencode(one), os.fsencode(other)
        while not done.is_set():
            assert renameat2(-100, names[0], -100, names[1], 2) == 0, ctypes.get_errno()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_source_that_becomes_a_symlink_is_never_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("secret")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_text("public")
    (tree / "sub/more").write_text("public")
    (tree / "one").write_text("public")
    (tree / "other").symlink_to(secret / "file")
    (tree / "swap").symlink_to(secret)
    with swapping(tree / "sub", tree / "swap"), swapping(tree / "one", tree / "other"):
        for number in range(200):
            to = tmp_path / f"to{number}"
            to.mkdir()
            copied(tmp_path, to, b"tree", b"new")
            for place, directories, files in os.walk(to):
                for name in (*directories, *files):
                    path = Path(place, name)
                    assert path.is_symlink() or path.is_dir() or path.read_text() == "public"


def test_a_target_that_becomes_a_symlink_is_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(0o700)
    os.utime(outside, ns=(0, 5))
    tree = tmp_path / "tree"
    (tree / "sub/er").mkdir(parents=True)
    for number in range(10):
        (tree / f"sub/er/{number}").write_text("x")
    (tmp_path / "to/new/sub").mkdir(parents=True)
    (tmp_path / "to/swap").symlink_to(outside)
    refused = 0
    with swapping(tmp_path / "to/new/sub", tmp_path / "to/swap"):
        for _ in range(200):
            try:
                copied(tmp_path, tmp_path / "to", b"tree", b"new")
            except Conflict:
                refused += 1
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.ENOENT):
                    raise
                refused += 1
    assert refused
    assert os.listdir(outside) == []
    assert (outside.stat().st_mode & 0o777, outside.stat().st_mtime_ns) == (0o700, 5)


def test_a_file_that_grows_and_shrinks_is_told(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "to").mkdir()
    path = tmp_path / "tree/file"
    path.write_bytes(b"x" * (1 << 20))
    done = threading.Event()

    def change() -> None:
        with path.open("r+b") as file:
            while not done.is_set():
                file.truncate(1000)
                file.seek(0)
                file.write(b"x" * (1 << 20))
                file.flush()

    thread = threading.Thread(target=change)
    thread.start()
    told = 0
    try:
        for _ in range(200):
            notes = copied(tmp_path / "tree", tmp_path / "to", b"file", b"file").notes
            told += bool(notes)
            assert set(notes) <= {"changed while it was read"}
            assert not (tmp_path / "to/file").read_bytes().strip(b"x\0")
    finally:
        done.set()
        thread.join()
    assert told

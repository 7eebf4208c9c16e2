"""The oracles say what is there and notice what is wrong: to agree always proves nothing."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import socket
import stat
import struct
import tarfile
from pathlib import Path

import pytest

from tests.oracles import cache, command, fsck, gnutar, merged, peers, trees
from tests.rootmount import missing, require

NS = 1_234_567_890_123_456_789


def member(name: bytes, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(os.fsdecode(name))
    info.type = kind
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar(path: Path, *members: tarfile.TarInfo, content: bytes = b"content") -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
        for info in members:
            if info.isreg():
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# --- trees ----------------------------------------------------------------------------------


def test_a_snapshot_holds_every_type_with_all_its_attributes(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path / "root")
    os.makedirs(root + b"/dir/\xff\n")
    file = root + b"/dir/file"
    Path(os.fsdecode(file)).write_bytes(b"abc")
    os.chown(file, 11, 22)
    os.chmod(file, 0o4751)
    os.setxattr(file, b"user.note", b"\0x")
    os.setxattr(file, b"trusted.secret", b"")
    os.utime(file, ns=(NS, NS))
    os.link(file, root + b"/again")
    os.symlink(b"/etc/passwd", root + b"/dir/link")
    os.setxattr(root + b"/dir/link", b"trusted.of.link", b"1", follow_symlinks=False)
    os.mknod(root + b"/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root + b"/disk", stat.S_IFBLK | 0o600, os.makedev(259, 300))
    os.mkfifo(root + b"/fifo")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(root + b"/socket")
    found = trees.snapshot(root)
    assert list(found) == sorted(found)
    assert {path: entry.type for path, entry in found.items()} == {
        b"": "directory",
        b"again": "file",
        b"dir": "directory",
        b"dir/\xff\n": "directory",
        b"dir/file": "file",
        b"dir/link": "symlink",
        b"disk": "block",
        b"fifo": "fifo",
        b"null": "char",
        b"socket": "socket",
    }
    assert found[b"dir/file"] == trees.Entry(
        type="file",
        mode=0o4751,
        uid=11,
        gid=22,
        mtime_ns=NS,
        size=3,
        sha256=hashlib.sha256(b"abc").hexdigest(),
        target=None,
        rdev=None,
        xattrs={b"trusted.secret": b"", b"user.note": b"\0x"},
        link_group=(b"again", b"dir/file"),
    )
    assert found[b"again"] == found[b"dir/file"]
    assert found[b"dir/link"].target == b"/etc/passwd"
    assert found[b"dir/link"].xattrs == {b"trusted.of.link": b"1"}
    assert found[b"disk"].rdev == (259, 300)
    assert found[b"dir"].size is None
    assert b"user.note" not in trees.snapshot(root, ignore=[b"user.note"])[b"again"].xattrs


def test_a_snapshot_reaches_the_bottom_of_a_very_deep_tree(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert len(trees.snapshot(tmp_path)) == 1501
    command.output("rm", "-rf", tmp_path / "d")


def test_whiteouts_that_share_an_inode_are_no_link_group(tmp_path: Path) -> None:
    os.mknod(tmp_path / "a", stat.S_IFCHR, os.makedev(0, 0))
    os.link(tmp_path / "a", tmp_path / "b")
    assert trees.snapshot(tmp_path)[b"a"].link_group == ()
    assert trees.snapshot(tmp_path)[b"a"].rdev == (0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("type", "fifo"),
        ("mode", 0o600),
        ("uid", 7),
        ("gid", 7),
        ("mtime_ns", 7),
        ("size", 7),
        ("sha256", "7"),
        ("target", b"7"),
        ("rdev", (7, 7)),
        ("xattrs", {b"user.seven": b"7"}),
        ("link_group", (b"f", b"seven")),
    ],
)
def test_a_difference_in_any_field_is_one_line_unless_ignored(
    tmp_path: Path, field: trees.Field, value: object
) -> None:
    (tmp_path / "f").write_bytes(b"x")
    same = trees.snapshot(tmp_path)
    changed = trees.Entry(**{**same[b"f"]._asdict(), field: value})
    other = {**same, b"f": changed}
    (line,) = trees.differences(same, other)
    assert line.startswith(f"b'f': {field}: ")
    assert trees.differences(same, other, ignore_fields=[field]) == []
    assert trees.differences(same, other, ignore_fields_of={b"f": [field]}) == []
    assert trees.differences(same, other, ignore_fields_of={b"": [field]}) == [line]
    assert trees.differences(same, other, ignore_paths=[b"f"]) == []
    assert trees.differences(same, same) == []


def test_a_path_in_one_tree_only_is_a_difference(tmp_path: Path) -> None:
    bare = trees.snapshot(tmp_path)
    (tmp_path / "f").touch()
    full = {**trees.snapshot(tmp_path), b"": bare[b""]}
    assert "only in the second" in trees.differences(bare, full)[0]
    assert "only in the first" in trees.differences(full, bare)[0]
    ignored = [b"user.a"]
    with_xattr = {b"": bare[b""]._replace(xattrs={b"user.a": b""})}
    assert trees.differences(bare, with_xattr, ignore_xattrs=ignored) == []


# --- layers ---------------------------------------------------------------------------------


def test_a_layer_keeps_what_the_tar_says(tmp_path: Path) -> None:
    pax = {"mtime": "1234567890.123456789", "SCHILY.xattr.user.a": "b"}
    layer = tar(
        tmp_path / "layer.tar",
        member(b"./", tarfile.DIRTYPE, mode=0o1700, uid=3, gid=4, mtime=5),
        member(b"dir/", tarfile.DIRTYPE, mode=0o500, uid=3_000_000_000, gid=4, mtime=-5),
        member(b"dir/\xff", mode=0o6755, uid=7, gid=8, pax_headers=pax),
        member(b"dir/hard", tarfile.LNKTYPE, linkname="dir/\udcff"),
        member(b"dir/soft", tarfile.SYMTYPE, linkname="/nowhere", mtime=9),
    )
    assert gnutar.apply_layer(layer, tmp_path / "dest").implied == frozenset()
    found = trees.snapshot(tmp_path / "dest")
    assert found[b""][1:5] == (0o1700, 3, 4, 5_000_000_000)
    assert found[b"dir"][1:5] == (0o500, 3_000_000_000, 4, -5_000_000_000)
    assert found[b"dir/\xff"][1:6] == (0o6755, 7, 8, 1234567890_123456789, 7)
    assert found[b"dir/\xff"].xattrs == {b"user.a": b"b"}
    assert found[b"dir/\xff"].link_group == (b"dir/hard", b"dir/\xff")
    assert found[b"dir/soft"].mtime_ns == 9_000_000_000


def test_markers_become_whiteouts_and_opaque_directories(tmp_path: Path) -> None:
    layer = tar(
        tmp_path / "layer.tar",
        member(b"d/", tarfile.DIRTYPE, mtime=10),
        member(b"d/.wh.gone", uid=1, gid=2, mtime=20),
        member(b"d/.wh.kept", mtime=20),
        member(b"d/kept", mtime=20),
        member(b"d/.wh.sub", mtime=20),
        member(b"d/sub/", tarfile.DIRTYPE, mtime=11),
        member(b"d/sub/.wh.hidden", mtime=20),
        member(b"o/.wh.late", mtime=20),
        member(b"o/", tarfile.DIRTYPE, mtime=12),
        member(b"o/.wh..wh..opq", mtime=20),
        member(b"o/file", mtime=20),
        member(b".wh..wh.plnk/", tarfile.DIRTYPE),
        member(b".wh..wh.plnk/1.2"),
        member(b".wh..wh.aufs"),
    )
    gnutar.apply_layer(layer, tmp_path / "dest")
    found = trees.snapshot(tmp_path / "dest")
    assert list(found) == [b"", b"d", b"d/gone", b"d/kept", b"d/sub", b"o", b"o/file"]
    assert found[b"d/gone"][:5] == ("char", 0, 1, 2, 20_000_000_000)
    assert found[b"d/gone"].rdev == (0, 0)
    assert found[b"d/kept"].type == "file"
    opaque = {b"trusted.overlay.opaque": b"y"}
    assert {path for path, entry in found.items() if entry.xattrs == opaque} == {b"o", b"d/sub"}
    times = {path: found[path].mtime_ns // 10**9 for path in (b"d", b"d/sub", b"o")}
    assert times == {b"d": 10, b"d/sub": 11, b"o": 12}


def test_implied_directories_take_the_time_of_what_is_in_them(tmp_path: Path) -> None:
    layer = tar(
        tmp_path / "layer.tar",
        member(b"/a/b/c/old", mtime=1),
        member(b"/a/b/new/", tarfile.DIRTYPE, mtime=5),
        member(b"/a/b/new/newest", mtime=9),
        member(b"/w/.wh.x", mtime=7),
        member(b"/q/.wh..wh..opq", mtime=8),
    )
    implied = gnutar.apply_layer(layer, tmp_path / "dest").implied
    assert implied == {b"", b"a", b"a/b", b"a/b/c", b"w", b"q"}
    found = trees.snapshot(tmp_path / "dest")
    times = {path: found[path].mtime_ns // 10**9 for path in implied}
    assert times == {b"": 9, b"a": 9, b"a/b": 5, b"a/b/c": 1, b"w": 7, b"q": 8}
    assert {found[path][1:4] for path in implied} == {(0o755, 0, 0)}


def test_directories_named_by_way_of_a_symlink_are_not_implied(tmp_path: Path) -> None:
    layer = tar(
        tmp_path / "layer.tar",
        member(b"usr/", tarfile.DIRTYPE),
        member(b"usr/bin/", tarfile.DIRTYPE),
        member(b"bin", tarfile.SYMTYPE, linkname="usr/bin"),
        member(b"bin/deep/", tarfile.DIRTYPE, mode=0o711),
        member(b"bin/.wh.gone"),
    )
    assert gnutar.apply_layer(layer, tmp_path / "dest").implied == {b""}
    found = trees.snapshot(tmp_path / "dest")
    assert found[b"usr/bin/deep"].mode == 0o711
    assert found[b"usr/bin/gone"].type == "char"


def test_instructions_to_the_kernel_are_escaped(tmp_path: Path) -> None:
    prefix = "SCHILY.xattr.trusted.overlay."
    pax = {f"{prefix}redirect": "/etc", f"{prefix}overlay.opaque": "y"}
    layer = tar(tmp_path / "layer.tar", member(b"d/", tarfile.DIRTYPE, pax_headers=pax))
    gnutar.apply_layer(layer, tmp_path / "dest")
    assert trees.snapshot(tmp_path / "dest")[b"d"].xattrs == {
        b"trusted.overlay.overlay.redirect": b"/etc",
        b"trusted.overlay.overlay.overlay.opaque": b"y",
    }


@pytest.mark.parametrize("length", [0, 1024, 515])
def test_a_tar_may_lack_its_end(tmp_path: Path, length: int) -> None:
    layer = tar(tmp_path / "layer.tar", member(b"f", mtime=1), content=b"xyz")
    os.truncate(layer, length)
    gnutar.apply_layer(layer, tmp_path / "dest")
    assert len(trees.snapshot(tmp_path / "dest")) == (2 if length else 1)


def test_what_gnu_tar_refuses_is_an_error_with_its_words(tmp_path: Path) -> None:
    layer = tar(tmp_path / "layer.tar", member(b"l", tarfile.LNKTYPE, linkname="nowhere"))
    with pytest.raises(command.CommandError, match="nowhere"):
        gnutar.apply_layer(layer, tmp_path / "dest")


# --- the cache ------------------------------------------------------------------------------


def test_what_fails_half_way_leaves_nothing_and_can_be_made_again(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "thing"

    def make(*, fail: bool) -> bool:
        with cache.making(place) as staging:
            if staging is None:
                return False
            (staging / "part").touch()
            if fail:
                raise ZeroDivisionError
            return True

    with pytest.raises(ZeroDivisionError):
        make(fail=True)
    assert list(place.parent.iterdir()) == []
    assert make(fail=False)
    assert not make(fail=True)
    assert list(place.parent.iterdir()) == [place]


# --- programs of others ---------------------------------------------------------------------


def test_docker_makes_an_image_that_umoci_unpacks(tmp_path: Path) -> None:
    require("dockerd", "docker", "runc", "skopeo", "umoci", "busybox")
    busybox = shutil.which("busybox")
    assert busybox is not None
    if b"/ld-" in Path(busybox).read_bytes():
        missing("a static busybox")
    root = tmp_path / "root.tar"
    with tarfile.open(root, "w") as archive:
        archive.add(busybox, "bin/sh")
        archive.addfile(member(b"bin/rm", tarfile.SYMTYPE, linkname="sh"))
        archive.addfile(member(b"gone"))
    with peers.Dockerd(tmp_path) as docker:
        docker.import_rootfs(root, "test:one")
        docker.commit_layer("test:one", "echo hello > /new; /bin/rm /gone", "test:two")
        docker.save("test:two", tmp_path / "two.tar")
        assert "Loaded image" in docker.load(tmp_path / "two.tar")
        with pytest.raises(command.CommandError, match="exited with 3"):
            docker.commit_layer("test:one", "exit 3", "test:three")
        assert docker.docker("ps", "--all", "--quiet") == ""
    rootfs = merged.umoci_unpack(tmp_path / "two.tar", tmp_path / "rootfs")
    found = trees.snapshot(rootfs)
    assert found[b"new"].size == 6
    assert b"gone" not in found
    assert not list(tmp_path.glob("dockerd.*"))


def test_fsck_accepts_a_sound_filesystem_and_names_a_broken_one(tmp_path: Path) -> None:
    require("mmdebstrap", "unshare")
    check = fsck.Fsck(tmp_path / "cache")
    image = tmp_path / "odd name, with: a comma.erofs"
    image.touch()
    made = check.run("mkfs.erofs", "-b512", "/mnt/image", "/etc", image=image)
    assert made.returncode == 0, made.stderr
    sound = check(image, "--extract")
    assert sound.returncode == 0, sound.stderr
    assert "Filesystem total file count" in check.dump(image, "-S")
    with image.open("r+b") as file:
        file.seek(1024 + 14)
        file.write(struct.pack("<H", 0xFFF0))  # the root's inode number
    broken = check(image)
    assert broken.returncode != 0
    assert "<E> erofs" in broken.stderr

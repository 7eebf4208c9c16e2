"""Trees as tars: read back by our own reader, by GNU tar and by Python's tarfile."""

from __future__ import annotations

import io
import os
import shutil
import socket
import stat
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlayctl.errors import BadInput
from overlayctl.kernel import mounter
from overlayctl.layer import tar_writer
from overlayctl.layer.header import END, header, padding
from overlayctl.layer.index import Index
from overlayctl.layer.tar import Member, TarReader
from overlayctl.layer.tar_writer import TarWriter
from overlayctl.mount import Erofs
from tests import filesystems
from tests.layer.tars import members, python_members
from tests.layer.test_tree import build, shape
from tests.oracles import command, trees
from tests.rootmount import require

_EXTRACT = (
    "--extract", "--numeric-owner", "--same-permissions", "--same-owner",
    "--delay-directory-restore", "--xattrs", "--xattrs-include=*",
)  # fmt: skip
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, rights, who)
    for tag, rights, who in (
        (0x01, 7, 0xFFFFFFFF), (0x02, 5, 1234), (0x04, 5, 0xFFFFFFFF), (0x10, 5, 0xFFFFFFFF),
        (0x20, 4, 0xFFFFFFFF),
    )
)  # fmt: skip
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


def written(tree: Path, *, layer: bool = False) -> tuple[bytes, dict[str, list[bytes]]]:
    """The tar of a tree, and what was noted."""
    fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    try:
        writer = TarWriter(fd, layer=layer)
        return b"".join(writer), writer.notes
    finally:
        os.close(fd)


def by_gnu_tar(data: bytes, place: Path) -> Path:
    """The tree that GNU tar makes of it."""
    place.mkdir()
    tar = place.parent / f"{place.name}.tar"
    tar.write_bytes(data)
    command.output("tar", *_EXTRACT, "--directory", place, "--file", tar)
    return place


def by_our_own(data: bytes, place: Path) -> dict[bytes, trees.Entry]:
    """The tree that the kernel shows of a layer of it."""
    build(place.with_suffix(".erofs"), data).close()
    place.mkdir()
    mounter.mount(Erofs(str(place.with_suffix(".erofs"))), str(place))
    try:
        return trees.snapshot(place)
    finally:
        mounter.unmount(str(place))


def agrees(tree: Path, place: Path) -> bytes:
    """Assert that every reader gets back what is there; the tar."""
    place.mkdir(exist_ok=True)
    data, notes = written(tree)
    assert notes == {}
    real = trees.snapshot(tree)
    assert trees.differences(real, trees.snapshot(by_gnu_tar(data, place / "gnu"))) == []
    assert trees.differences(real, by_our_own(data, place / "own")) == []
    names = [os.fsencode(member.name) for member in python_members(data)]
    assert sorted(names) == sorted(path or b"." for path in real)
    return data


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    made = tmp_path / "tree"
    made.mkdir()
    os.utime(made, ns=(0, 1_600_000_000_123_456_789))
    return made


# --- headers ------------------------------------------------------------------------------------

_bytes_of_names = st.integers(1, 255).filter(lambda byte: byte != ord("/"))
_name = st.lists(_bytes_of_names, min_size=1, max_size=120).map(bytes)
_long = st.lists(_name, min_size=1, max_size=5).map(b"/".join)
_times = st.tuples(st.integers(-(2**62), 2**62), st.sampled_from([0, 1, 10**8, 999_999_999]))
_xattr_names = st.binary(min_size=1, max_size=20).filter(lambda n: b"=" not in n and b"\0" not in n)
_members = st.builds(
    lambda time, **fields: Member(mtime=time[0], mtime_ns=time[1], **fields),
    time=_times,
    name=_long,
    type=st.sampled_from([b"0", b"1", b"2", b"3", b"4", b"5", b"6"]),
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 2**40),
    gid=st.integers(0, 2**40),
    size=st.integers(0, 5000),
    linkname=_long,
    major=st.integers(0, 0xFFF),
    minor=st.integers(0, 0xFFFFF),
    xattrs=st.dictionaries(_xattr_names.map(lambda n: b"user." + n), st.binary(max_size=300)),
)


@given(member=_members)
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_reader_gets_back_the_member_that_was_written(tmp_path: Path, member: Member) -> None:
    if member.type != b"0":
        member = member._replace(size=0)
    data = header(member) + bytes(member.size) + padding(member.size) + END
    (read,) = members(data, tmp_path)
    assert read._replace(offset=0, data=0, stored=0) == member
    (other,) = python_members(data)
    assert os.fsencode(other.name) == member.name.removesuffix(b"/")
    assert (other.uid, other.gid, other.mode, other.size) == (
        member.uid, member.gid, member.mode, member.size,
    )  # fmt: skip


@pytest.mark.parametrize("size", [8**11 - 1, 8**11, 8**11 + 1])
def test_sizes_around_what_the_header_holds(tmp_path: Path, size: int) -> None:
    head = header(Member(b"big", b"0", 0o644, 0, 0, size, 0, 0))
    path = tmp_path / "big.tar"
    path.write_bytes(head)
    os.truncate(path, len(head) + size + len(padding(size)) + len(END))
    assert (len(head) > 512) == (size >= 8**11)
    with path.open("rb") as file:
        (read,) = TarReader(file.fileno(), 0, path.stat().st_size)
        assert read.size == read.stored == size
        with tarfile.open(fileobj=file) as archive:
            assert [member.size for member in archive] == [size]


def test_what_fits_is_plain_ustar(tmp_path: Path) -> None:
    for name in (
        b"n" * 100,
        b"p" * 155 + b"/" + b"n" * 100,
        b"a/" * 50 + b"n" * 100,
        b"d" * 99 + b"/",
    ):
        head = header(Member(name, b"0", 0o644, 8**7 - 1, 0, 0, 8**11 - 1, 0))
        assert len(head) == 512
        assert members(head + END, tmp_path)[0].name == name
    for name in (b"n" * 101, b"p" * 156 + b"/n" + b"n" * 99, b"d" * 100 + b"/", "é".encode()):
        head = header(Member(name, b"0", 0o644, 0, 0, 0, 0, 0))
        assert len(head) == 3 * 512
        assert members(head + END, tmp_path)[0].name == name


# --- trees --------------------------------------------------------------------------------------

_SOME_NAMES = [b"a", b"b\n", b"\xff\xfe", "é".encode(), b"n" * 255, b"-rf", b"a.b", b"a b", b"%3D"]
# What ext4 holds, to the nanosecond.
_some_times = st.integers(-(2**31) * 10**9 + 1, (2**33) * 10**9)
_nodes = st.tuples(
    st.sampled_from(
        ["file", "file", "directory", "directory", "symlink", "link", "fifo", "device"]
    ),
    st.integers(0, 9),
    st.sampled_from(_SOME_NAMES),
    st.binary(max_size=1100),
    st.integers(0, 0o7777),
    st.sampled_from([0, 1000, 8**7, 2**32 - 2]),
    _some_times,
    st.dictionaries(
        st.sampled_from(["trusted.a", "trusted.overlay.opaque"]), st.binary(max_size=40)
    ),
)


def grow(root: Path, nodes: list[Any]) -> None:
    """A tree of the nodes; one that cannot be made is left out."""
    directories = [os.fsencode(root)]
    files: list[bytes] = []
    made = []
    for kind, parent, name, data, mode, owner, time, xattrs in nodes:
        path = directories[parent % len(directories)] + b"/" + name
        if os.path.lexists(path) or len(path) > 3000:
            continue
        if kind == "directory":
            os.mkdir(path)
            directories.append(path)
        elif kind == "symlink":
            os.symlink(data.replace(b"\0", b"") or b"x", path)
        elif kind == "link" and files:
            os.link(files[parent % len(files)], path)
            continue
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            os.mknod(path, stat.S_IFBLK, os.makedev(300, parent * 100_000))
        else:
            Path(os.fsdecode(path)).write_bytes(data)
        if kind != "directory":
            files.append(path)
        made.append((path, kind, mode, owner, time, xattrs))
    # A directory's time is the last thing that is set in it.
    for path, kind, mode, owner, time, xattrs in reversed(made):
        os.chown(path, owner, owner, follow_symlinks=False)
        for key, value in xattrs.items():
            os.setxattr(path, key, value, follow_symlinks=False)
        if kind != "symlink":
            os.chmod(path, mode)
        os.utime(path, ns=(0, time), follow_symlinks=False)


@given(nodes=st.lists(_nodes, max_size=14))
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_tree_is_read_back_by_everybody(
    tmp_path_factory: pytest.TempPathFactory, nodes: list[Any]
) -> None:
    place = tmp_path_factory.mktemp("any")
    made = place / "tree"
    made.mkdir()
    grow(made, nodes)
    os.utime(made, ns=(0, 1))
    data, notes = written(made)
    assert notes == {}
    # A name of overlay's is one like any other here; ours stores it under another.
    real = trees.snapshot(made)
    gnu = trees.snapshot(by_gnu_tar(data, place / "gnu"))
    assert trees.differences(real, gnu) == []
    own = by_our_own(data, place / "own")
    for path, entry in own.items():
        stored = {
            key.replace(b"trusted.overlay.overlay.", b"trusted.overlay."): value
            for key, value in entry.xattrs.items()
        }
        own[path] = entry._replace(xattrs=stored)
    assert trees.differences(real, own) == []
    names = [os.fsencode(member.name) for member in python_members(data)]
    assert names == [path or b"." for path in ordered(real)]
    # What GNU tar made is a copy, with other inodes and other places on the disk.
    assert written(place / "gnu")[0] == data


def ordered(paths: dict[bytes, trees.Entry]) -> list[bytes]:
    """By the bytes of each name, a directory's own directly behind it."""
    return sorted(paths, key=lambda path: path.split(b"/") if path else [])


def test_acls_capabilities_owners_and_times(tree: Path, tmp_path: Path) -> None:
    (tree / "acl").mkdir()
    os.setxattr(tree / "acl", "system.posix_acl_access", ACL)
    os.setxattr(tree / "acl", "system.posix_acl_default", ACL)
    (tree / "ping").write_bytes(b"\x7fELF")
    os.setxattr(tree / "ping", "security.capability", CAPABILITY)
    os.setxattr(tree / "ping", "user.note", b"a\n=\0b\xff")
    (tree / "old").touch()
    os.utime(tree / "old", ns=(0, -1))
    (tree / "older").touch()
    os.utime(tree / "older", ns=(0, -1_500_000_000))
    (tree / "late").touch()
    os.utime(tree / "late", ns=(0, 8**11 * 10**9))
    (tree / "owned").touch()
    os.chown(tree / "owned", 2**32 - 2, 8**7)
    (tree / "setuid").touch()
    (tree / "setuid").chmod(0o6755)
    os.symlink("t" * 4095, tree / "long")
    agrees(tree, tmp_path / "out")


def test_xfs_shows_an_acl_twice_and_the_tar_holds_it_once(tmp_path: Path) -> None:
    acl = bytes.fromhex("02000000 01000600ffffffff 02000400 07000000 04000400ffffffff")
    acl += bytes.fromhex("10000400ffffffff 20000400ffffffff")
    with filesystems.mounted("xfs", tmp_path, name="disk") as disk:
        (disk / "tree").mkdir()
        (disk / "tree/file").touch(0o644)
        os.setxattr(disk / "tree/file", "system.posix_acl_access", acl)
        assert "trusted.SGI_ACL_FILE" in os.listxattr(disk / "tree/file")
        data, _ = written(disk / "tree")
    assert b"system.posix_acl_access" in data
    assert b"SGI_ACL" not in data


def test_names_of_any_bytes_and_lengths(tree: Path, tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tree) + b"/\xff\n")
    deep = os.fsencode(tree) + b"/\xff\n/" + b"/".join([b"d" * 200] * 10)
    os.makedirs(deep)
    for name in (b"x", "\u00e9".encode(), b"n" * 255, b"\x80", b"--", b"../x".replace(b"/", b"_")):
        Path(os.fsdecode(deep + b"/" + name)).write_bytes(name)
        os.link(deep + b"/" + name, deep + b"/link to " + name[:240])
    agrees(tree, tmp_path / "out")


def test_a_tree_that_is_deeper_than_any_path_is_long(tree: Path) -> None:
    fd = os.open(tree, os.O_RDONLY)
    for number in range(40):
        name = f"{number:03}" + "d" * 247
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with open(os.open("end", os.O_WRONLY | os.O_CREAT, dir_fd=fd), "wb") as file:
        file.write(b"deep")
    os.close(fd)
    data, notes = written(tree)
    assert notes == {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        *_, last = archive
        assert len(last.name) > 10_000
        content = archive.extractfile(last)
        assert content is not None
        assert content.read() == b"deep"


def test_a_gigabyte_with_three_bytes(tree: Path, tmp_path: Path) -> None:
    with (tree / "sparse").open("wb") as file:
        for offset in (0, 1 << 29, (1 << 30) - 1):
            file.seek(offset)
            file.write(b"x")
    with (tree / "nothing").open("wb") as file:
        file.truncate(1 << 20)
    with (tree / "ends in a hole").open("wb") as file:
        file.write(b"y" * 5000)
        file.truncate(1 << 20)
    with (tree / "é sparse\n").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"z")
    os.link(tree / "sparse", tree / "sparse too")
    data = agrees(tree, tmp_path / "out")
    assert len(data) < 64 << 10
    for name in ("sparse", "nothing", "ends in a hole"):
        assert (tmp_path / "out/gnu" / name).stat().st_blocks == (tree / name).stat().st_blocks
    sizes = {m.name: (m.size, m.stored) for m in members(data, tmp_path)}
    assert sizes[b"sparse"] == (1 << 30, 3 * 4096)
    assert sizes[b"nothing"] == (1 << 20, 0)


def test_the_same_tree_is_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    for name in ("b", "a.b", "a", "a/x", "a-b", "B"):
        (tree / name).mkdir()
    for number in range(300):
        (tree / "a" / str(number)).write_bytes(b"%d" % number * number)
    os.link(tree / "a/7", tree / "0 first")
    first, _ = written(tree)
    assert written(tree)[0] == first
    command.output("cp", "-a", tree, tmp_path / "copy")
    assert written(tmp_path / "copy")[0] == first
    read = members(first, tmp_path)
    assert read[0].name == b"./"
    paths = [member.name.strip(b"/") for member in read[1:]]
    assert paths == sorted(paths, key=lambda path: path.split(b"/"))
    linked = {member.name: member.linkname for member in read if member.type == b"1"}
    assert linked == {b"a/7": b"0 first"}
    assert {
        member.name for member in python_members(first) if member.uname or member.gname
    } == set()
    assert first.endswith(END)


def test_sockets_are_left_out_and_named(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The address of a socket is short.
    monkeypatch.chdir(tree)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s")
        (tree / "t").touch()
        data, notes = written(tree)
    assert notes == {tar_writer.SOCKET: [b"s"]}
    assert [member.name for member in members(data, tmp_path)] == [b"./", b"t"]


def test_reading_leaves_no_trace(tree: Path) -> None:
    (tree / "f").write_bytes(b"x")
    os.utime(tree / "f", ns=(5, 5))
    os.utime(tree, ns=(5, 5))
    written(tree)
    assert ((tree / "f").stat().st_atime_ns, tree.stat().st_atime_ns) == (5, 5)


def test_an_xattr_that_no_tar_carries(tree: Path) -> None:
    os.setxattr(tree, "user.a=b", b"1")
    os.setxattr(tree, "user.a", b"2")
    data, notes = written(tree)
    assert notes == {tar_writer.XATTR_LEFT_OUT: [b""]}
    (root,) = python_members(data)
    assert {k: v for k, v in root.pax_headers.items() if "xattr" in k} == {
        "SCHILY.xattr.user.a": "2"
    }


# --- while it changes ---------------------------------------------------------------------------


@pytest.fixture
def midway(tree: Path) -> Iterator[tuple[Path, Iterator[bytes], TarWriter, list[bytes]]]:
    """A tar of which the header and the first piece of a 3 MiB file are read."""
    (tree / "a").write_bytes(b"a" * (3 << 20))
    (tree / "b").mkdir()
    (tree / "b/c").write_bytes(b"c")
    (tree / "d").write_bytes(b"d")
    fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    writer = TarWriter(fd)
    pieces = iter(writer)
    yield tree, pieces, writer, [next(pieces)]
    os.close(fd)


def test_a_file_that_shrinks_is_filled_with_zeros(midway: Any, tmp_path: Path) -> None:
    tree, pieces, writer, begun = midway
    os.truncate(tree / "a", 1 << 20)
    (tree / "d").write_bytes(b"longer by now")
    data = b"".join([*begun, *pieces])
    assert writer.notes == {tar_writer.CHANGED: [b"a"]}
    read = {member.name: member for member in members(data, tmp_path)}
    a = read[b"a"]
    assert data[a.data : a.data + a.stored] == b"a" * (1 << 20) + bytes(2 << 20)
    assert read[b"d"].size == len("longer by now")


def test_a_file_that_grows_is_cut(midway: Any, tmp_path: Path) -> None:
    tree, pieces, writer, begun = midway
    with (tree / "a").open("ab") as file:
        file.write(b"more")
    data = b"".join([*begun, *pieces])
    assert writer.notes == {tar_writer.CHANGED: [b"a"]}
    assert {m.name: m.size for m in members(data, tmp_path)}[b"a"] == 3 << 20


def test_what_goes_meanwhile_is_named(midway: Any, tmp_path: Path) -> None:
    tree, pieces, writer, begun = midway
    shutil.rmtree(tree / "b")
    (tree / "d").unlink()
    data = b"".join([*begun, *pieces])
    assert writer.notes == {tar_writer.GONE: [b"b", b"d"]}
    assert [m.name for m in members(data, tmp_path)] == [b"./", b"a"]


@pytest.mark.parametrize("inside", [True, False])
def test_a_directory_that_becomes_a_symlink_leads_nowhere(
    tree: Path, tmp_path: Path, *, inside: bool
) -> None:
    secret = (tree if inside else tmp_path) / "secret"
    (secret / "sub").mkdir(parents=True)
    (secret / "sub/key").write_bytes(b"the secret")
    (tree / "d/sub").mkdir(parents=True)
    (tree / "d/big").write_bytes(b"b" * (3 << 20))
    (tree / "d/sub/key").write_bytes(b"ours")
    (tree / "d/tail").touch()
    fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    writer = TarWriter(fd)
    pieces = iter(writer)
    begun = next(pieces)
    (tree / "d").rename(tmp_path / "moved")
    (tree / "d").symlink_to("secret" if inside else secret)
    data = begun + b"".join(pieces)
    os.close(fd)
    assert data.count(b"the secret") == inside
    # The directory was open; what is below it, and what comes then, is looked for by its path.
    assert writer.notes == {tar_writer.GONE: [b"d/sub/key", b"d/tail"]}
    names = [member.name for member in members(data, tmp_path)]
    assert names[:4] == [b"./", b"d/", b"d/big", b"d/sub/"]


# --- layers -------------------------------------------------------------------------------------


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    """What the kernel leaves in an upper directory, by mount(8)."""
    require("mount")
    for name in ("lower/gone", "lower/d", "lower/e", "lower/kept", "upper", "work", "merged"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("gone/x", "d/x", "d/y", "e/x", "kept/x", "f"):
        (tmp_path / "lower" / name).write_text(name)
    place = tmp_path / "merged"
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    options += ",index=off,metacopy=off,redirect_dir=nofollow"
    command.output("mount", "-t", "overlay", "overlay", "-o", options, place)
    try:
        shutil.rmtree(place / "gone")
        (place / "d/x").unlink()
        shutil.rmtree(place / "e")
        (place / "e").mkdir()
        (place / "e/new").write_text("new")
        (place / "f").unlink()
        (place / "kept/x").write_text("changed")
        os.setxattr(place / "kept", "user.note", b"1")
        os.link(place / "e/new", place / "linked")
    finally:
        command.output("umount", place)
    return tmp_path / "upper"


def test_an_upper_is_written_as_a_layer(upper: Path, tmp_path: Path) -> None:
    data, notes = written(upper, layer=True)
    assert notes == {}
    read = members(data, tmp_path)
    assert [member.name for member in read] == [
        b"./", b"d/", b"d/.wh.x", b"e/", b"e/.wh..wh..opq", b"e/new", b".wh.f", b".wh.gone",
        b"kept/", b"kept/x", b"linked",
    ]  # fmt: skip
    assert all(not name.startswith(b"trusted") for member in read for name in member.xattrs)
    with build(tmp_path / "layer", data) as index:
        found = shape(index)
        kept = index.lookup(b"kept")
        assert kept is not None
        assert index.xattrs(kept) == {b"user.note": b"1"}
    assert found == {
        b"d": "directory", b"d/x": "whiteout", b"e": "opaque", b"e/new": "new", b"f": "whiteout",
        b"gone": "whiteout", b"kept": "directory", b"kept/x": "changed", b"linked": "new",
    }  # fmt: skip


def test_a_layer_round_trips(tmp_path: Path) -> None:
    """Written from a mounted layer it is the same layer; trusted.overlay.* names come back."""
    made = tmp_path / "made"
    (made / "d").mkdir(parents=True)
    os.mknod(made / "d/gone", stat.S_IFCHR, 0)
    os.setxattr(made / "d", "trusted.overlay.overlay.opaque", b"y")
    os.setxattr(made / "d", "trusted.overlay.origin", b"")
    (made / "o").mkdir()
    os.setxattr(made / "o", "trusted.overlay.opaque", b"y")
    os.setxattr(made, "trusted.overlay.opaque", b"y")
    data, _ = written(made, layer=True)
    _, d, *others = members(data, tmp_path)
    assert [member.name for member in others] == [b"d/.wh.gone", b"o/", b"o/.wh..wh..opq"]
    assert d.xattrs == {b"trusted.overlay.opaque": b"y"}
    path = tmp_path / "l.erofs"
    build(path, data).close()
    (tmp_path / "seen").mkdir()
    mounter.mount(Erofs(str(path)), str(tmp_path / "seen"))
    try:
        again, _ = written(tmp_path / "seen", layer=True)
    finally:
        mounter.unmount(str(tmp_path / "seen"))
    assert again == data
    with Index.open(path) as index:
        assert shape(index) == {b"d": "directory", b"d/gone": "whiteout", b"o": "opaque"}


@pytest.mark.parametrize("name", ["trusted.overlay.redirect", "trusted.overlay.metacopy"])
def test_an_upper_that_is_no_layer_of_its_own_is_refused(tree: Path, name: str) -> None:
    (tree / "moved").mkdir()
    os.setxattr(tree / "moved", name, b"/elsewhere")
    with pytest.raises(BadInput, match="'moved'"):
        written(tree, layer=True)
    assert written(tree)[1] == {}


def test_a_name_that_would_delete_another_is_left_out_of_a_layer(
    tree: Path, tmp_path: Path
) -> None:
    (tree / ".wh.d").mkdir()
    (tree / ".wh.d/x").touch()
    (tree / "d").touch()
    data, notes = written(tree, layer=True)
    assert notes == {tar_writer.NAMED_AS_WHITEOUT: [b".wh.d"]}
    assert [member.name for member in members(data, tmp_path)] == [b"./", b"d"]
    assert len(members(written(tree)[0], tmp_path)) == 4

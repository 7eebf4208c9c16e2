"""The rules from entries to a tree, and whole layers through the real kernel."""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlayctl.errors import BadTar, LimitExceeded, OverlayctlError
from overlayctl.kernel import mounter
from overlayctl.layer import ingest
from overlayctl.layer.index import Index
from overlayctl.layer.stack import Stack, inherit
from overlayctl.layer.tree import Tree
from overlayctl.mount import Erofs
from tests import kernel_has
from tests.layer.tars import directory, entry, hardlink, members, symlink, tar
from tests.oracles import gnutar, trees
from tests.oracles.command import CommandError

WHITEOUT = {"mode": 0o600}


def build(path: Path, data: bytes, below: tuple[Index, ...] = ()) -> Index:
    """A layer file of a tar on lower layers (topmost first)."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        received = ingest.receive(fd, [data])
        described = ingest.describe(fd, received)
        ingest.seal(fd, received, described, inherit(described.wants, Stack(below)))
    finally:
        os.close(fd)
    return Index.open(path)


def shape(index: Index) -> dict[bytes, str]:
    """Path -> what is there, for reading at a glance."""
    found = {}
    for path, node in index.walk():
        if index.is_whiteout(node):
            found[path] = "whiteout"
        elif stat.S_ISDIR(node.mode):
            found[path] = "opaque" if index.is_opaque(node) else "directory"
        elif stat.S_ISLNK(node.mode):
            found[path] = "-> " + index.target(node).decode()
        else:
            found[path] = index.read(node, 0, node.size).decode()
    found.pop(b"")
    return found


CASES = {
    "leading slash and dot": (
        [entry("/a", data=b"1"), entry("./b", data=b"2"), entry("./c/./d", data=b"3")],
        {b"a": "1", b"b": "2", b"c": "directory", b"c/d": "3"},
    ),
    "a later entry replaces": (
        [entry("a", data=b"1"), entry("a", data=b"2")],
        {b"a": "2"},
    ),
    "a file replaces a directory": (
        [directory("a"), entry("a/b"), entry("a", data=b"2")],
        {b"a": "2"},
    ),
    "a directory replaces a file": (
        [entry("a", data=b"1"), directory("a"), entry("a/b", data=b"2")],
        {b"a": "directory", b"a/b": "2"},
    ),
    "a file in the way of a parent": (
        [entry("a", data=b"1"), entry("a/b", data=b"2")],
        {b"a": "directory", b"a/b": "2"},
    ),
    "a parent that is a symlink of the layer": (
        [symlink("lib", "usr/lib"), entry("lib/x", data=b"1")],
        {b"lib": "-> usr/lib", b"usr": "directory", b"usr/lib": "directory", b"usr/lib/x": "1"},
    ),
    "an absolute symlink stays inside": (
        [symlink("out", "/etc"), entry("out/x", data=b"1")],
        {b"out": "-> /etc", b"etc": "directory", b"etc/x": "1"},
    ),
    "a symlink above the root stays inside": (
        [directory("d"), symlink("d/up", "../../../x"), entry("d/up/y", data=b"1")],
        {b"d": "directory", b"d/up": "-> ../../../x", b"x": "directory", b"x/y": "1"},
    ),
    "a symlink that is replaced is not followed any more": (
        [symlink("l", "t"), entry("l/a", data=b"1"), directory("l"), entry("l/b", data=b"2")],
        {b"l": "directory", b"l/b": "2", b"t": "directory", b"t/a": "1"},
    ),
    "a whiteout": (
        [entry(".wh.gone"), entry("d/.wh.gone")],
        {b"gone": "whiteout", b"d": "directory", b"d/gone": "whiteout"},
    ),
    "a whiteout and a file of that name": (
        [entry(".wh.a"), entry("a", data=b"1")],
        {b"a": "1"},
    ),
    "a whiteout and a directory of that name, in either order": (
        [entry(".wh.a"), entry("a/x", data=b"1"), entry("b/x", data=b"2"), entry(".wh.b")],
        {b"a": "opaque", b"a/x": "1", b"b": "opaque", b"b/x": "2"},
    ),
    "opaque drops whiteouts, in either order": (
        [entry("a/.wh..wh..opq"), entry("a/.wh.x"), entry("b/.wh.x"), entry("b/.wh..wh..opq")],
        {b"a": "opaque", b"b": "opaque"},
    ),
    "aufs metadata is passed over": (
        [entry(".wh..wh.plnk"), entry("a", data=b"1")],
        {b"a": "1"},
    ),
    "a hard link to a symlink links the symlink": (
        [symlink("s", "t"), hardlink("h", "s")],
        {b"s": "-> t", b"h": "-> t"},
    ),
    "a hard link to itself": (
        [entry("a", data=b"1"), hardlink("a", "a")],
        {b"a": "1"},
    ),
    "a dot file that only looks odd": (
        [entry("..gitme", data=b"1"), entry(".wh", data=b"2")],
        {b"..gitme": "1", b".wh": "2"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rules(tmp_path: Path, case: str) -> None:
    entries, expected = CASES[case]
    assert shape(build(tmp_path / "layer", tar(*entries))) == expected


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry("../a")], "'..'"),
        ([entry("a/../../b")], "'..'"),
        ([entry("a/..")], "'..'"),
        ([hardlink("a", "../b")], "'..'"),
        ([entry(".wh.")], "pretends"),
        ([entry("d/.wh..")], "pretends"),
        ([entry("d/.wh...")], "pretends"),
        ([entry(".wh.d/x")], "below a whiteout"),
        ([entry("a/" + "n" * 256)], "longer than 255"),
        ([symlink("a", "b"), symlink("b", "a"), entry("a/x")], "loop"),
        ([symlink("./", "x")], "root"),
        ([hardlink("a", "nowhere")], "neither"),
        ([directory("d"), hardlink("a", "d")], "directory"),
        ([entry("c", b"3", devmajor=0, devminor=0)], "0:0"),
        ([symlink("s", "t" * 4096)], "4095"),
        ([entry("a", uid=2**32 - 1)], "4294967294"),
        ([entry("a", xattrs={"user." + "x" * 255: "1"})], "too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_name_the_entry(tmp_path: Path, entries: list[bytes], words: str) -> None:
    with pytest.raises((BadTar, LimitExceeded), match=words):
        build(tmp_path / "layer", tar(*entries))


def test_names_with_nul_are_refused(tmp_path: Path) -> None:
    (member,) = members(tar(entry("a")), tmp_path)
    with pytest.raises(BadTar):
        Tree().add(member._replace(name=b"a\0b"))


def test_implied_parents_look_like_what_they_cover(tmp_path: Path) -> None:
    below = build(
        tmp_path / "below",
        tar(
            directory("./", mode=0o711),
            directory("a", mode=0o700, uid=7, gid=8, xattrs={"user.x": "y"}),
            directory("a/b", mode=0o1777),
        ),
    )
    index = build(
        tmp_path / "layer",
        tar(entry("a/b/c/new", mtime=5), entry("a/b/.wh.old", mtime=9), entry("fresh/x")),
        (below,),
    )

    def attributes(path: bytes) -> tuple[int, int, int]:
        node = index.lookup(path)
        assert node is not None
        return stat.S_IMODE(node.mode), node.uid, node.gid

    assert attributes(b"") == (0o711, 0, 0)
    assert attributes(b"a") == (0o700, 7, 8)
    assert attributes(b"a/b") == (0o1777, 0, 0)
    assert attributes(b"a/b/c") == (0o755, 0, 0)
    a = index.lookup(b"a")
    b = index.lookup(b"a/b")
    assert a is not None
    assert b is not None
    assert index.xattrs(a) == {b"user.x": b"y"}
    assert (b.mtime, a.mtime) == (9, 9)
    assert b"a/b" in index.facts() or b'"a/b"' in index.facts()


def test_what_is_hidden_is_not_inherited(tmp_path: Path) -> None:
    below = build(tmp_path / "below", tar(directory("a", mode=0o700), directory("a/b", mode=0o711)))
    index = build(
        tmp_path / "layer", tar(entry("a/.wh..wh..opq"), entry("a/b/x"), entry(".wh.c")), (below,)
    )
    a, b = index.lookup(b"a"), index.lookup(b"a/b")
    assert a is not None
    assert b is not None
    assert (stat.S_IMODE(a.mode), stat.S_IMODE(b.mode)) == (0o700, 0o755)


def test_a_hard_link_into_a_lower_layer_brings_the_content(tmp_path: Path) -> None:
    below = build(tmp_path / "below", tar(entry("d/file", data=b"x" * 5000, mode=0o4711, mtime=3)))
    index = build(tmp_path / "layer", tar(hardlink("h1", "d/file"), hardlink("h2", "d/file")),
                  (below,))  # fmt: skip
    h1, h2 = index.lookup(b"h1"), index.lookup(b"h2")
    assert h1 is not None
    assert h1 == h2
    assert (h1.nlink, stat.S_IMODE(h1.mode), h1.mtime) == (2, 0o4711, 3)
    assert index.read(h1, 0, h1.size) == b"x" * 5000
    hidden = build(tmp_path / "hidden", tar(entry(".wh.d")), (below,))
    with pytest.raises(BadTar, match="neither"):
        build(tmp_path / "no", tar(hardlink("h", "d/file")), (hidden, below))


def test_a_hard_link_to_a_terabyte_of_holes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    command = ["tar", "-C", str(tmp_path), "--sparse", "-cf", "-", "huge"]
    made = subprocess.run(command, check=True, capture_output=True).stdout
    with build(tmp_path / "below", made) as below, pytest.raises(LimitExceeded, match="'huge'"):
        build(tmp_path / "above", tar(hardlink("link", "huge")), (below,))


def test_overlay_xattrs_of_a_hostile_tar_steer_nothing(tmp_path: Path) -> None:
    index = build(
        tmp_path / "layer",
        tar(
            directory(
                "d",
                xattrs={
                    "trusted.overlay.redirect": "/secret",
                    "trusted.overlay.opaque": "y",
                    "user.overlay.opaque": "y",
                    "security.selinux": "label",
                },
            )
        ),
    )
    node = index.lookup(b"d")
    assert node is not None
    assert not index.is_opaque(node)
    assert set(index.xattrs(node)) == {
        b"trusted.overlay.overlay.redirect",
        b"trusted.overlay.overlay.opaque",
        b"user.overlay.opaque",
    }


_paths = st.lists(st.sampled_from(["a", "b", "c", "\xe9", "n" * 200]), min_size=1, max_size=4).map(
    "/".join
)
_any_entry = st.one_of(
    st.builds(
        entry,
        _paths,
        st.just(b"0"),
        st.binary(max_size=1300),
        mode=st.integers(0, 0o7777),
        uid=st.integers(0, 2**32 - 2),
        mtime=st.integers(0, 2**33),
    ),
    st.builds(directory, _paths, mode=st.integers(0, 0o7777), mtime=st.integers(0, 2**33)),
    st.builds(symlink, _paths, st.just("nowhere/at/all")),
    st.builds(hardlink, _paths, _paths),
    st.builds(
        entry,
        _paths,
        data=st.binary(max_size=40),
        pax=st.fixed_dictionaries(
            {
                # What ext4, where GNU tar puts its tree, can hold.
                "mtime": st.decimals(-(2**31) + 2, 2**33, places=9).map(str),
                "SCHILY.xattr.user.note": st.text("abc\xe9", max_size=20),
            }
        ),
    ),
    st.builds(entry, _paths.map(lambda p: _in_parent(p, ".wh."))),
    st.builds(entry, _paths.map(lambda p: p + "/.wh..wh..opq")),
)


def _in_parent(path: str, prefix: str) -> str:
    head, slash, tail = path.rpartition("/")
    return head + slash + prefix + tail


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    target = tmp_path / "mnt"
    target.mkdir()
    return target


@given(entries=st.lists(_any_entry, max_size=10))
@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_layer_reads_the_same_through_the_kernel_and_gnu_tar(
    tmp_path_factory: pytest.TempPathFactory, mountpoint: Path, entries: list[bytes]
) -> None:
    _compare(tmp_path_factory, mountpoint, entries)


@pytest.mark.long
@given(entries=st.lists(_any_entry, max_size=25))
@settings(
    max_examples=4000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_many_more_layers(
    tmp_path_factory: pytest.TempPathFactory, mountpoint: Path, entries: list[bytes]
) -> None:
    _compare(tmp_path_factory, mountpoint, entries)


@pytest.mark.long
def test_a_hundred_thousand_entries_and_a_file_of_four_gigabytes(
    tmp_path: Path, mountpoint: Path
) -> None:
    """Every name is found through the kernel; the byte past 4 GiB is the right one."""
    big = tarfile.TarInfo("big")
    big.size = (4 << 30) + 3
    small = b"".join(entry(f"d{n % 40}/f{n}", data=b"%d" % n) for n in range(100_000))
    path = tmp_path / "layer.erofs"
    with path.open("w+b") as file:

        def chunks() -> Iterator[bytes]:
            yield small + big.tobuf()
            for _ in range(4096):
                yield bytes(1 << 20)
            yield b"end" + bytes(509) + bytes(1024)

        received = ingest.receive(file.fileno(), chunks())
        described = ingest.describe(file.fileno(), received)
        ingest.seal(file.fileno(), received, described, inherit(described.wants, Stack([])))
    _mount(path, mountpoint)
    try:
        for n in range(100_000):
            assert (mountpoint / f"d{n % 40}" / f"f{n}").stat().st_size == len(str(n))
        with (mountpoint / "big").open("rb") as content:
            content.seek(4 << 30)
            assert content.read() == b"end"
    finally:
        mounter.unmount(str(mountpoint))


def _mount(layer: Path, mountpoint: Path) -> None:
    loop = not kernel_has.erofs_from(str(layer))
    mounter.mount(Erofs(str(layer), loop=loop), str(mountpoint))


def _compare(
    tmp_path_factory: pytest.TempPathFactory, mountpoint: Path, entries: list[bytes]
) -> None:
    place = tmp_path_factory.mktemp("any")
    data = tar(*entries)
    (place / "layer.tar").write_bytes(data)
    try:
        build(place / "layer.erofs", data)
    except OverlayctlError:
        return
    _mount(place / "layer.erofs", mountpoint)
    try:
        ours = trees.snapshot(str(mountpoint), ignore=(b"trusted.overlay.origin",))
    finally:
        mounter.unmount(str(mountpoint))
    try:
        applied = gnutar.apply_layer(place / "layer.tar", place / "expected")
    except CommandError:
        # Where GNU tar gives up (a file as parent, a full directory replaced) the
        # cases above say what is right.
        return
    assert applied is not None
    expected = trees.snapshot(str(place / "expected"), ignore=(b"trusted.overlay.origin",))
    assert trees.differences(expected, ours) == []

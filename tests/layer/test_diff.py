"""What an upper directory changes, with uppers that no program left so, and while they change."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayctl.errors import BadInput
from overlayctl.layer import diff
from overlayctl.layer.diff import Change
from overlayctl.layer.index import Index
from tests.layer.tars import directory, entry, tar
from tests.layer.test_tree import build

TIME = 1_234_567_890


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    made = tmp_path / "upper"
    made.mkdir(mode=0o755)
    return made


class Below:
    """Layers, given bottom to top."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.indexes: list[Index] = []

    def add(self, data: bytes) -> None:
        file = self._place / f"{len(self.indexes)}.erofs"
        self.indexes.insert(0, build(file, data, tuple(self.indexes)))


@pytest.fixture
def below(tmp_path: Path) -> Iterator[Below]:
    made = Below(tmp_path)
    yield made
    for index in made.indexes:
        index.close()


def walk(upper: Path, below: Below, **options: object) -> Iterator[Change]:
    fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield from diff.changes(fd, below.indexes, **options)  # type: ignore[arg-type]
    finally:
        os.close(fd)


def listed(upper: Path, below: Below, **options: object) -> list[str]:
    return [f"{c.kind} /{os.fsdecode(c.path)}" for c in walk(upper, below, **options)]


def whiteout(path: Path) -> None:
    os.mknod(path, 0o020000)


def opaque(path: Path) -> None:
    path.mkdir(mode=0o755)
    os.setxattr(path, "trusted.overlay.opaque", b"y")


@pytest.mark.parametrize("name", ["trusted.overlay.redirect", "trusted.overlay.metacopy"])
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_an_upper_that_says_nothing_alone_is_refused(
    upper: Path, below: Below, name: str, kind: str
) -> None:
    below.add(tar(entry("a", data=b"1")))
    (upper / "a").mkdir() if kind == "directory" else (upper / "a").touch()
    os.setxattr(upper / "a", name, b"/b")
    with pytest.raises(BadInput, match=r"'a'.*another program mounted it"):
        listed(upper, below)


def test_below_an_opaque_root_nothing_is_seen(upper: Path, below: Below) -> None:
    below.add(tar(entry("hidden"), entry("both", data=b"1")))
    below.add(tar(entry(".wh..wh..opq"), entry("both", data=b"22"), entry("top")))
    whiteout(upper / "hidden")
    whiteout(upper / "top")
    (upper / "both").write_bytes(b"333")
    (found, top) = walk(upper, below)
    assert (found.kind, found.before and found.before.size) == ("C", 2)
    assert (top.kind, top.path) == ("D", b"top")


def test_marks_of_the_kernel_are_no_change(upper: Path, below: Below) -> None:
    below.add(tar(directory("./"), directory("d", mtime=5), entry("d/f", mtime=TIME, mode=0o644)))
    for name in ("origin", "impure", "uuid", "opaque"):
        os.setxattr(upper, f"trusted.overlay.{name}", b"y")
    (upper / "d").mkdir(mode=0o755)
    (upper / "d/f").touch(mode=0o644)
    for path in (upper / "d", upper / "d/f"):
        os.setxattr(path, "trusted.overlay.origin", b"\0")
    os.utime(upper / "d/f", (TIME, TIME))
    assert listed(upper, below) == []


def test_a_name_of_overlays_own_is_a_programs(upper: Path, below: Below) -> None:
    below.add(tar(entry("f", mtime=TIME, mode=0o644)))
    (upper / "f").touch(mode=0o644)
    os.utime(upper / "f", (TIME, TIME))
    os.setxattr(upper / "f", "trusted.overlay.overlay.opaque", b"y")
    assert [c.fields for c in walk(upper, below)] == [("xattrs",)]


def test_an_acl_counts_as_the_filesystem_gives_it_back(upper: Path, below: Below) -> None:
    """A tar may hold ids that mean nothing, and an ACL that only says what the mode says."""

    def acl(*entries: tuple[int, int, int]) -> bytes:
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)

    odd = acl((1, 6, 0), (2, 4, 7), (4, 4, 0), (16, 4, 0), (32, 4, 0))
    plain = acl((1, 6, 0), (4, 4, 0), (32, 4, 0))
    for number, given in enumerate((odd, plain)):
        name = f"f{number}"
        xattrs = {"system.posix_acl_access": given.decode("latin-1")}
        pax = {f"SCHILY.xattr.{key}": value for key, value in xattrs.items()}
        assert all(byte < 0x80 for byte in given)
        below.add(tar(entry(name, mtime=TIME, mode=0o644, pax=pax)))
        (upper / name).touch(mode=0o644)
        os.setxattr(upper / name, "system.posix_acl_access", given)
        os.utime(upper / name, (TIME, TIME))
    assert "system.posix_acl_access" in os.listxattr(upper / "f0")
    assert os.getxattr(upper / "f0", "system.posix_acl_access") != odd
    assert os.listxattr(upper / "f1") == []
    assert listed(upper, below) == []
    os.setxattr(
        upper / "f0",
        "system.posix_acl_access",
        acl((1, 6, 0), (2, 4, 8), (4, 4, 0), (16, 4, 0), (32, 4, 0)),
    )
    assert [c.fields for c in walk(upper, below)] == [("xattrs",)]


def test_holes_are_compared_as_zeros(upper: Path, below: Below) -> None:
    data = bytes(1 << 20) + b"x" + bytes(1 << 20)
    below.add(tar(entry("f", data=data, mtime=TIME, mode=0o644)))

    def make(at: int, byte: bytes) -> None:
        with (upper / "f").open("wb") as file:
            file.truncate(len(data))
            file.seek(at)
            file.write(byte)
        (upper / "f").chmod(0o644)
        os.utime(upper / "f", (TIME, TIME))

    make(1 << 20, b"x")
    assert listed(upper, below) == []
    make(1 << 20, b"y")
    assert [c.fields for c in walk(upper, below)] == [("content",)]
    make(5, b"x")
    assert [c.fields for c in walk(upper, below)] == [("content",)]


def test_a_time_that_is_set_back_hides_nothing(upper: Path, below: Below) -> None:
    below.add(
        tar(
            entry("content", data=b"1", mtime=TIME, mode=0o644),
            entry("device", b"3", devmajor=1, devminor=3, mtime=TIME, mode=0o644),
            entry("same", b"3", devmajor=1, devminor=3, mtime=TIME, mode=0o644),
            entry("size", data=b"1", mtime=TIME, mode=0o644),
            entry("target", b"2", linkname="to", mtime=TIME, mode=0o777),
        )
    )
    (upper / "content").write_bytes(b"2")
    (upper / "size").write_bytes(b"11")
    os.mknod(upper / "device", 0o020644, os.makedev(1, 5))
    os.mknod(upper / "same", 0o020644, os.makedev(1, 3))
    (upper / "target").symlink_to("TO")
    for path in upper.iterdir():
        os.utime(path, (TIME, TIME), follow_symlinks=False)
    found = {change.path.decode(): change.fields for change in walk(upper, below)}
    assert found == {name: (name,) for name in ("content", "device", "size", "target")}


def test_what_vanished_with_a_directory_is_added_up(upper: Path, below: Below) -> None:
    below.add(
        tar(
            directory("d"), entry("d/a", data=b"1" * 10), directory("d/sub"),
            entry("d/sub/b", data=b"2" * 5), entry("d/gone", data=b"3" * 100),
            entry("d/twice", data=b"4" * 7), entry("d/again", b"1", linkname="d/twice"),
            directory("e"), entry("e/x", data=b"5"),
        )
    )  # fmt: skip
    below.add(tar(entry("d/.wh.gone"), entry("d/a", data=b"1" * 20)))
    whiteout(upper / "d")
    (upper / "e").write_bytes(b"66")
    d, e = walk(upper, below, sizes=True)
    assert (d.before and d.before.size, e.before and e.before.size) == (20 + 5 + 7, 1)
    assert e.after is not None
    assert (e.fields, e.after.size) == (("type",), 2)


def test_links_name_the_first(upper: Path, below: Below) -> None:
    (upper / "b").touch()
    os.link(upper / "b", upper / "a")
    os.link(upper / "b", upper / "c")
    assert [(c.path, c.linked) for c in walk(upper, below)] == [
        (b"a", None), (b"b", b"a"), (b"c", b"a"),
    ]  # fmt: skip


def test_paths_are_left_out_with_what_is_in_them(upper: Path, below: Below) -> None:
    (upper / "etc").mkdir()
    (upper / "etc/hosts").touch()
    (upper / "etc/x").touch()
    (upper / "dev/pts").mkdir(parents=True)
    without = frozenset((b"etc/hosts", b"dev"))
    assert listed(upper, below, without=without) == ["A /etc", "A /etc/x"]


def test_sockets_and_everything_else_have_a_type(
    upper: Path, below: Below, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(upper)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s")
    os.mkfifo("p")
    os.mknod("c", 0o020600, os.makedev(1, 3))
    os.mknod("b", 0o060600, os.makedev(7, 300))
    Path("l").symlink_to("x")
    assert {c.path: c.after and c.after.type for c in walk(upper, below)} == {
        b"b": "block", b"c": "char", b"l": "symlink", b"p": "fifo", b"s": "socket",
    }  # fmt: skip


# --- while it changes ---------------------------------------------------------------------------


def test_what_goes_meanwhile_is_left_out(upper: Path, below: Below) -> None:
    for name in ("a", "b/x", "c", "d"):
        (upper / name).parent.mkdir(exist_ok=True)
        (upper / name).touch()
    found = walk(upper, below)
    first = next(found)
    shutil.rmtree(upper / "b")
    (upper / "c").unlink()
    assert [first.path, *(change.path for change in found)] == [b"a", b"d"]


def test_a_directory_that_becomes_a_symlink_leads_nowhere(
    upper: Path, below: Below, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    for name in ("x", "y"):
        (upper / "d").mkdir(exist_ok=True)
        (upper / "d" / name).touch()
        (secret / name).write_text("the secret")
    found = walk(upper, below)
    d, x = next(found), next(found)
    (upper / "d").rename(tmp_path / "moved")
    (upper / "d").symlink_to(secret)
    rest = list(found)
    assert (d.path, x.path) == (b"d", b"d/x")
    # The directory is open still, or looked for again: never what the symlink leads to.
    assert all(change.after is not None and change.after.size == 0 for change in rest)


def test_a_tree_deeper_than_any_path_is_long(upper: Path, below: Below) -> None:
    fd = os.open(upper, os.O_RDONLY)
    for _ in range(40):
        os.mkdir("d" * 250, dir_fd=fd)
        further = os.open("d" * 250, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = further
    os.close(fd)
    found = list(walk(upper, below))
    assert len(found) == 40
    assert len(found[-1].path) == 40 * 251 - 1


@pytest.mark.long
@pytest.mark.parametrize("covered", [False, True])
def test_a_hundred_thousand_names_take_seconds(upper: Path, below: Below, *, covered: bool) -> None:
    count = 100_000
    below.add(tar(directory("d"), *(entry(f"d/{n:06}") for n in range(count))))
    if covered:
        opaque(upper / "d")
    else:
        (upper / "d").mkdir(mode=0o755)
        for number in range(count):
            (upper / "d" / f"{number:06}").touch(mode=0o644)
    begun = time.monotonic()
    found = listed(upper, below)
    taken = time.monotonic() - begun
    assert (len(found), found[0], found[1][0]) == (count + 1, "C /d", "D" if covered else "C")
    assert taken < 60, taken

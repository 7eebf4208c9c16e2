"""Who a container's process is: docker's rules, and files of an image that are none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayctl.errors import BadInput
from overlayctl.runtime import users
from overlayctl.runtime.users import User
from tests.busybox import GROUP, PASSWD


class Root:
    """A container's root."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "etc").mkdir(parents=True)
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def user(self, text: str) -> User:
        return users.resolve(self.fd, text)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    root = Root(tmp_path / "root")
    yield root
    os.close(root.fd)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", User(0, 0, (0,), "/root")),
        ("root", User(0, 0, (0,), "/root")),
        ("web", User(33, 44, (44, 55), "/srv")),
        ("33", User(33, 44, (44, 55), "/srv")),
        ("web:more", User(33, 55, (55,), "/srv")),
        ("web:7", User(33, 7, (7,), "/srv")),
        ("7", User(7, 0, (0,), "/")),
        ("7:web", User(7, 44, (44,), "/")),
        ("7:8", User(7, 8, (8,), "/")),
        (":last", User(0, 66, (66,), "/root")),
    ],
)
def test_users_and_groups_are_dockers(root: Root, text: str, expected: User) -> None:
    (root.path / "etc/passwd").write_bytes(PASSWD)
    (root.path / "etc/group").write_bytes(b"# comment\nshort\n\n" + GROUP)
    assert root.user(text) == expected


@pytest.mark.parametrize(
    "text", ["nobody", "web:none", "-1", "99999999999", "4294967295", "\u0663"]
)
def test_what_is_not_there_is_named(root: Root, text: str) -> None:
    (root.path / "etc/passwd").write_bytes(PASSWD)
    (root.path / "etc/group").write_bytes(GROUP)
    with pytest.raises(BadInput, match=text.rpartition(":")[2]):
        root.user(text)


def test_a_file_may_lie_where_a_link_leads_inside(root: Root) -> None:
    (root.path / "passwd").write_bytes(PASSWD)
    (root.path / "etc/passwd").symlink_to("/../../passwd")
    assert root.user("web").uid == 33


def marker(path: Path) -> None:
    """A file of the host that nobody may read."""
    path.write_text("marker:x:4711:4711::/host:/bin/sh\n")


def hostile(kind: str, place: Path, outside: Path) -> None:
    """What an image may have instead of a file."""
    marker(outside)
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "absolute":
        place.symlink_to(outside)
    elif kind == "relative":
        place.symlink_to("../" * 40 + str(outside).lstrip("/"))
    elif kind == "magic":
        fd = os.open(outside, os.O_RDONLY)
        place.symlink_to(f"/proc/self/fd/{fd}")
    elif kind == "directory":
        place.mkdir()
    elif kind == "device":
        os.mknod(place, 0o20666, os.makedev(1, 5))
    elif kind == "endless":
        place.symlink_to("passwd")
    elif kind == "sparse":
        with place.open("wb") as file:
            file.truncate(1 << 30)


KINDS = ("fifo", "absolute", "relative", "magic", "directory", "device", "endless", "sparse", "no")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_not_there(root: Root, tmp_path: Path, kind: str) -> None:
    hostile(kind, root.path / "etc/passwd", tmp_path / "outside")
    assert root.user("") == User(0, 0, (0,), "/")
    assert root.user("7:8") == User(7, 8, (8,), "/")
    with pytest.raises(BadInput):
        root.user("marker")
    assert root.user("4711").home == "/"

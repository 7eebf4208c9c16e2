"""Names of every encoding and of none, from each kind of tar header to the kernel and back."""

from __future__ import annotations

import base64
import json
import os
import tarfile
import unicodedata
from pathlib import Path
from typing import Literal

import pytest

from tests.archives import docker_archive
from tests.cli.conftest import Shell
from tests.layer.tars import tar

LONGEST = b"n" * 255
# The second byte of that character is a backslash in Shift-JIS.
SHIFT_JIS = "\u8868.txt".encode("shift_jis")
NAMES = [
    "caf\xe9".encode("latin-1"),
    SHIFT_JIS,
    "\u0444\u0430\u0439\u043b".encode("koi8-r"),
    "x\u4e2d".encode("utf-16-be").replace(b"\0", b""),
    unicodedata.normalize("NFC", "e\u0301").encode(),
    unicodedata.normalize("NFD", "\xe9").encode(),
    "\U0001f600\u200d\U0001f525".encode(),
    "\u202egnp.exe".encode(),
    "\ufeff".encode(),
    b"new\nline",
    b"\x01\x1b[31mred",
    b"\x7f\x80\x9b",
    b"\xff\xfe",
    b"\xc0\xae\xc0\xae",
    b"\xed\xa0\x80",
    b"back\\slash",
    b"\\",
    b"-rf",
    b"--help",
    b" ",
    b"\t",
    b"...",
    b"..\xff",
    b"%2F",
    b"'\"$`*?[]{}~!#&|;<>",
    b"a:b,c=d",
    b".wh",
    b"x.wh.y",
    b".WH.x",
    LONGEST,
    ("\u3042" * 85).encode(),
]
FORMATS: dict[str, Literal[0, 1, 2]] = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}
# Nothing longer fits where a header has no other place than its own field.
USTAR_LONGEST = 100


def member(kind: str, name: bytes, data: bytes = b"", target: bytes = b"") -> bytes:
    """One entry whose name stands in a header of that kind, byte for byte."""
    info = tarfile.TarInfo(os.fsdecode(name))
    info.size = len(data)
    if target:
        info.type, info.linkname = tarfile.SYMTYPE, os.fsdecode(target)
    head = info.tobuf(FORMATS[kind], "utf-8", "surrogateescape")
    assert name in head
    return head + data + bytes(-len(data) % 512)


def fitting(kind: str, room: int = 0) -> list[bytes]:
    """The names that a header of that kind can hold, with ``room`` more bytes."""
    return [name for name in NAMES if kind != "ustar" or len(name) + room <= USTAR_LONGEST]


@pytest.fixture(params=FORMATS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def files(kind: str) -> dict[bytes, bytes]:
    return {name: b"%d\n" % number for number, name in enumerate(fitting(kind))}


@pytest.fixture
def loaded(kind: str, files: dict[bytes, bytes], run: Shell, tmp_path: Path) -> Shell:
    """A store with an image of two layers: every name, and whiteouts of every second one."""
    bottom = tar(
        *(member(kind, name, data) for name, data in files.items()),
        *(member(kind, b"in/" + name, b"x") for name in fitting(kind, 3)),
        *(member(kind, b"l%d" % n, target=name) for n, name in enumerate(files)),
    )
    gone = fitting(kind, 4)[::2]
    top = tar(*(member(kind, b".wh." + name) for name in gone))
    run("load", docker_archive(tmp_path / "a.tar", [bottom, top]))
    return run


def test_the_kernel_has_every_name(kind: str, loaded: Shell, files: dict[bytes, bytes]) -> None:
    place = os.fsencode(loaded.path("layer", "path", "demo:1"))
    links = [b"l%d" % number for number in range(len(files))]
    assert sorted(os.listdir(place)) == sorted([*files, b"in", *links])
    assert sorted(os.listdir(place + b"/in")) == sorted(fitting(kind, 3))
    for number, (name, data) in enumerate(files.items()):
        assert Path(os.fsdecode(place + b"/" + name)).read_bytes() == data
        assert os.readlink(place + b"/l%d" % number) == name


def test_whiteouts_hide_every_name(kind: str, loaded: Shell, files: dict[bytes, bytes]) -> None:
    gone = set(fitting(kind, 4)[::2])
    top = os.fsencode(loaded.path("layer", "path", "demo:2"))
    assert set(os.listdir(top)) == gone
    assert all(os.lstat(top + b"/" + name).st_rdev == 0 for name in gone)
    merged = os.fsencode(loaded.path("image", "mount", "demo"))
    left = set(os.listdir(merged))
    assert left.isdisjoint(gone)
    assert set(files) - gone < left
    loaded("umount", "demo")


def test_commands_tell_every_name(loaded: Shell, files: dict[bytes, bytes]) -> None:
    paths = os.fsencode(loaded("layer", "files", "-0", "demo:1").out).split(b"\0")
    assert set(files) < set(paths)
    documents = json.loads(loaded("layer", "files", "--json", "demo:1").out)
    told = []
    for document in documents:
        text, encoded = document["Path"], document.get("PathBase64")
        name = base64.b64decode(encoded) if encoded else text.encode()
        assert (encoded is None) is _is_utf8(name)
        told.append(name or b".")
    assert [*told, b""] == paths
    targets = {document["Target"] for document in documents if "TargetBase64" not in document}
    assert {name.decode() for name in files if _is_utf8(name)} | {None} == targets


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_lists_are_safe_on_a_terminal(loaded: Shell, files: dict[bytes, bytes]) -> None:
    for arguments in (("demo:1",), ("-q", "demo:1")):
        out = loaded("layer", "files", *arguments).out
        # The root, the directory and what is in it, the files and the links.
        paths = os.fsencode(loaded("layer", "files", "-0", "demo:1").out).split(b"\0")
        assert len(out.splitlines()) == len(paths) - 1 > 2 * len(files)
        for character in out.replace("\n", ""):
            assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"), character


def test_a_file_of_every_name_is_read(loaded: Shell, files: dict[bytes, bytes]) -> None:
    for name, data in files.items():
        assert loaded("layer", "cat", "demo:1", "--", os.fsdecode(name)).out.encode() == data


@pytest.mark.parametrize("name", [b"n" * 256, b".wh." + b"n" * 256, b"d" * 256 + b"/n"])
def test_a_name_longer_than_the_kernel_takes(name: bytes, run: Shell, tmp_path: Path) -> None:
    archive = docker_archive(tmp_path / "a.tar", [tar(member("pax", name))])
    assert "is longer than 255 bytes" in run("load", archive, ok=1).err

"""docs/store-format.md is true, and enough: a reader written from it sees what the kernel shows."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import random
import re
import stat
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from overlayctl import layout as places
from overlayctl import names
from overlayctl.layer import format as form
from overlayctl.layer import pack
from overlayctl.layer.index import Index, verify
from overlayctl.layout import Layout
from overlayctl.store import check, images
from tests import store_format_reader as reader
from tests.layer.tars import directory, entry, hardlink, symlink, tar
from tests.oracles import trees
from tests.store import stores

PAGE = Path(__file__).parents[1] / "docs" / "store-format.md"
TAG = "docker.io/library/demo:1"
LONG_TAG = f"{'%s.example.org' % ('h' * 60)}:5000/{'/'.join(['a-b_c'] * 30)}:{'v' * 128}"
ACL = bytes.fromhex("02000000 01000600ffffffff 04000400ffffffff 20000400ffffffff")


# -- the corpus -------------------------------------------------------------------------


def _bottom() -> bytes:
    rng = random.Random(2)
    return tar(
        directory("./", mode=0o711, mtime=-5),
        directory("lib", mode=0o750, uid=7, gid=8, xattrs={"user.from": "below"}),
        entry("lib/tool", data=rng.randbytes(5000), mode=0o4755, xattrs={"user.tool": "t"}),
        symlink("lib/link", "tool", mtime=3),
        entry("lib/empty"),
        directory("replaced"),
        entry("replaced/old", data=b"old"),
        entry("gone", data=b"gone"),
    )


def _everything() -> bytes:
    rng = random.Random(7)
    long = "n" * 255
    odd = [bytes(rng.sample(range(1, 47), 20)) + bytes(rng.sample(range(48, 256), 99))
           for _ in range(400)]  # fmt: skip
    dirty = entry("padding/dirty", data=b"d" * 700, xattrs={"user.x": "y"})
    return tar(
        *(entry(f"size/{n}", data=rng.randbytes(n)) for n in (0, 1, 511, 512, 513, 70_000)),
        *(symlink(f"links/{n}", "t" * n, mtime=n) for n in (1, 447, 448, 449, 511, 512, 513, 4095)),
        symlink("links/x", "t" * 440, xattrs={"trusted.a": "b" * 31}),
        entry(f"{long}/{long}", data=b"x", uid=2**32 - 2, gid=70_000),
        entry("/".join(["d"] * 1500 + ["deep"]), data=b"deep"),
        *(entry("many/" + os.fsdecode(name), data=name) for name in odd),
        *(
            entry(f"many/{name}")
            for name in ("!", "-", ".-", "...", "..a", ".a", "é", "\U0001f600")
        ),
        hardlink("hard/one", "size/513"),
        hardlink("hard/two", "links/1"),
        entry("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        entry("dev/big", tarfile.BLKTYPE, devmajor=4095, devminor=1048575),
        entry("dev/pipe", tarfile.FIFOTYPE),
        entry("time/early", mtime=-(2**40)),
        entry("time/exact", mtime=1234567890.125),
        entry(
            "xattrs/file",
            data=b"caps",
            mode=0o6755,
            xattrs={
                "user.a": "1",
                "user.é": "2" * 999,
                "user.none": "",
                "trusted.mine": "3",
                "trusted.overlay.redirect": "/etc",
                "trusted.overlay.opaque": "y",
                "security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00" + "\x00" * 12,
                "security.selinux": "dropped",
                "system.posix_acl_access": os.fsdecode(ACL),
            },
        ),
        directory("xattrs/directory", xattrs={"system.posix_acl_default": os.fsdecode(ACL)}),
        # Past its end a file whose padding is not zero must show none of it.
        dirty[: -(-700 % 512)] + b"S" * (-700 % 512),
        directory("empty"),
        directory("opaque"),
        entry("opaque/.wh..wh..opq"),
        entry("opaque/new", data=b"new"),
        entry(".wh.gone", mtime=99, uid=3),
        entry("lib/.wh.empty"),
        entry(".wh.replaced"),
        directory("replaced"),
        # What a layer takes from below: an implied parent, and links to files that are not here.
        entry("lib/sub/new", data=b"sub"),
        hardlink("lib/borrowed", "lib/tool"),
        hardlink("borrowed-link", "lib/link"),
    )


def _sparse(tmp_path: Path) -> bytes:
    place = tmp_path / "sparse"
    place.mkdir()
    pieces: dict[str, tuple[int, list[tuple[int, bytes]]]] = {
        "hole": (100 << 20, []),
        "three": (1 << 30, [(0, b"1"), (500 << 20, b"2"), ((1 << 30) - 1, b"3")]),
        "odd": (1_234_567, [(at * 12_345, b"%d" % at) for at in range(100)]),
        "whole": (8 << 20, [(16384, random.Random(3).randbytes(3 << 20))]),
    }
    for name, (size, parts) in pieces.items():
        with (place / name).open("wb") as file:
            file.truncate(size)
            for offset, data in parts:
                file.seek(offset)
                file.write(data)
    command = ["tar", "-C", str(place), "--format=posix", "--sparse", "-cf", "-", "."]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.fixture
def corpus(tmp_path: Path) -> Layout:
    """A store with an image of layers that have everything in them."""
    layout = stores.new(os.path.join(tmp_path, os.fsdecode(b"st ore\xff")))
    image = stores.add_image(layout, _bottom(), _everything(), _sparse(tmp_path), bytes(1024))
    with stores.writing(layout) as place:
        for reference in (TAG, LONG_TAG):
            images.tag(layout, place, reference, image.hex)
    assert [len(name) for name in image.layers] == [64, 64 + 17, 64, 64]
    return layout


def _entries(path: str) -> dict[bytes, tuple[trees.Entry, bool, bool]]:
    """What the reader says of a layer file, in the words of the kernel's oracle."""
    listed = list(reader.Layer(path).files())
    paths: dict[int, list[bytes]] = {}
    for name, found in listed:
        if found.type != "directory":
            paths.setdefault(found.nid, []).append(name)
    said = {}
    for name, found in listed:
        group = tuple(sorted(paths.get(found.nid, ())))
        said[name] = (
            trees.Entry(
                found.type, found.mode, found.uid, found.gid, found.mtime_ns,
                found.size if found.type == "file" else None, found.sha256, found.target,
                found.device, found.xattrs, group if len(group) > 1 else (),
            ),
            found.whiteout,
            found.opaque,
        )  # fmt: skip
    assert len(said) == len(listed)
    return said


# -- the reader ---------------------------------------------------------------------------


def test_the_reader_is_of_a_hundred_lines_and_knows_the_standard_library_alone() -> None:
    text = Path(reader.__file__).read_text()
    assert len(text.splitlines()) <= 100
    imported = [
        name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else [n.name for n in node.names]
        )
    ]
    assert imported
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_the_reader_sees_what_the_kernel_shows(corpus: Layout) -> None:
    files = reader.layers(corpus.root, TAG)
    assert files == reader.layers(corpus.root, LONG_TAG)
    by_name = [os.path.basename(os.path.dirname(path)) for path in files]
    with stores.attached(corpus, by_name):
        for name, path in zip(by_name, files, strict=True):
            said = _entries(path)
            shown = trees.snapshot(corpus.diff(name))
            assert trees.differences({p: e for p, (e, _, _) in said.items()}, shown) == []


def test_the_reader_sees_what_overlayctl_reads(corpus: Layout) -> None:
    seen: set[str] = set()
    for path in reader.layers(corpus.root, TAG):
        said = _entries(path)
        with Index.open(path) as index:
            read = dict(index.walk())
            assert list(said.keys() ^ read.keys()) == []
            assert len(said) == index.header.entries + 1
            for name, node in read.items():
                found, whiteout, opaque = said[name]
                assert (found.mode, found.uid, found.gid) == (
                    stat.S_IMODE(node.mode), node.uid, node.gid
                )  # fmt: skip
                assert found.mtime_ns == node.mtime * 10**9 + node.mtime_ns
                assert found.xattrs == index.xattrs(node)
                assert whiteout == index.is_whiteout(node)
                assert opaque == index.is_opaque(node)
                if stat.S_ISLNK(node.mode):
                    assert found.target == index.target(node)
                if stat.S_ISREG(node.mode):
                    digest = hashlib.sha256()
                    for at in range(0, node.size, 64 << 20):
                        digest.update(index.read(node, at, 64 << 20))
                    assert (found.size, found.sha256) == (node.size, digest.hexdigest())
                    seen.add(("plain", "", "inline", "", "chunks")[node.layout])
                seen |= {"whiteout"} if whiteout else set()
                seen |= {"opaque"} if opaque else set()
                seen |= {"blocks"} if stat.S_ISDIR(node.mode) and node.size > 10_000 else set()
    assert seen == {"plain", "inline", "chunks", "whiteout", "opaque", "blocks"}


def test_of_several_files_of_a_layer_the_highest_counts(corpus: Layout) -> None:
    first = reader.layers(corpus.root, TAG)[0]
    before = _entries(first)
    again = os.path.join(os.path.dirname(first), "layer-10.erofs")
    Path(again).write_bytes(Path(first).read_bytes())
    for name in ("layer-2.erofs", "layer-03.erofs", "layer-99.erofs.old", "layer-x.erofs"):
        Path(os.path.dirname(first), name).write_bytes(b"")
    os.chmod(first, 0o600)
    os.truncate(first, 0)
    assert reader.layers(corpus.root, TAG)[0] == again
    assert corpus.layer_file(os.path.basename(os.path.dirname(first))) == again
    assert _entries(again) == before


def test_what_the_page_says_of_a_files_bytes_holds(corpus: Layout) -> None:
    for path in reader.layers(corpus.root, TAG):
        layer, data = reader.Layer(path), Path(path).read_bytes()
        header = layer.header
        after = 4096 + header["tar_size"]
        assert sorted(header) == sorted(_fields("### Header"))
        assert _hex(data[4096:after]) == header["diff_id"].removeprefix("sha256:")
        assert _hex(data[1024:4096] + data[after:]) == header["index_sha256"]
        assert layer.inodes == after + -after % 4096
        assert not any(data[1152:4096] + data[after : layer.inodes])
        assert len(data) % 4096 == 0
        assert layer.root == 2
        at, size = header["facts"]["offset"], header["facts"]["size"]
        facts = data[at : at + size]
        text = f"overlayctl layer\n{header['diff_id']}\n{_hex(facts)}\n{header['writer']}\n"
        assert data[1072:1088] == _uuid(text)
        directory = os.path.basename(os.path.dirname(path))
        assert directory == header["diff_id"][7:] + (f"-{_hex(facts)[:16]}" if facts else "")
        found = dict(layer.files())
        inodes = {node.nid: node.size for node in found.values() if node.type == "file"}
        assert header["size"] == sum(inodes.values())
        assert header["entries"] == len(found) - 1
        assert {node.mode for node in found.values() if node.whiteout} <= {0}
        with_whiteouts = {os.path.dirname(name) for name, node in found.items() if node.whiteout}
        marked = {n for n, node in found.items() if b"trusted.overlay.origin" in node.xattrs}
        assert marked == with_whiteouts
        assert not any(found[name].opaque for name in with_whiteouts)


def test_inherited_facts_are_what_the_page_says(corpus: Layout) -> None:
    below, path = reader.layers(corpus.root, TAG)[:2]
    layer, data = reader.Layer(path), Path(path).read_bytes()
    at, size = layer.header["facts"]["offset"], layer.header["facts"]["size"]
    facts = json.loads(data[at : at + size])
    assert json.dumps(facts, sort_keys=True, indent=1).encode() + b"\n" == data[at : at + size]
    assert [fact.get("path", fact.get("link")) for fact in facts] == [
        "", "lib", "lib/link", "lib/tool",
    ]  # fmt: skip
    assert {key for fact in facts for key in fact} == set(_fields("## 5. Inherited facts"))
    known = dict(reader.Layer(below).files())
    for fact in facts:
        node = known[os.fsencode(fact.get("link", fact.get("path")))]
        assert (int(fact["mode"], 8) & 0o7777, fact["uid"]) == (node.mode, node.uid)
        assert {os.fsencode(k): base64.b64decode(v) for k, v in fact["xattrs"].items()} == (
            node.xattrs
        )
        if "link" in fact:
            digest = node.sha256 or _hex(node.target)
            time = fact["mtime"][0] * 10**9 + fact["mtime"][1]
            assert (fact["sha256"], fact["size"], time) == (digest, node.size, node.mtime_ns)


# -- the page's tables and examples -------------------------------------------------------


def _hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _uuid(text: str) -> bytes:
    uuid = bytearray(hashlib.sha256(text.encode()).digest()[:16])
    uuid[6] = uuid[6] & 0x0F | 0x80
    uuid[8] = uuid[8] & 0x3F | 0x80
    return bytes(uuid)


def _section(heading: str) -> str:
    """The page from a heading to the next one."""
    text = PAGE.read_text()
    assert text.count(f"\n{heading}\n") == 1, heading
    return re.split(r"\n##+ ", text.split(f"\n{heading}\n")[1])[0]


def _rows(text: str) -> list[list[str]]:
    """The rows of all tables in a text, the lines of dashes left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not set("".join(row)) <= {"-"}]


def _fields(heading: str) -> list[str]:
    """The names in backquotes in the first column of a section's tables."""
    return [name for row in _rows(_section(heading)) for name in re.findall("`(.+?)`", row[0])]


def _places(packed: struct.Struct) -> list[tuple[int, int]]:
    """Offset and size of each field of a structure, padding included."""
    found, at = [], 0
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", packed.format):
        sizes = [int(count)] if kind in "sx" and count else [struct.calcsize("<" + kind)]
        for size in sizes if kind in "sx" else sizes * int(count or 1):
            found.append((at, size))
            at += size
    assert at == packed.size
    return found


@pytest.mark.parametrize(
    ("heading", "packed"),
    [
        ("### Superblock", form.SUPERBLOCK),
        ("### Inodes", form.INODE),
        ("### Xattrs", form.XATTR),
        ("### Directories", form.DIRENT),
    ],
)
def test_structures_are_laid_out_as_the_page_says(heading: str, packed: struct.Struct) -> None:
    rows = [row for row in _rows(_section(heading)) if len(row) == 4 and row[0].isdigit()]
    assert [(int(row[0]), int(row[1])) for row in rows] == _places(packed)


def test_the_superblock_has_the_values_of_the_page(corpus: Layout) -> None:
    data = Path(reader.layers(corpus.root, TAG)[1]).read_bytes()
    compared = 0
    for row in _rows(_section("### Superblock"))[1:]:
        at, size = 1024 + int(row[0]), int(row[1])
        value = {"zeros": "0"}.get(row[3], row[3].split(" ")[0])
        if re.fullmatch(r"0x[0-9A-F]+|\d+", value):
            assert int.from_bytes(data[at : at + size], "little") == int(value, 0), row
            compared += 1
    assert compared == 19
    assert int.from_bytes(data[1024 + 36 : 1024 + 40], "little") == len(data) // 512


def test_constants_are_those_of_the_page() -> None:
    rows = dict(row for row in _rows(_section("## 3. layer.erofs")) if len(row) == 2)
    said = {name: int(value, 0) for name, value in rows.items() if value[:1].isdigit()}
    assert said == {
        "block size": form.BLOCK,
        "start of the tar": form.PAGE,
        "size of the header, its digest included": form.HEADER,
        "magic number": form.MAGIC,
        "block number that stands for a hole": form.NULL_CHUNK,
        "layout: plain": form.PLAIN,
        "layout: inline": form.INLINE,
        "layout: chunks": form.CHUNKED,
        "longest name": form.NAME_MAX,
        "longest symlink target": form.TARGET_MAX,
        "longest xattr value": form.XATTR_VALUE_MAX,
    }
    prefixes = [row for row in _rows(_section("### Xattrs")) if len(row) == 2 and row[0].isdigit()]
    said_prefixes = {int(row[0]): row[1].split("`")[1].encode() for row in prefixes}
    assert said_prefixes == form.XATTR_PREFIXES
    types = [row for row in _rows(_section("### Directories")) if len(row) == 2][1:]
    formats = {
        "regular file": stat.S_IFREG,
        "directory": stat.S_IFDIR,
        "character device": stat.S_IFCHR,
        "block device": stat.S_IFBLK,
        "fifo": stat.S_IFIFO,
        "symlink": stat.S_IFLNK,
    }
    assert {kind: int(number) for number, kind in types} == {
        kind: pack._DIRENT_TYPE[mode >> 12] for kind, mode in formats.items()
    }


def test_the_stores_names_and_records_are_those_of_the_page(corpus: Layout) -> None:
    image = images.get(corpus, images.listed(corpus)[0])
    stores.add_container(corpus, image)
    named = {row[0].strip("`").split("/")[0] for row in _rows(_section("## 1. The directory"))[1:]}
    assert named == {*os.listdir(corpus.root)}
    assert named == {name.split("/")[0] for name in places.DIRECTORIES} | {
        "overlayctl.json", "empty.erofs",
    }  # fmt: skip
    marker = json.loads(Path(corpus.marker).read_text())
    assert sorted(marker) == sorted(_fields("### overlayctl.json"))
    assert marker["incompatible"] == ["erofs-tar-1"]
    of_image = set(_fields("### Images"))
    assert set(image.record) - {"version"} <= of_image
    assert {f"layers[].{key}" for key in image.record["layers"][0]} <= of_image
    said = set(_fields("### Snapshots and containers"))
    container = json.loads(Path(corpus.container(stores.KEY)).read_text())
    assert set(container) - {"version"} <= said
    inside = set(os.listdir(corpus.snapshot(stores.KEY)))
    assert inside == {"snapshot.json", "keep", "upper"}
    assert {"snapshot.json", "keep", "upper/", "work.<n>/"} <= said
    for path, mode in {
        corpus.root: 0o700,
        corpus.path("layers", image.layers[0]): 0o700,
        corpus.layer_file(image.layers[0]): 0o400,
        corpus.container(stores.KEY): 0o600,
        corpus.marker: 0o600,
    }.items():
        assert stat.S_IMODE(os.stat(path).st_mode) == mode, path
    tag = Path(corpus.path("tags", names.tag_file(TAG)))
    assert tag.read_text() == f"{image.id}\n{TAG}\n"


def test_tag_files_are_named_as_the_page_says() -> None:
    examples = [re.findall("`(.+?)`", " ".join(row)) for row in _rows(_section("### Tags"))[1:]]
    assert len(examples) == 2
    for reference, file in examples:
        assert names.tag_file(reference) == file
        assert names.stored(names.familiar(reference)) == reference


def test_the_pages_example_is_what_the_writer_makes(tmp_path: Path) -> None:
    page = _section("## 6. An example")
    layout = stores.new(tmp_path / "store")
    (name,) = stores.add_layers(layout, bytes(1024)).names
    data = Path(layout.layer_file(name)).read_bytes()
    digest, uuid, empty = re.findall(r"`([0-9a-f]{32,64})`", page)
    blocks = re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)
    header, root, entries = (block.strip() for block in blocks)
    assert name == digest
    assert str(len(data)) in page
    assert data[:992].rstrip(b"\0").decode() == header
    assert data[1072:1088].hex() == uuid
    assert data[8256 : 8256 + 64] == bytes.fromhex(root)
    assert data[8704 : 8704 + 27] == bytes.fromhex(entries)
    assert hashlib.sha256(Path(layout.empty).read_bytes()).hexdigest() == empty
    assert Path(layout.empty).read_bytes()[1072:1088] == _uuid("overlayctl empty\n")
    assert f"sha256:{empty}" == check.EMPTY_IMAGE
    assert verify(layout.layer_file(name)) == []

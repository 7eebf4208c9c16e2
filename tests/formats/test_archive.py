"""Archives that nobody should have made, and the ways that input can arrive."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overlayctl.errors import BadArchive, BadInput, DigestMismatch, LimitExceeded, NotFound
from overlayctl.formats import read_images
from overlayctl.formats.plain import open_layers
from overlayctl.layer import compression
from overlayctl.layer.archive import Archive, Expansion, open_archive
from overlayctl.oci import Platform
from tests.archives import OCI, config, content, descriptor, diff_id, index, layout, manifest
from tests.layer.tars import directory, entry, hardlink, symlink, tar

LAYER = tar(entry("hello", data=b"hello\n"))
NOISE = bytes(range(128, 256)) * 8


def docker(*extra: bytes, layers: tuple[str, ...] = ("a/layer.tar",), tags: object = None) -> bytes:
    manifest = [{"Config": "c.json", "RepoTags": tags, "Layers": list(layers)}]
    return tar(
        entry("c.json", data=config(*[LAYER] * len(layers))),
        entry("manifest.json", data=json.dumps(manifest).encode()),
        *extra,
    )


def opened(data: bytes, tmp_path: Path) -> Archive:
    path = tmp_path / "input"
    path.write_bytes(data)
    return at(path)


def at(path: Path) -> Archive:
    return open_archive(str(path), lambda: str(path.parent))


# --- links and duplicates in a tar ---------------------------------------------------------


@pytest.mark.parametrize(
    "entries",
    [
        (entry("b/layer.tar", data=LAYER), symlink("a/layer.tar", "../b/layer.tar")),
        (entry("b/layer.tar", data=LAYER), symlink("a/layer.tar", "/b/layer.tar")),
        (entry("b/layer.tar", data=LAYER), symlink("a", "b")),
        (entry("b/layer.tar", data=LAYER), hardlink("a/layer.tar", "./b/layer.tar")),
        (entry("a/layer.tar", data=b"old"), entry("./a/layer.tar", data=LAYER)),
        (symlink("a/layer.tar", "../b"), symlink("b", "c"), entry("c", data=LAYER)),
    ],
)
def test_a_layer_is_found_behind_links(entries: tuple[bytes, ...], tmp_path: Path) -> None:
    with opened(docker(*entries), tmp_path) as archive:
        (image,) = read_images(archive)
        assert content(image.layers[0].source) == LAYER


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ((symlink("a/layer.tar", "layer.tar"),), "loop"),
        ((symlink("a", "b"), symlink("b", "a")), "loop"),
        ((symlink("a/layer.tar", "../../etc/passwd"),), "leads out"),
        ((symlink("a/layer.tar", "gone"),), "has no file"),
        ((hardlink("a/layer.tar", "gone"),), "hard link"),
        ((directory("a/layer.tar"),), "directory"),
        ((entry("a/layer.tar", b"6"),), "FIFO"),
        ((), "has no file"),
    ],
)
def test_a_layer_that_is_not_there(entries: tuple[bytes, ...], words: str, tmp_path: Path) -> None:
    with opened(docker(*entries), tmp_path) as archive, pytest.raises(BadArchive, match=words):
        read_images(archive)


def test_one_layer_twice(tmp_path: Path) -> None:
    data = docker(entry("a/layer.tar", data=LAYER), layers=("a/layer.tar",) * 2)
    with opened(data, tmp_path) as archive:
        (image,) = read_images(archive)
        assert len(image.layers) == 2


# --- what is no archive --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(600), "zip"),
        (gzip.compress(b"PK\x03\x04" + bytes(600)), "zip"),
        (gzip.compress(gzip.compress(LAYER)), "gzip data inside another"),
        (b"hello " * 200, "a text"),
        (NOISE, "no tar"),
        (b"x", "a text"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(docker())[:-30], "gzip data of .* is damaged or cut"),
        (docker()[:600], "cut|ends after"),
        (tar(entry("manifest.json", data=b"{nope")), "no JSON"),
        (tar(entry("manifest.json", data=b"[3]")), "names no config"),
    ],
)
def test_refused_with_what_it_is(data: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words), opened(data, tmp_path) as archive:
        read_images(archive)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        at(tmp_path / "gone")


def test_fds_are_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for data in (b"", b"x", gzip.compress(docker())[:-20], gzip.compress(docker())):
        with pytest.raises(BadInput), opened(data, tmp_path) as archive:
            read_images(archive)
    assert len(os.listdir("/proc/self/fd")) == before


# --- the ways in ---------------------------------------------------------------------------


def _fed(data: bytes) -> int:
    out, into = os.pipe()

    def feed() -> None:
        with os.fdopen(into, "wb") as pipe:
            pipe.write(data)

    threading.Thread(target=feed, daemon=True).start()
    return out


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
def test_a_pipe(
    pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with os.fdopen(_fed(pack(docker(entry("a/layer.tar", data=LAYER))))) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with open_archive("-", lambda: str(tmp_path)) as archive:
            (image,) = read_images(archive)
            assert content(image.layers[0].source) == LAYER


def test_plain_layers(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(LAYER)
    two.write_bytes(gzip.compress(LAYER))
    with open_layers([str(one), str(two)], lambda: str(tmp_path)) as layers:
        assert [content(source) for source in layers.sources] == [LAYER, LAYER]
    with pytest.raises(BadArchive, match="directory"):
        open_layers([str(one), str(tmp_path)], lambda: str(tmp_path))


# --- layouts -------------------------------------------------------------------------------


def test_a_layout_cannot_escape(tmp_path: Path) -> None:
    conf = config(LAYER)
    body = manifest(conf, LAYER)
    root = layout(tmp_path / "layout", index(descriptor(body, "x")), body, conf)
    outside = tmp_path / "secret"
    outside.write_bytes(LAYER)
    link = root / "blobs/sha256" / diff_id(LAYER).removeprefix("sha256:")
    for target in ("../../../secret", str(outside), "/proc/self/exe"):
        link.symlink_to(target)
        with at(root) as archive, pytest.raises(BadArchive):
            read_images(archive)
        link.unlink()
    os.mkfifo(link)
    with at(root) as archive:
        with pytest.raises(BadArchive, match="is not in"):
            read_images(archive)
        with pytest.raises(BadArchive, match="FIFO"):
            archive.source(str(link.relative_to(root)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"layers": []}, BadArchive, "0 layers, its config 1 diff_ids"),
        ({"artifactType": "application/x"}, BadArchive, "artifact"),
        ({"layers": [descriptor(b"?", OCI + "layer.v1.tar+encrypted")]}, BadArchive, "encrypted"),
        (
            {"layers": [descriptor(b"?", OCI + "layer.nondistributable.v1.tar")]},
            BadArchive,
            "foreign",
        ),
        ({"layers": [{"digest": "md5:1", "size": 1}]}, BadArchive, "sha256"),
        (
            {"layers": [{**descriptor(LAYER, "x"), "size": 3}]},
            BadArchive,
            "descriptor says 3",
        ),
        ({"config": {**descriptor(config(LAYER), ""), "size": 1}}, BadArchive, "says 1"),
    ],
)
def test_a_manifest_that_is_refused(
    change: dict[str, Any], error: type[BadInput], words: str, tmp_path: Path
) -> None:
    conf = config(LAYER)
    body = manifest(conf, LAYER, **change)
    root = layout(tmp_path / "layout", index(descriptor(body, "x")), body, conf, LAYER)
    with (
        at(root) as archive,
        pytest.raises(error, match=words),
    ):
        read_images(archive)


def test_a_changed_config(tmp_path: Path) -> None:
    conf = config(LAYER)
    body = manifest(conf, LAYER)
    root = layout(tmp_path / "layout", index(descriptor(body, "x")), body, conf, LAYER)
    path = root / "blobs/sha256" / diff_id(conf).removeprefix("sha256:")
    path.write_bytes(conf.replace(b"linux", b"linuX"))
    with at(root) as archive, pytest.raises(DigestMismatch):
        read_images(archive)


def test_an_index_without_end(tmp_path: Path) -> None:
    body = b"{}"
    blobs = []
    for _ in range(8):
        body = json.dumps(index(descriptor(body, "x"))).encode()
        blobs.append(body)
    root = layout(tmp_path / "layout", index(descriptor(body, "x")), *blobs)
    with (
        at(root) as archive,
        pytest.raises(BadArchive, match="nested"),
    ):
        read_images(archive)


def test_an_attestation_is_passed_over(tmp_path: Path) -> None:
    conf = config(LAYER)
    body = manifest(conf, LAYER)
    attests = {"vnd.docker.reference.type": "attestation-manifest"}
    inner = json.dumps(
        index(descriptor(body, "x"), descriptor(b"gone", "x", annotations=attests))
    ).encode()
    root = layout(tmp_path / "layout", index(descriptor(inner, "x")), inner, body, conf, LAYER)
    with at(root) as archive:
        (image,) = read_images(archive)
        assert image.manifest == body


# --- compression ---------------------------------------------------------------------------

_DATA = os.urandom(200_000) + b"abc" * 700_000
_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}


def _zstd(data: bytes) -> bytes:
    zstd = pytest.importorskip(
        "backports.zstd" if sys.version_info < (3, 14) else "compression.zstd"
    )
    packed: bytes = zstd.compress(data)
    return packed


_PACKERS["zstd"] = _zstd


def unpacked(data: bytes, name: str, step: int = 1 << 20) -> bytes:
    raw = [data[at : at + step] for at in range(0, len(data), step)]
    return b"".join(compression.decompressed(raw, name, "layer X"))


@pytest.mark.parametrize("name", _PACKERS)
def test_members_and_what_follows_them(name: str) -> None:
    packed = _PACKERS[name](_DATA)
    assert compression.codec(packed) == name
    assert unpacked(packed + packed, name) == _DATA * 2
    assert unpacked(packed + bytes(8) + packed + bytes(512), name) == _DATA * 2
    assert unpacked(packed + b"garbage", name) == _DATA
    small = _PACKERS[name](b"small") * 20
    for step in (1, 2, 3, 7, 11):
        assert unpacked(small, name, step) == b"small" * 20


def test_zstd_skippable_frames() -> None:
    skip = b"\x50\x2a\x4d\x18\x05\0\0\0hello"
    packed = _zstd(b"data")
    assert compression.codec(skip) == "zstd"
    assert unpacked(skip + packed + skip + packed + skip, "zstd") == b"datadata"


@pytest.mark.parametrize("name", _PACKERS)
def test_every_cut_is_noticed(name: str) -> None:
    packed = _PACKERS[name](b"some data " * 20)
    for end in range(len(packed)):
        with pytest.raises(BadArchive, match=f"the {name} data of layer X is damaged or cut"):
            unpacked(packed[:end], name)


def test_gzip_without_isal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    packed = gzip.compress(_DATA)
    assert unpacked(packed * 2 + b"junk", "gzip") == _DATA * 2
    with pytest.raises(BadArchive):
        unpacked(packed[:-1], "gzip")


def test_bombs() -> None:
    packed = gzip.compress(bytes(32 << 20))
    for limits in (Expansion(total=1 << 20), Expansion(ratio=10, floor=1 << 20)):
        with pytest.raises(LimitExceeded):
            list(compression.decompressed([packed], "gzip", "bomb", limits))


def test_one_manifest_for_two_platforms(tmp_path: Path) -> None:
    """Buildx writes such an index where one build serves both."""
    conf = config(LAYER)
    body = manifest(conf, LAYER)
    listed = [
        descriptor(body, OCI + "manifest.v1+json", platform={"os": "linux", "architecture": name})
        for name in ("amd64", "arm64")
    ]
    root = layout(tmp_path / "layout", index(*listed), body, conf, LAYER)
    for name in ("amd64", "arm64"):
        with at(root) as archive:
            (found,) = read_images(archive, platform=Platform("linux", name, ""))
            assert found.image_id == diff_id(conf)
    with at(root) as archive, pytest.raises(NotFound, match="layout has no image for linux/riscv"):
        read_images(archive, platform=Platform("linux", "riscv64", ""))

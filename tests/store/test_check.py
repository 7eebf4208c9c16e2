"""Whatever is changed behind the store's back, ``check`` names it, the part, and who suffers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from overlayctl.digest import of_bytes
from overlayctl.layer.format import PAGE, index_start
from overlayctl.layout import Layout
from overlayctl.store import check, images, layers
from tests.layer.tars import directory, entry, tar
from tests.store import stores

TAR = tar(directory("etc"), entry("etc/hosts", data=b"127.0.0.1"))
OTHER = tar(directory("srv"))
TAG = "docker.io/library/demo:1"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return stores.new(os.path.join(tmp_path, os.fsdecode(b"st ore:,\n\\\xff")))


def test_a_whole_store_is_clean(layout: Layout) -> None:
    image = stores.add_image(layout, TAR, OTHER, TAR, tag=TAG)
    stores.add_container(layout, image)
    assert check.check(layout) == []
    with open(layout.empty, "rb") as file:
        assert of_bytes(file.read()) == check.EMPTY_IMAGE


def _flip(path: str, at: int) -> None:
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    ("part", "at"),
    [
        ("header", 3),
        ("header", 1000),
        ("superblock", 1024),
        ("superblock", 1024 + 50),
        ("tar", PAGE),
        ("tar", PAGE + len(TAR) - 1),
        ("index", index_start(len(TAR)) + 64),
    ],
)
def test_one_changed_byte_of_a_layer(layout: Layout, part: str, at: int) -> None:
    image = stores.add_image(layout, TAR, OTHER)
    name = image.layers[0]
    _flip(layout.layer_file(name), at)
    (found,) = [f for f in check.check(layout) if f.tag == "layer-damaged"]
    assert part in found.message
    assert found.path == layout.layer_file(name)
    assert found.users == (f"image {image.hex}",)


@pytest.mark.parametrize("quick", [True, False])
def test_a_layer_of_a_later_format(layout: Layout, *, quick: bool) -> None:
    image = stores.add_image(layout, TAR)
    path = layout.layer_file(image.layers[0])
    text = Path(path).read_bytes()[:992].replace(b'"format":1', b'"format":2')
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.write(text + hashlib.sha256(text).digest())
    (found,) = check.check(layout, quick=quick)
    assert (found.tag, found.users) == ("layer-damaged", (f"image {image.hex}",))
    assert "format 2" in found.message


def test_a_cut_layer(layout: Layout) -> None:
    image = stores.add_image(layout, TAR)
    for length in (index_start(len(TAR)), PAGE, 100, 0):
        os.chmod(layout.layer_file(image.layers[0]), 0o600)
        os.truncate(layout.layer_file(image.layers[0]), length)
        for quick in (False, True):
            assert {f.tag for f in check.check(layout, quick=quick)} == {"layer-damaged"}, length


def _in(*names: str) -> Callable[[Layout, images.Image], str]:
    return lambda layout, image: layout.path(*names).format(image=image.hex, layer=image.layers[0])


@pytest.mark.parametrize(
    ("tag", "path"),
    [
        ("layer-missing", _in("layers", "{layer}")),
        ("image-damaged", _in("images", "{image}", "image.json")),
        ("config-damaged", _in("images", "{image}", "config.json")),
        ("manifest-missing", _in("images", "{image}", "manifest.json")),
        ("tag-dangling", _in("images", "{image}")),
        ("container-unfinished", _in("snapshots", stores.KEY)),
        ("snapshot-unfinished", _in("snapshots", stores.KEY, "keep")),
        ("snapshot-damaged", _in("snapshots", stores.KEY, "snapshot.json")),
        ("snapshot-damaged", _in("snapshots", stores.KEY, "upper")),
        ("snapshot-orphan", _in("containers", stores.KEY + ".json")),
        ("name-dangling", _in("containers", stores.KEY + ".json")),
        ("container-nameless", _in("containers", "names", "web")),
        ("empty-image-unreadable", _in("empty.erofs")),
    ],
)
def test_what_is_gone(
    layout: Layout, tag: str, path: Callable[[Layout, images.Image], str]
) -> None:
    image = stores.add_image(layout, TAR, tag=TAG)
    stores.add_container(layout, image)
    gone = path(layout, image)
    if os.path.isdir(gone):
        shutil.rmtree(gone)
    else:
        os.unlink(gone)
    assert tag in {found.tag for found in check.check(layout)}


def test_records_that_do_not_agree(layout: Layout) -> None:
    image = stores.add_image(layout, TAR, OTHER, tag=TAG)
    path = Path(layout.image(image.hex, "image.json"))
    record = json.loads(path.read_text())
    record["layers"] = record["layers"][::-1]
    path.write_text(json.dumps(record))
    messages = [found.message for found in check.check(layout)]
    assert messages == ["its chain ids are wrong", "it names other layers"]


def test_a_layer_under_anothers_name(layout: Layout) -> None:
    image = stores.add_image(layout, TAR)
    stores.add_image(layout, OTHER)
    first, second = layers.listed(layout)
    shutil.copy(layout.layer_file(second), layout.layer_file(first))
    (found,) = check.check(layout)
    assert found.tag == "layer-misnamed"
    assert second in found.message
    assert image.layers


def test_a_damaged_image_is_whole_after_it_is_loaded_again(layout: Layout) -> None:
    image = stores.add_image(layout, TAR)
    for name, text in (("image.json", "{"), ("config.json", "{}")):
        Path(layout.image(image.hex, name)).write_text(text)
        assert check.check(layout) != []
        assert stores.add_image(layout, TAR).hex == image.hex
        assert check.check(layout) == []


def test_tags_move_and_are_found(layout: Layout) -> None:
    first, second = stores.add_image(layout, TAR), stores.add_image(layout, OTHER)
    with stores.writing(layout) as place:
        assert images.tag(layout, place, TAG, first.hex) is None
        assert images.tag(layout, place, TAG, first.hex) is None
        assert images.tag(layout, place, TAG, second.hex) == first.hex
    assert images.resolve(layout, "demo:1") == (second, TAG)
    assert images.resolve(layout, first.id[:20])[0] == first
    (path,) = Path(layout.path("tags")).iterdir()
    assert path.read_text() == f"{second.id}\n{TAG}\n"
    path.rename(path.with_name("other"))
    assert [found.tag for found in check.check(layout)] == ["tag-misnamed"]

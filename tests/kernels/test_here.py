"""Large and odd images on the kernel that runs, this machine's own or one in QEMU.

What ``test_kernels`` starts in QEMU it starts with this file among others, and compares
what is recorded here with what it knows of that kernel.
"""

from __future__ import annotations

import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from overlayctl.engine import Engine
from overlayctl.kernel import mounttable, probe
from overlayctl.kernel.probe import Way
from overlayctl.mount import Rung
from tests.layer.tars import directory, entry, tar
from tests.oracles.command import output
from tests.store import stores

pytestmark = [pytest.mark.long, pytest.mark.kernels]

NAMES = {
    "every byte": [b"n%c" % byte for byte in range(1, 256) if byte != ord("/")],
    "encodings": [
        "Grüße-Ελλάδα-日本語-🐧".encode(),
        "Grüße".encode("latin-1"),
        "日本語".encode("shift_jis"),
        "日本語".encode("utf-16-le").replace(b"\0", b"\x01").replace(b"/", b"_"),
        "é".encode(),
        "e\u0301".encode(),
    ],
    "long": [b"x" * 255, "é".encode() * 127, b"\xff" * 255],
}

END = bytes(8) + b"end"


@contextmanager
def nothing_left(root: str) -> Iterator[None]:
    """The store is sound after the block, and then gone."""
    try:
        yield
        assert Engine.open(root).check() == []
    finally:
        Engine.open(root).reset(dry_run=False)
    assert mounttable.below(root) == []


def works(answers: dict[str, str]) -> list[str]:
    return [name for name, answer in answers.items() if answer == probe.WORKS]


def every_way(root: str) -> Iterator[Engine]:
    """The store, opened with every way to attach and to mount that works here."""
    empty = os.path.join(root, "empty.erofs")
    for way in works(probe.attach_ways(empty)):
        for rung in works(probe.mount_rungs(root)):
            yield Engine.open(root, attach=cast("Way", way), rung=cast("Rung", rung))
        Engine.open(root).detach(None)


def test_what_works_here(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    root = stores.new(tmp_path / "store").root
    with nothing_left(root):
        record_property("kernel", os.uname().release)
        record_property("ways", " ".join(works(probe.attach_ways(f"{root}/empty.erofs"))))
        record_property("rungs", " ".join(works(probe.mount_rungs(root))))


@pytest.mark.parametrize("kind", NAMES)
def test_names(tmp_path: Path, kind: str) -> None:
    names = [b"gone", *NAMES[kind]]
    layout = stores.new(tmp_path / "store")
    entries = [entry(os.fsdecode(name), data=name, mtime=1) for name in names]
    stores.add_image(
        layout,
        tar(directory("./"), *entries),
        tar(entry(".wh.gone")),
        tag="docker.io/library/names:1",
    )
    with nothing_left(layout.root):
        for engine in every_way(layout.root):
            layer, view = engine.layer_path("names:1:1"), engine.mount_image("names:1")
            for place, expected in ((layer, names), (view, names[1:])):
                assert sorted(os.listdir(os.fsencode(place))) == sorted(expected)
                for name in expected:
                    assert Path(place, os.fsdecode(name)).read_bytes() == name
            engine.unmount_image("names:1")


def test_five_hundred_layers(tmp_path: Path) -> None:
    layout = stores.new(tmp_path / "store")
    layers = [tar(directory("./"), entry(f"f{n}", data=b"%d" % n)) for n in range(500)]
    stores.add_image(layout, *layers, tag="docker.io/library/many:1")
    with nothing_left(layout.root):
        for rung in works(probe.mount_rungs(layout.root)):
            engine = Engine.open(layout.root, rung=cast("Rung", rung))
            engine.create("many:1", name="cc")
            merged = Path(engine.mount_container("cc", volatile=False, xino=False))
            assert {name: (merged / name).read_text() for name in os.listdir(merged)} == {
                f"f{n}": str(n) for n in range(500)
            }
            (merged / "f0").write_text("changed")
            (merged / "f499").unlink()
            assert sorted(os.listdir(merged)) == sorted(f"f{n}" for n in range(499))
            engine.unmount_container("cc", lazy=False)
            engine.remove_container("cc", force=False, dry_run=False)


def large_images(store: Path, place: Path) -> None:
    """Make a store with two images: ``many:1`` of 100,000 files, ``big:1`` of one above 4 GiB."""
    overlayctl = (sys.executable, "-m", "overlayctl", "--root", store)
    archive = place / "image.tar"
    archive.write_bytes(tar(*(entry(f"d{n % 40}/f{n}", data=b"%d" % n) for n in range(100_000))))
    output(*overlayctl, "import", archive, "many:1")
    big = tarfile.TarInfo("big")
    big.size = (4 << 30) + 3
    with archive.open("wb") as file:
        file.write(big.tobuf())
        file.seek(4 << 30, os.SEEK_CUR)
        file.write(b"end" + bytes(509) + bytes(1024))
    output(*overlayctl, "import", archive, "big:1")
    output(*overlayctl, "layer", "detach", "--all")
    archive.unlink()


def test_a_hundred_thousand_entries_and_a_file_of_four_gigabytes(tmp_path: Path) -> None:
    """In QEMU from a store that was made before: to make it there takes minutes."""
    made = os.environ.get("OVERLAYCTL_TEST_LARGE")
    root = Path(made or tmp_path / "store")
    if not made:
        large_images(root, tmp_path)
    try:
        engine = Engine.open(str(root))
        read_many(Path(engine.mount_image("many:1")))
        read_big(Path(engine.mount_image("big:1"), "big"))
    finally:
        Engine.open(str(root)).reset(dry_run=False)


def read_many(view: Path) -> None:
    for number in range(40):
        inside = os.path.join(view, f"d{number}")
        expected = {f"f{n}": len(str(n)) for n in range(number, 100_000, 40)}
        with os.scandir(inside) as found:
            assert {file.name: file.stat().st_size for file in found} == expected
        assert Path(inside, f"f{number + 99_960}").read_text() == str(number + 99_960)


def read_big(file: Path) -> None:
    assert file.stat().st_size == (4 << 30) + 3
    with file.open("rb") as content:
        for place, expected in ((0, bytes(16)), ((1 << 31) - 8, bytes(16)), ((1 << 32) - 8, END)):
            content.seek(place)
            assert content.read(16) == expected

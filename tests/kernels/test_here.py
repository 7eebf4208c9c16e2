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
            engine.create("many:1", name="cc", command=(), labels={}, mount=False)
            merged = Path(engine.mount_container("cc", volatile=False, xino=False))
            assert {name: (merged / name).read_text() for name in os.listdir(merged)} == {
                f"f{n}": str(n) for n in range(500)
            }
            (merged / "f0").write_text("changed")
            (merged / "f499").unlink()
            assert sorted(os.listdir(merged)) == sorted(f"f{n}" for n in range(499))
            engine.unmount_container("cc", lazy=False)
            engine.remove_container("cc", force=False, dry_run=False)


def test_a_hundred_thousand_entries(tmp_path: Path) -> None:
    layout = stores.new(tmp_path / "store")
    one = tar(*(entry(f"d{n % 40}/f{n}", data=b"%d" % n) for n in range(100_000)))
    stores.add_image(layout, one, tag="docker.io/library/large:1")
    with nothing_left(layout.root):
        view = Engine.open(layout.root).mount_image("large:1")
        for number in range(40):
            inside = os.path.join(view, f"d{number}")
            expected = {f"f{n}": len(str(n)) for n in range(number, 100_000, 40)}
            with os.scandir(inside) as found:
                assert {file.name: file.stat().st_size for file in found} == expected
            assert Path(inside, f"f{number + 99_960}").read_text() == str(number + 99_960)
        Engine.open(layout.root).unmount_image("large:1")


def four_gigabytes(store: Path, place: Path) -> None:
    """Make a store with an image ``big:1``, whose file ``big`` is longer than 32 bits can say."""
    big = tarfile.TarInfo("big")
    big.size = (4 << 30) + 3
    archive = place / "big.tar"
    with archive.open("wb") as file:
        file.write(big.tobuf())
        file.seek(4 << 30, os.SEEK_CUR)
        file.write(b"end" + bytes(509) + bytes(1024))
    output(sys.executable, "-m", "overlayctl", "--root", store, "import", archive, "big:1")
    archive.unlink()


def test_a_file_of_four_gigabytes(tmp_path: Path) -> None:
    """On another kernel from a store that this one made: to make it there takes minutes."""
    made = os.environ.get("OVERLAYCTL_TEST_BIG")
    root = Path(made or tmp_path / "store")
    if not made:
        four_gigabytes(root, tmp_path)
    try:
        view = Path(Engine.open(str(root)).mount_image("big:1"), "big")
        assert view.stat().st_size == (4 << 30) + 3
        with view.open("rb") as file:
            for place in (0, (1 << 31) - 8, (1 << 32) - 8):
                file.seek(place)
                expected = b"\0" * 8 + (b"end" if place == (1 << 32) - 8 else b"\0" * 8)
                assert file.read(16) == expected
        Engine.open(str(root)).unmount_image("big:1")
    finally:
        Engine.open(str(root)).reset(dry_run=False)

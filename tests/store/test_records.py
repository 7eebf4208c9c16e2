"""Records, the marker, and the store's making."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from overlayctl import layout as places
from overlayctl.engine import Engine
from overlayctl.errors import Conflict, Damaged, HostCannot, NotFound
from overlayctl.layout import Layout
from overlayctl.store import records
from tests.layer.tars import directory, tar
from tests.store import stores

ODD = os.fsdecode(b"a b:c,d\\e\nf\xff")


def test_a_record_comes_back_with_fields_nobody_knows(tmp_path: Path) -> None:
    path = str(tmp_path / "record.json")
    records.write(path, records.encode({"layers": ["a"], "later": {"x": 1}, "path": ODD}))
    assert records.read(path) == {
        "version": 1, "layers": ["a"], "later": {"x": 1}, "path": ODD,
    }  # fmt: skip
    with pytest.raises(FileExistsError):
        records.write(path, b"{}")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"version": "1"}', b"[" * 100_000])
def test_what_is_no_record_is_damaged(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(data)
    with pytest.raises(Damaged):
        records.read(str(path))


def test_a_later_version_is_refused_and_a_missing_record_is_not_found(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"version": 2}')
    with pytest.raises(HostCannot):
        records.read(str(path))
    for gone in (tmp_path / "none.json", path / "below-a-file.json"):
        with pytest.raises(NotFound):
            records.read(str(gone))
    with pytest.raises(Damaged):
        records.read(str(tmp_path))


@pytest.mark.parametrize("name", ["plain", ODD])
def test_a_new_store_is_private_and_readable_with_cat(tmp_path: Path, name: str) -> None:
    root = os.path.join(tmp_path, name)
    layout = stores.new(root)
    marker = json.loads(Path(layout.marker).read_text())
    assert len(marker["id"]) == 16
    assert marker["incompatible"] == ["erofs-tar-1"]
    for place, directories, _ in os.walk(root):
        assert stat.S_IMODE(os.stat(place).st_mode) == 0o700, directories
    assert os.listdir(layout.ingest) == []
    assert records.open_store(root, create=True)[1] == marker


def test_an_empty_directory_with_another_mode_becomes_private(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir(mode=0o755)
    (root / "lost+found").mkdir()
    stores.new(root)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_somebody_elses_directory_is_no_place_for_a_store(tmp_path: Path) -> None:
    root = tmp_path / "home"
    root.mkdir(mode=0o755)
    (root / "letter").write_text("dear")
    with pytest.raises(Conflict, match="letter"):
        stores.new(root)
    assert os.listdir(root) == ["letter"]
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    with pytest.raises(Conflict):
        stores.new(root / "letter")


def test_a_store_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        records.open_store(str(tmp_path / "none"), create=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("change", [{"format": 2}, {"incompatible": ["erofs-tar-1", "gills"]}])
def test_a_store_of_a_later_format_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    layout = stores.new(tmp_path / "store")
    marker = json.loads(Path(layout.marker).read_text())
    Path(layout.marker).write_text(json.dumps(marker | change))
    with pytest.raises(HostCannot):
        records.open_store(layout.root, create=False)


def test_a_store_with_a_feature_that_forbids_writing_is_read_and_not_written(
    tmp_path: Path,
) -> None:
    layout = stores.new(tmp_path / "store")
    image = stores.add_image(layout, tar(directory("etc")), tag="docker.io/library/demo:1")
    container = stores.add_container(layout, image)
    marker = json.loads(Path(layout.marker).read_text())
    later = {"compatible": ["scent"], "read_only_compatible": ["gills"]}
    Path(layout.marker).write_text(json.dumps(marker | later))
    engine = Engine.open(layout.root)
    assert [row["Id"] for row in engine.images()] == [image.id]
    assert [row["Id"] for row in engine.containers(everything=True)] == [container.id]
    before = [sorted(os.listdir(layout.path(name))) for name in places.DIRECTORIES]
    for writing in (
        lambda: Engine.open(layout.root, create=True),
        lambda: engine.tag("demo:1", "demo:2"),
        lambda: engine.create("demo:1", name=None),
        lambda: engine.mount_container("web", volatile=False, xino=False),
        lambda: engine.remove_image("demo:1", force=True, dry_run=False),
        lambda: engine.remove_container("web", force=False, dry_run=False),
    ):
        with pytest.raises(HostCannot, match="gills"):
            writing()
    assert [sorted(os.listdir(layout.path(name))) for name in places.DIRECTORIES] == before


def _make_one(root: str, start: object, ids: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    ids.put(records.open_store(root, create=True)[1]["id"])  # type: ignore[attr-defined]


def test_first_commands_at_once_agree_on_one_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, ids = context.Event(), context.Queue()
    root = str(tmp_path / "store")
    makers = [context.Process(target=_make_one, args=(root, start, ids)) for _ in range(8)]
    for maker in makers:
        maker.start()
    start.set()
    found = {ids.get(timeout=20) for _ in makers}
    for maker in makers:
        maker.join()
    assert len(found) == 1
    assert os.listdir(Layout(root).ingest) == []

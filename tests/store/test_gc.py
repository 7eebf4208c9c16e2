"""What a kill leaves is finished by the next writer; what a person made is not touched."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from overlayctl.errors import Conflict
from overlayctl.kernel import mounter
from overlayctl.layout import Layout
from overlayctl.store import check, containers, gc, images, layers, records, snapshots
from tests.layer.tars import directory, entry, tar
from tests.store import stores

TAR = tar(directory("etc"), entry("etc/hosts", data=b"127.0.0.1"))
OTHER = tar(directory("srv"))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return stores.new(tmp_path / "store")


def killed_at(point: str, action: Callable[[], object]) -> None:
    """``action`` in another process, which dies at the fault point."""

    def run() -> None:
        os.environ["OVERLAYCTL_FAULT"] = point
        action()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def finished(layout: Layout) -> list[str]:
    with stores.writing(layout):
        gc.finish(layout)
    return [found.tag for found in check.check(layout)]


@pytest.mark.parametrize("point", ["layer:after-rename", "image:before-rename"])
def test_killed_before_the_image_is_visible(layout: Layout, point: str) -> None:
    killed_at(point, lambda: stores.add_image(layout, TAR, tag="docker.io/library/a:1"))
    assert images.listed(layout) == []
    assert finished(layout) == ["layer-orphan"]
    (name,) = gc.orphans(layout)
    layers.remove(layout, name)
    assert finished(layout) == []


@pytest.mark.parametrize("point", ["image:after-rename", "tag:after-rename"])
def test_killed_after_the_image_is_visible(layout: Layout, point: str) -> None:
    killed_at(point, lambda: stores.add_image(layout, TAR, tag="docker.io/library/a:1"))
    assert finished(layout) == []
    assert len(images.listed(layout)) == 1


@pytest.mark.parametrize(
    "point", ["snapshot:before-rename", "snapshot:after-rename", "container:after-name"]
)
def test_killed_before_the_container_is_visible(layout: Layout, point: str) -> None:
    image = stores.add_image(layout, TAR)
    killed_at(point, lambda: stores.add_container(layout, image))
    assert containers.listed(layout) == []
    assert finished(layout) == []
    assert records.names(layout.path("snapshots")) == []
    assert records.names(layout.path("containers", "names")) == []
    stores.add_container(layout, image)
    assert finished(layout) == []


def _remove(layout: Layout, container: containers.Container) -> None:
    snapshots.remove(layout, container.id)
    containers.remove(layout, container)


def test_killed_while_a_container_is_removed(layout: Layout) -> None:
    container = stores.add_container(layout, stores.add_image(layout, TAR))
    Path(layout.snapshot(container.id, "upper"), "data").write_text("written")
    killed_at("snapshot:after-unlink", lambda: _remove(layout, container))
    assert containers.listed(layout) == []
    assert finished(layout) == []
    assert records.names(layout.path("snapshots")) == []
    assert records.names(layout.path("containers")) == ["names"]


def test_killed_between_the_snapshot_and_the_record(layout: Layout) -> None:
    image = stores.add_image(layout, TAR)
    container = stores.add_container(layout, image)
    snapshots.remove(layout, container.id)
    assert [found.tag for found in check.check(layout)] == ["container-unfinished"]
    assert finished(layout) == []
    assert records.names(layout.path("containers")) == ["names"]
    stores.add_container(layout, image)


def test_killed_between_the_record_and_the_name(layout: Layout) -> None:
    container = stores.add_container(layout, stores.add_image(layout, TAR))
    snapshots.remove(layout, container.id)
    os.unlink(layout.container(container.id))
    assert finished(layout) == []
    assert records.names(layout.path("containers", "names")) == []


def test_killed_while_an_image_or_a_layer_is_removed(layout: Layout) -> None:
    image = stores.add_image(layout, TAR)
    killed_at("image:after-unlink", lambda: images.remove(layout, image.hex))
    killed_at("layer:after-unlink", lambda: layers.remove(layout, image.layers[0]))
    assert finished(layout) == []
    assert records.names(layout.path("images")) == records.names(layout.path("layers")) == []


def test_a_layer_that_was_made_again_is_removed_from_its_oldest_file_on(layout: Layout) -> None:
    name = stores.add_image(layout, TAR).layers[0]
    good = layout.layer_file(name, after=1)
    shutil.copy(layout.layer_file(name), good)
    os.chmod(layout.layer_file(name, after=-1), 0o600)
    os.truncate(layout.layer_file(name, after=-1), 100)
    killed_at("layer:after-unlink", lambda: layers.remove(layout, name))
    assert os.listdir(layout.layer(name)) == ["layer-2.erofs"]
    assert check.check(layout) == []
    size = os.stat(good).st_blocks * 512
    assert layers.remove(layout, name) == size
    assert records.names(layout.path("layers")) == []


def test_an_upper_with_content_stays_though_nobody_owns_it(layout: Layout) -> None:
    image = stores.add_image(layout, TAR)
    stores.add_snapshot(layout, image.layers)
    Path(layout.snapshot(stores.KEY, "upper"), "data").write_text("written")
    assert finished(layout) == ["snapshot-orphan"]
    assert (
        Path(
            layout.snapshot(
                stores.KEY,
                "upper",
            ),
            "data",
        ).read_text()
        == "written"
    )


def test_an_upper_that_somebody_writes_to_stays_though_it_is_empty(
    layout: Layout, tmp_path: Path
) -> None:
    """Its container's record was removed by hand, and no mount of this store shows the overlay."""
    container = stores.add_container(layout, stores.add_image(layout, TAR))
    os.unlink(layout.container(container.id))
    (tmp_path / "lower").mkdir()
    (tmp_path / "seen").mkdir()
    os.mkdir(layout.snapshot(container.id, "work.1"))
    options = (
        f"lowerdir={tmp_path / 'lower'},upperdir={layout.snapshot(container.id, 'upper')},"
        f"workdir={layout.snapshot(container.id, 'work.1')}"
    )
    subprocess.run(["mount", "-t", "overlay", "-o", options, "mine", tmp_path / "seen"], check=True)
    try:
        assert finished(layout) == ["snapshot-orphan"]
        (tmp_path / "seen" / "new").write_text("written")
    finally:
        mounter.unmount(str(tmp_path / "seen"))
    assert Path(layout.snapshot(container.id, "upper"), "new").read_text() == "written"
    os.unlink(Path(layout.snapshot(container.id, "upper"), "new"))
    assert finished(layout) == []


def test_what_is_not_ours_hinders_nobody_and_is_not_touched(layout: Layout) -> None:
    for place in ("images", "layers", "snapshots", "containers", "containers/names"):
        Path(layout.path(place), "NOTES").write_text("mine")
        Path(layout.path(place), "lost+found").mkdir()
    image = stores.add_image(layout, TAR)
    stores.add_container(layout, image)
    finished(layout)
    for place in ("images", "layers", "snapshots", "containers", "containers/names"):
        assert Path(layout.path(place), "NOTES").read_text() == "mine"
        assert Path(layout.path(place), "lost+found").is_dir()


@pytest.mark.parametrize("kind", ["image", "snapshot"])
def test_no_layer_counts_as_unneeded_while_a_record_cannot_be_read(
    layout: Layout, kind: str
) -> None:
    kept = stores.add_layers(layout, TAR).names[0]
    stores.add_image(layout, OTHER)
    assert gc.orphans(layout) == [kept]
    assert gc.unneeded(layout, [kept]) == [kept]
    if kind == "image":
        other = stores.add_image(layout, TAR)
        Path(layout.image(other.hex, "image.json")).write_text("{")
    else:
        stores.add_snapshot(layout, [kept])
        Path(layout.snapshot(stores.KEY, "snapshot.json")).write_text('{"version": 9}')
    assert gc.orphans(layout) == []
    assert gc.unneeded(layout, [kept]) == []


def test_who_needs_a_layer_is_read_from_images_and_snapshots(layout: Layout) -> None:
    image = stores.add_image(layout, TAR, OTHER)
    stores.add_container(layout, image)
    users = gc.layer_users(layout)
    assert users == {
        name: [f"image {image.hex}", f"snapshot {stores.KEY}"] for name in image.layers
    }


def test_a_name_is_taken_once(layout: Layout) -> None:
    image = stores.add_image(layout, TAR)
    stores.add_container(layout, image)
    with pytest.raises(Conflict, match="web"):
        stores.add_container(layout, image, key=stores.OTHER_KEY)
    assert finished(layout) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EUCLEAN, errno.ENOMEM])
def test_what_cannot_be_looked_at_is_not_gone(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    image = stores.add_image(layout, TAR)
    stores.add_container(layout, image)
    Path(layout.snapshot(stores.KEY, "upper"), "data").write_text("written")
    tree = Path(layout.layer_tree(image.layers[0]))
    tree.mkdir()
    failing = ("/keep", "/image.json", "/layer.erofs", f"/{stores.KEY}", ".json")

    def failed(look: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def call(path: str, **more: int) -> os.stat_result:
            if str(path).endswith(failing):
                raise OSError(number, os.strerror(number), path)
            return look(path, **more)

        return call

    with stores.writing(layout), monkeypatch.context() as patch:
        patch.setattr(os, "stat", failed(os.stat))
        patch.setattr(os, "lstat", failed(os.lstat))
        with contextlib.suppress(OSError):
            gc.finish(layout)
    assert tree.is_dir()
    assert check.check(layout, quick=True) == []
    assert Path(layout.snapshot(stores.KEY, "upper"), "data").read_text() == "written"


def test_uppers_that_are_elsewhere_for_a_while(layout: Layout) -> None:
    stores.add_container(layout, stores.add_image(layout, TAR))
    os.rename(layout.path("snapshots"), layout.root + ".away")
    assert finished(layout)[0] == "directory-missing"
    os.rename(layout.root + ".away", layout.path("snapshots"))
    assert finished(layout) == []
    assert [found.name for found in containers.readable(layout)] == ["web"]

"""The main job on a real Debian image and on images of other tools, against other tools.

Each layer's diff path against GNU tar plus the OCI whiteout rules, the merged view
against umoci, the layer file against fsck.erofs 1.8, the load against docker's.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayctl.engine import Engine
from overlayctl.errors import BadArchive
from overlayctl.layer.index import Index
from overlayctl.names import familiar
from tests.images_of_others import IMPORT, LOADABLE, REFUSED
from tests.oracles import debian, fsck, layers, merged, peers, trees
from tests.rootmount import require

_TIME: tuple[trees.Field, ...] = ("mtime_ns",)


class Silent:
    """No progress shown."""

    def start(self, total: int | None, layers: int) -> None: ...

    def advance(self, count: int) -> None: ...

    def layer_done(self, number: int) -> None: ...


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine.open(str(tmp_path / "store"), create=True)
    yield engine
    assert engine.check() == []
    engine.reset(dry_run=False)


def _load_all(store: Engine, path: Path) -> list[str]:
    loaded = store.load(str(path), tag=None, platform=None, progress=Silent())
    return [one.image_id for one in loaded]


def _load(store: Engine, path: Path) -> str:
    return _load_all(store, path)[0]


def _compare_layers(store: Engine, image: str, tmp_path: Path) -> None:
    """Each diff path against GNU tar's idea of the layer's own bytes."""
    for number, layer in enumerate(store.inspect_image(image)["Layers"]):
        with Index.open(layer["File"]) as index:
            size = index.header.tar_size
        tar = tmp_path / f"{number}.tar"
        with open(layer["File"], "rb") as file, tar.open("wb") as out:
            file.seek(4096)
            out.write(file.read(size))
        assert "sha256:" + hashlib.sha256(tar.read_bytes()).hexdigest() == layer["DiffID"]
        assert layers.differences(tar, layer["DiffPath"]) == [], f"layer {number + 1}"
        tar.unlink()


def _compare_merged(store: Engine, image: str, archive: Path, tmp_path: Path) -> None:
    view = store.mount_image(image)
    expected = merged.umoci_unpack(archive, tmp_path / "umoci")
    # umoci gives the root the time of the topmost entry that it wrote there.
    problems = trees.differences(
        trees.snapshot(expected),
        trees.snapshot(view, ignore=layers.OWN),
        ignore_fields_of={b"": _TIME},
    )
    assert problems == []


@pytest.mark.parametrize("name", LOADABLE)
def test_images_of_other_tools(store: Engine, images: Path, name: str, tmp_path: Path) -> None:
    require("bsdtar")
    expected = LOADABLE[name]
    found = [store.inspect_image(image) for image in _load_all(store, images / name)]
    assert tuple(len(image["Layers"]) for image in found) == expected.layers
    tags = {tag for image in found for tag in image["RepoTags"]}
    assert tags == set(map(familiar, expected.references))
    for image in found:
        assert f"{image['Os']}/{image['Architecture']}" == expected.platform
        _compare_layers(store, image["Id"], tmp_path)


@pytest.mark.parametrize("name", [name for name, line in REFUSED.items() if IMPORT in line.hint])
def test_what_is_no_image_is_imported_as_the_message_says(
    store: Engine, images: Path, name: str, tmp_path: Path
) -> None:
    with pytest.raises(BadArchive) as refused:
        _load(store, images / name)
    assert store.images() == []
    line = refused.value.hint.partition(IMPORT)[2]
    *paths, reference = shlex.split(line.replace("NAME", "flat:1"))
    made = store.import_layers(paths, reference=reference, progress=Silent())
    assert store.inspect_image("flat:1")["Id"] == made.image_id
    _compare_layers(store, made.image_id, tmp_path)


def test_kaniko_directories_look_like_those_below(store: Engine, images: Path) -> None:
    """Kaniko's layers name no parents: those take mode and owner from the layers below."""
    image = _load(store, images / "dive/test-kaniko-image.tar")
    bottom, *above = store.inspect_image(image)["Layers"]
    root = Path(bottom["DiffPath"])
    seen = 0
    for layer in above:
        for path in Path(layer["DiffPath"]).rglob("*"):
            lower = root / path.relative_to(layer["DiffPath"])
            if path.is_dir() and lower.is_dir():
                assert path.stat().st_mode == lower.stat().st_mode
                seen += 1
    assert seen


def test_debian_layers_and_merged_view(
    store: Engine, debian_image: debian.DebianImage, tmp_path: Path
) -> None:
    image = _load(store, debian_image.docker_archive)
    _compare_layers(store, image, tmp_path)
    _compare_merged(store, image, debian_image.docker_archive, tmp_path)


def test_debian_is_the_same_in_every_wrapping(
    store: Engine, debian_image: debian.DebianImage, tmp_path: Path
) -> None:
    """OCI gzip and OCI zstd hold the same layers; a second store makes the same files."""
    docker = store.inspect_image(_load(store, debian_image.docker_archive))
    other = Engine.open(str(tmp_path / "other"), create=True)
    for path in (debian_image.oci_gzip, debian_image.oci_zstd_tar):
        found = other.inspect_image(_load(other, path))
        assert found["RootFS"] == docker["RootFS"]
        for ours, theirs in zip(docker["Layers"], found["Layers"], strict=True):
            assert _sha256(ours["File"]) == _sha256(theirs["File"])
    other.reset(dry_run=False)


def test_fsck_erofs_accepts_every_layer(
    store: Engine, images: Path, debian_image: debian.DebianImage, kept: Path
) -> None:
    check = fsck.Fsck(kept)
    for path in (debian_image.docker_archive, *(images / name for name in LOADABLE)):
        for image in _load_all(store, path):
            for layer in store.inspect_image(image)["Layers"]:
                result = check(Path(layer["File"]))
                assert result.returncode == 0, result.stdout + result.stderr


def test_durable_load_takes_less_than_half_of_dockers(
    debian_image: debian.DebianImage, tmp_path: Path
) -> None:
    """Whole commands in turn, ours durable, docker's as it is; the median of the ratios."""
    ratios = []
    with peers.Dockerd() as dockerd:
        for turn in range(3):
            root = tmp_path / f"store-{turn}"
            start = time.monotonic()
            subprocess.run(
                [
                    sys.executable, "-m", "overlayctl", "--root", root, "load", "-i",
                    debian_image.docker_archive,
                ],
                check=True,
                capture_output=True,
            )  # fmt: skip
            ours = time.monotonic() - start
            Engine.open(str(root)).reset(dry_run=False)
            start = time.monotonic()
            dockerd.load(debian_image.docker_archive)
            theirs = time.monotonic() - start
            dockerd.docker("rmi", "-f", debian_image.reference)
            ratios.append(ours / theirs)
            print(f"overlayctl load {ours:.2f} s, docker load {theirs:.2f} s")
    assert sorted(ratios)[1] < 0.5, ratios


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_tarfile_reads_back_what_a_layer_file_holds(store: Engine, images: Path) -> None:
    image = _load(store, images / "misc/busybox-2018.tar")
    bottom = store.inspect_image(image)["Layers"][0]
    with open(bottom["File"], "rb") as file:
        file.seek(4096)
        with tarfile.open(fileobj=file, mode="r|") as archive:
            assert sum(member.islnk() for member in archive) == 364

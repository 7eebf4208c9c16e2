"""Every image that others made: what is found in it, or why it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

from overlayctl.errors import BadInput
from overlayctl.formats import FoundImage, read_images
from overlayctl.layer.archive import Archive, open_archive
from tests.archives import content, diff_id

Images = Callable[[str], Path]


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    with TemporaryDirectory() as place, open_archive(str(path), lambda: place) as archive:
        yield archive


def images_in(path: Path) -> list[FoundImage]:
    with opened(path) as archive:
        return read_images(archive)


class Found(NamedTuple):
    layers: tuple[int, ...]
    """How many layers each image has."""
    references: tuple[str, ...] = ()
    manifests: bool = False


class Refused(NamedTuple):
    code: str
    words: str
    hint: str


_ROOT = "looks like the root file system of a container"
_FLAT = "neither manifest.json nor index.json"

TABLE: dict[str, Found | Refused] = {
    "dive/test-docker-image.tar": Found((14,), ("docker.io/library/dive-test:latest",)),
    "dive/test-kaniko-image.tar": Found((14,), ("docker.io/library/dive-test:kaniko-latest",)),
    "dive/test-oci-gzip-image.tar": Found((1,), (), manifests=True),
    "dive/test-oci-zstd-image.tar": Found((1,), (), manifests=True),
    "dive/test-oci-estargz-image.tar": Found((1,), (), manifests=True),
    "dive/test-oci-uncompressed-image.tar": Found((1,), (), manifests=True),
    "dive/test-gzip-image.tar": Refused("bad-archive", _FLAT, "overlayctl import"),
    "dive/test-zstd-image.tar": Refused("bad-archive", _FLAT, "overlayctl import"),
    "dive/test-estargz-image.tar": Refused("bad-archive", _FLAT, "overlayctl import"),
    "dive/test-uncompressed-image.tar": Refused("bad-archive", _FLAT, "overlayctl import"),
    "fanal/alpine-310.tar.gz": Found((1,), ("docker.io/library/alpine:3.10",)),
    "fanal/alpine-311.tar.gz": Found((1,), ("docker.io/library/alpine:3.11",)),
    "misc/busybox-2018.tar": Found((2,), ("docker.io/library/busybox:latest",)),
    "misc/busybox-2019b.tar": Found((1,)),
    "misc/busybox-2019a.tar": Refused("bad-archive", _ROOT, "overlayctl import"),
    "misc/hello-world-2023-docker.tar": Found((1,), ("docker.io/library/hello-world:latest",)),
    "rules_docker/pause.tar": Found((2,), ("gcr.io/google-containers/pause:2.0",)),
    "rules_docker/image_with_symlinked_layer.tar": Found(
        (2,), ("docker.io/library/bazel:small_base_2",)
    ),
    "rules_docker/small_linux.tar": Found((3,), ("docker.io/bazel/image:image",)),
    "ggcr/test_image_1.tar": Found((1,), ("docker.io/bazel/v1/tarball:test_image_1",)),
    "ggcr/test_image_2.tar": Found((1,), ("docker.io/bazel/v1/tarball:test_image_2",)),
    "ggcr/source_image.tar": Found((1,), ("docker.io/bazel/pkg/v1/mutate:source_image",)),
    "ggcr/source_image_with_empty_layer_history.tar": Found(
        (1,), ("docker.io/bazel/pkg/v1/mutate:source_image",)
    ),
    "ggcr/test_load_manifest.tar": Found((1,), ("docker.io/bazel/v1/tarball:test_image_1",)),
    "ggcr/test_bundle.tar": Found(
        (1, 1), ("docker.io/library/test_image_2:latest", "docker.io/library/test_image_1:latest")
    ),
    "ggcr/test_link.tar": Found(
        (1, 2),
        ("docker.io/bazel/v1/tarball:test_image_1", "docker.io/bazel/v1/tarball:test_image_3"),
    ),
    "ggcr/overwritten_file.tar": Found((3,), ("docker.io/bazel/pkg/v1/mutate:overwritten_file",)),
    "ggcr/whiteout_image.tar": Found((3,), ("docker.io/bazel/pkg/v1/mutate:whiteout_image",)),
    "ggcr/whiteout_dir.tar": Found((4,), ("localhost:5000/whiteout:latest",)),
    "ggcr/null_manifest.tar": Refused("bad-archive", "null or empty", "save the image again"),
    "ggcr/no_manifest.tar": Refused("bad-archive", "docker before 1.10", "docker load"),
    "ggcr/hello-world-v25.tar": Found((1,)),
    "ggcr-layouts/test_gc_index": Found((1,), (), manifests=True),
    "ggcr-layouts/test_index": Found((1, 1), (), manifests=True),
    "ggcr-layouts/test_index_one_image": Found((1,), (), manifests=True),
    "ggcr-layouts/test_index_media_type": Refused("bad-archive", "helm", "other artifacts"),
    "built/buildah-toy3-docker-archive.tar": Found((3,), ("localhost/toy:3",)),
    "built/buildah-toy3-oci-archive.tar": Found((3,), ("localhost/toy:3",), manifests=True),
    "built/umoci-oci1.tar": Found((4,), (), manifests=True),
    "built/ctr-export-hybrid.tar": Found((3,), ("127.0.0.1:5055/toy:oci",), manifests=True),
    "built/docker20-save-toy.tar": Found((4,), ("docker.io/library/toy:committed",)),
    "built/toy-zstd-oci.tar": Found((3,), (), manifests=True),
    "built/toy-multiarch-index-oci.tar": Found((3,), (), manifests=True),
}


@pytest.mark.parametrize("name", [n for n, e in TABLE.items() if isinstance(e, Found)])
def test_what_is_found(name: str, image: Images) -> None:
    expected = TABLE[name]
    assert isinstance(expected, Found)
    found = images_in(image(name))
    assert tuple(len(i.layers) for i in found) == expected.layers
    assert tuple(r for i in found for r in i.references) == expected.references
    assert all((i.manifest is not None) is expected.manifests for i in found)
    for one in found:
        assert one.image_id == diff_id(one.config)
        assert tuple(layer.diff_id for layer in one.layers) == one.diff_ids


@pytest.mark.parametrize("name", [n for n, e in TABLE.items() if isinstance(e, Refused)])
def test_what_is_refused(name: str, image: Images) -> None:
    expected = TABLE[name]
    assert isinstance(expected, Refused)
    with pytest.raises(BadInput) as caught:
        images_in(image(name))
    assert caught.value.code == expected.code
    assert expected.words in str(caught.value)
    assert expected.hint in caught.value.hint


@pytest.mark.parametrize("name", [n for n, e in TABLE.items() if isinstance(e, Found)])
def test_every_layer_is_the_promised_tar(name: str, image: Images) -> None:
    with opened(image(name)) as archive:
        for one in read_images(archive):
            for layer in one.layers:
                assert diff_id(content(layer.source, layer.blob_digest)) == layer.diff_id


def test_the_table_names_every_file(images: Path) -> None:
    there = {str(p.relative_to(images)) for p in images.glob("*/*")}
    assert there == set(TABLE)

"""The images that others made (the ``images`` fixture): what each of them has to give."""

from __future__ import annotations

from typing import NamedTuple


class Found(NamedTuple):
    layers: tuple[int, ...]
    """How many layers each image has."""
    references: tuple[str, ...] = ()
    manifests: bool = False
    platform: str = "linux/amd64"
    notes: tuple[str, ...] = ()
    """Words of each note."""


class Refused(NamedTuple):
    code: str
    words: str
    hint: str


_ROOT = "looks like the root file system of a container"
IMPORT = "overlayctl import"
_FLAT = "neither manifest.json nor index.json"

TABLE: dict[str, Found | Refused] = {
    "dive/test-docker-image.tar": Found((14,), ("docker.io/library/dive-test:latest",)),
    "dive/test-kaniko-image.tar": Found((14,), ("docker.io/library/dive-test:kaniko-latest",)),
    "dive/test-oci-gzip-image.tar": Found((1,), (), manifests=True, platform="linux/arm64"),
    "dive/test-oci-zstd-image.tar": Found((1,), (), manifests=True, platform="linux/arm64"),
    "dive/test-oci-estargz-image.tar": Found((1,), (), manifests=True, platform="linux/arm64"),
    "dive/test-oci-uncompressed-image.tar": Found((1,), (), manifests=True, platform="linux/arm64"),
    "dive/test-gzip-image.tar": Refused("bad-archive", _FLAT, IMPORT),
    "dive/test-zstd-image.tar": Refused("bad-archive", _FLAT, IMPORT),
    "dive/test-estargz-image.tar": Refused("bad-archive", _FLAT, IMPORT),
    "dive/test-uncompressed-image.tar": Refused("bad-archive", _FLAT, IMPORT),
    "fanal/alpine-310.tar.gz": Found((1,), ("docker.io/library/alpine:3.10",)),
    "fanal/alpine-311.tar.gz": Found((1,), ("docker.io/library/alpine:3.11",)),
    "misc/busybox-2018.tar": Found((2,), ("docker.io/library/busybox:latest",)),
    "misc/busybox-2019b.tar": Found((1,)),
    "misc/busybox-2019a.tar": Refused("bad-archive", _ROOT, IMPORT),
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
        (1,), ("docker.io/bazel/pkg/v1/mutate:source_image",), notes=("was edited",)
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
    "ggcr/null_manifest.tar": Refused("bad-archive", "null or empty", "docker save -o FILE NAME"),
    "ggcr/no_manifest.tar": Refused("bad-archive", "docker before 1.10", "docker load"),
    "ggcr/hello-world-v25.tar": Found((1,), platform="linux/arm64"),
    "ggcr-layouts/test_gc_index": Found(
        (1,),
        (),
        manifests=True,
        notes=(
            "'1' is only a tag",
            "'3' is only a tag",
            "'4' is only a tag",
        ),
    ),
    "ggcr-layouts/test_index": Found(
        (1, 1),
        (),
        manifests=True,
        notes=(
            "'1' is only a tag",
            "'3' is only a tag",
            "'4' is only a tag",
            "'2' is only a tag",
        ),
    ),
    "ggcr-layouts/test_index_one_image": Found((1,), (), manifests=True),
    "ggcr-layouts/test_index_media_type": Refused("bad-archive", "is a Helm chart", "helm pull"),
    "built/buildah-toy3-docker-archive.tar": Found((3,), ("localhost/toy:3",)),
    "built/buildah-toy3-oci-archive.tar": Found((3,), ("localhost/toy:3",), manifests=True),
    "built/umoci-oci1.tar": Found((4,), (), manifests=True, notes=("'t' is only a tag",)),
    "built/ctr-export-hybrid.tar": Found((3,), ("127.0.0.1:5055/toy:oci",), manifests=True),
    "built/docker20-save-toy.tar": Found((4,), ("docker.io/library/toy:committed",)),
    "built/toy-zstd-oci.tar": Found((3,), (), manifests=True, notes=("'zstd' is only a tag",)),
    "built/toy-multiarch-index-oci.tar": Found(
        (3,), (), manifests=True, notes=("'multi' is only a tag",)
    ),
}

LOADABLE = {name: line for name, line in TABLE.items() if isinstance(line, Found)}
REFUSED = {name: line for name, line in TABLE.items() if isinstance(line, Refused)}

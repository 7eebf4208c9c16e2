"""Images as what other tools read: an OCI layout, and docker's archive, which is one, too.

OCI image-spec, image-layout.md and annotations.md; moby, image/spec/v1.2.md. Docker's archive is
written as docker does since 25: the blobs of a layout, and a manifest.json that leads to the
same bytes. Older dockers, podman and skopeo read manifest.json, containerd the layout.

Every name is a full reference, for skopeo and podman as well as (by an annotation of its own)
for containerd. Docker leaves ``docker.io/library/`` out in its files and takes both; of a name
without it podman makes one of localhost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.digest import Digest, hex_of
from overlayctl.layer.header import END, header, padding
from overlayctl.layer.tar import Member

if TYPE_CHECKING:
    from overlayctl.layer.compression import Buffer

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_REFERENCE = "org.opencontainers.image.ref.name"
_CONTAINERDS = "io.containerd.image.name"


class Blob(NamedTuple):
    """``size`` bytes with that digest; ``pieces`` begins to read them."""

    digest: Digest
    size: int
    pieces: Callable[[], Iterable[Buffer]]

    @property
    def path(self) -> str:
        """Where it lies in a layout."""
        return f"blobs/sha256/{hex_of(self.digest)}"


class Image(NamedTuple):
    """An image to be written, its layers bottom to top; ``references`` in stored form."""

    config: Blob
    manifest: Blob
    layers: tuple[Blob, ...]
    references: tuple[str, ...]


class File(NamedTuple):
    """A file of a layout or an archive."""

    name: str
    size: int
    pieces: Callable[[], Iterable[Buffer]]


def files(images: Sequence[Image], *, docker: bool) -> Iterator[File]:
    """What there is to be read first, then each blob once. Of two equal images there is one."""
    yield _json("oci-layout", {"imageLayoutVersion": "1.0.0"})
    yield _json("index.json", _index(images))
    if docker:
        yield _json("manifest.json", [_entry(image) for image in images])
        if repositories := _repositories(images):
            yield _json("repositories", repositories)
    small = [blob for image in images for blob in (image.manifest, image.config)]
    large = [blob for image in images for blob in image.layers]
    for blob in {blob.digest: blob for blob in (*small, *large)}.values():
        yield File(blob.path, blob.size, blob.pieces)


def _json(name: str, value: object) -> File:
    data = json.dumps(value, separators=(",", ":")).encode()
    return File(name, len(data), lambda: (data,))


def _index(images: Sequence[Image]) -> dict[str, object]:
    return {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "manifests": [
            {
                "mediaType": MANIFEST_TYPE,
                "digest": image.manifest.digest,
                "size": image.manifest.size,
                **({"annotations": annotations} if annotations else {}),
            }
            for image in images
            for annotations in [{_REFERENCE: name, _CONTAINERDS: name} for name in image.references]
            or [{}]
        ],
    }


def _entry(image: Image) -> dict[str, object]:
    """What manifest.json says of an image."""
    return {
        "Config": image.config.path,
        "RepoTags": list(image.references) or None,
        "Layers": [layer.path for layer in image.layers],
    }


def _repositories(images: Sequence[Image]) -> dict[str, dict[str, str]]:
    """Docker's oldest file: repository, tag, topmost layer."""
    found: dict[str, dict[str, str]] = {}
    for image in images:
        for reference in image.references if image.layers else ():
            repository, _, tag = reference.rpartition(":")
            found.setdefault(repository, {})[tag] = hex_of(image.layers[-1].digest)
    return found


def as_tar(found: Iterable[File]) -> Iterator[Buffer]:
    """The files as a tar that is the same on every host and day."""
    for directory in (b"blobs/", b"blobs/sha256/"):
        yield header(Member(directory, b"5", 0o755, 0, 0, 0, 0, 0))
    for file in found:
        yield header(Member(file.name.encode(), b"0", 0o644, 0, 0, file.size, 0, 0))
        yield from file.pieces()
        yield padding(file.size)
    yield END

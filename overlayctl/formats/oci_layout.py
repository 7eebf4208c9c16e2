"""OCI image layouts: index.json, and blobs under their digests.

image-spec image-layout.md, image-index.md, manifest.md, descriptor.md, annotations.md.
Whether a blob is an index or a manifest follows from its content: media types in the
field are often those of something else.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any, NamedTuple

from overlayctl import digest, oci
from overlayctl.digest import Digest, ImageID
from overlayctl.errors import BadArchive, DigestMismatch
from overlayctl.formats import (
    FoundImage,
    FoundLayer,
    check_count,
    diff_ids_of,
    parsed_object,
    platform_of,
    stored_reference,
)
from overlayctl.formats.artifacts import ATTESTATION, Artifact, artifact
from overlayctl.layer import compression, magic
from overlayctl.layer.archive import Directory
from overlayctl.layer.compression import Source
from overlayctl.layer.input import STDIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from overlayctl.layer.archive import Archive
    from overlayctl.layer.stream import Candidate
    from overlayctl.oci import Platform

_INDEX = "index.json"
_LAYOUT = "oci-layout"
_DEPTH = 4
_MANIFESTS = 10_000
_REF_NAME = "org.opencontainers.image.ref.name"
_CONTAINERD_NAME = "io.containerd.image.name"
_ATTESTS = "vnd.docker.reference.type"
_ENCRYPTED = ("+encrypted", "+enc")
_TAR = re.compile(r"\.tar(\.gzip|\.zstd)?(\+(gzip|zstd))?$")
_ALONE = (
    "have it written as a tar, plain or in gzip or zstd; tars alone make an image, too: "
    "overlayctl import LAYER.tar... NAME:TAG"
)
_AGAIN = "the layout is incomplete or damaged: save or copy the image again"


class _Descriptor(NamedTuple):
    digest: Digest
    size: int
    media_type: str
    annotations: dict[str, str]
    platform: Platform | None
    urls: tuple[str, ...]

    @property
    def path(self) -> str:
        return "blobs/sha256/" + digest.hex_of(self.digest)


class _Aside(NamedTuple):
    """What lies behind descriptors and is no image that could be loaded."""

    passed: list[tuple[str, Artifact]]
    missing: list[str]


class _Candidate(NamedTuple):
    """A manifest that could be loaded, and its content once that was read."""

    descriptor: _Descriptor
    body: bytes
    fields: dict[str, Any]


def detect(archive: Archive) -> bool:
    """Whether ``archive`` says that it is a layout; index.json alone is not enough for a tar."""
    if not archive.exists(_INDEX):
        return False
    if not archive.exists(_LAYOUT):
        return any(name.startswith("blobs/sha256/") or name == "blobs" for name in archive.names)
    version = parsed_object(archive.read(_LAYOUT), _LAYOUT).get("imageLayoutVersion")
    if not isinstance(version, str) or version.split(".")[0] != "1":
        raise BadArchive(
            f"{archive.where} is an OCI layout of version {version!r}, known is 1.0.0",
            hint="copy the image with skopeo: skopeo copy oci:DIR docker-archive:FILE",
        )
    return True


def read(archive: Archive, *, platform: Platform | None = None) -> list[FoundImage]:
    """The images that index.json names. Raises BadArchive, DigestMismatch, NotFound.

    Entries of one name (or all unnamed ones, if their platforms differ) are one image for
    several platforms, and so is a nested index. What is no image (attestations, charts,
    signatures) is passed over where there is an image, else refused by name.
    """
    top = _listed(parsed_object(archive.read(_INDEX), _INDEX), _INDEX)
    found: list[FoundImage] = []
    passed: list[tuple[str, Artifact]] = []
    for group in _groups(top):
        candidates: list[_Candidate] = []
        missing: list[str] = []
        for descriptor in group:
            candidates += _candidates(archive, descriptor, 0, _Aside(passed, missing))
        if candidates:
            found.append(_image(archive, _choose(archive, candidates, platform), group[0]))
        elif missing:
            raise BadArchive(
                f"{archive.where} names {missing[0]}, but its blob is not there", hint=_AGAIN
            )
    if found:
        return found
    if passed:
        what, kind = passed[0]
        raise BadArchive(f"{archive.where} holds no image: {what} {kind.words}", hint=kind.hint)
    raise BadArchive(
        f"{archive.where} is an OCI layout that names no image: its {_INDEX} is empty",
        hint="save the image again, by its name",
    )


def manifest_of(archive: Archive, image: FoundImage) -> bytes | None:
    """The manifest of ``image`` in an archive that also is a layout; None if it has none."""
    try:
        top = _listed(parsed_object(archive.read(_INDEX), _INDEX), _INDEX)
        for descriptor in top:
            for candidate in _candidates(archive, descriptor, 0, _Aside([], [])):
                if candidate.fields["config"].get("digest") == image.image_id:
                    return candidate.body
    except (BadArchive, DigestMismatch):
        # manifest.json was complete; docker writes index.json with null and with gaps.
        return None
    return None


def _listed(fields: dict[str, Any], what: str) -> list[_Descriptor]:
    listed = fields.get("manifests")
    if not isinstance(listed, list | None):
        raise BadArchive(f"the manifests of {what} are no list", hint=_AGAIN)
    if listed and len(listed) > _MANIFESTS:
        raise BadArchive(f"{what} names {len(listed)} manifests, the limit is {_MANIFESTS}")
    return [_descriptor(value, what) for value in listed or ()]


def _descriptor(value: object, what: str) -> _Descriptor:
    if not isinstance(value, dict):
        raise BadArchive(f"{what} holds a descriptor that is none: {value!r:.60}", hint=_AGAIN)
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise BadArchive(f"{what} holds a descriptor without a size", hint=_AGAIN)
    notes, urls = value.get("annotations"), value.get("urls")
    return _Descriptor(
        digest.parse(value.get("digest")),
        size,
        str(value.get("mediaType") or ""),
        {str(k): str(v) for k, v in notes.items()} if isinstance(notes, dict) else {},
        platform_of(value["platform"]) if isinstance(value.get("platform"), dict) else None,
        tuple(map(str, urls)) if isinstance(urls, list) else (),
    )


def _name(descriptor: _Descriptor) -> str:
    notes = descriptor.annotations
    return notes.get(_CONTAINERD_NAME) or notes.get(_REF_NAME, "")


def _groups(top: list[_Descriptor]) -> list[list[_Descriptor]]:
    """The entries of index.json, those that are one image for several platforms together."""
    named: dict[str, list[_Descriptor]] = {}
    for descriptor in top:
        named.setdefault(_name(descriptor), []).append(descriptor)
    groups = []
    for group in named.values():
        images = [d for d in group if _ATTESTS not in d.annotations]
        platforms = {d.platform for d in images}
        if None not in platforms and len(platforms) == len(images):
            groups.append(group)
        else:
            groups += [[descriptor] for descriptor in group]
    return groups


def _blob(archive: Archive, descriptor: _Descriptor, what: str) -> bytes:
    data = archive.read(descriptor.path)
    actual = digest.of_bytes(data)
    if actual != descriptor.digest:
        raise DigestMismatch(what, expected=descriptor.digest, actual=actual)
    if len(data) != descriptor.size:
        raise BadArchive(
            f"{what} has {len(data)} bytes, its descriptor says {descriptor.size}", hint=_AGAIN
        )
    return data


def _candidates(
    archive: Archive, descriptor: _Descriptor, depth: int, aside: _Aside
) -> Iterator[_Candidate]:
    """The image manifests behind ``descriptor``; ``aside`` takes the rest."""
    what = f"the manifest {descriptor.digest}"
    if depth > _DEPTH:
        raise BadArchive(f"the indexes of {archive.where} are nested more than {_DEPTH} deep")
    if _ATTESTS in descriptor.annotations:
        aside.passed.append((what, ATTESTATION))
        return
    if not archive.exists(descriptor.path):
        # A saved image for several platforms often has the blobs of one only.
        aside.missing.append(what)
        return
    body = _blob(archive, descriptor, what)
    fields = parsed_object(body, what)
    if "manifests" in fields:
        for inner in _listed(fields, f"the index {descriptor.digest}"):
            yield from _candidates(archive, inner, depth + 1, aside)
        return
    kind = artifact(fields, descriptor.media_type)
    if kind:
        aside.passed.append((what, kind))
        return
    yield _Candidate(descriptor, body, fields)


def _choose(archive: Archive, candidates: list[_Candidate], wanted: Platform | None) -> _Candidate:
    """The candidate for ``wanted``; the only one if nothing particular is wanted."""
    if wanted is None and len({candidate.descriptor.digest for candidate in candidates}) == 1:
        return candidates[0]
    by_platform: dict[Platform, _Candidate] = {}
    for candidate in candidates:
        platform = candidate.descriptor.platform or platform_of(
            parsed_object(_config(archive, candidate)[1], "the config")
        )
        by_platform.setdefault(platform, candidate)
    return by_platform[oci.choose(list(by_platform), wanted, archive.where)]


def _config(archive: Archive, candidate: _Candidate) -> tuple[_Descriptor, bytes]:
    what = f"the config of {candidate.descriptor.digest}"
    descriptor = _descriptor(candidate.fields["config"], what)
    return descriptor, _blob(archive, descriptor, what)


def _image(archive: Archive, candidate: _Candidate, entry: _Descriptor) -> FoundImage:
    what = f"the manifest {candidate.descriptor.digest}"
    described, config = _config(archive, candidate)
    fields = parsed_object(config, f"the config {described.digest}")
    diff_ids = diff_ids_of(fields, f"the config {described.digest}")
    blobs = [_descriptor(value, what) for value in candidate.fields.get("layers") or ()]
    check_count(len(blobs), len(diff_ids), what)
    layers = []
    for blob, diff_id in zip(blobs, diff_ids, strict=True):
        layers.append(FoundLayer(_layer(archive, blob), blob.digest, blob.size, diff_id))
    references, notes = _references(entry)
    return FoundImage(
        config,
        ImageID(described.digest),
        candidate.body,
        diff_ids,
        tuple(layers),
        references,
        notes,
        platform_of(fields),
    )


def _layer(archive: Archive, blob: _Descriptor) -> Source | Candidate:
    if blob.media_type.endswith(_ENCRYPTED):
        raise BadArchive(
            f"the layer {blob.digest} is encrypted",
            hint=f"decrypt the image: skopeo copy --decryption-key KEY {_here(archive)} oci:DIR",
        )
    if not archive.exists(blob.path):
        raise _absent(archive, blob)
    source = archive.source(blob.path)
    if source.size != blob.size:
        raise BadArchive(
            f"the layer {blob.digest} has {source.size} bytes, its descriptor says {blob.size}",
            hint=_AGAIN,
        )
    if isinstance(source, Source) and not _TAR.search(blob.media_type):
        # Media types are wrong often enough: the content decides where it can be told.
        start = compression.head(source, magic.HEAD)
        known = compression.codec(start) != "none" or magic.foreign(start)
        if not known and not magic.is_tar(start):
            raise BadArchive(
                f"the layer {blob.digest} is no tar, its media type is {blob.media_type!r}",
                hint=_ALONE,
            )
    return source


def _absent(archive: Archive, blob: _Descriptor) -> BadArchive:
    """The refusal of a layer whose blob is not there; a foreign one comes from its vendor."""
    what = f"the layer {blob.digest} is not in {archive.where}"
    if not any(word in blob.media_type for word in ("nondistributable", "foreign")):
        return BadArchive(what, hint=_AGAIN)
    unpacked = _unpacked(archive)
    place = shlex.quote(f"{unpacked}/{blob.path}")
    url = next((url for url in blob.urls if url.startswith(("https://", "http://"))), None)
    steps = [
        *([] if unpacked == archive.where else [f"unpack it to {unpacked}/"]),
        f"curl -Lo {place} {shlex.quote(url)}" if url else f"put it at {place}",
        f"overlayctl load {shlex.quote(unpacked)}",
    ]
    return BadArchive(
        f"{what}: it is a foreign layer, which only its vendor hands out", hint="; ".join(steps)
    )


def _unpacked(archive: Archive) -> str:
    """The directory of a layout, or a name for the one that its tar has to be unpacked to."""
    return archive.where if isinstance(archive, Directory) else "LAYOUT"


def _here(archive: Archive) -> str:
    """What skopeo calls the layout."""
    if isinstance(archive, Directory):
        return shlex.quote(f"oci:{archive.where}")
    return shlex.quote(f"oci-archive:{'FILE' if archive.where == STDIN else archive.where}")


def _references(entry: _Descriptor) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of an entry of index.json and what is to be said about them."""
    name = _name(entry)
    if not name:
        return (), ()
    if "/" not in name and ":" not in name:
        return (), (f"{name!r} is only a tag and names no image: overlayctl tag ID NAME does",)
    reference, note = stored_reference(name)
    return ((reference,), ()) if reference else ((), (note,))

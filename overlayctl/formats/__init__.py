"""What other tools write: archives and layouts, read into one shape."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any, NamedTuple

from overlayctl import digest, names
from overlayctl.digest import DiffID, Digest, ImageID
from overlayctl.errors import BadArchive, Usage
from overlayctl.layer.input import STDIN
from overlayctl.oci import Platform

if TYPE_CHECKING:
    from overlayctl.layer.archive import Archive
    from overlayctl.layer.compression import Source
    from overlayctl.layer.stream import Candidate

__all__ = ["FoundImage", "FoundLayer", "read_images"]

_IMPORT = "overlayctl import {} NAME"
_SAVE = "give a file that docker save, podman save or skopeo copy has written"
_ROOT_NAMES = frozenset({"bin", "dev", "etc", "lib", "proc", "root", "sbin", "usr", "var"})


class FoundLayer(NamedTuple):
    """A layer in an archive: where its bytes are and what they claim to be.

    ``blob_digest`` and ``blob_size`` speak of the stored, perhaps compressed bytes and are
    None where the format does not say; ``diff_id`` of the tar. The digests are claims:
    whoever reads ``source`` checks them.
    """

    source: Source | Candidate
    blob_digest: Digest | None
    blob_size: int | None
    diff_id: DiffID


class FoundImage(NamedTuple):
    """An image in an archive, its layers bottom to top.

    ``config`` and ``manifest`` are verbatim; ``manifest`` is None where there is no OCI
    manifest. ``references`` are in stored form. ``notes`` are for a person.
    """

    config: bytes
    image_id: ImageID
    manifest: bytes | None
    diff_ids: tuple[DiffID, ...]
    layers: tuple[FoundLayer, ...]
    references: tuple[str, ...]
    notes: tuple[str, ...]
    platform: Platform


def read_images(archive: Archive, *, platform: Platform | None = None) -> list[FoundImage]:
    """Every image in ``archive``: a docker-archive, an OCI layout, skopeo's ``dir:``.

    Which it is, is told by content.

    Of an image for several platforms the one for ``platform`` (this host's if None) is
    taken. An image that several entries name comes once, with all references. An archive
    that is both is read by its manifest.json, which has the names. Raises BadArchive with
    what the archive is instead, DigestMismatch for a config, manifest or index.
    """
    from overlayctl.formats import docker_archive, oci_layout, skopeo_dir

    skopeos = skopeo_dir.detect(archive)
    entries = None if skopeos else docker_archive.entries(archive)
    layout = not skopeos and oci_layout.detect(archive)
    if skopeos:
        found = oci_layout.read(skopeo_dir.AsLayout(archive), platform=platform)
    elif entries:
        try:
            found = docker_archive.read(archive, entries, platform=platform)
        except BadArchive:
            if layout:
                # That may know more: docker and ctr leave out a layer that is its vendor's alone.
                oci_layout.read(archive, platform=platform)
            raise
        if layout:
            found = [
                image._replace(manifest=oci_layout.manifest_of(archive, image)) for image in found
            ]
    elif layout:
        found = oci_layout.read(archive, platform=platform)
    else:
        raise _refusal(archive, manifest=entries is not None)
    return [_told(image) for image in _merged(found)]


def _merged(found: list[FoundImage]) -> list[FoundImage]:
    images: dict[str, FoundImage] = {}
    for image in found:
        known = images.get(image.image_id)
        images[image.image_id] = (
            image
            if known is None
            else known._replace(
                references=tuple(dict.fromkeys(known.references + image.references)),
                notes=tuple(dict.fromkeys(known.notes + image.notes)),
            )
        )
    return list(images.values())


def _told(image: FoundImage) -> FoundImage:
    """The image with a note where nothing in it is for this kernel."""
    system = image.platform.os
    if system in ("", "linux"):
        return image
    note = f"the image is for {system}: its files can be looked at here, its programs not be run"
    return image._replace(notes=(*image.notes, note))


def _refusal(archive: Archive, *, manifest: bool) -> BadArchive:
    where, listed = archive.where, archive.names
    path = shlex.quote(where)
    as_root = _IMPORT.format("-" if where == STDIN else path)
    top = {name.split("/", 1)[0] for name in listed}
    if manifest:
        return BadArchive(
            f"{where} is a docker archive that names no image: its manifest.json is null or empty",
            hint="save the image again, by its name: docker save -o FILE NAME",
        )
    if "repositories" in listed and any(name.endswith("/layer.tar") for name in listed):
        return BadArchive(
            f"{where} has no manifest.json, only the repositories file of docker before 1.10",
            hint="load it with docker and save it again: docker load, docker save",
        )
    from overlayctl.layer.archive import Directory

    if isinstance(archive, Directory):
        hint = "an OCI layout has oci-layout, index.json and blobs/"
        if len(top & _ROOT_NAMES) > 2:
            hint = f"a root file system is imported: tar -C {path} -c . | overlayctl import - NAME"
        return BadArchive(f"the directory {where} is no OCI layout: {_holds(top)}", hint=hint)
    if not listed:
        return BadArchive(f"{where} is no image: it is an empty tar", hint=_SAVE)
    if len(top) == 1 and (below := next(iter(top))) + "/oci-layout" in listed:
        return BadArchive(
            f"{where} has its layout one directory down, in {below}",
            hint=f"tar -xf {path}; overlayctl load {shlex.quote(below)}",
        )
    if len(top & _ROOT_NAMES) > 2 or ".dockerenv" in top:
        return BadArchive(
            f"{where} is no image: it looks like the root file system of a container "
            "(docker export)",
            hint=as_root,
        )
    why = "it has neither manifest.json nor index.json"
    if "manifest.json" in listed:
        why = "its manifest.json is not docker's (and skopeo's dir: has a file version)"
    return BadArchive(
        f"{where} is a tar but no image: {why}, {_holds(top)}",
        hint=f"{_SAVE}; if it is the content of one layer: {as_root}",
    )


def _holds(names: set[str]) -> str:
    """A few of the names, as they may be shown."""
    shown = [f"{name[:40]!r}" for name in sorted(names)[:4]]
    more = ["..."] if len(names) > len(shown) else []
    return f"it holds {', '.join(shown + more) or 'nothing'}"


def parsed(data: bytes, what: str) -> Any:
    """``data`` as JSON. Raises BadArchive that calls it ``what``."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadArchive(f"{what} is no JSON: {error}", hint="save the image again") from error


def parsed_object(data: bytes, what: str) -> dict[str, Any]:
    """``data`` as a JSON object. Raises BadArchive."""
    value = parsed(data, what)
    if not isinstance(value, dict):
        raise BadArchive(f"{what} is no JSON object", hint="save the image again")
    return value


def diff_ids_of(config: dict[str, Any], what: str) -> tuple[DiffID, ...]:
    """The diff_ids of an image config (image-spec config.md, rootfs). Raises BadArchive."""
    rootfs = config.get("rootfs")
    listed = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(rootfs, dict) or not isinstance(listed, list | None):
        raise BadArchive(
            f"{what} is no image config: it has no rootfs.diff_ids", hint="save the image again"
        )
    return tuple(DiffID(digest.parse(value)) for value in listed or ())


def platform_of(value: object) -> Platform:
    """The platform that a config or a descriptor's ``platform`` states; empty where it does not."""
    fields = value if isinstance(value, dict) else {}
    return Platform(*(str(fields.get(key) or "") for key in ("os", "architecture", "variant")))


def check_count(layers: int, diff_ids: int, what: str) -> None:
    """Raise BadArchive unless a manifest and its config have equally many layers."""
    if layers != diff_ids:
        raise BadArchive(
            f"{what} lists {layers} layers, its config {diff_ids} diff_ids",
            hint="the archive contradicts itself: save the image again",
        )


def stored_reference(text: str) -> tuple[str | None, str]:
    """``text`` in stored form and a note; None with the reason if it is no reference."""
    try:
        return names.stored(text), ""
    except Usage as error:
        return None, f"the name {text!r} is left out: {error}"

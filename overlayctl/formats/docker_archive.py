"""The archives of ``docker save``: manifest.json, configs, and layers as files.

moby, image/spec/v1.2.md ("Combined Image JSON + Filesystem Changeset Format"). The names
in manifest.json are paths in the archive, whatever they look like.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from overlayctl import digest
from overlayctl.digest import Digest, ImageID
from overlayctl.errors import BadArchive, DigestMismatch, NotFound
from overlayctl.formats import (
    FoundImage,
    FoundLayer,
    check_count,
    diff_ids_of,
    parsed,
    parsed_object,
    platform_of,
    stored_reference,
)

if TYPE_CHECKING:
    from overlayctl.layer.archive import Archive
    from overlayctl.oci import Platform

_MANIFEST = "manifest.json"
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")
_NAMED = re.compile(r"(?:sha256:)?([0-9a-f]{64})(?:\.json)?")


def entries(archive: Archive) -> list[Any] | None:
    """What manifest.json lists; empty if that is null; None without such a file."""
    if not archive.exists(_MANIFEST):
        return None
    listed = parsed(archive.read(_MANIFEST), _MANIFEST)
    if listed is None:
        return []
    if not isinstance(listed, list):
        # A root file system may well have a file of that name.
        return None
    return listed


def read(
    archive: Archive, listed: list[Any], *, platform: Platform | None = None
) -> list[FoundImage]:
    """The images of manifest.json's ``listed``. Raises BadArchive, DigestMismatch, NotFound.

    With ``platform``, those for others are passed over, and NotFound names what there is.
    """
    found = [_image(archive, entry, number) for number, entry in enumerate(listed)]
    if platform is None:
        return found
    fitting = [image for image in found if image.platform.fits(platform)]
    if not fitting:
        there = ", ".join(sorted({str(image.platform) for image in found}))
        raise NotFound(
            f"{archive.where} has no image for {platform}: it has {there}",
            hint=f"--platform {there.split(', ', 1)[0]}",
        )
    return fitting


def _image(archive: Archive, entry: Any, number: int) -> FoundImage:
    what = f"image {number + 1} of {_MANIFEST}"
    if not isinstance(entry, dict) or not isinstance(entry.get("Config"), str):
        raise BadArchive(f"{what} names no config", hint="save the image again")
    paths = _strings(entry, "Layers", what)
    name = entry["Config"]
    config = archive.read(name)
    image_id = ImageID(digest.of_bytes(config))
    notes = _check_name(name, image_id)
    fields = parsed_object(config, f"the config {name}")
    diff_ids = diff_ids_of(fields, f"the config {name}")
    check_count(len(paths), len(diff_ids), what)
    layers = []
    for path, diff_id in zip(paths, diff_ids, strict=True):
        blob = _BLOB.fullmatch(path)
        layers.append(
            FoundLayer(
                archive.source(path), Digest(f"sha256:{blob[1]}") if blob else None, None, diff_id
            )
        )
    references = []
    for tag in _strings(entry, "RepoTags", what):
        reference, note = stored_reference(tag)
        if reference:
            references.append(reference)
        else:
            notes.append(note)
    return FoundImage(
        config,
        image_id,
        None,
        diff_ids,
        tuple(layers),
        tuple(dict.fromkeys(references)),
        tuple(notes),
        platform_of(fields),
    )


def _strings(entry: dict[str, Any], key: str, what: str) -> list[str]:
    value = entry.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadArchive(f"{key} of {what} is no list of names", hint="save the image again")
    return value


def _check_name(name: str, image_id: ImageID) -> list[str]:
    """Compare a config with its name: a blob's name is a promise, ``<id>.json`` a habit."""
    blob = _BLOB.fullmatch(name)
    if blob and blob[1] != digest.hex_of(image_id):
        raise DigestMismatch(f"the config {name}", expected=f"sha256:{blob[1]}", actual=image_id)
    named = _NAMED.fullmatch(name)
    if named and named[1] != digest.hex_of(image_id):
        # docker load accepts edited archives, so do we; the id follows the content.
        return [f"the config {name} was edited: the image's id is {image_id}"]
    return []

"""Directories as skopeo's ``dir:`` transport writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from overlayctl.errors import BadArchive, DigestMismatch
from overlayctl.formats import read_images
from overlayctl.oci import Platform
from tests.archives import config, descriptor, diff_id, manifest
from tests.formats.test_archive import LAYER, at

ARM = config(LAYER, arch="arm64")
AMD = config(LAYER, arch="amd64")
LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


def directory(root: Path, top: bytes, *manifests: bytes) -> Path:
    root.mkdir()
    (root / "version").write_bytes(b"Directory Transport Version: 1.1\n")
    (root / "manifest.json").write_bytes(top)
    for blob in (ARM, AMD, LAYER):
        (root / diff_id(blob).removeprefix("sha256:")).write_bytes(blob)
    for body in manifests:
        (root / f"{diff_id(body).removeprefix('sha256:')}.manifest.json").write_bytes(body)
    return root


def test_one_image(tmp_path: Path) -> None:
    body = manifest(AMD, LAYER)
    with at(directory(tmp_path / "dir", body)) as archive:
        (found,) = read_images(archive)
    assert found.manifest == body
    assert found.image_id == diff_id(AMD)
    assert found.diff_ids == (diff_id(LAYER),)
    assert found.references == ()


def test_an_image_for_several_platforms(tmp_path: Path) -> None:
    bodies = [manifest(ARM, LAYER), manifest(AMD, LAYER)]
    platforms = [{"os": "linux", "architecture": name} for name in ("arm64", "amd64")]
    listed = [
        descriptor(body, MANIFEST, platform=platform)
        for body, platform in zip(bodies, platforms, strict=True)
    ]
    top = json.dumps({"schemaVersion": 2, "mediaType": LIST, "manifests": listed}).encode()
    with at(directory(tmp_path / "dir", top, *bodies)) as archive:
        for architecture, image in (("arm64", ARM), ("amd64", AMD)):
            (found,) = read_images(archive, platform=Platform("linux", architecture, ""))
            assert found.image_id == diff_id(image)


def test_a_config_that_was_changed(tmp_path: Path) -> None:
    root = directory(tmp_path / "dir", manifest(AMD, LAYER))
    (root / diff_id(AMD).removeprefix("sha256:")).write_bytes(AMD + b" ")
    with at(root) as archive, pytest.raises(DigestMismatch):
        read_images(archive)


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    root = directory(tmp_path / "dir", manifest(AMD, LAYER))
    (root / diff_id(LAYER).removeprefix("sha256:")).unlink()
    with at(root) as archive, pytest.raises(BadArchive, match="is not in"):
        read_images(archive)

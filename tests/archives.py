"""Docker archives and OCI layouts for tests, from the bytes of their layers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from overlayctl.digest import Digest
from overlayctl.layer.compression import Source, chunks
from overlayctl.layer.format import PAGE
from overlayctl.layer.stream import Candidate
from tests.layer.tars import entry, tar
from tests.rootmount import require


def diff_id(layer: bytes) -> str:
    return "sha256:" + hashlib.sha256(layer).hexdigest()


def content(source: Source | Candidate, blob: Digest | None = None) -> bytes:
    """The tar of a layer that an archive has, or that has passed; its bytes were ``blob``'s."""
    if isinstance(source, Source):
        return b"".join(map(bytes, chunks(source, hashed=blob)))
    size = source.received(blob).size
    with source.take()[0] as file:
        return os.pread(file.fileno(), size, PAGE)


def zstd(data: bytes) -> bytes:
    require("zstd")
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


def docker_archive(
    path: Path,
    layers: list[bytes],
    *,
    tags: tuple[str, ...] = ("demo:latest",),
    stored: list[bytes] | None = None,
    diff_ids: list[str] | None = None,
    config: Mapping[str, object] = MappingProxyType({"Cmd": ["/bin/sh"]}),
    created: str = "",
) -> Path:
    """An archive at ``path``; ``stored`` are other bytes for the layers (compressed, damaged)."""
    whole = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": dict(config),
            **({"created": created} if created else {}),
            "rootfs": {"type": "layers", "diff_ids": diff_ids or [diff_id(x) for x in layers]},
            "history": [{"created_by": f"step {n}"} for n in range(1, len(layers) + 1)],
        }
    ).encode()
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": "config.json", "RepoTags": list(tags) or None, "Layers": names}]
    path.write_bytes(
        tar(
            entry("manifest.json", data=json.dumps(manifest).encode()),
            entry("config.json", data=whole),
            *(entry(n, data=d) for n, d in zip(names, stored or layers, strict=True)),
        )
    )
    return path


OCI = "application/vnd.oci.image."


def config(*layers: bytes, arch: str = "amd64", system: str = "linux") -> bytes:
    """The config of an image of these (uncompressed) layers."""
    rootfs = {"type": "layers", "diff_ids": [diff_id(layer) for layer in layers]}
    return json.dumps({"os": system, "architecture": arch, "rootfs": rootfs}).encode()


def descriptor(data: bytes, media_type: str, **fields: object) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": diff_id(data), "size": len(data), **fields}


def manifest(conf: bytes, *layers: bytes, kind: str = OCI + "layer.v1.tar", **fields: Any) -> bytes:
    """A manifest of these blobs, all of one media type; ``fields`` are more, or others."""
    return json.dumps(
        {
            "schemaVersion": 2,
            "config": descriptor(conf, OCI + "config.v1+json"),
            "layers": [descriptor(layer, kind) for layer in layers],
            **fields,
        }
    ).encode()


def index(*manifests: dict[str, Any]) -> dict[str, Any]:
    return {"schemaVersion": 2, "manifests": list(manifests)}


def layout(root: Path, index: object, *blobs: bytes) -> Path:
    """A layout in the new directory ``root``."""
    place = root / "blobs" / "sha256"
    place.mkdir(parents=True)
    for blob in blobs:
        (place / hashlib.sha256(blob).hexdigest()).write_bytes(blob)
    (root / "index.json").write_text(json.dumps(index))
    (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return root

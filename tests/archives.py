"""Docker archives for tests, from the bytes of their layers."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from overlayctl.digest import Digest
from overlayctl.layer.compression import Source, chunks
from overlayctl.layer.format import PAGE
from overlayctl.layer.stream import Candidate
from tests.layer.tars import entry, tar


def diff_id(layer: bytes) -> str:
    return "sha256:" + hashlib.sha256(layer).hexdigest()


def content(source: Source | Candidate, blob: Digest | None = None) -> bytes:
    """The tar of a layer that an archive has, or that has passed; its bytes were ``blob``'s."""
    if isinstance(source, Source):
        return b"".join(map(bytes, chunks(source, hashed=blob)))
    size = source.received(blob).size
    return os.pread(source.take()[0], size, PAGE)


def docker_archive(
    path: Path,
    layers: list[bytes],
    *,
    tags: tuple[str, ...] = ("demo:latest",),
    stored: list[bytes] | None = None,
    diff_ids: list[str] | None = None,
) -> Path:
    """An archive at ``path``; ``stored`` are other bytes for the layers (compressed, damaged)."""
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids or [diff_id(x) for x in layers]},
            "history": [{"created_by": f"step {n}"} for n in range(1, len(layers) + 1)],
        }
    ).encode()
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": "config.json", "RepoTags": list(tags) or None, "Layers": names}]
    path.write_bytes(
        tar(
            entry("manifest.json", data=json.dumps(manifest).encode()),
            entry("config.json", data=config),
            *(entry(n, data=d) for n, d in zip(names, stored or layers, strict=True)),
        )
    )
    return path

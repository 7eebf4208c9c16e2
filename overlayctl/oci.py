"""Platforms, and the configs and manifests that are written here (OCI image-spec, config.md)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from overlayctl.digest import DiffID, Digest, of_bytes
from overlayctl.errors import NotFound, Usage

_MACHINES = {
    "x86_64": ("amd64", ""),
    "i386": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", "v8"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "loongarch64": ("loong64", ""),
}
"""What the kernel calls machines that Go calls otherwise, and their variants."""
_PART = re.compile(r"[a-z0-9_.-]+")
_BASELINE = {"amd64": "v1", "arm": "v7", "arm64": "v8"}
"""What an architecture without a variant means (containerd, platforms)."""


class Platform(NamedTuple):
    """Where an image runs. Empty is unknown."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in self if part)

    def fits(self, wanted: Platform) -> bool:
        """Whether an image for this platform answers a wish for ``wanted``."""
        if (self.os, self.architecture) != (wanted.os, wanted.architecture):
            return False
        return not wanted.variant or self.full_variant == wanted.full_variant

    @property
    def full_variant(self) -> str:
        """The variant, or the one that leaving it out means."""
        return self.variant or _BASELINE.get(self.architecture, "")


def host_platform() -> Platform:
    """This machine's platform in Go's words."""
    machine = os.uname().machine
    return Platform("linux", *_MACHINES.get(machine, (machine, "")))


def parse_platform(text: str) -> Platform:
    """``linux/arm64/v8`` as a platform, ``arm64`` as one of Linux. Raises Usage."""
    parts = text.lower().split("/")
    if not 1 <= len(parts) <= 3 or not all(map(_PART.fullmatch, parts)) or text == "linux":
        raise Usage(f"{text!r} is no platform", hint="for example --platform linux/arm64")
    system, machine, *variant = parts if len(parts) > 1 else ["linux", *parts]
    architecture, implied = _MACHINES.get(machine, (machine, ""))
    return Platform(system, architecture, *variant or [implied])


def choose(platforms: Sequence[Platform], wanted: Platform | None, where: str) -> Platform:
    """The platform to load: the wanted one, else the host's, else the only one.

    Where no variant was asked for and there is none for it, the next older one will do.
    Raises NotFound naming what there is in ``where``.
    """
    target = wanted or host_platform()
    fitting = [one for one in platforms if one.fits(target._replace(variant=""))]
    for candidate in fitting:
        if candidate.full_variant == target.full_variant:
            return candidate
    if fitting and not (wanted and wanted.variant):
        older = [one for one in fitting if one.full_variant < target.full_variant]
        return max(older or fitting[:1], key=lambda one: one.full_variant)
    if wanted is None and len(set(platforms)) == 1:
        return platforms[0]
    there = ", ".join(sorted({str(platform) for platform in platforms}))
    raise NotFound(
        f"{where} has no image for {target}: it has {there}",
        hint=f"--platform {platforms[0]}" if platforms else "",
    )


def new_config(diff_ids: Sequence[DiffID], *, created: str, comment: str) -> bytes:
    """The config of an image made of plain layer tars: deterministic JSON."""
    host = host_platform()
    config = {
        "architecture": host.architecture,
        "config": {},
        "created": created,
        "history": [{"created": created, "comment": comment} for _ in diff_ids],
        "os": host.os,
        "rootfs": {"diff_ids": list(diff_ids), "type": "layers"},
    }
    return json.dumps(config, sort_keys=True, separators=(",", ":")).encode()


def new_manifest(
    config: bytes, layers: Sequence[tuple[Digest | DiffID, int]], *, codec: str = "none"
) -> bytes:
    """The OCI manifest of an image whose layers are blobs of that many bytes.

    They are plain tars, or tars compressed by ``codec``.
    """
    media = "application/vnd.oci.image."
    kind = media + "layer.v1.tar" + ("" if codec == "none" else f"+{codec}")
    manifest = {
        "config": {
            "digest": of_bytes(config),
            "mediaType": media + "config.v1+json",
            "size": len(config),
        },
        "layers": [{"digest": digest, "mediaType": kind, "size": size} for digest, size in layers],
        "mediaType": media + "manifest.v1+json",
        "schemaVersion": 2,
    }
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def said(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an image's config says of its process (config.md, "config"); nothing if it is none."""
    inner = config.get("config")
    return inner if isinstance(inner, dict) else {}


def created_by(config: Mapping[str, object], layers: int) -> list[str]:
    """The history line of each layer, bottom to top; empty where the history has none."""
    history = config.get("history")
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    lines = [
        str(row.get("created_by") or row.get("comment") or "")
        for row in rows
        if not row.get("empty_layer")
    ]
    return (lines + [""] * layers)[:layers]

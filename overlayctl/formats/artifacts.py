"""What registries and layouts hold beside images: charts, signatures, attestations, modules.

image-spec manifest.md ("Guidelines for Artifact Usage"): ``artifactType``, or the type of
the config, says what it is. Signatures of cosign and attestations of buildkit have the
config of an image, and only their layers tell.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_CONFIGS = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
_EMPTY = "application/vnd.oci.empty.v1+json"
_NO_LAYER = re.compile(r"[+/]json$|^text/|wasm|\.sif$")


class Artifact(NamedTuple):
    """A manifest that is no image: what it is, and what to do instead of loading it."""

    words: str
    hint: str


_ITSELF = "save the image itself, by its name"
_OTHER = "overlayctl loads container images; other artifacts belong to their own tools"
_KINDS = (
    (r"helm", "a Helm chart", "helm pull oci://REGISTRY/CHART, then helm install"),
    (r"cosign|sigstore|notary|signature", "a signature of an image", _ITSELF),
    (r"in-toto|spdx|cyclonedx|slsa|dsse", "an attestation about an image", _ITSELF),
    (r"wasm", "a WebAssembly module", "give it to a WebAssembly runtime, as wasmtime is one"),
    (r"docker\.plugin", "a plugin of docker", "docker plugin install NAME"),
    (r"\.sif", "a Singularity image", "singularity run FILE.sif"),
)
ATTESTATION = Artifact("is an attestation about an image", _ITSELF)


def artifact(fields: dict[str, Any], described: str) -> Artifact | None:
    """What a manifest's ``fields`` are where they are no image; ``described`` is its media type."""
    config, layers = fields.get("config"), fields.get("layers")
    if fields.get("schemaVersion") == 1:
        return Artifact(
            "has docker's schema 1, which no tool writes any more",
            "convert it from where it came: skopeo copy docker://NAME docker-archive:FILE",
        )
    if not isinstance(config, dict) or not isinstance(layers, list | None):
        kind = str(fields.get("mediaType") or described or "of an unknown type")
        return _named(f"is no image manifest ({kind})", kind)
    types = [str(fields.get("artifactType") or ""), str(config.get("mediaType") or "")]
    if types[1] in _CONFIGS:
        types.pop()
    inside = [str(layer.get("mediaType") or "") for layer in layers or () if type(layer) is dict]
    if not any(types) and not (inside and all(map(_NO_LAYER.search, inside))):
        return None
    # The type of an empty config says nothing, what is in the layers may.
    kind = next((kind for kind in (*types, *inside) if kind not in ("", _EMPTY)), _EMPTY)
    return _named(f"is an artifact ({kind})", kind)


def _named(words: str, kind: str) -> Artifact:
    for pattern, name, hint in _KINDS:
        if re.search(pattern, kind):
            return Artifact(f"is {name} ({kind})", hint)
    return Artifact(words, _OTHER)

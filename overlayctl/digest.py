"""Digests: the only way from text to a ``Digest`` is a check.

OCI image-spec, descriptor.md (digests) and config.md (DiffID, ChainID).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import NewType

from overlayctl.errors import BadArchive

Digest = NewType("Digest", str)
"""``sha256:<64 hex>``: the name of some bytes."""
DiffID = NewType("DiffID", str)
"""Digest of an uncompressed layer tar."""
ChainID = NewType("ChainID", str)
"""Digest of a layer and all below it."""
ImageID = NewType("ImageID", str)
"""Digest of an image's config."""

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_OTHER = re.compile(r"(sha384|sha512|blake3):[0-9a-f]{64,}")


def parse(text: object) -> Digest:
    """``text`` as a digest. Raises BadArchive for anything but lower-case sha256."""
    if isinstance(text, str) and _SHA256.fullmatch(text):
        return Digest(text)
    other = _OTHER.fullmatch(text) if isinstance(text, str) else None
    if other:
        raise BadArchive(
            f"{text} is a {other[1]} digest, only sha256 ones are supported",
            hint="have the image written with sha256 digests; its layers alone can be imported: "
            "overlayctl import LAYER.tar... NAME:TAG",
        )
    raise BadArchive(
        f"not a sha256 digest: {str(text)[:100]!r}", hint="only sha256 digests are supported"
    )


def of_bytes(data: bytes) -> Digest:
    """The digest of ``data``."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def hex_of(digest: str) -> str:
    """The 64 hex characters of a digest of any of the four kinds."""
    return digest.removeprefix("sha256:")


def chain_ids(diff_ids: Iterable[DiffID]) -> list[ChainID]:
    """The chain id of each layer, bottom to top (image-spec config.md, "Layer ChainID")."""
    chain: list[ChainID] = []
    for diff_id in diff_ids:
        below = chain[-1] if chain else None
        chain.append(
            ChainID(of_bytes(f"{below} {diff_id}".encode())) if below else ChainID(diff_id)
        )
    return chain

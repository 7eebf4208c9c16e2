"""The directories of ``skopeo copy X dir:Y`` and ``podman save --format docker-dir``.

containers-transports(5), dir: a file ``version``, the manifest as manifest.json, and each blob
under the hexadecimal digits of its digest. ``skopeo copy --all`` makes manifest.json an index,
and the manifests that it names are ``HEX.manifest.json``. There are no names in it.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

from overlayctl import digest
from overlayctl.layer.archive import READ_LIMIT
from overlayctl.layer.compression import Source, head
from overlayctl.layer.input import Closing

if TYPE_CHECKING:
    from overlayctl.layer.archive import Archive
    from overlayctl.layer.stream import Candidate

_BLOBS = "blobs/sha256/"
_MANIFEST = "manifest.json"
_VERSION = "version"
_SAYS = b"Directory Transport Version: 1."


def detect(archive: Archive) -> bool:
    """Whether ``archive`` says that it is such a directory."""
    if not archive.exists(_VERSION) or not archive.exists(_MANIFEST):
        return False
    version = archive.source(_VERSION)
    return isinstance(version, Source) and head(version).startswith(_SAYS)


class AsLayout(Closing):
    """Such a directory with the names of an OCI layout, whose only image has no name.

    The directory stays the caller's.
    """

    def __init__(self, archive: Archive) -> None:
        super().__init__(archive.where, ExitStack())
        self._archive = archive
        manifest = archive.read(_MANIFEST)
        self._manifest = digest.of_bytes(manifest)
        entry = {"digest": self._manifest, "size": len(manifest)}
        self._index = json.dumps({"manifests": [entry]}).encode()

    @property
    def names(self) -> frozenset[str]:
        """The names that are there in fact."""
        return self._archive.names

    def source(self, name: str) -> Source | Candidate:
        """The bytes of a blob. Raises BadArchive if there is none."""
        return self._archive.source(self._real(name))

    def read(self, name: str, limit: int = READ_LIMIT) -> bytes:
        """All bytes of a blob, or of the index. Raises BadArchive, LimitExceeded."""
        return self._index if name == "index.json" else self._archive.read(self._real(name), limit)

    def exists(self, name: str) -> bool:
        """Whether there is such a blob."""
        return self._archive.exists(self._real(name))

    def _real(self, name: str) -> str:
        digits = name.removeprefix(_BLOBS)
        if digits == digest.hex_of(self._manifest):
            return _MANIFEST
        listed = f"{digits}.manifest.json"
        return listed if self._archive.exists(listed) else digits

"""What an image looks like when another program has put its layers together: umoci."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import tempfile
from pathlib import Path

from . import command

_TAG = "unpack"


def umoci_unpack(image: Path, dest: Path, *, tag: str | None = None) -> Path:
    """Unpack all layers of an image into ``dest``, which must not exist yet, and return it.

    ``image`` is an OCI layout (a directory, or a tar of one) or a docker-archive, either tar
    perhaps gzipped; ``tag`` chooses one of several images: the layout's ref.name, or the archive's
    ``name:tag``.

    umoci 0.4 reads directories, gzip and tags only, so skopeo makes a layout of that kind first,
    beside ``dest``. Where a layout holds several platforms it takes the host's.
    """
    with tempfile.TemporaryDirectory(prefix=".umoci.", dir=dest.parent) as directory:
        layout = Path(directory) / "layout"
        command.output(
            "skopeo",
            "--insecure-policy",  # a fresh machine has no containers-policy.json(5)
            "copy",
            "--quiet",
            # Level 1: what is compressed here is read once and thrown away.
            *("--dest-compress-format", "gzip", "--dest-compress-level", "1"),
            _source(plain(image, Path(directory)), tag),
            f"oci:{layout}:{_TAG}",
        )
        command.output("umoci", "raw", "unpack", "--image", f"{layout}:{_TAG}", dest)
    return dest


def plain(image: Path, directory: Path) -> Path:
    """Undo the gzip around a whole archive, which skopeo, podman and containerd do not read.

    Return ``image`` where there is none, else a file in ``directory``.
    """
    if image.is_dir():
        return image
    with image.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return image
    plain = directory / "image.tar"
    with gzip.open(image) as compressed, plain.open("wb") as file:
        shutil.copyfileobj(compressed, file)
    return plain


def _source(image: Path, tag: str | None) -> str:
    """Say in skopeo's words (containers-transports(5)) what ``image`` is."""
    suffix = f":{tag}" if tag else ""
    if image.is_dir():
        return f"oci:{image}{suffix}"
    with tarfile.open(image) as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    transport = "docker-archive" if "manifest.json" in names else "oci-archive"
    return f"{transport}:{image}{suffix}"

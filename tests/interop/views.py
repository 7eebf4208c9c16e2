"""What an image looks like in overlayctl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cli.conftest import Shell
from tests.oracles import trees

Tree = dict[bytes, trees.Entry]

# Ours alone: it tells overlayfs that nothing was copied up from elsewhere.
OWN = (b"trusted.overlay.origin",)
TIME: tuple[trees.Field, ...] = ("mtime_ns",)


def loaded(run: Shell, path: Path) -> dict[str, Any]:
    """Load the image at ``path``; what inspect says about it."""
    run("load", path)
    (image,) = json.loads(run("inspect", run("images", "-q").out.split(maxsplit=1)[0]).out)
    return dict(image)


def view_of(run: Shell, image: str) -> Tree:
    """An image's merged view."""
    return trees.snapshot(run.path("image", "mount", image), ignore=OWN)


def before_1970(tree: Tree) -> Tree:
    """``tree`` as docker, podman and containerd have it: what is older than 1970 is of 1970."""
    return {path: entry._replace(mtime_ns=max(entry.mtime_ns, 0)) for path, entry in tree.items()}

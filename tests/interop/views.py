"""What an image looks like in overlayctl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cli.conftest import Shell
from tests.oracles import trees

# Ours alone: it tells overlayfs that nothing was copied up from elsewhere.
OWN = (b"trusted.overlay.origin",)
TIME: tuple[trees.Field, ...] = ("mtime_ns",)


def loaded(run: Shell, path: Path) -> dict[str, Any]:
    """Load the image at ``path``; what inspect says about it."""
    run("load", path)
    (image,) = json.loads(run("inspect", run("images", "-q").out.split(maxsplit=1)[0]).out)
    return dict(image)


def view_of(run: Shell, image: str) -> dict[bytes, trees.Entry]:
    """An image's merged view."""
    return trees.snapshot(run.path("image", "mount", image), ignore=OWN)

"""A layer's diff path compared with what GNU tar makes of the layer's tar."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from . import gnutar, trees

# Layers do not carry what overlayfs itself needs on whiteout-holding directories.
OWN = (b"trusted.overlay.origin",)
_INHERITED: tuple[trees.Field, ...] = ("mode", "uid", "gid", "xattrs")


def differences(tar: Path, diff_path: str | os.PathLike[str]) -> list[str]:
    """Return one line for each difference; ``tar`` lies where its tree can be made beside it."""
    tree = tar.with_suffix(".tree")
    applied = gnutar.apply_layer(tar, tree)
    # What an implied directory takes from below is not in the tar: the merged view proves it.
    below = dict.fromkeys(applied.implied, _INHERITED)
    found = trees.differences(
        trees.snapshot(tree, ignore=OWN),
        trees.snapshot(diff_path, ignore=OWN),
        ignore_fields_of=below,
    )
    shutil.rmtree(tree)
    return found

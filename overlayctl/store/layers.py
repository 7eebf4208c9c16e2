"""Stored layers: immutable files named by the digest of their tar (and their facts).

Nobody counts references: who uses a layer is found by reading images and snapshots.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from overlayctl import names
from overlayctl.errors import NotFound
from overlayctl.layer import attach
from overlayctl.layer.index import Index
from overlayctl.store import records
from overlayctl.store.records import fault

if TYPE_CHECKING:
    from overlayctl.layer.format import Header
    from overlayctl.layout import Layout


class LayerStat(NamedTuple):
    """A stored layer: sizes in bytes, ``disk`` as the blocks that the store spends on it."""

    name: str
    header: Header
    disk: int


def listed(layout: Layout) -> list[str]:
    """The names of all stored layers."""
    return [
        name
        for name in records.names(layout.path("layers"))
        if os.path.exists(layout.layer_file(name))
    ]


def exists(layout: Layout, name: str) -> bool:
    """Whether the layer is stored."""
    return os.path.exists(layout.layer_file(name))


def open_index(layout: Layout, name: str) -> Index:
    """The layer's index, attached or not. Raises NotFound, Damaged."""
    try:
        return Index.open(layout.layer_file(name))
    except FileNotFoundError:
        raise NotFound(
            f"the layer {names.short(name)} is missing", hint="overlayctl system check"
        ) from None


def stat(layout: Layout, name: str) -> LayerStat:
    """What is known of a stored layer. Raises NotFound, Damaged."""
    with open_index(layout, name) as index:
        return LayerStat(name, index.header, os.stat(layout.layer_file(name)).st_blocks * 512)


def commit(layout: Layout, staged: str, name: str) -> bool:
    """Move a synced, staged layer directory to its place; False if the layer was there.

    The caller holds the store's lock and syncs ``layers/`` afterwards.
    """
    if exists(layout, name):
        return False
    target = layout.layer(name)
    if os.path.isdir(target):
        # A removal that stopped between the file and its directory.
        os.rmdir(target)
    os.rename(staged, target)
    fault("layer:after-rename")
    return True


def remove(layout: Layout, name: str) -> int:
    """Delete a layer that nobody uses; how many bytes its file took. The caller holds the lock."""
    attach.detach(layout, name)
    path = layout.layer_file(name)
    # The file's space is freed when its last fd closes, after the caller's lock is gone.
    size = os.stat(path).st_blocks * 512 if os.path.exists(path) else 0
    records.remove(path)
    fault("layer:after-unlink")
    if os.path.isdir(layout.layer(name)):
        for left in os.listdir(layout.layer(name)):
            os.unlink(os.path.join(layout.layer(name), left))
        os.rmdir(layout.layer(name))
    return size

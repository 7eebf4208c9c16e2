"""Who needs a layer, and what a crash left for the next writer to finish."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from overlayctl.errors import OverlayctlError
from overlayctl.store import images, layers, records, snapshots, staging

if TYPE_CHECKING:
    from overlayctl.layout import Layout


def layer_users(layout: Layout) -> dict[str, list[str]]:
    """Each layer that something names: ``image <id>`` and ``snapshot <key>`` who do."""
    users: dict[str, list[str]] = {}
    for image in images.readable(layout):
        for name in dict.fromkeys(image.layers):
            users.setdefault(name, []).append(f"image {image.hex}")
    for key in snapshots.listed(layout):
        try:
            snapshot = snapshots.get(layout, key)
        except OverlayctlError:
            continue
        for name in dict.fromkeys(snapshot.layers):
            users.setdefault(name, []).append(f"snapshot {key}")
    return users


def orphans(layout: Layout) -> list[str]:
    """Stored layers that nobody names. None while a record cannot be read: it may name them."""
    if len(images.readable(layout)) < len(images.listed(layout)):
        return []
    users = layer_users(layout)
    return [name for name in layers.listed(layout) if name not in users]


def finish(layout: Layout) -> None:
    """Finish what a killed command left; the caller holds the store's lock.

    Only what was being made or unmade goes: nothing that a person made complete.
    """
    staging.sweep(layout)
    for name in records.names(layout.path("images")):
        if not os.path.exists(layout.image(name, "image.json")):
            shutil.rmtree(layout.image(name))
    for name in records.names(layout.path("layers")):
        if not os.listdir(layout.layer(name)):
            os.rmdir(layout.layer(name))
    for key in records.names(layout.path("snapshots")):
        recorded = os.path.exists(layout.container(key))
        kept = os.path.exists(layout.snapshot(key, "keep"))
        upper = layout.snapshot(key, "upper")
        empty = not os.path.isdir(upper) or not os.listdir(upper)
        if not os.path.lexists(layout.merged(key)) and (
            (not kept and not recorded) or (not recorded and empty)
        ):
            shutil.rmtree(layout.snapshot(key))
        elif not kept and recorded and not os.path.lexists(layout.merged(key)):
            records.remove(layout.container(key))
            shutil.rmtree(layout.snapshot(key))
    for name in records.names(layout.path("containers", "names")):
        link = layout.container_name(name)
        if not os.path.exists(layout.container(os.readlink(link))):
            os.unlink(link)

"""Who needs a layer, and what a crash left for the next writer to finish."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from overlayctl.errors import KernelRefused, OverlayctlError
from overlayctl.kernel import inuse, rooted
from overlayctl.layer import attach
from overlayctl.store import containers, images, layers, records, snapshots, staging

if TYPE_CHECKING:
    from overlayctl.layout import Layout

# What else lies in these directories (lost+found, a person's notes) is left alone.
_IMAGE = re.compile(r"[0-9a-f]{64}")


def layer_users(layout: Layout) -> dict[str, list[str]]:
    """Each layer that something names: ``image <id>`` and ``snapshot <key>`` who do."""
    return users(layout)[0]


def orphans(layout: Layout) -> list[str]:
    """Stored layers that nobody names. None while a record cannot be read: it may name them."""
    return unneeded(layout, layers.listed(layout))


def unneeded(layout: Layout, wanted: Iterable[str], *, without: str = "") -> list[str]:
    """Those of the layers that nobody names, the user ``without`` aside.

    None while a record cannot be read: it may name them.
    """
    named, complete = users(layout)
    return [name for name in wanted if not set(named.get(name, ())) - {without}] if complete else []


def users(layout: Layout) -> tuple[dict[str, list[str]], bool]:
    """The users of each layer, as in ``layer_users``, and whether every record could be read."""
    named: dict[str, list[str]] = {}
    found: list[tuple[str, tuple[str, ...]]] = []
    complete = True
    for image_hex in images.listed(layout):
        try:
            found.append((f"image {image_hex}", images.get(layout, image_hex).layers))
        except OverlayctlError:
            complete = False
    for key in snapshots.listed(layout):
        try:
            found.append((f"snapshot {key}", snapshots.get(layout, key).layers))
        except OverlayctlError:
            complete = False
    for user, names in found:
        for name in dict.fromkeys(names):
            named.setdefault(name, []).append(user)
    return named, complete


def abandoned(layout: Layout) -> dict[str, int]:
    """Staging that no running command owns, and the bytes that the files in it take as blocks."""
    return {name: _blocks(layout.path("ingest", name)) for name in staging.abandoned(layout)}


def _blocks(path: str) -> int:
    # The next writer takes it away, and may be doing so.
    with suppress(FileNotFoundError):
        found = rooted.stats(path) if os.path.isdir(path) else [os.lstat(path)]
        return sum(one.st_blocks * 512 for one in found if not stat.S_ISDIR(one.st_mode))
    return 0


def finish(layout: Layout) -> None:
    """Finish what a killed command left; the caller holds the store's lock.

    Only what was being made or unmade goes: nothing that a person made complete. What
    cannot be removed hinders nobody: ``check`` names it.
    """
    from overlayctl.store import volumes

    staging.sweep(layout)
    for name in records.names(layout.path("images")):
        if _IMAGE.fullmatch(name) and records.is_gone(layout.image(name, "image.json")):
            rooted.remove_tree(layout.image(name), ignore_errors=True)
    for name in records.names(layout.path("layers")):
        if layers.is_name(name) and layers.is_gone(layout, name):
            layers.clear(layout, name)
    for key in snapshots.stored(layout):
        _finish_snapshot(layout, key)
    volumes.finish(layout)
    # Without their directory all are gone, and it may come back.
    known = os.path.isdir(layout.path("snapshots"))
    for container_id in containers.recorded(layout):
        # Its snapshot went first: the removal stopped before the record.
        if known and records.is_gone(layout.snapshot(container_id)):
            records.remove(layout.container(container_id))
    for name in records.names(layout.path("containers", "names")):
        holder = containers.named(layout, name)
        if holder is not None and records.is_gone(layout.container(holder)):
            os.unlink(layout.container_name(name))


def _finish_snapshot(layout: Layout, key: str) -> None:
    kept = not records.is_gone(layout.snapshot(key, "keep"))
    owned = not records.is_gone(layout.container(key))
    if kept and (owned or snapshots.is_written(layout, key)):
        return
    merged = layout.merged(key)
    there = attach.is_mountpoint(layout, merged)
    if there and attach.is_mounted(merged):
        return
    if _may_be_written(layout.snapshot(key, "upper")):
        return
    if there:
        os.rmdir(merged)
    records.remove(layout.snapshot(key, "keep"))
    rooted.remove_tree(layout.snapshot(key), ignore_errors=True)
    records.remove(layout.container(key))


def _may_be_written(upper: str) -> bool:
    """Whether an overlay that no mount of ours shows has the upper, or nobody can tell."""
    try:
        return os.path.isdir(upper) and inuse.upper_in_use(upper)
    except KernelRefused:
        return True

"""``check``: every layer re-hashed, files and records compared both ways."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.digest import of_bytes
from overlayctl.errors import OverlayctlError
from overlayctl.layer import index
from overlayctl.store import containers, gc, images, layers, records, snapshots

if TYPE_CHECKING:
    from overlayctl.layout import Layout


class Finding(NamedTuple):
    """One thing that is wrong. ``users`` are the images and snapshots it harms."""

    tag: str
    path: str
    message: str
    users: tuple[str, ...] = ()


def check(layout: Layout, *, quick: bool = False) -> list[Finding]:
    """What is wrong with the store; ``quick`` leaves the hashing of layers out."""
    users = gc.layer_users(layout)
    found: list[Finding] = []
    for name in records.names(layout.path("layers")):
        found += layer(layout, name, tuple(users.get(name, ())), quick=quick)
    found += [
        Finding("layer-missing", layout.layer_file(name), f"layer {name[:12]} is gone", tuple(who))
        for name, who in users.items()
        if not layers.exists(layout, name)
    ]
    found += [
        Finding("layer-orphan", layout.layer(name), f"nobody names layer {name[:12]}")
        for name in gc.orphans(layout)
    ]
    found += _images(layout)
    found += _tags(layout)
    found += _containers(layout)
    found += [
        Finding("staging-left", layout.path("ingest", name), "left by a command that was killed")
        for name in records.names(layout.ingest)
    ]
    return found


def layer(layout: Layout, name: str, users: tuple[str, ...], *, quick: bool) -> list[Finding]:
    """What is wrong with one layer: which part of its file, and whom it harms."""
    path = layout.layer_file(name)
    if not os.path.exists(path):
        return [Finding("layer-empty", layout.layer(name), "a layer's directory without its file")]
    try:
        with index.Index.open(path) as opened:
            recorded = opened.header.diff_id.removeprefix("sha256:")
        wrong = [] if quick else index.verify(path)
    except OverlayctlError as error:
        wrong = [] if quick else index.verify(path)
        if not wrong:
            return [Finding("layer-damaged", path, str(error), users)]
        recorded = name[:64]
    found = [
        Finding("layer-damaged", path, f"the {part} of layer {name[:12]} is damaged", users)
        for part in wrong
    ]
    if recorded != name[:64] and not wrong:
        found.append(Finding("layer-misnamed", path, f"it holds layer {recorded[:12]}", users))
    return found


def _images(layout: Layout) -> list[Finding]:
    found = []
    for name in records.names(layout.path("images")):
        users = (f"image {name}",)
        try:
            image = images.get(layout, name)
            with open(layout.image(name, "config.json"), "rb") as file:
                if of_bytes(file.read()) != image.id:
                    path = layout.image(name, "config.json")
                    found.append(
                        Finding("config-damaged", path, "it is not what the id says", users)
                    )
        except (OverlayctlError, FileNotFoundError) as error:
            found.append(Finding("image-damaged", layout.image(name), str(error), users))
    return found


def _tags(layout: Layout) -> list[Finding]:
    found = []
    known = set(images.listed(layout))
    for name in records.names(layout.path("tags")):
        path = layout.path("tags", name)
        tag = images.read_tag(path)
        if tag is None:
            found.append(Finding("tag-damaged", path, "not an image id and a reference"))
        elif tag[0] not in known:
            found.append(Finding("tag-dangling", path, f"{tag[1]} names an image that is gone"))
    return found


def _containers(layout: Layout) -> list[Finding]:
    found = []
    known = set(containers.listed(layout))
    for name in records.names(layout.path("containers")):
        if name.endswith(".json"):
            try:
                containers.get(layout, name.removesuffix(".json"))
            except OverlayctlError as error:
                path = layout.path("containers", name)
                found.append(Finding("container-damaged", path, str(error)))
    for key in records.names(layout.path("snapshots")):
        path = layout.snapshot(key)
        try:
            snapshots.get(layout, key)
        except OverlayctlError as error:
            found.append(Finding("snapshot-damaged", path, str(error)))
        if not os.path.exists(layout.container(key)):
            found.append(Finding("snapshot-orphan", path, "no container names this snapshot"))
    for name in records.names(layout.path("containers", "names")):
        if os.readlink(layout.container_name(name)) not in known:
            path = layout.container_name(name)
            found.append(Finding("name-dangling", path, "it names no container"))
    return found

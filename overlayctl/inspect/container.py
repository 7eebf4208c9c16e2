"""Containers in docker's words, for ``inspect`` and ``ps``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from overlayctl import names
from overlayctl.errors import NotFound, OverlayctlError
from overlayctl.layer import attach
from overlayctl.store import containers, images, locks, snapshots

if TYPE_CHECKING:
    from overlayctl.layout import Layout
    from overlayctl.mount import Merged
    from overlayctl.placed import Placed
    from overlayctl.store.containers import Container
    from overlayctl.store.opened import Store


def describe(
    layout: Layout, found: Container, mounted: Mapping[str, Merged], unseen: str | None
) -> dict[str, Any]:
    """The ``container inspect`` of docker, as far as it applies.

    ``mounted`` are the merged views by container; ``unseen`` is why a layer could not be
    attached, where one is not.
    """
    snapshot = snapshots.find(layout, found.id)
    view = mounted.get(found.id)
    attached = set(attach.attached(layout))
    lowers = snapshots.lowers(layout, snapshot.layers) if snapshot else []
    runners = locks.sharers(layout.snapshot(found.id, "upper"))
    config = found.config
    return {
        "Id": found.id,
        "Name": "/" + found.name,
        "Created": found.created,
        "Path": config.words[0] if config.words else "",
        "Args": list(config.words[1:]),
        "Image": f"sha256:{found.image}" if found.image else None,
        "Config": {
            "Hostname": config.hostname or found.id[:12],
            "User": config.user,
            "Tty": config.terminal,
            "OpenStdin": config.stdin,
            "Env": list(config.environment),
            "Cmd": list(config.command) or None,
            "Image": found.reference,
            "WorkingDir": config.directory,
            "Entrypoint": list(config.entrypoint or ()) or None,
            "Labels": found.labels,
        },
        "HostConfig": {
            "NetworkMode": config.network,
            "AutoRemove": config.disposable,
            "ReadonlyRootfs": config.read_only,
        },
        "State": {
            "Status": _status(layout, found, mounted=view is not None, running=bool(runners)),
            "Running": bool(runners),
            "Mounted": view is not None,
            "Runners": [runner.name for runner in runners],
        },
        "AttachError": unseen,
        "GraphDriver": {
            "Name": "overlayctl",
            "Data": {
                "LowerDir": ":".join(layout.diff(name) for name in lowers)
                if snapshot and attached.issuperset(lowers)
                else None,
                "UpperDir": layout.snapshot(found.id, "upper"),
                "WorkDir": view.work if view else None,
                "MergedDir": view.target if view else None,
            },
        },
        "Mounts": [_mount(layout, one) for one in config.mounts],
    }


def _mount(layout: Layout, one: Placed) -> dict[str, Any]:
    source = layout.volume(one.source, "_data") if one.kind == "volume" else one.source
    told: dict[str, Any] = {"Type": one.kind}
    if one.kind == "volume":
        told |= {"Name": one.source, "Driver": "local", "Anonymous": one.anonymous}
    return {
        **told,
        "Source": source,
        "Destination": one.target,
        "Mode": ",".join(one.options),
        "RW": not one.read_only,
        "Propagation": ("".join(one.options) or "rprivate") if one.kind == "bind" else "",
    }


def rows(
    layout: Layout, mounted: Mapping[str, Merged], *, everything: bool
) -> list[dict[str, Any]]:
    """One row for each container, newest first: those mounted or running, or all."""
    busy = locks.shared()
    listed = [
        _row(
            layout,
            found,
            mounted.get(found.id),
            running=_inode(layout, found.id) in busy
            and bool(locks.sharers(layout.snapshot(found.id, "upper"))),
        )
        for found in containers.readable(layout)
    ]
    wanted = [row for row in listed if everything or row["Mounted"] or row["Running"]]
    return sorted(wanted, key=lambda row: (str(row["Created"]), str(row["Id"])), reverse=True)


def _inode(layout: Layout, key: str) -> int:
    try:
        return os.stat(layout.snapshot(key, "upper")).st_ino
    except FileNotFoundError:
        return 0


def _row(layout: Layout, found: Container, view: Merged | None, *, running: bool) -> dict[str, Any]:
    return {
        "Id": found.id,
        "Names": found.name,
        "Image": names.familiar(found.reference) or names.short(found.image),
        "ImageID": f"sha256:{found.image}" if found.image else None,
        "Command": " ".join(found.config.words),
        "Created": found.created,
        "Status": _status(layout, found, mounted=view is not None, running=running),
        "Running": running,
        "Mounted": view is not None,
        "MergedDir": view.target if view else None,
        "Labels": found.labels,
        "Volumes": [placed.source for placed in found.config.mounts if placed.kind == "volume"],
    }


def _status(layout: Layout, found: Container, *, mounted: bool, running: bool) -> str:
    words = ["running"] if running else ["mounted"] if mounted else []
    if not found.image or snapshots.find(layout, found.id) is None:
        words.append("no record")
    return ", ".join(words) or "not mounted"


def sizes(store: Store, key: str) -> dict[str, int | None]:
    """What was written in the container, and that with its image: bytes, as files are long.

    ``SizeRootFs`` is None where its image is not known. Raises NotFound if it went meanwhile.
    """
    with store.holding(key, exclusive=False):
        written = snapshots.usage(store.layout, key).size
    whole = None
    try:
        image = images.get(store.layout, containers.find(store.layout, key).image)
    except OverlayctlError:
        pass
    else:
        whole = written + sum(int(layer["size"]) for layer in image.record["layers"])
    return {"SizeRw": written, "SizeRootFs": whole}


def with_sizes(store: Store, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with ``sizes`` in them; without those whose container went meanwhile."""
    found = []
    for row in listed:
        try:
            found.append({**row, **sizes(store, row["Id"])})
        except NotFound:
            continue
    return found

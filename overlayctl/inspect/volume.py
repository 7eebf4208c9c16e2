"""Volumes in docker's words, for ``volume inspect`` and ``volume ls``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overlayctl.store import volumes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from overlayctl.layout import Layout
    from overlayctl.store.containers import Container


def rows(layout: Layout, *, sizes: bool) -> list[dict[str, Any]]:
    """One row for each volume, by name; ``sizes`` reads every directory in them."""
    users = volumes.users(layout)
    return [
        _described(layout, volumes.find(layout, name), users.get(name, ()), sizes=sizes)
        for name in volumes.listed(layout)
    ]


def describe(layout: Layout, name: str) -> dict[str, Any]:
    """The ``volume inspect`` of docker, with who has it and what lies in it. Raises NotFound."""
    users = volumes.users(layout).get(name, ())
    return _described(layout, volumes.find(layout, name), users, sizes=True)


def _described(
    layout: Layout, volume: volumes.Volume, users: Iterable[Container], *, sizes: bool
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "CreatedAt": volume.created,
        "Driver": "local",
        "Labels": dict(volume.labels),
        "Mountpoint": layout.volume(volume.name, "_data"),
        "Name": volume.name,
        "Options": None,
        "Scope": "local",
        "Anonymous": volume.anonymous,
        "UsedBy": [container.name for container in users],
    }
    if sizes:
        told["DiskUsage"] = volumes.taken(layout, volume.name).disk
    return told

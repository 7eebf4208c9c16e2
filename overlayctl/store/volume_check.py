"""``check`` for volumes: lost and damaged records, lost data, what is no volume."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overlayctl.errors import Damaged, OverlayctlError
from overlayctl.store import records, volumes
from overlayctl.store.finding import Finding

if TYPE_CHECKING:
    from overlayctl.layout import Layout


def findings(layout: Layout) -> list[Finding]:
    """What is wrong with the volumes, and which containers it harms."""
    found = []
    users = volumes.users(layout)
    for name in records.names(layout.path("volumes")):
        path = layout.volume(name)
        who = tuple(f"container {container.name}" for container in users.pop(name, ()))
        if volumes.is_unmade(layout, name):
            message = "it is being removed: the next command that writes finishes that"
            found.append(Finding("volume-unfinished", path, message, who))
        elif not volumes.exists(layout, name):
            if name != "lost+found":
                found.append(Finding("volume-foreign", path, "this is no volume", who))
        else:
            found += _volume(layout, name, who)
    for name, known in users.items():
        who = tuple(f"container {container.name}" for container in known)
        message = f"overlayctl volume create {name} makes it again, empty"
        found.append(Finding("volume-missing", layout.volume(name), message, who))
    return found


def _volume(layout: Layout, name: str, users: tuple[str, ...]) -> list[Finding]:
    found = []
    path = layout.volume(name, "volume.json")
    try:
        record = records.read(path)
        volumes.parse(name, record)
        if record.get("name") != name:
            message = "it says that it is another volume"
            found.append(Finding("volume-misnamed", path, message, users))
    except OverlayctlError as error:
        found.append(Finding("volume-damaged", path, str(error), users))
    try:
        volumes.data(layout, name)
    except Damaged as error:
        found.append(Finding("volume-damaged", layout.volume(name, "_data"), str(error), users))
    return found

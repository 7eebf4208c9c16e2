"""Containers: an image, a configuration, and one snapshot; a name is a symlink to the id."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from overlayctl import names
from overlayctl.errors import Conflict, Damaged, NotFound, OverlayctlError
from overlayctl.store import records
from overlayctl.store.records import Record, fault

if TYPE_CHECKING:
    from overlayctl.layout import Layout


class Container(NamedTuple):
    """A container's record."""

    id: str
    name: str
    image: str
    reference: str
    command: tuple[str, ...]
    labels: dict[str, str]
    created: str


def commit(layout: Layout, staging: str, container: Container) -> None:
    """Give the container its name, then make it visible; the caller holds the store's lock.

    Raises Conflict if the name is taken. A name whose record is missing is free.
    """
    link = layout.container_name(container.name)
    if os.path.lexists(link):
        holder = named(layout, container.name)
        if holder and os.path.exists(layout.container(holder)):
            raise Conflict(
                f"the name {container.name!r} is taken by container {names.short(holder)}",
                hint=f"overlayctl rm {container.name}, or choose another --name",
            )
        os.unlink(link)
    os.symlink(container.id, link)
    records.sync_directory(layout.path("containers", "names"))
    fault("container:after-name")
    staged = os.path.join(staging, "container.json")
    records.write(staged, records.encode(container._asdict()))
    os.rename(staged, layout.container(container.id))
    records.sync_directory(layout.path("containers"))
    fault("container:after-rename")


def named(layout: Layout, name: str) -> str | None:
    """The id that a name's symlink holds, whether or not it has a record."""
    try:
        return os.readlink(layout.container_name(name))
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.EINVAL}:
            return None
        raise


def get(layout: Layout, container_id: str) -> Container:
    """The container with that full id. Raises NotFound, Damaged."""
    record: Record = records.read(layout.container(container_id))
    try:
        return Container(
            container_id,
            str(record["name"]),
            str(record["image"]),
            str(record.get("reference", "")),
            tuple(map(str, record.get("command") or ())),
            {str(key): str(value) for key, value in (record.get("labels") or {}).items()},
            str(record.get("created", "")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(
            f"the record of container {names.short(container_id)} is damaged: {error}",
            hint="overlayctl system check",
        ) from error


def listed(layout: Layout) -> list[str]:
    """The ids of all containers: a record, and a snapshot that is kept."""
    return [
        container_id
        for container_id in recorded(layout)
        if os.path.exists(layout.snapshot(container_id, "keep"))
    ]


def recorded(layout: Layout) -> list[str]:
    """The ids of all records, of those too whose snapshot is gone."""
    return [
        name.removesuffix(".json")
        for name in records.names(layout.path("containers"))
        if name.endswith(".json")
    ]


def readable(layout: Layout) -> list[Container]:
    """All containers whose record can be read."""
    found = []
    for container_id in listed(layout):
        try:
            found.append(get(layout, container_id))
        except OverlayctlError:
            continue
    return found


def resolve(layout: Layout, text: str) -> Container:
    """The container of that name or id's start. Raises NotFound with close names, Ambiguous."""
    ids = listed(layout)
    safe = "/" not in text and "\0" not in text and text not in {"", ".", ".."}
    holder = named(layout, text) if safe else None
    if holder in ids:
        return get(layout, holder)
    try:
        return get(layout, names.match(text, ids))
    except NotFound:
        known = [container.name for container in readable(layout)]
        raise NotFound(
            f"there is no container {text!r}",
            hint=names.near(text, known) or "overlayctl ps -a lists them",
        ) from None


def remove(layout: Layout, container: Container) -> None:
    """Take away the record and the name of a container whose snapshot is gone."""
    records.remove(layout.container(container.id))
    if named(layout, container.name) == container.id:
        os.unlink(layout.container_name(container.name))

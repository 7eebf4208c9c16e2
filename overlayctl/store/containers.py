"""Containers: an image, a configuration, and one snapshot; a name is a symlink to the id.

One whose record is lost is still there for as long as something is written in its upper: it
answers to its id, so that a person can look at it, mount it and remove it.
"""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from overlayctl import names
from overlayctl.errors import Conflict, Damaged, NotFound, OverlayctlError
from overlayctl.store import records, snapshots
from overlayctl.store.records import Record, fault

if TYPE_CHECKING:
    from overlayctl.layout import Layout
    from overlayctl.placed import Placed

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Config(NamedTuple):
    """What runs in a container, and how: the image's words, with those of ``create`` over them.

    ``environment`` has ``NAME=value`` each. ``entrypoint`` is None only in what is asked for:
    then the image's counts. ``disposable`` is whether the container goes when its process ends.
    """

    entrypoint: tuple[str, ...] | None = None
    command: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    directory: str = ""
    user: str = ""
    hostname: str = ""
    terminal: bool = False
    stdin: bool = False
    read_only: bool = False
    network: str = "none"
    disposable: bool = False
    volatile: bool = False
    mounts: tuple[Placed, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """The program and its arguments."""
        return (*(self.entrypoint or ()), *self.command)


class Container(NamedTuple):
    """A container's record. Where that is lost ``image`` is empty: nothing but the id is known.

    ``name`` is the one it has now; the record keeps the one it was made with.
    """

    id: str
    name: str
    image: str
    reference: str
    config: Config
    labels: dict[str, str]
    created: str


def commit(layout: Layout, staging: str, container: Container) -> None:
    """Give the container its name, then make it visible; the caller holds the store's lock.

    Raises Conflict if the name is taken. A name whose record is missing is free.
    """
    _refuse_taken(layout, container.name)
    link = layout.container_name(container.name)
    staged = os.path.join(staging, "container.json")
    records.write(staged, records.encode(_record(container)))
    os.symlink(container.id, link)
    records.sync_directory(layout.path("containers", "names"))
    fault("container:after-name")
    try:
        os.rename(staged, layout.container(container.id))
    except OSError:
        os.unlink(link)
        raise
    records.sync_directory(layout.path("containers"))
    fault("container:after-rename")


def _record(container: Container) -> Record:
    config = container.config._asdict()
    config["mounts"] = [placed._asdict() for placed in container.config.mounts]
    return {**container._asdict(), "config": config}


def rename(layout: Layout, container: Container, name: str) -> None:
    """Give a container another name; the caller holds the store's lock.

    Raises Usage for what cannot be a name, Conflict for one that is taken.
    """
    names.container_name(name)
    if name == container.name:
        raise Conflict(f"container {name!r} has that name already", hint="choose another name")
    _refuse_taken(layout, name)
    before = layout.container_name(container.name)
    if named(layout, container.name) != container.id:
        raise Damaged(
            f"container {names.short(container.id)} has no name",
            hint="overlayctl system check --repair",
        )
    os.rename(before, layout.container_name(name))
    records.sync_directory(layout.path("containers", "names"))


def _refuse_taken(layout: Layout, name: str) -> None:
    """Raises Conflict if the name is taken; a name whose record is missing is free."""
    link = layout.container_name(name)
    if os.path.lexists(link):
        holder = named(layout, name)
        if holder and os.path.exists(layout.container(holder)):
            raise Conflict(
                f"the name {name!r} is taken by container {names.short(holder)}",
                hint=f"overlayctl rm {name}, or choose another name",
            )
        os.unlink(link)


def named(layout: Layout, name: str) -> str | None:
    """The id that a name's symlink holds, whether or not it has a record; None for no name."""
    if "/" in name or "\0" in name or name in {"", ".", ".."}:
        return None
    try:
        return os.readlink(layout.container_name(name))
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.EINVAL, errno.ENAMETOOLONG}:
            return None
        raise


def get(layout: Layout, container_id: str) -> Container:
    """The container with that full id. Raises NotFound, Damaged."""
    found = parse(container_id, records.read(layout.container(container_id)))
    return called(layout, found)


def called(layout: Layout, container: Container) -> Container:
    """The container with the name that leads to it; where none does, the one in its record."""
    if named(layout, container.name) == container.id:
        return container
    for name in records.names(layout.path("containers", "names")):
        if named(layout, name) == container.id:
            return container._replace(name=name)
    return container


def parse(container_id: str, record: Record) -> Container:
    """What a container's record says, with the name it was made with. Raises Damaged."""
    try:
        return Container(
            container_id,
            _text(record["name"], "name"),
            _text(record["image"], "image", _DIGEST),
            _text(record.get("reference", ""), "reference"),
            # The first versions knew nothing but a command.
            _config(record.get("config", {"command": record.get("command"), "mounts": []})),
            {str(key): str(value) for key, value in (record.get("labels") or {}).items()},
            str(record.get("created", "")),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Damaged(
            f"the record of container {names.short(container_id)} is damaged: {error}",
            hint="overlayctl system check",
        ) from error


def _config(record: Record) -> Config:
    """What a record says of a configuration; unknown fields are left to who knows them."""
    said = _sound(record, Config._field_defaults)
    mounts = record["mounts"]
    if not isinstance(mounts, list):
        raise TypeError("mounts is no list")
    said["entrypoint"] = said.get("entrypoint") or ()
    return Config(**said | {"mounts": tuple(map(_placed, mounts))})


def _placed(record: Record) -> Placed:
    from overlayctl.placed import Placed

    texts = {"kind": "", "source": "", "target": ""}
    placed = Placed(**_sound(record, {**texts, **Placed._field_defaults}))
    known = {
        "volume": names.is_volume_name(placed.source),
        "bind": placed.source.startswith("/"),
        "tmpfs": True,
    }
    if not known.get(placed.kind) or not placed.target.startswith("/"):
        raise ValueError(f"{placed.kind} {placed.source!r} at {placed.target!r} is no mount")
    return placed


def _sound(record: Record, like: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the fields ``like``; a list of text for those that have a tuple.

    Raises TypeError for what is of another type.
    """
    found: dict[str, Any] = {}
    for key, default in like.items():
        value = record.get(key)
        if key == "mounts" or key not in record:
            continue
        if default is None or isinstance(default, tuple):
            if not isinstance(value, list | tuple | None):
                raise TypeError(f"{key} is no list")
            found[key] = tuple(_text(one, key) for one in value or ())
        elif type(value) is type(default):
            found[key] = value
        else:
            raise TypeError(f"{key} is no {type(default).__name__}")
    return found


def _text(value: object, key: str, form: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or (form and not form.fullmatch(value)):
        raise TypeError(f"{key} is none: {value!r:.80}")
    return value


def listed(layout: Layout) -> list[str]:
    """The ids of all containers: a snapshot that is kept, and a record or something written.

    One without a record and with nothing in it is still being made, or was when it was killed.
    """
    return [
        key
        for key in snapshots.listed(layout)
        if os.path.exists(layout.container(key)) or snapshots.is_written(layout, key)
    ]


def recorded(layout: Layout) -> list[str]:
    """The ids of all records, of those too whose snapshot is gone."""
    return [
        name.removesuffix(".json")
        for name in records.names(layout.path("containers"))
        if name.endswith(".json")
    ]


def readable(layout: Layout) -> list[Container]:
    """All containers, those whose record is lost too; but none of a later version."""
    found = []
    for container_id in listed(layout):
        try:
            found.append(find(layout, container_id))
        except OverlayctlError:
            continue
    return found


def find(layout: Layout, container_id: str) -> Container:
    """The container with that full id, even if its record is missing or damaged."""
    try:
        return get(layout, container_id)
    except (NotFound, Damaged):
        return Container(container_id, container_id[:12], "", "", Config(), {}, "")


def resolve(layout: Layout, text: str) -> Container:
    """The container of that name or id's start. Raises NotFound with close names, Ambiguous."""
    ids = listed(layout)
    holder = named(layout, text)
    if holder in ids:
        return find(layout, holder)
    try:
        return find(layout, names.match(text, ids))
    except NotFound:
        known = [container.name for container in readable(layout)]
        hint = names.near(text, known) or "overlayctl ps -a lists them"
        from overlayctl.store import images

        if images.exists(layout, text):
            hint = f"{text} is an image: overlayctl create {text} makes a container of it"
        raise NotFound(f"there is no container {text!r}", hint=hint) from None


def exists(layout: Layout, text: str) -> bool:
    """Whether a container answers to that name or id's start."""
    try:
        resolve(layout, text)
    except NotFound:
        return False
    return True


def remove(layout: Layout, container: Container) -> None:
    """Take away the record and the name of a container whose snapshot is gone."""
    records.remove(layout.container(container.id))
    fault("container:after-unlink")
    # A record that is lost does not tell the name.
    every = records.names(layout.path("containers", "names"))
    for name in [container.name] if container.image else every:
        if named(layout, name) == container.id:
            os.unlink(layout.container_name(name))

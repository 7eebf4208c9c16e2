"""Volumes: a directory that outlives the containers that it is mounted in.

    volumes/<name>/   volume.json   the record; ``keep`` is a copy of it
                      made          says that it was once complete
                      fresh         there until the volume got an image's content
                      _data/        what a person's programs wrote

Only a person removes a volume, and a record that is lost is no such word. So a removal unlinks
both, ``keep`` and then ``volume.json``, and leaves ``made`` to the end: that one without the other
two is a removal that began, and none of the three a directory that somebody put there.
"""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from overlayctl import names
from overlayctl.errors import Conflict, Damaged, HostCannot, InUse, NotFound
from overlayctl.kernel import inuse, rooted
from overlayctl.store import containers, records
from overlayctl.store.records import fault

if TYPE_CHECKING:
    from collections.abc import Mapping

    from overlayctl.layout import Layout
    from overlayctl.store.containers import Container

_RECORDS = ("volume.json", "keep")


class Volume(NamedTuple):
    """A volume's record. Where that is lost ``created`` is empty, and the volume named."""

    name: str
    labels: Mapping[str, str]
    created: str
    anonymous: bool


class Taken(NamedTuple):
    """``disk`` in bytes, as blocks taken; hard links count once, ``_data`` itself does not."""

    disk: int
    inodes: int


def make(layout: Layout, staging: str, volume: Volume) -> None:
    """Make the volume, empty; the caller holds the store's lock. Raises Conflict if it is there."""
    place = layout.volume(volume.name)
    if os.path.lexists(place) and not _is_empty(place):
        raise Conflict(
            f"there is already {'a volume' if exists(layout, volume.name) else 'something'} "
            f"at {place}",
            hint=f"overlayctl volume rm {volume.name}, or choose another name",
        )
    staged = tempfile.mkdtemp(prefix="volume.", dir=staging)
    os.mkdir(os.path.join(staged, "_data"))
    os.chmod(os.path.join(staged, "_data"), 0o755)  # noqa: S103 (any user's programs use it)
    for name in _RECORDS:
        records.write(os.path.join(staged, name), _encoded(volume))
    for name in ("made", "fresh"):
        records.write(os.path.join(staged, name), b"")
    records.sync_directory(os.path.join(staged, "_data"))
    records.sync_directory(staged)
    fault("volume:before-rename")
    os.rename(staged, place)
    records.sync_directory(layout.path("volumes"))
    fault("volume:after-rename")


def _encoded(volume: Volume) -> bytes:
    labels = dict(volume.labels)
    return records.encode({**volume._asdict(), "labels": labels, "driver": "local"})


def again(layout: Layout, name: str) -> bytes:
    """A lost record as it is to be made again; without labels where its copy is lost, too."""
    return _encoded(find(layout, name))


def _is_empty(path: str) -> bool:
    """Whether it is a directory with nothing in it: what a removal left at last."""
    return os.path.isdir(path) and not os.path.islink(path) and not os.listdir(path)


def stored(layout: Layout) -> list[str]:
    """The names of all directories that may be volumes, of those too that are being removed."""
    return [
        name
        for name in records.names(layout.path("volumes"))
        if names.is_volume_name(name) and stat.S_ISDIR(_mode(layout.volume(name)))
    ]


def _mode(path: str) -> int:
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0


def listed(layout: Layout) -> list[str]:
    """The names of all volumes, of those too whose record is lost."""
    return [name for name in stored(layout) if exists(layout, name)]


def exists(layout: Layout, name: str) -> bool:
    """Whether there is such a volume."""
    return names.is_volume_name(name) and any(
        not records.is_gone(layout.volume(name, record)) for record in _RECORDS
    )


def is_unmade(layout: Layout, name: str) -> bool:
    """Whether its removal began: a person said so."""
    return not exists(layout, name) and os.path.lexists(layout.volume(name, "made"))


def get(layout: Layout, name: str) -> Volume:
    """The volume of that name. Raises NotFound with close names, Damaged."""
    if not exists(layout, name):
        raise missing(layout, name)
    try:
        return parse(name, records.read(layout.volume(name, "volume.json")))
    except (NotFound, Damaged):
        try:
            return parse(name, records.read(layout.volume(name, "keep")))
        except (NotFound, Damaged):
            pass
        raise


def missing(layout: Layout, name: str) -> NotFound:
    """The error that there is no such volume."""
    hint = names.near(name, listed(layout)) or "overlayctl volume ls lists them"
    return NotFound(f"there is no volume {name!r}", hint=hint)


def parse(name: str, record: records.Record) -> Volume:
    """What a volume's record says. Raises Damaged."""
    try:
        labels = {str(key): str(value) for key, value in (record.get("labels") or {}).items()}
        return Volume(name, labels, str(record["created"]), record["anonymous"] is True)
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(
            f"the record of volume {name} is damaged: {error}", hint="overlayctl system check"
        ) from error


def find(layout: Layout, name: str) -> Volume:
    """The volume of that name, even if its record is missing or damaged. Raises NotFound."""
    try:
        return get(layout, name)
    except (Damaged, HostCannot):
        return Volume(name, {}, "", anonymous=False)


def users(layout: Layout) -> dict[str, list[Container]]:
    """The containers that name each volume, running or not, by name."""
    found: dict[str, list[Container]] = {}
    for container in sorted(containers.readable(layout), key=lambda one: one.name):
        named = [one.source for one in container.config.mounts if one.kind == "volume"]
        for name in dict.fromkeys(named):
            found.setdefault(name, []).append(container)
    return found


def forsake(layout: Layout, container: Container) -> list[str]:
    """Remove the anonymous volumes of a container that goes; the caller holds the lock.

    Their names. One stays that another container names, or may name: its record cannot be
    read; and one in which something is mounted.
    """
    wanted = [one.source for one in container.config.mounts if one.anonymous]
    if not wanted or len(containers.readable(layout)) < len(containers.listed(layout)):
        return []
    used = {
        name
        for name, others in users(layout).items()
        if any(other.id != container.id for other in others)
    }
    gone = []
    for name in dict.fromkeys(wanted):
        if name not in used and exists(layout, name) and find(layout, name).anonymous:
            with suppress(InUse):
                inuse.refuse_mounts(layout.volume(name))
                remove(layout, name)
                gone.append(name)
    return gone


def data(layout: Layout, name: str) -> str:
    """The directory that is mounted. Raises NotFound, Damaged where it is gone."""
    if not exists(layout, name):
        raise missing(layout, name)
    path = layout.volume(name, "_data")
    if not stat.S_ISDIR(_mode(path)):
        raise Damaged(
            f"the directory {path} of volume {name} is gone",
            hint=f"put it back, or overlayctl volume rm {name}",
        )
    return path


def is_fresh(layout: Layout, name: str) -> bool:
    """Whether it may get an image's content: it is empty, and never got any."""
    return os.path.lexists(layout.volume(name, "fresh")) and _is_empty(layout.volume(name, "_data"))


def fill(layout: Layout, name: str, staged: str) -> None:
    """Let ``staged``, a synced tree, be the data of a fresh volume; the caller holds the lock."""
    fault("volume:before-fill")
    os.rename(staged, layout.volume(name, "_data"))
    records.sync_directory(layout.volume(name))
    fault("volume:after-fill")
    records.remove(layout.volume(name, "fresh"))


def taken(layout: Layout, name: str) -> Taken:
    """What lies in the volume."""
    seen: set[tuple[int, int]] = set()
    disk = 0
    with suppress(FileNotFoundError):
        for found in rooted.stats(layout.volume(name, "_data")):
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                disk += found.st_blocks * 512
    return Taken(disk, len(seen))


def remove(layout: Layout, name: str) -> None:
    """Unmake a volume that nobody uses; the caller holds the store's lock."""
    records.remove(layout.volume(name, "keep"))
    fault("volume:after-keep")
    records.remove(layout.volume(name, "volume.json"))
    fault("volume:after-unlink")
    _clear(layout, name, ignore_errors=False)


def _clear(layout: Layout, name: str, *, ignore_errors: bool) -> None:
    """Take away what is left of a volume that is unmade: ``made`` goes after the data."""
    place = layout.volume(name)
    if os.path.lexists(layout.volume(name, "_data")):
        _remove(layout.volume(name, "_data"), ignore_errors=ignore_errors)
    fault("volume:after-data")
    if not os.path.lexists(layout.volume(name, "_data")):
        _remove(place, ignore_errors=ignore_errors)
    fault("volume:after-removal")


def _remove(path: str, *, ignore_errors: bool) -> None:
    if stat.S_ISDIR(_mode(path)):
        rooted.remove_tree(path, ignore_errors=ignore_errors)
    else:
        records.remove(path)


def finish(layout: Layout) -> None:
    """Finish the removals that were killed; the caller holds the store's lock."""
    for name in stored(layout):
        if is_unmade(layout, name):
            _clear(layout, name, ignore_errors=True)
        if _is_empty(layout.volume(name)):
            with suppress(OSError):
                os.rmdir(layout.volume(name))

"""Volumes as people use them: made, listed with who has them, removed where nobody does."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, NamedTuple

from overlayctl import names
from overlayctl.errors import Holder, InUse
from overlayctl.kernel import inuse
from overlayctl.store import containers, records, volumes
from overlayctl.store.volumes import Volume

if TYPE_CHECKING:
    from collections.abc import Mapping

    from overlayctl.store.opened import Store


class Made(NamedTuple):
    """A volume that was asked for; ``new`` is False where it was there already."""

    volume: Volume
    new: bool


class Pruned(NamedTuple):
    """What ``prune`` took away, or would; ``freed`` in bytes. ``kept`` says what stays, and why.

    ``unread`` says that a container's record could not be read, which may name any volume: so
    none went.
    """

    names: tuple[str, ...]
    freed: int
    kept: tuple[str, ...] = ()
    unread: bool = False


def create(store: Store, name: str | None, labels: Mapping[str, str]) -> Made:
    """The volume of that name, made if it is not there; without a name an anonymous one.

    Raises Usage for what cannot be a name, Conflict for what is there and is no volume.
    """
    if name is not None:
        names.volume_name(name)
    with store.deciding() as own:
        if name is not None and volumes.exists(store.layout, name):
            return Made(volumes.find(store.layout, name), new=False)
        volume = new(name, labels)
        volumes.make(store.layout, own, volume)
    return Made(volume, new=True)


def new(name: str | None, labels: Mapping[str, str] | None = None) -> Volume:
    """What is to be recorded of a volume; without a name it gets one that nobody chose."""
    return Volume(
        name or secrets.token_hex(32), labels or {}, records.now(), anonymous=name is None
    )


def remove(store: Store, name: str, *, force: bool, dry_run: bool) -> bool:
    """Remove a volume and what is in it; False if it is not there and ``force`` is set.

    Raises NotFound, InUse naming each container that has it.
    """
    with store.unmaking():
        if not volumes.exists(store.layout, name):
            if force:
                return False
            raise volumes.missing(store.layout, name)
        holders = [
            Holder("container", found.name, f"overlayctl rm {found.name}")
            for found in volumes.users(store.layout).get(name, ())
        ]
        if holders:
            raise InUse(f"volume {name}", holders)
        if not dry_run:
            take_away(store, name)
    return True


def take_away(store: Store, name: str) -> None:
    """Remove a volume that no container names; the caller holds the lock. Raises InUse."""
    inuse.refuse_mounts(store.layout.volume(name))
    volumes.remove(store.layout, name)


def prune(
    store: Store, *, everything: bool, labels: Mapping[str, str | None], dry_run: bool,
    agreed: Pruned | None = None,
) -> Pruned:  # fmt: skip
    """Remove the anonymous volumes that no container names; with ``everything`` named ones too.

    Only those with all ``labels``, of any value where that is None. ``agreed`` is what a dry
    run showed: nothing else goes.
    """
    layout = store.layout
    with store.locked(exclusive=False) if dry_run else store.unmaking():
        known = containers.listed(layout)
        readable = containers.readable(layout)
        if len(readable) < len(known) or any(not found.image for found in readable):
            return Pruned((), 0, unread=True)
        used = volumes.users(layout)
        gone: list[str] = []
        kept: list[str] = []
        freed = 0
        for name in volumes.listed(layout):
            volume = volumes.find(layout, name)
            if name in used or not (everything or volume.anonymous):
                continue
            if not carries(volume, labels) or (agreed and name not in agreed.names):
                continue
            size = volumes.taken(layout, name).disk
            try:
                if not dry_run:
                    take_away(store, name)
            except InUse as error:
                kept.append(str(error))
            else:
                gone.append(name)
                freed += size
    return Pruned(tuple(gone), freed, tuple(kept))


def carries(volume: Volume, labels: Mapping[str, str | None]) -> bool:
    """Whether a volume has all these labels, of any value where that is None."""
    return all(
        key in volume.labels and value in {None, volume.labels[key]}
        for key, value in labels.items()
    )

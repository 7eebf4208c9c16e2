"""Taking things away: never what somebody uses, and the one unlink that unmakes it first."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from overlayctl import names
from overlayctl.errors import Conflict, Holder, InUse, NotFound
from overlayctl.kernel import inuse, mounter, mounttable, rooted
from overlayctl.layer import attach
from overlayctl.runtime import mounts, running
from overlayctl.store import containers, gc, images, layers, locks, records, snapshots
from overlayctl.store import volumes as stored_volumes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from overlayctl.mount import Merged
    from overlayctl.store.containers import Container
    from overlayctl.store.images import Image
    from overlayctl.store.opened import Store

_RUNNING = "running container"


class Removed(NamedTuple):
    """What ``remove_image`` took away; ``freed`` in bytes, measured on the deleted files.

    ``needed_by`` are the containers for which an untied image stays.
    """

    untagged: tuple[str, ...]
    image_id: str | None
    layers: tuple[str, ...]
    freed: int
    needed_by: tuple[str, ...] = ()


def remove_image(store: Store, name: str, *, force: bool, dry_run: bool) -> Removed:
    """Untie a tag; with the last one go the image and the layers that nobody else uses.

    Raises InUse naming each container that needs it and each place it is mounted.
    """
    with store.unmaking():
        image, reference = images.resolve(store.layout, name)
        tied = sorted(r for r, h in images.tags(store.layout).items() if h == image.hex)
        shown = tuple(map(names.familiar, tied))
        if reference and len(tied) > 1:
            if not dry_run:
                images.untag(store.layout, reference)
            return Removed((names.familiar(reference),), None, (), 0)
        if len(tied) > 1 and not force:
            raise Conflict(
                f"image {names.short(image.hex)} has {len(tied)} tags: " + ", ".join(shown),
                hint="overlayctl rmi TAG unties one, overlayctl rmi -f removes all",
            )
        views = mounts.mounted(store, everywhere=True)
        holders = _containers_of(store, image, {view.id for view in views})
        # As docker: of a name, -f unties it; by its id, not even -f takes an image from a process.
        named = force and reference is not None
        in_the_way = [h for h in holders if not named and (not force or h.kind == _RUNNING)]
        in_the_way += [
            mounts.holder(view, view.target)
            for view in views
            if view.kind == "image" and view.id == image.hex
        ] or mounts.unseen(store, image.hex)
        if in_the_way:
            raise InUse(
                f"image {shown[0] if shown else names.short(image.hex)} ({names.short(image.hex)})",
                in_the_way,
            )
        if dry_run:
            return Removed(shown, None if holders else image.id, (), 0)
        if holders:
            # As docker's -f does: the name goes, what the container needs stays.
            for tag in tied:
                images.untag(store.layout, tag)
            return Removed(shown, None, (), 0, tuple(holder.name for holder in holders))
        gone = gc.unneeded(
            store.layout, dict.fromkeys(image.layers[::-1]), without=f"image {image.hex}"
        )
        unmake(store, image, tied, gone)
        by_name = dict(zip(image.layers, image.diff_ids, strict=True))
        freed = sum(layers.remove(store.layout, n) for n in gone)
        return Removed(shown, image.id, tuple(by_name[n] for n in gone), freed)


def unmake(store: Store, image: Image, references: Iterable[str], alone: Iterable[str]) -> None:
    """Remove an image and its tags, but for the layers ``alone``, which are only detached.

    Raises InUse, for a layer that somebody works in, before anything is unmade.
    """
    layers.release(store.layout, alone)
    forget_mountpoint(store, image.hex)
    records.fault("image:after-detach")
    for reference in references:
        images.untag(store.layout, reference)
    images.remove(store.layout, image.hex)


def _containers_of(store: Store, image: Image, mounted: Collection[str]) -> list[Holder]:
    holders = []
    for found in containers.readable(store.layout):
        if found.image == image.hex:
            runs = bool(locks.sharers(store.layout.snapshot(found.id, "upper")))
            option = "-f " if runs or found.id in mounted else ""
            kind = _RUNNING if runs else "container"
            holders.append(Holder(kind, found.name, f"overlayctl rm {option}{found.name}"))
    return holders


def remove_container(
    store: Store, name: str, *, force: bool, dry_run: bool, volumes: bool = False
) -> str:
    """Remove a container and what was written in it; its id.

    With ``volumes`` its anonymous volumes, too, that no other container has. Raises InUse while
    it is mounted or a process lives in it; ``force`` unmounts it first.
    """
    with store.locked(exclusive=False):
        found = containers.resolve(store.layout, name)
    with store.holding(found.id):
        if force and not dry_run:
            running.refuse_elsewhere(store, found)
            running.end(store, found.id)
        with running.idle(store, found.id, found.name), store.unmaking():
            views = mounts.views(store, "container", found.id)
            own = [v for v in views if v.pid == os.getpid()]
            if views and (not force or len(own) < len(views)):
                holders = [mounts.holder(v, found.name) for v in views]
                raise InUse(f"container {found.name}", holders)
            inuse.refuse_mounts(store.layout.snapshot(found.id))
            if not dry_run:
                take_away(store, found, own, volumes=volumes)
    return found.id


def take_away(
    store: Store, found: Container, views: Iterable[Merged], *, volumes: bool = False
) -> None:
    """Remove a container in which nothing runs, its ``views`` unmounted first.

    With ``volumes``, and of a disposable one in any case, its anonymous volumes go too. The
    caller holds its lock and the store's. Raises InUse.
    """
    for view in views:
        mounts.unmount(store, view, lazy=False)
    # An overlay that no mount table shows may still write there.
    upper = store.layout.snapshot(found.id, "upper")
    running.forget(store, found.id)
    inuse.patiently(lambda: inuse.refuse_used([upper] if os.path.isdir(upper) else []))
    forget_mountpoint(store, found.id)
    with suppress(FileNotFoundError):
        os.unlink(store.layout.held(found.id))
    if found.config.disposable:
        # As long as its record is there, whoever comes next goes on where this was killed.
        stored_volumes.forsake(store.layout, found)
    snapshots.remove(store.layout, found.id)
    containers.remove(store.layout, found)
    if volumes:
        stored_volumes.forsake(store.layout, found)


def prune_containers(
    store: Store,
    rows: Iterable[Mapping[str, Any]],
    *,
    dry_run: bool,
    agreed: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Remove those of the containers that nothing uses, of ``agreed`` alone; their rows.

    One that somebody uses, from wherever, stays.
    """
    gone = []
    for row in rows:
        if agreed is not None and row["Id"] not in agreed:
            continue
        with suppress(InUse, NotFound):
            remove_container(store, row["Id"], force=False, dry_run=dry_run)
            gone.append(dict(row))
    return gone


def forget_mountpoint(store: Store, key: str) -> None:
    """Take away what a command that was killed around its mount left; nobody has it mounted.

    What is mounted there all the same is of a store that lay here before. Raises InUse.
    """
    target = store.layout.merged(key)
    if attach.is_mountpoint(store.layout, target):
        while mounttable.at(target):
            mounter.unmount(target)
        os.rmdir(target)


def reset(store: Store, *, dry_run: bool) -> dict[str, Any]:
    """Remove everything: unmount, detach, delete. Raises InUse for what is busy."""
    with store.locked(exclusive=not dry_run):
        plan = {
            "Root": store.layout.root,
            "Images": len(images.listed(store.layout)),
            "Containers": [found.name for found in containers.readable(store.layout)],
            "Layers": len(layers.listed(store.layout)),
            "Volumes": stored_volumes.listed(store.layout),
        }
        if dry_run:
            return plan
        for key in snapshots.stored(store.layout):
            snapshot = store.layout.snapshot(key)
            name = containers.find(store.layout, key).name
            with running.idle(store, key, name), locks.attempt(snapshot) as readers:
                if readers:
                    raise InUse(f"container {name}", readers)
        views = mounts.mounted(store, everywhere=True)
        others = [mounts.holder(v, v.target) for v in views if v.pid != os.getpid()]
        for place in records.names(store.layout.ingest):
            # A load that goes on would come back to a store that is not there.
            staged = store.layout.path("ingest", place)
            with suppress(NotFound, NotADirectoryError), locks.attempt(staged) as loading:
                others += loading
        if others:
            raise InUse(f"the store {store.layout.root}", others)
        inuse.refuse_mounts(store.layout.root, but=store.layout.attached)
        for view in views[::-1]:
            mounts.unmount(store, view, lazy=False)
        inuse.refuse_used(
            [store.layout.snapshot(key, "upper") for key in snapshots.stored(store.layout)]
        )
        for name in attach.attached(store.layout):
            attach.detach(store.layout, name)
        while mounttable.at(store.layout.attached):
            mounter.unmount(store.layout.attached)
        records.remove(store.layout.marker)
        for name in records.names(store.layout.root):
            path = store.layout.path(name)
            if os.path.isdir(path) and not os.path.islink(path):
                rooted.remove_tree(path)
            else:
                os.unlink(path)
    return plan

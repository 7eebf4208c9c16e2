"""Taking away what nobody uses: staging, images without a name, layers that nobody names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from overlayctl import names
from overlayctl.errors import InUse
from overlayctl.runtime import mounts, removal
from overlayctl.store import containers, gc, images, layers, records, snapshots

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from overlayctl.layout import Layout
    from overlayctl.store.images import Image
    from overlayctl.store.opened import Store


class Pruned(NamedTuple):
    """What ``prune`` took away, or would: ids of images with their tags, names of layers.

    ``freed`` is in bytes, measured on the deleted files. ``kept`` names who works in a layer
    that was to go. ``unread`` says that a record could not be read: it may name any image
    and any layer, so none of them went.
    """

    images: tuple[tuple[str, tuple[str, ...]], ...]
    layers: tuple[str, ...]
    staging: tuple[str, ...]
    freed: int
    kept: tuple[InUse, ...] = ()
    unread: bool = False


def prune(store: Store, *, everything: bool, dry_run: bool, agreed: Pruned | None = None) -> Pruned:
    """Remove abandoned staging, untagged images that nobody uses, and layers that nobody names.

    ``everything`` takes tagged images, too. A container uses its image, and so does a
    mounted view in any namespace that can be read. ``agreed`` is what a dry run showed:
    nothing else goes.
    """
    layout = store.layout
    staged = gc.abandoned(layout)
    with store.locked(exclusive=False) if dry_run else store.unmaking():
        users, complete = gc.users(layout)
        sure = complete and _all_read(layout)
        unused = _unused(store, everything=everything) if sure else []
        if agreed:
            unused = [(image, tags) for image, tags in unused if (image.id, tags) in agreed.images]
        kept: list[InUse] = []
        pruned = []
        gone: set[str] = set()
        for image, tags in unused:
            gone.add(f"image {image.hex}")
            try:
                if not dry_run:
                    references = [names.stored(tag) for tag in tags]
                    removal.unmake(store, image, references, _unnamed(image.layers, users, gone))
            except InUse as error:
                gone.remove(f"image {image.hex}")
                kept.append(error)
            else:
                pruned.append((image.id, tags))
        freed = {}
        for name in _unnamed(layers.listed(layout), users, gone) if sure else []:
            if agreed is None or name in agreed.layers:
                try:
                    freed[name] = (layers.disk if dry_run else layers.remove)(layout, name)
                except InUse as error:
                    kept.append(error)
    swept = [n for n in staged if dry_run or not os.path.lexists(layout.path("ingest", n))]
    return Pruned(
        tuple(pruned),
        tuple(freed),
        tuple(swept),
        sum(freed.values()) + sum(staged[name] for name in swept),
        tuple(kept),
        not sure,
    )


def _unused(store: Store, *, everything: bool) -> list[tuple[Image, tuple[str, ...]]]:
    """The images that may go, with the references that go with them as they are shown."""
    known = containers.readable(store.layout)
    used = {found.image for found in known}
    # A container whose record is lost came from one with the layers of its snapshot.
    lost = {snapshots.get(store.layout, found.id).layers for found in known if not found.image}
    used |= {v.id for v in mounts.mounted(store, everywhere=True) if v.kind == "image"}
    tied: dict[str, list[str]] = {}
    for reference, image_hex in images.tags(store.layout).items():
        tied.setdefault(image_hex, []).append(names.familiar(reference))
    return [
        (image, tuple(sorted(tied.get(image.hex, ()))))
        for image in images.readable(store.layout)
        if image.hex not in used
        and image.layers not in lost
        and (everything or image.hex not in tied)
        and not mounts.unseen(store, image.hex)
    ]


def _all_read(layout: Layout) -> bool:
    """Whether every tag and every container can be understood."""
    tags = [name for name in records.names(layout.path("tags")) if name != "lost+found"]
    return all(images.read_tag(layout.path("tags", name)) for name in tags) and len(
        containers.readable(layout)
    ) == len(containers.listed(layout))


def _unnamed(
    wanted: Iterable[str], users: Mapping[str, Sequence[str]], gone: set[str]
) -> list[str]:
    """Those of the layers that nobody names, but for who is gone."""
    return [name for name in dict.fromkeys(wanted) if gone.issuperset(users.get(name, ()))]

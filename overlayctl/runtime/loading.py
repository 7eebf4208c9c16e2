"""Bringing images in: from what other tools write, or from plain layer tars.

Long work happens in staging under no lock. The final burst, under the store's lock, looks
again, then moves layers, image and tags in, in that order.
"""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

from overlayctl import formats, names, oci
from overlayctl.digest import chain_ids, hex_of, of_bytes
from overlayctl.errors import Conflict, Usage
from overlayctl.formats import plain
from overlayctl.kernel import rooted
from overlayctl.layer.archive import open_archive
from overlayctl.layer.compression import Source, chunks, codec, head
from overlayctl.layer.fields import shown
from overlayctl.layer.format import PAGE
from overlayctl.layer.raw_upper import RawUpper
from overlayctl.layer.stream import Candidate
from overlayctl.store import gc, images, layers, records, staging
from overlayctl.store.ingest import LayerWentError, Wanted, ingest_layers, look_for_room

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from overlayctl.layout import Layout
    from overlayctl.store.ingest import Ingested, Progress
    from overlayctl.store.opened import Store


_TRIES = 10


class Loaded(NamedTuple):
    """An image that came in. ``moved`` are tags that stood for another image before."""

    image_id: str
    references: tuple[str, ...]
    moved: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    new_layers: int
    layers: int


def load(
    store: Store, path: str, *, tag: str | None, platform: str | None, progress: Progress
) -> list[Loaded]:
    """Load every image of an archive, a layout or standard input (``-``).

    Raises BadInput and its kin for what is none, DiskFull; then nothing is left behind.
    """
    host = oci.parse_platform(platform) if platform else None
    chosen = names.stored(tag) if tag else None
    with ExitStack() as owned:
        place = _staging(store, owned)
        progress.start(None, 0)
        archive = owned.enter_context(open_archive(path, place, advance=progress.advance))
        found = formats.read_images(archive, platform=host)
        if chosen and len(found) > 1:
            raise Usage(
                f"the archive holds {len(found)} images: one --tag cannot name them all",
                hint="leave --tag out",
            )
        wanted = [
            [Wanted(layer.diff_id, layer.source, layer.blob_digest) for layer in image.layers]
            for image in found
        ]
        look_for_room(store.layout, [layer for image in wanted for layer in image])
        loaded = []
        for image, its in zip(found, wanted, strict=True):
            references = [*dict.fromkeys((*image.references, *([chosen] if chosen else [])))]
            progress.start(sum(layer.source.size for layer in its), len(its))
            made = partial(_as_found, image.config, image.manifest)
            result = put(store, place(), made, its, references, path, progress)
            loaded.append(result._replace(notes=(*image.notes, *result.notes)))
        return loaded


def import_layers(
    store: Store,
    paths: Sequence[str],
    *,
    reference: str | None,
    progress: Progress,
    raw: bool = False,
) -> Loaded:
    """Make an image of plain layer tars, given bottom to top.

    ``raw`` ones are of upper directories, and are stored as the layers that they stand for.
    Raises BadInput for what is no tar, or means nothing without the layers below.
    """
    references = [names.stored(reference)] if reference else []
    with ExitStack() as owned:
        place = _staging(store, owned)
        progress.start(None, 0)
        opened = owned.enter_context(plain.open_layers(paths, place, advance=progress.advance))
        wanted = [Wanted(None, source) for source in opened.sources]
        look_for_room(store.layout, wanted)
        progress.start(sum(layer.source.size for layer in wanted), len(wanted))
        notes: list[str] = []
        if raw:
            wanted = [
                Wanted(None, _converted(layer.source, place(), notes, progress)) for layer in wanted
            ]
        made = put(store, place(), _imported, wanted, references, "import", progress)
        return made._replace(notes=(*notes, *made.notes))


def _converted(
    source: Source | Candidate, place: str, notes: list[str], progress: Progress
) -> Candidate:
    """The tar of an upper directory as a layer's. What is compressed is stored first."""
    with ExitStack() as owned:
        if isinstance(source, Source) and codec(head(source)) != "none":
            arrived = Candidate(os.path.join(place, secrets.token_hex(4)), 0, source.name)
            arrived.receive(chunks(source), progress.advance)
            source = arrived
        if isinstance(source, Candidate):
            size = source.received(None).size
            file, directory = source.take()
            owned.enter_context(file)
            owned.callback(rooted.remove_tree, directory)
            source = Source(file.fileno(), PAGE, size, source.name)
        upper = RawUpper(source)
        layer = Candidate(os.path.join(place, secrets.token_hex(4)), 0, source.name)
        layer.receive(upper, progress.advance)
    for kind, paths in upper.notes.items():
        notes += [f"{shown(path)}: {kind}" if path else kind for path in paths]
    return layer


def _staging(store: Store, owned: ExitStack) -> Callable[[], str]:
    """The one staging place of a command, made when it is first asked for.

    On a disk without an inode it cannot be made, and what is missing is more than that one:
    so whatever can be looked at before is.
    """
    return cache(lambda: owned.enter_context(staging.staging(store.layout)))


def _as_found(config: bytes, manifest: bytes | None, _: Ingested) -> tuple[bytes, bytes | None]:
    return config, manifest


def _imported(ingested: Ingested) -> tuple[bytes, bytes | None]:
    config = oci.new_config(ingested.diff_ids, created=records.now(), comment="overlayctl import")
    return config, None


def put(
    store: Store,
    place: str,
    made: Callable[[Ingested], tuple[bytes, bytes | None]],
    wanted: Sequence[Wanted],
    references: Sequence[str],
    origin: str,
    progress: Progress,
    *,
    on: Sequence[str] = (),
) -> Loaded:
    """Ingest on the stored layers ``on``, and commit.

    ``made`` gives the config and manifest of what was ingested. Raises Conflict where layers
    go as fast as they come.
    """
    unpacked = store.unpacks()
    for _ in range(_TRIES):
        inside = os.path.join(place, secrets.token_hex(4))
        os.mkdir(inside)
        try:
            ingested = ingest_layers(
                store.layout, inside, wanted, progress, unpacked=unpacked, on=on
            )
            return _commit(store, *made(ingested), ingested, references, origin)
        except LayerWentError:
            # Somebody removed a layer that was there when it was skipped: once more.
            continue
    raise Conflict(
        f"layers of this image were removed {_TRIES} times while it was loaded",
        hint="repeat the command when nobody removes images",
    )


def _commit(
    store: Store,
    config: bytes,
    manifest: bytes | None,
    ingested: Ingested,
    references: Sequence[str],
    origin: str,
) -> Loaded:
    """The final burst under the lock: layers, then the image, then its tags."""
    if manifest is None:
        sizes = zip(ingested.diff_ids, ingested.tar_sizes, strict=True)
        manifest = oci.new_manifest(config, list(sizes))
    image_hex = hex_of(of_bytes(config))
    chains = chain_ids(ingested.diff_ids)
    record = {
        "id": f"sha256:{image_hex}",
        "loaded": records.now(),
        "created": _created(config),
        "origin": os.path.basename(origin),
        "layers": [
            {"name": name, "diff_id": diff_id, "chain_id": chain, "size": size}
            for name, diff_id, chain, size in zip(
                ingested.names, ingested.diff_ids, chains, ingested.sizes, strict=True
            )
        ],
    }
    with store.deciding() as own:
        if any(
            name not in ingested.staged and not layers.exists(store.layout, name)
            for name in ingested.names
        ):
            raise LayerWentError
        new: list[str] = []
        made = False
        moved = []
        try:
            for name, staged in ingested.staged.items():
                if name in ingested.damaged:
                    layers.replace(store.layout, staged, name)
                elif layers.commit(store.layout, staged, name):
                    new.append(name)
            records.sync_directory(store.layout.path("layers"))
            made = images.commit(store.layout, own, record, image_hex, config, manifest)
            for reference in references:
                before = images.tag(store.layout, own, reference, image_hex)
                if before:
                    moved.append((names.familiar(reference), f"sha256:{before}"))
        except OSError:
            _take_back(store.layout, image_hex if made else None, new)
            raise
    unseen = store.attaching(lambda: store.attach_or_why(ingested.names))
    return Loaded(
        f"sha256:{image_hex}",
        tuple(map(names.familiar, references)),
        tuple(moved),
        (
            *ingested.notes,
            *_healed(store, ingested.damaged),
            *([f"the layers are not attached: {unseen}"] if unseen else []),
        ),
        len(new),
        len(ingested.names),
    )


def _take_back(layout: Layout, image: str | None, new: Sequence[str]) -> None:
    """Remove what the final burst brought in before the disk refused the rest.

    An image that has a tag already stays: the tag may have been another's.
    """
    if image and image not in images.tags(layout).values():
        images.remove(layout, image)
    for name in gc.unneeded(layout, new):
        layers.remove(layout, name)


def _healed(store: Store, damaged: Collection[str]) -> list[str]:
    """What there is to say of layers that were damaged: who has the old file mounted."""
    if not damaged:
        return []
    from overlayctl.store import repair

    made = [
        f"layer {names.short(name)} was damaged in the store: made again"
        for name in sorted(damaged)
    ]
    views = repair.outdated_views(store.layout, store.mark, damaged)
    return made + [f"{view.path}: {view.message}" for view in views]


def _created(config: bytes) -> str:
    value = records.decoded(config)
    return str(value.get("created") or "") if isinstance(value, dict) else ""

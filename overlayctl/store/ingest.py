"""Layers of one image into staging: in parallel where they stand alone, in order where not.

Receiving (decompress, hash, write) and reading the headers happen on all cores at once. A
layer is sealed once those below it are, because it may inherit from them; syncing goes on
in the background meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from overlayctl.digest import DiffID, Digest, hex_of
from overlayctl.errors import DigestMismatch, NotFound
from overlayctl.kernel import disk
from overlayctl.layer import ingest
from overlayctl.layer.compression import Source, chunks
from overlayctl.layer.format import FILE
from overlayctl.layer.index import Index, verify
from overlayctl.layer.ingest import Described, Received
from overlayctl.layer.stack import Stack, inherit
from overlayctl.layer.stream import Candidate
from overlayctl.store import layers, records

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor
    from io import FileIO

    from overlayctl.layout import Layout


# A layer is a directory and a file; an image a directory and three files, and there are the
# places where both are made, and a tag.
_INODES_OF_LAYER = 2
_INODES = 8


class Progress(Protocol):
    """Told how far a load is; only a front end shows it."""

    def start(self, total: int | None, layers: int) -> None:
        """A number of layers begins, of ``total`` bytes as they come in if that is known."""

    def advance(self, count: int) -> None:
        """So many bytes of tar more are stored."""

    def layer_done(self, number: int) -> None:
        """Layer ``number`` (from 1) is complete."""


class Wanted(NamedTuple):
    """A layer to store, and what was promised: the digests of its tar and of its ``source``."""

    diff_id: DiffID | None
    source: Source | Candidate
    blob: Digest | None = None


class LayerWentError(Exception):
    """A layer that was there when a load looked is gone: somebody removed it meanwhile."""


class Ingested(NamedTuple):
    """Names and diff_ids bottom to top; the new layers as staged directories; remarks.

    Of the staged ones, ``damaged`` are stored already, in files that are not what they were.
    """

    names: tuple[str, ...]
    diff_ids: tuple[DiffID, ...]
    sizes: tuple[int, ...]
    tar_sizes: tuple[int, ...]
    staged: dict[str, str]
    damaged: frozenset[str]
    notes: tuple[str, ...]


class _Arrived(NamedTuple):
    """A tar in a layer file, staged in ``directory`` or stored, whose headers were read.

    What stands alone is stored under the digest of its tar, and nothing below changes it: it
    is neither open nor described. Of those stored with that tar, ``damaged`` are
    found not to be sound, and ``sound`` is the one that was read.
    """

    file: FileIO | None
    received: Received
    described: Described | None
    directory: str
    damaged: frozenset[str] = frozenset()
    sound: str = ""


def look_for_room(layout: Layout, wanted: Sequence[Wanted]) -> None:
    """Raise DiskFull, before anything is begun, where the layers cannot fit.

    Compressed ones take more than they show here: ``layer.ingest.receive`` goes on looking.
    """
    stored = {name[:64] for name in layers.listed(layout)}
    new = {
        # What passed is on the disk already.
        layer.diff_id or number: layer.source.size if isinstance(layer.source, Source) else 0
        for number, layer in enumerate(wanted)
        if not layer.diff_id or hex_of(layer.diff_id) not in stored
    }
    if not new:
        return
    fd = os.open(layout.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        disk.look(fd, sum(new.values()), _INODES + _INODES_OF_LAYER * len(new))
    finally:
        os.close(fd)


def ingest_layers(
    layout: Layout,
    staging: str,
    wanted: Sequence[Wanted],
    progress: Progress,
    *,
    unpacked: bool = False,
    on: Sequence[str] = (),
) -> Ingested:
    """Bring the layers (bottom to top) into the store's staging; ``unpacked`` as trees, too.

    They lie on the stored layers ``on``, which are taken as they are and come first in the result.
    Raises BadTar, BadArchive, DigestMismatch, LimitExceeded; what was staged goes with
    ``staging``. New layers are synced when this returns. Raises LayerWentError.
    """
    try:
        ingested = _ingest(layout, staging, wanted, progress, unpacked=unpacked, on=on)
    except (NotFound, FileNotFoundError) as error:
        raise LayerWentError from error
    records.fault("ingest:after-sync")
    return ingested


def _ingest(
    layout: Layout,
    staging: str,
    wanted: Sequence[Wanted],
    progress: Progress,
    *,
    unpacked: bool,
    on: Sequence[str],
) -> Ingested:
    with ExitStack() as owned, ingest.threads(progress.advance) as (pool, advance):
        arrivals: dict[DiffID | int, Future[_Arrived]] = {}
        stored: dict[str, list[str]] = {}
        for name in layers.listed(layout):
            stored.setdefault(name[:64], []).append(name)
        for number, layer in enumerate(wanted):
            key = layer.diff_id or number
            if key not in arrivals:
                there = stored.get(hex_of(layer.diff_id), []) if layer.diff_id else []
                directory = os.path.join(staging, f"layer-{number}")
                arrivals[key] = pool.submit(
                    _arrive, layout, there, layer, directory, advance, owned
                )
        finish = partial(_finish, unpacked=unpacked)
        below = [owned.enter_context(layers.open_index(layout, name)) for name in on]
        return _seal_in_order(
            layout, staging, wanted, arrivals, pool, owned, progress, finish, on, below
        )


def _arrive(
    layout: Layout,
    there: Sequence[str],
    layer: Wanted,
    directory: str,
    advance: ingest.Advance,
    owned: ExitStack,
) -> _Arrived:
    """From a sound file that is stored, read there; else from what is loaded."""
    damaged = set()
    for name in there:
        with ExitStack() as opening:
            fd = layers.open_file(layout, name)
            file = opening.enter_context(os.fdopen(fd, "rb", buffering=0))
            if verify(file.fileno()):
                damaged.add(name)
                continue
            with Index.open(file.fileno()) as index:
                received = Received(index.header.diff_id, index.header.tar_size)
                alone = len(name) == 64 and not index.header.wants
            if alone:
                return _Arrived(None, received, None, "", sound=name)
            # On these layers the same tar may inherit otherwise.
            owned.push(opening.pop_all())
        described = ingest.describe(file.fileno(), received)
        return _Arrived(file, received, described, "", frozenset(damaged), name)
    if isinstance(layer.source, Candidate):
        received = layer.source.received(layer.blob)
        if layer.diff_id is not None and received.diff_id != layer.diff_id:
            raise DigestMismatch(layer.source.name, expected=layer.diff_id, actual=received.diff_id)
        file, directory = layer.source.take()
        owned.enter_context(file)
    else:
        file = owned.enter_context(ingest.new_file(directory))
        tar = chunks(layer.source, hashed=layer.blob)
        received = ingest.receive(file.fileno(), tar, expected=layer.diff_id, progress=advance)
    described = ingest.describe(file.fileno(), received)
    return _Arrived(file, received, described, directory, frozenset(damaged))


def _seal_in_order(
    layout: Layout,
    staging: str,
    wanted: Sequence[Wanted],
    arrivals: dict[DiffID | int, Future[_Arrived]],
    pool: ThreadPoolExecutor,
    owned: ExitStack,
    progress: Progress,
    finish: Callable[[FileIO, str], None],
    on: Sequence[str],
    below: list[Index],
) -> Ingested:
    names = [*on]
    diff_ids = [index.header.diff_id for index in below]
    staged: dict[str, str] = {}
    damaged: set[str] = set()
    syncing: list[Future[None]] = []
    used: set[str] = set()
    notes: dict[str, int] = {}
    unended: list[str] = []
    masking = _Masking()
    for number, layer in enumerate(wanted):
        arrived = arrivals[layer.diff_id or number].result()
        diff_id = arrived.received.diff_id
        name = hex_of(diff_id)
        described = arrived.described
        if described is not None:
            if layer.diff_id is None and not described.end_marker:
                unended.append(f"layer {number + 1} has no end marker: the tar may have been cut")
            inherited = inherit(described.wants, Stack(below[::-1]))
            name = inherited.name(diff_id)
            there = layers.exists(layout, name)
            harmed = there and name not in staged and _is_damaged(layout, name, arrived)
            if name not in staged and (harmed or not there):
                file, directory = arrived.file, arrived.directory
                if file is None or not directory or directory in used:
                    directory = os.path.join(staging, f"again-{number}")
                    file = _copied(arrived, directory, owned)
                    described = ingest.describe(file.fileno(), arrived.received)
                used.add(directory)
                ingest.seal(file.fileno(), arrived.received, described, inherited)
                staged[name] = directory
                if harmed:
                    damaged.add(name)
                syncing.append(pool.submit(finish, file, directory))
                for kind, paths in described.tree.notes.items():
                    notes[kind] = notes.get(kind, 0) + len(paths)
                masking.add(described)
        at = os.path.join(staged[name], FILE) if name in staged else layout.layer_file(name)
        below.append(owned.enter_context(Index.open(at)))
        names.append(name)
        diff_ids.append(diff_id)
        progress.layer_done(number + 1)
    for future in syncing:
        future.result()
    return Ingested(
        tuple(names),
        tuple(diff_ids),
        tuple(index.header.size for index in below),
        tuple(index.header.tar_size for index in below),
        staged,
        frozenset(damaged),
        (
            *(f"{count} x {kind}" for kind, count in sorted(notes.items())),
            *unended,
            *masking.notes,
        ),
    )


def _is_damaged(layout: Layout, name: str, arrived: _Arrived) -> bool:
    """Whether a stored layer with the tar that arrived is not sound."""
    if name == arrived.sound or name in arrived.damaged:
        return name in arrived.damaged
    # Another one with the same tar was read.
    fd = layers.open_file(layout, name)
    try:
        return bool(verify(fd))
    finally:
        os.close(fd)


def _copied(arrived: _Arrived, directory: str, owned: ExitStack) -> FileIO:
    """The same tar in a file of its own: it inherits differently here."""
    copy = owned.enter_context(ingest.new_file(directory))
    with ExitStack() as opening:
        source = arrived.file
        if arrived.directory or source is None:
            # It may be finished, and closed.
            path = os.path.join(arrived.directory, FILE)
            source = opening.enter_context(open(path, "rb", buffering=0))
        ingest.copy_tar(source.fileno(), copy.fileno(), arrived.received.size)
    return copy


def _finish(file: FileIO, directory: str, *, unpacked: bool) -> None:
    """Make a sealed layer durable, as a tree too where that is wanted; its file is closed."""
    os.fdatasync(file.fileno())
    if unpacked:
        with Index.open(file.fileno()) as index:
            layers.unpack_into(index, os.path.join(directory, "tree"))
    file.close()
    records.sync_directory(directory)


class _Masking:
    """Symlinks of lower layers that a directory of a higher one hides (merged /usr, mostly)."""

    def __init__(self) -> None:
        self._symlinks: set[bytes] = set()
        self.notes: list[str] = []

    def add(self, described: Described) -> None:
        masked = self._symlinks.intersection(described.tree.directories())
        self.notes += [
            f"the symlink {path.decode(errors='backslashreplace')} of a lower layer is masked "
            "by a directory"
            for path in sorted(masked)[:5]
        ]
        self._symlinks.update(described.tree.symlinks())

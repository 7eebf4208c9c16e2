"""Layers of one image into staging: in parallel where they stand alone, in order where not.

Receiving (decompress, hash, write) and reading the headers happen on all cores at once. A
layer is sealed once those below it are, because it may inherit from them; syncing goes on
in the background meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from overlayctl.digest import DiffID, hex_of
from overlayctl.errors import NotFound
from overlayctl.kernel import disk
from overlayctl.layer import ingest
from overlayctl.layer.index import Index
from overlayctl.layer.ingest import Described, Received
from overlayctl.layer.stack import Stack, inherit
from overlayctl.store import layers, records

if TYPE_CHECKING:
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
    """A layer to store: its tar, and the diff_id that was promised, if one was.

    ``size`` is how many bytes it has as it comes, compressed or not.
    """

    diff_id: DiffID | None
    chunks: Callable[[], Iterable[bytes | memoryview]]
    size: int = 0


class LayerWentError(Exception):
    """A layer that was there when a load looked is gone: somebody removed it meanwhile."""


class Ingested(NamedTuple):
    """Names and diff_ids bottom to top; the new layers as staged directories; remarks."""

    names: tuple[str, ...]
    diff_ids: tuple[DiffID, ...]
    sizes: tuple[int, ...]
    tar_sizes: tuple[int, ...]
    staged: dict[str, str]
    notes: tuple[str, ...]


class _Arrived(NamedTuple):
    """A tar in a layer file, staged or stored, whose headers were read."""

    fd: int
    received: Received
    described: Described
    directory: str


def look_for_room(layout: Layout, wanted: Sequence[Wanted]) -> None:
    """Raise DiskFull, before anything is begun, where the layers cannot fit.

    Compressed ones take more than they show here: ``layer.ingest.receive`` goes on looking.
    """
    stored = {name[:64] for name in layers.listed(layout)}
    new = {
        layer.diff_id or number: layer.size
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
) -> Ingested:
    """Bring the layers (bottom to top) into the store's staging; ``unpacked`` as trees, too.

    Raises BadTar, BadArchive, DigestMismatch, LimitExceeded; what was staged goes with
    ``staging``. New layers are synced when this returns. Raises LayerWentError.
    """
    try:
        ingested = _ingest(layout, staging, wanted, progress, unpacked=unpacked)
    except (NotFound, FileNotFoundError) as error:
        raise LayerWentError from error
    records.fault("ingest:after-sync")
    return ingested


def _ingest(
    layout: Layout, staging: str, wanted: Sequence[Wanted], progress: Progress, *, unpacked: bool
) -> Ingested:
    with ExitStack() as owned, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        owned.callback(pool.shutdown, wait=True, cancel_futures=True)
        arrivals: dict[DiffID | int, Future[_Arrived]] = {}
        stored = {name[:64]: name for name in layers.listed(layout)}
        for number, layer in enumerate(wanted):
            key = layer.diff_id or number
            if key not in arrivals and not _stands_alone(layout, layer.diff_id):
                there = stored.get(hex_of(layer.diff_id)) if layer.diff_id else None
                if there:
                    arrivals[key] = pool.submit(_reread, layout, there, owned)
                else:
                    directory = os.path.join(staging, f"layer-{number}")
                    arrivals[key] = pool.submit(_arrive, layer, directory, progress, owned)
        finish = partial(_finish, unpacked=unpacked)
        return _seal_in_order(layout, staging, wanted, arrivals, pool, owned, progress, finish)


def _stands_alone(layout: Layout, diff_id: DiffID | None) -> bool:
    """Whether the layer is stored, and nothing below could change it."""
    if diff_id is None or not layers.exists(layout, hex_of(diff_id)):
        return False
    with layers.open_index(layout, hex_of(diff_id)) as index:
        return not index.header.wants


def _reread(layout: Layout, name: str, owned: ExitStack) -> _Arrived:
    """A stored tar once more: on these layers it may inherit otherwise."""
    fd = os.open(layout.layer_file(name), os.O_RDONLY | os.O_CLOEXEC)
    owned.callback(os.close, fd)
    with Index.open(fd) as index:
        received = Received(index.header.diff_id, index.header.tar_size)
    return _Arrived(fd, received, ingest.describe(fd, received), "")


def _arrive(layer: Wanted, directory: str, progress: Progress, owned: ExitStack) -> _Arrived:
    fd = _new_file(directory, owned)
    received = ingest.receive(fd, layer.chunks(), expected=layer.diff_id, progress=progress.advance)
    return _Arrived(fd, received, ingest.describe(fd, received), directory)


def _new_file(directory: str, owned: ExitStack) -> int:
    os.mkdir(directory, 0o700)
    path = os.path.join(directory, "layer.erofs")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    owned.callback(os.close, fd)
    return fd


def _seal_in_order(
    layout: Layout,
    staging: str,
    wanted: Sequence[Wanted],
    arrivals: dict[DiffID | int, Future[_Arrived]],
    pool: ThreadPoolExecutor,
    owned: ExitStack,
    progress: Progress,
    finish: Callable[[int, str], None],
) -> Ingested:
    below: list[Index] = []
    names: list[str] = []
    diff_ids: list[DiffID] = []
    staged: dict[str, str] = {}
    syncing: list[Future[None]] = []
    used: set[int] = set()
    notes: dict[str, int] = {}
    unended: list[str] = []
    masking = _Masking()
    for number, layer in enumerate(wanted):
        name = None
        arrival = arrivals.get(layer.diff_id or number)
        if arrival is None:
            # Only what is stored and stands alone was not sent for.
            diff_id = layer.diff_id or DiffID("")
            name = hex_of(diff_id)
        else:
            arrived = arrival.result()
            diff_id = arrived.received.diff_id
            if layer.diff_id is None and not arrived.described.end_marker:
                unended.append(f"layer {number + 1} has no end marker: the tar may have been cut")
            inherited = inherit(arrived.described.wants, Stack(below[::-1]))
            name = inherited.name(diff_id)
            if name not in staged and not layers.exists(layout, name):
                if not arrived.directory or arrived.fd in used:
                    arrived = _copied(arrived, os.path.join(staging, f"again-{number}"), owned)
                used.add(arrived.fd)
                ingest.seal(arrived.fd, arrived.received, arrived.described, inherited)
                staged[name] = arrived.directory
                syncing.append(pool.submit(finish, arrived.fd, arrived.directory))
                for kind, paths in arrived.described.tree.notes.items():
                    notes[kind] = notes.get(kind, 0) + len(paths)
                masking.add(arrived.described)
        path = staged.get(name)
        file = os.path.join(path, "layer.erofs") if path else layout.layer_file(name)
        below.append(owned.enter_context(Index.open(file)))
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
        (
            *(f"{count} x {kind}" for kind, count in sorted(notes.items())),
            *unended,
            *masking.notes,
        ),
    )


def _copied(arrived: _Arrived, directory: str, owned: ExitStack) -> _Arrived:
    """The same tar in a file of its own: it inherits differently here."""
    fd = _new_file(directory, owned)
    ingest.copy_tar(arrived.fd, fd, arrived.received.size)
    return _Arrived(fd, arrived.received, ingest.describe(fd, arrived.received), directory)


def _finish(fd: int, directory: str, *, unpacked: bool) -> None:
    """Make a sealed layer durable, as a tree too where that is wanted."""
    os.fdatasync(fd)
    if unpacked:
        with Index.open(fd) as index:
            layers.unpack_into(index, os.path.join(directory, "tree"))
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

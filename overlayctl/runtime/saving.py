"""Images out of the store, for other tools: streams of what is stored, without a copy of it.

Every layer file is opened before the first byte is written, so nothing that is removed
meanwhile matters. What is written is hashed on the way: a stored layer that is damaged makes
the command fail, and what it wrote till then is worth nothing.

Compressed blobs have to be named before they are written. So a layer is compressed twice, first
for its digest and size alone: no layer needs room anywhere.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from overlayctl import names, oci
from overlayctl.digest import DiffID, Digest, of_bytes
from overlayctl.errors import Damaged, HostCannot, NotFound, OverlayctlError, Usage
from overlayctl.formats import writing
from overlayctl.formats.writing import Blob, Image
from overlayctl.layer import ingest
from overlayctl.layer.compress import Codec, compressed
from overlayctl.layer.format import HEADER, PAGE, Header
from overlayctl.store import images, layers

if TYPE_CHECKING:
    from overlayctl.layer.compression import Buffer
    from overlayctl.layout import Layout
    from overlayctl.store.ingest import Progress
    from overlayctl.store.opened import Store

Form = Literal["docker-archive", "oci-archive"]
_PIECE = 1 << 20
_OCI_CONFIG = "application/vnd.oci.image.config.v1+json"


class Saved(NamedTuple):
    """What was written: image ids and familiar names; ``size`` bytes in all."""

    images: tuple[tuple[str, tuple[str, ...]], ...]
    size: int


class _Stored(NamedTuple):
    """A layer's file, open."""

    name: str
    fd: int
    diff_id: DiffID
    size: int


class _Chosen(NamedTuple):
    """An image to be saved, as the store has it."""

    image: images.Image
    config: bytes
    manifest: bytes
    layers: tuple[_Stored, ...]
    references: tuple[str, ...]


def save(
    store: Store,
    wanted: Sequence[str],
    write: Callable[[Buffer], object],
    *,
    form: Form,
    codec: Codec,
    progress: Progress,
) -> Saved:
    """Give ``write`` an archive of the images, piece by piece.

    A name without a tag stands for all tags of it, an id for the image without a name. Raises
    NotFound, Damaged for stored bytes that are not what they were, HostCannot for zstd where
    nothing writes it.
    """
    with _prepared(store, wanted, codec, progress) as found:
        size = 0
        for piece in writing.as_tar(writing.files(found, docker=form == "docker-archive")):
            write(piece)
            size += len(piece)
        return _saved(found, size)


def save_directory(
    store: Store, wanted: Sequence[str], place: str, *, codec: Codec, progress: Progress
) -> Saved:
    """The images as an OCI layout in the empty directory ``place``. Raises as ``save`` does."""
    with _prepared(store, wanted, codec, progress) as found:
        os.makedirs(os.path.join(place, "blobs/sha256"))
        size = 0
        for file in writing.files(found, docker=False):
            with open(os.path.join(place, file.name), "xb", buffering=0) as out:
                for piece in file.pieces():
                    view = memoryview(piece)
                    while view:
                        view = view[out.write(view) :]
            size += file.size
        return _saved(found, size)


def _saved(found: Sequence[Image], size: int) -> Saved:
    return Saved(
        tuple((one.config.digest, tuple(map(names.familiar, one.references))) for one in found),
        size,
    )


@contextmanager
def _prepared(
    store: Store, wanted: Sequence[str], codec: Codec, progress: Progress
) -> Iterator[list[Image]]:
    """The images, ready to be written inside the block."""
    with ExitStack() as owned:
        chosen = _opened(store, wanted, owned)
        every = {layer.name: layer for one in chosen for layer in one.layers}
        total = sum(layer.size for layer in every.values())
        progress.start(total * (1 if codec == "none" else 2), len(every))
        reader = _Reader(owned.enter_context(ThreadPoolExecutor(1)), progress)
        if codec == "none":
            blobs = {
                name: Blob(Digest(layer.diff_id), layer.size, partial(reader.tar, layer))
                for name, layer in every.items()
            }
        else:
            blobs = _compress(every.values(), codec, reader, progress)
        yield [_image(one, [blobs[layer.name] for layer in one.layers], codec) for one in chosen]


def _image(one: _Chosen, blobs: Sequence[Blob], codec: Codec) -> Image:
    manifest = one.manifest
    sizes = [(blob.digest, blob.size) for blob in blobs]
    if not _is_of(manifest, one.config, sizes):
        manifest = oci.new_manifest(one.config, sizes, codec=codec)
    return Image(_bytes(one.config), _bytes(manifest), tuple(blobs), one.references)


def _bytes(data: bytes) -> Blob:
    return Blob(of_bytes(data), len(data), lambda: (data,))


def _is_of(manifest: bytes, config: bytes, sizes: list[tuple[Digest, int]]) -> bool:
    """Whether the manifest that came with an image tells of these very blobs, in OCI's words."""
    try:
        fields = json.loads(manifest)
        told = [(layer["digest"], layer["size"]) for layer in fields["layers"]]
        kind = fields.get("mediaType", writing.MANIFEST_TYPE), fields["config"]["mediaType"]
        itself = fields["config"]["digest"], fields["config"]["size"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    right = kind == (writing.MANIFEST_TYPE, _OCI_CONFIG)
    return right and told == sizes and itself == (of_bytes(config), len(config))


# --- what is to be saved ----------------------------------------------------------------------


def _opened(
    store: Store, wanted: Sequence[str], owned: ExitStack, *, again: bool = False
) -> list[_Chosen]:
    """What is to be saved, all files open. Raises HostCannot for more than may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with store.locked(exclusive=False), ExitStack() as opening:
            chosen = _choose(store.layout, wanted, opening)
            owned.push(opening.pop_all())
            return chosen
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        if again:
            raise HostCannot(
                f"the images have more layers than this process may open files: {soft}",
                hint="raise the limit (ulimit -n 65536), or save fewer images at once",
            ) from error
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _opened(store, wanted, owned, again=True)


def _choose(layout: Layout, wanted: Sequence[str], owned: ExitStack) -> list[_Chosen]:
    """Each image once, with the references that were asked for. The store is locked."""
    if not wanted:
        raise Usage("no image is named", hint="overlayctl save -o FILE IMAGE...")
    references: dict[str, list[str]] = {}
    for text in wanted:
        for image_hex, found in _named(layout, text):
            references.setdefault(image_hex, []).extend(found)
    opened: dict[str, _Stored] = {}
    chosen = []
    for image_hex, found in references.items():
        image = images.get(layout, image_hex)
        config = _read(layout.image(image_hex, "config.json"), image)
        if of_bytes(config) != image.id:
            raise _damaged(f"the config of image {names.short(image_hex)}")
        for name, diff_id in zip(image.layers, image.diff_ids, strict=True):
            if name not in opened:
                opened[name] = _open(layout, name, diff_id, owned)
        chosen.append(
            _Chosen(
                image,
                config,
                _read(layout.image(image_hex, "manifest.json"), image),
                tuple(opened[name] for name in image.layers),
                tuple(dict.fromkeys(found)),
            )
        )
    return chosen


def _named(layout: Layout, text: str) -> list[tuple[str, list[str]]]:
    """The images (hex) that a word stands for, with the references that come with it."""
    tags = images.tags(layout)
    try:
        repository = names.stored(text).rpartition(":")[0]
    except Usage:
        repository = ""
    if repository and ":" not in text.rsplit("/", 1)[-1]:
        every = {name: image for name, image in tags.items() if name.startswith(repository + ":")}
        if every:
            return [(image, [name]) for name, image in sorted(every.items())]
    image, reference = images.resolve(layout, text)
    return [(image.hex, [reference] if reference else [])]


def _read(path: str, image: images.Image) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        what = f"{os.path.basename(path)} of image {names.short(image.hex)}"
        raise _damaged(what) from None


def _open(layout: Layout, name: str, diff_id: DiffID, owned: ExitStack) -> _Stored:
    """A layer's file. Raises NotFound, Damaged."""
    try:
        fd = layers.open_file(layout, name)
    except FileNotFoundError:
        raise NotFound(
            f"the layer {names.short(name)} is missing", hint="overlayctl system check"
        ) from None
    owned.callback(os.close, fd)
    head = Header.parse(os.pread(fd, HEADER, 0), layout.layer(name))
    if head.diff_id != diff_id:
        raise _damaged(f"the layer {names.short(name)}")
    return _Stored(name, fd, diff_id, head.tar_size)


def _damaged(what: str) -> Damaged:
    return Damaged(
        f"{what} is not what it was: what was written is not to be used",
        hint="overlayctl system check; loading the image again heals it",
    )


# --- the bytes --------------------------------------------------------------------------------


class _Reader:
    """Reads tars out of layer files; a thread hashes what is being written meanwhile."""

    def __init__(self, pool: ThreadPoolExecutor, progress: Progress) -> None:
        self._pool = pool
        self._progress = progress
        self._done = 0

    def tar(self, layer: _Stored) -> Iterator[memoryview]:
        """The tar, in pieces that are good until the next is asked for.

        Raises Damaged before the last piece: so whoever reads it has a tar that is cut.
        """
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(_PIECE, max(layer.size, 1))))
        at, end = PAGE, PAGE + layer.size
        while at < end:
            count = os.preadv(layer.fd, [buffer[: end - at]], at)
            at += count
            hashed = self._pool.submit(digest.update, buffer[:count])
            if not count or at == end:
                hashed.result()
                if "sha256:" + digest.hexdigest() != layer.diff_id:
                    raise _damaged(f"the layer {names.short(layer.name)}")
            try:
                yield buffer[:count]
            finally:
                hashed.result()
            self._progress.advance(count)
        self._done += 1
        self._progress.layer_done(self._done)

    def compressed(self, layer: _Stored, codec: Codec, expected: Digest) -> Iterator[Buffer]:
        """The tar, compressed once more. Raises Damaged, and where it is not as ``expected``."""
        digest = hashlib.sha256()
        for piece in compressed(self.tar(layer), codec):
            digest.update(piece)
            yield piece
        if "sha256:" + digest.hexdigest() != expected:
            raise OverlayctlError(
                f"{codec} made other bytes of the same layer {names.short(layer.name)}",
                hint="--compress none",
            )


def _compress(
    every: Iterable[_Stored], codec: Codec, reader: _Reader, progress: Progress
) -> dict[str, Blob]:
    """The blob that each layer makes, found by compressing it, on all cores."""

    def measured(layer: _Stored, advance: ingest.Advance) -> tuple[_Stored, Digest, int]:
        digest = hashlib.sha256()
        size = 0
        for piece in compressed(_checked(layer, advance), codec):
            digest.update(piece)
            size += len(piece)
        return layer, Digest("sha256:" + digest.hexdigest()), size

    with ingest.threads(progress.advance) as (pool, advance):
        found = [pool.submit(measured, layer, advance) for layer in every]
        made = [future.result() for future in found]
    return {
        layer.name: Blob(digest, size, partial(reader.compressed, layer, codec, digest))
        for layer, digest, size in made
    }


def _checked(layer: _Stored, advance: ingest.Advance) -> Iterator[bytes]:
    """The tar of a layer. Raises Damaged."""
    digest = hashlib.sha256()
    at, end = PAGE, PAGE + layer.size
    while at < end and (piece := os.pread(layer.fd, min(_PIECE, end - at), at)):
        digest.update(piece)
        yield piece
        at += len(piece)
        advance(len(piece))
    if "sha256:" + digest.hexdigest() != layer.diff_id:
        raise _damaged(f"the layer {names.short(layer.name)}")

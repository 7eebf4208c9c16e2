"""A layer file once more, from its tar: what a repair writes and a deep check compares with.

Law: every byte of a layer file follows from its tar, its inherited facts and the writer's
version. The tar is known by its digest, with which the layer's name begins; the facts
follow from the layers below, and their digest is the rest of the name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from overlayctl.digest import DiffID
from overlayctl.errors import Damaged, NotFound, OverlayctlError
from overlayctl.layer import ingest
from overlayctl.layer.format import BLOCK, HEADER, PAGE, SUPERBLOCK, Header
from overlayctl.layer.stack import Stack, inherit
from overlayctl.store import images, layers, snapshots

if TYPE_CHECKING:
    from overlayctl.layout import Layout

_PIECE = 1 << 20
_META_BLKADDR = 10


def stacks(layout: Layout) -> list[tuple[str, ...]]:
    """Every list of layers (bottom to top) of an image or a snapshot that can be read, once."""
    found: dict[tuple[str, ...], None] = {}
    for listed, get in ((images.listed, images.get), (snapshots.listed, snapshots.get)):
        for key in listed(layout):
            try:
                found[get(layout, key).layers] = None
            except OverlayctlError:
                continue
    return list(found)


def tar_size(fd: int, name: str) -> int | None:
    """The size of the tar in a layer file, found by its digest; None if it is not whole.

    The header says it; where that is damaged, the superblock says where the index begins,
    and the tar ends in the 4096 bytes before. Raises HostCannot for a later format.
    """
    limit = os.fstat(fd).st_size - PAGE
    ends = []
    try:
        told = Header.parse(os.pread(fd, HEADER, 0), f"layer {name[:12]}").tar_size
        ends.append(range(told, told + 1))
    except Damaged:
        told = -1
    block = os.pread(fd, SUPERBLOCK.size, HEADER)
    if len(block) == SUPERBLOCK.size:
        last = SUPERBLOCK.unpack(block)[_META_BLKADDR] * BLOCK - PAGE
        window = range(max(0, last - PAGE + 1), last + 1)
        if told not in window:
            ends.append(window)
    found = (_end(fd, name[:64], window, limit) for window in ends)
    return next((size for size in found if size is not None), None)


def _end(fd: int, wanted: str, window: range, limit: int) -> int | None:
    """The length in ``window``, at most ``limit``, at which the tar has the digest ``wanted``."""
    window = range(window.start, min(window.stop, limit + 1))
    if not window:
        return None
    digest = hashlib.sha256()
    at = 0
    while at < window.start:
        piece = os.pread(fd, min(_PIECE, window.start - at), PAGE + at)
        if not piece:
            return None
        digest.update(piece)
        at += len(piece)
    rest = os.pread(fd, len(window) - 1, PAGE + at)
    for count in range(len(rest) + 1):
        if digest.hexdigest() == wanted:
            return at + count
        digest.update(rest[count : count + 1])
    return None


def write(layout: Layout, name: str, source: int, size: int, fd: int) -> Header:
    """Write the layer ``name`` into the empty file ``fd``, its tar from ``source``.

    Nothing is synced. Raises NotFound where the layers below that its facts come from are
    gone or damaged, Damaged where they tell something else than its name says, BadTar.
    """
    received = ingest.Received(DiffID(f"sha256:{name[:64]}"), size)
    ingest.copy_tar(source, fd, size)
    described = ingest.describe(fd, received)
    told = False
    for below in _below(layout, name):
        with ExitStack() as opened:
            try:
                indexes = [
                    opened.enter_context(layers.open_index(layout, lower)) for lower in below[::-1]
                ]
                inherited = inherit(described.wants, Stack(indexes))
            except (Damaged, NotFound):
                continue
            told = True
            if inherited.name(received.diff_id) == name:
                return ingest.seal(fd, received, described, inherited)
    if not told:
        raise NotFound("the layers below, from which it takes a part, are gone or damaged")
    raise Damaged("the layers below are not those that its name tells of")


def _below(layout: Layout, name: str) -> Iterator[Sequence[str]]:
    """What may lie below a layer; nothing for one that takes nothing from there."""
    if len(name) == 64:
        yield ()
        return
    for stack in stacks(layout):
        for position, layer in enumerate(stack):
            if layer == name:
                yield stack[:position]

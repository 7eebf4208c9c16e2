"""What a container changed of its image: read from its upper directory and the layers' indexes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.errors import BadInput, Damaged, LimitExceeded, NotFound
from overlayctl.kernel import places
from overlayctl.kernel.rooted import Parents
from overlayctl.layer import diff, stubs
from overlayctl.layer.attributes import TYPES, check_complete
from overlayctl.layer.fields import shown
from overlayctl.layer.stack import Shown, Stack
from overlayctl.store import containers, snapshots
from overlayctl.whiteout import OPAQUE_XATTR

if TYPE_CHECKING:
    from overlayctl.layer.diff import Change
    from overlayctl.layer.index import Index
    from overlayctl.store.opened import Store

LONGEST = 16 << 20
"""The longest file whose content is compared line by line, in bytes."""


class Version(NamedTuple):
    """A file at one time: a symlink's content is where it points."""

    type: str
    content: bytes


class Versions(NamedTuple):
    """One path of a container; None where there was, or is, nothing."""

    before: Version | None
    after: Version | None


class _Opened(NamedTuple):
    """``upper`` is an fd, ``below`` are the layers, topmost first."""

    upper: int
    below: list[Index]


def changes(store: Store, name: str, *, sizes: bool = False) -> list[Change]:
    """The changes in byte order, as ``layer.diff.changes`` tells them; stubs are left out.

    The container's lock is held shared: it is neither mounted nor unmounted nor removed
    meanwhile, and processes in it go on. Raises NotFound, Damaged, and as ``layer.diff``.
    """
    with _opened(store, name) as (upper, below):
        without = stubs.found(upper, Stack(below))
        return list(diff.changes(upper, below, without=without, sizes=sizes))


def versions(store: Store, name: str, path: bytes) -> Versions:
    """What the image and the container have at ``path``, below the root; no symlink is followed.

    Raises NotFound where neither has anything, BadInput for what has no content,
    LimitExceeded for a long file.
    """
    path = b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))
    with _opened(store, name) as (upper, below):
        before = _before(Stack(below).root(), path)
        after = _after(upper, path, before)
    if before is None and after is None:
        raise NotFound(
            f"neither the image nor the container has {shown(path)}",
            hint=f"overlayctl diff {name} lists the paths; symlinks on the way are not followed",
        )
    return Versions(before, after)


@contextmanager
def _opened(store: Store, name: str) -> Iterator[_Opened]:
    with store.locked(exclusive=False):
        found = containers.resolve(store.layout, name)
    with store.holding(found.id, exclusive=False), ExitStack() as owned:
        snapshot = snapshots.find(store.layout, found.id)
        if snapshot is None:
            raise Damaged(
                f"which layers container {found.name} lies on is lost: what it changed of them "
                "cannot be told",
                hint="overlayctl system check --repair; overlayctl export keeps what was written",
            )
        upper = snapshots.open_upper(store.layout, found.id)
        owned.callback(os.close, upper)
        yield _Opened(upper, snapshots.open_lowers(store.layout, snapshot.layers, owned))


def _before(seen: Shown | None, path: bytes) -> Version | None:
    for name in path.split(b"/"):
        seen = seen and seen.child(name)
    if seen is None:
        return None
    layer, node = seen.parts[0]
    kind = _with_content(path, node.mode, node.size)
    content = layer.target(node) if stat.S_ISLNK(node.mode) else layer.read(node, 0, node.size)
    return Version(kind, content)


def _after(upper: int, path: bytes, before: Version | None) -> Version | None:
    """What is there now: ``before``, unless the upper says something of it."""
    parts = path.split(b"/")
    with Parents(upper) as parents:
        for depth in range(1, len(parts) + 1):
            here = b"/".join(parts[:depth])
            try:
                place = places.at(*parents.of(here))
            except OSError as error:
                if error.errno not in (*places.GONE, errno.ENAMETOOLONG):
                    raise
                return before
            try:
                info = os.fstat(place)
                if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
                    return None
                xattrs = places.xattrs(place)
                check_complete(here, xattrs)
                if depth == len(parts):
                    return _read(here, place, info)
                if not stat.S_ISDIR(info.st_mode):
                    return None
                if xattrs.get(OPAQUE_XATTR) == b"y":
                    before = None
            finally:
                os.close(place)
    return before


def _read(path: bytes, place: int, info: os.stat_result) -> Version:
    kind = _with_content(path, info.st_mode, info.st_size)
    if stat.S_ISLNK(info.st_mode):
        return Version(kind, os.fsencode(os.readlink("", dir_fd=place)))
    with open(places.read(place), "rb") as file:
        return Version(kind, file.read(LONGEST))


def _with_content(path: bytes, mode: int, size: int) -> str:
    kind = TYPES[stat.S_IFMT(mode)]
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise BadInput(
            f"{shown(path or b'/')} is a {kind}: it has no content to compare",
            hint="--content names a file or a symlink",
        )
    if size > LONGEST:
        raise LimitExceeded(
            f"{shown(path)} has {size:,} bytes: files of up to {LONGEST:,} are compared",
            hint="overlayctl layer cat prints a layer's file, overlayctl mount shows the new one",
        )
    return kind

"""Stored layers: immutable files named by the digest of their tar (and their facts).

Nobody counts references: who uses a layer is found by reading images and snapshots.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from stat import S_ISDIR
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from overlayctl import names
from overlayctl.errors import NotFound
from overlayctl.kernel import inuse, rooted
from overlayctl.layer import attach
from overlayctl.layer.format import FILE
from overlayctl.layer.index import Index
from overlayctl.layout import generation
from overlayctl.store import records
from overlayctl.store.records import fault

if TYPE_CHECKING:
    from overlayctl.layer.format import Header
    from overlayctl.layout import Layout

_T = TypeVar("_T")
_NAME = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{16})?")


class LayerStat(NamedTuple):
    """A stored layer: sizes in bytes, ``disk`` as the blocks that the store spends on it."""

    name: str
    header: Header
    disk: int


def is_name(text: object) -> bool:
    """Whether a layer can be called so: a digest, and what its facts add to it."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def listed(layout: Layout) -> list[str]:
    """The names of all stored layers."""
    return [name for name in records.names(layout.path("layers")) if exists(layout, name)]


def exists(layout: Layout, name: str) -> bool:
    """Whether the layer is stored."""
    try:
        _of_today(layout, name, os.stat)
    except OSError:
        return False  # As os.path.exists answers.
    return True


def is_gone(layout: Layout, name: str) -> bool:
    """Whether the layer's file is not there, for who deletes the rest of it."""
    try:
        _of_today(layout, name, os.stat)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _of_today(layout: Layout, name: str, use: Callable[[str], _T]) -> _T:
    """What ``use`` makes of the layer's file, which a repair may replace before it is opened."""
    path = layout.layer_file(name)
    while True:
        try:
            return use(path)
        except FileNotFoundError:
            newer = layout.layer_file(name)
            if newer == path:
                raise
            path = newer


def open_file(layout: Layout, name: str) -> int:
    """A descriptor of the layer's file. Raises OSError."""
    return _of_today(layout, name, partial(os.open, flags=os.O_RDONLY | os.O_CLOEXEC))


def open_index(layout: Layout, name: str) -> Index:
    """The layer's index, attached or not. Raises NotFound, Damaged."""
    try:
        return _of_today(layout, name, Index.open)
    except FileNotFoundError:
        raise NotFound(
            f"the layer {names.short(name)} is missing", hint="overlayctl system check"
        ) from None


def stat(layout: Layout, name: str) -> LayerStat:
    """What is known of a stored layer. Raises NotFound, Damaged."""
    with open_index(layout, name) as index:
        return LayerStat(name, index.header, disk(layout, name))


def commit(layout: Layout, staged: str, name: str) -> bool:
    """Move a synced, staged layer directory to its place; False if the layer was there.

    The caller holds the store's lock and syncs ``layers/`` afterwards.
    """
    if not is_gone(layout, name):
        return False
    # A removal may have stopped between the file and its directory.
    clear(layout, name)
    os.rename(staged, layout.layer(name))
    fault("layer:after-rename")
    return True


def replace(layout: Layout, staged: str, name: str) -> None:
    """Put the synced file (and tree) in ``staged`` where a damaged one is, which goes.

    A mount of the old one keeps it. The caller holds the store's lock.
    """
    if commit(layout, staged, name):
        return
    os.rename(os.path.join(staged, FILE), layout.layer_file(name, after=1))
    fault("layer:after-rename")
    tree = os.path.join(staged, "tree")
    if os.path.isdir(tree):
        os.rename(tree, layout.layer_tree(name, after=1))
    records.sync_directory(layout.layer(name))
    for path in files(layout, name)[:-1]:
        os.unlink(path)


def unpack(layout: Layout, staging: str, name: str) -> str:
    """The stored layer as a tree in staging, synced. Raises HostCannot, NotFound, Damaged."""
    with open_index(layout, name) as index:
        return unpack_into(index, os.path.join(staging, f"tree-{name}"))


def unpack_into(index: Index, directory: str) -> str:
    """The layer as a tree in the new ``directory``, synced. Raises HostCannot, Damaged."""
    from overlayctl.layer.unpack import unpack

    os.mkdir(directory, 0o700)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        unpack(index, fd)
    finally:
        os.close(fd)
    return directory


def commit_tree(layout: Layout, staged: str, name: str) -> None:
    """Move a synced tree beside its layer's file, if that is there and has none yet.

    The caller holds the store's lock.
    """
    target = layout.layer_tree(name)
    if exists(layout, name) and not os.path.isdir(target):
        os.rename(staged, target)
        records.sync_directory(layout.layer(name))


def release(layout: Layout, names: Iterable[str]) -> None:
    """Detach layers that are to go. Raises InUse for one that somebody works in.

    The kernel keeps the file of a layer for an overlay above it, but not what is in a tree.
    """
    names = list(names)
    unpacked = {name for name in names if os.path.isdir(layout.layer_tree(name))}
    if unpacked:
        inuse.refuse_lowers(layout.root, unpacked)
    for name in names:
        attach.detach(layout, name)


def remove(layout: Layout, name: str) -> int:
    """Delete a layer that nobody uses; how many bytes it took. The caller holds the lock.

    Its file goes first: without one the layer is gone, and the rest is anybody's to finish.
    Raises InUse as ``release`` does.
    """
    release(layout, [name])
    directory = layout.layer(name)
    size = disk(layout, name)
    # The file of today goes last: without it an older one, which was damaged, would count.
    for file in files(layout, name):
        # A file's space is freed when its last fd closes, after the caller's lock is gone.
        records.remove(file)
        fault("layer:after-unlink")
    clear(layout, name)
    if os.path.isdir(directory):
        for left in os.listdir(directory):
            os.unlink(os.path.join(directory, left))
        os.rmdir(directory)
    fault("layer:after-removal")
    return size


def clear(layout: Layout, name: str) -> None:
    """Delete the trees of a layer whose file is gone, and its directory if nothing else is in it.

    The caller holds the lock.
    """
    directory = layout.layer(name)
    for tree in records.names(directory):
        if generation(tree, "tree", ""):
            rooted.remove_tree(os.path.join(directory, tree))
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT}:
            raise


def files(layout: Layout, name: str) -> list[str]:
    """The paths of a layer's files, the oldest first: the last one is that of today."""
    directory = layout.layer(name)
    found = [(generation(one, "layer", ".erofs"), one) for one in records.names(directory)]
    return [os.path.join(directory, one) for number, one in sorted(found) if number]


def disk(layout: Layout, name: str) -> int:
    """The bytes that the store spends on a layer: blocks taken by its file, and by its tree."""
    seen = {}
    with suppress(FileNotFoundError):
        for found in rooted.stats(layout.layer(name)):
            if not S_ISDIR(found.st_mode):
                seen[found.st_ino] = found.st_blocks * 512
    return sum(seen.values())

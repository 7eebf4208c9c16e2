"""The paths of a container as ``cp`` takes them: below its root, and into its volumes.

What a container has mounted at a path counts there whether or not it runs, but for tmpfs: that
is a process's own. ``..`` is taken away before anything is looked at, as docker does.
"""

from __future__ import annotations

import os
import posixpath
import stat
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.errors import Conflict, NotFound, OverlayctlError
from overlayctl.kernel import places
from overlayctl.layer.fields import shown
from overlayctl.runtime.targets import Targets
from overlayctl.store import volumes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import ExitStack

    from overlayctl.store.containers import Container
    from overlayctl.store.opened import Store

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Place(NamedTuple):
    """What is at a path: an fd of the directory above it and its name there, ``.`` for itself.

    ``path`` is absolute, with no link on the way; ``info`` is None where nothing is.
    """

    parent: int
    name: bytes
    path: bytes
    info: os.stat_result | None

    @property
    def is_directory(self) -> bool:
        """Whether a directory is there."""
        return self.info is not None and stat.S_ISDIR(self.info.st_mode)


class _Mounted(NamedTuple):
    path: bytes
    place: Place
    read_only: bool


class Inside:
    """The container whose merged root is the fd ``root``; what it opens is closed by ``owned``."""

    def __init__(self, store: Store, container: Container, root: int, owned: ExitStack) -> None:
        self._container = container
        self._root = root
        self._owned = owned
        self._targets = Targets(root)
        self._mounted = list(self._mounts(store))

    def _mounts(self, store: Store) -> Iterator[_Mounted]:
        for one in self._container.config.mounts:
            if one.kind == "tmpfs":
                continue
            try:
                volume = one.kind == "volume"
                source = volumes.data(store.layout, one.source) if volume else one.source
                source = os.path.realpath(source)
                above = self._open(os.path.dirname(source) or "/")
                fd = os.open(source, os.O_PATH | os.O_CLOEXEC)
            except (OSError, OverlayctlError):
                # It is gone: then its place in the container's own tree is what there is.
                continue
            self._owned.callback(os.close, fd)
            info = os.fstat(fd)
            path = self._targets.resolve(os.fsencode(one.target))
            self._targets.mount(path, fd, writable=not one.read_only)
            if stat.S_ISDIR(info.st_mode):
                place = Place(self._open(places.link(fd)), b".", path, info)
            else:
                place = Place(above, os.fsencode(os.path.basename(source)), path, info)
            yield _Mounted(path, place, one.read_only)

    def _open(self, path: str) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._owned.callback(os.close, fd)
        return fd

    def place(self, path: bytes, *, follow: bool) -> Place:
        """What is at a path; with ``follow`` at the end of the links that it ends in.

        Raises NotFound where the directory above is not there, Conflict where it is none.
        """
        clean = cleaned(path)
        if follow or clean == b"/":
            found = self._targets.resolve(clean)
        else:
            above, name = posixpath.split(clean)
            found = places.below(self._targets.resolve(above).rstrip(b"/"), name)
            found = b"/" + found.lstrip(b"/")
        if found == b"/":
            return Place(self._root, b".", found, os.fstat(self._root))
        for mounted in self._mounted:
            if mounted.path == found:
                return mounted.place
        try:
            parent, name = self._targets.open_parent(found)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(
                f"container {self._container.name} has no directory "
                f"{shown(posixpath.dirname(found))}",
                hint=f"overlayctl export {self._container.name} | tar -t lists what it has",
            ) from None
        self._owned.callback(os.close, parent)
        return Place(parent, name, found, self._targets.stat(found))

    def mounts_below(self, path: bytes) -> list[tuple[bytes, Place]]:
        """What is mounted below a path that ``place`` gave, relative to it, in its order."""
        start = path.rstrip(b"/") + b"/"
        found = [(one.path[len(start) :], one.place) for one in self._mounted]
        return [
            (path, place)
            for path, place in sorted(found, key=lambda one: one[0].count(b"/"))
            if place.path.startswith(start)
        ]

    def expect_writable(self, path: bytes) -> None:
        """Raise Conflict where a path that ``place`` gave is not to be written."""
        above = [one for one in self._mounted if (path + b"/").startswith(one.path + b"/")]
        if above:
            deepest = max(above, key=lambda one: len(one.path))
            if deepest.read_only:
                raise Conflict(
                    f"what container {self._container.name} has mounted at "
                    f"{shown(deepest.path)} is read-only",
                    hint="copy to where it comes from, or to another path",
                )
        elif self._container.config.read_only:
            raise Conflict(
                f"the root of container {self._container.name} is read-only",
                hint="copy into a volume of it, or make it without --read-only",
            )

    def is_foreign(self, path: bytes) -> bool:
        """Whether a path that ``place`` gave lies on what the container has mounted."""
        return any((path + b"/").startswith(one.path + b"/") for one in self._mounted)

    def parent(self, top: bytes, path: bytes) -> tuple[int, bytes]:
        """The directory of ``path`` below the directory ``top``, made if it is missing.

        Links on the way lead where they do in the container. The fd is the caller's.
        """
        whole = places.below(top.rstrip(b"/"), path)
        above, name = posixpath.split(whole) if path else (whole, b"")
        found = self._targets.resolve(above, make="directory")
        self.expect_writable(found)
        if found == b"/":
            return os.dup(self._root), name
        for mounted in self._mounted:
            if mounted.path == found:
                return os.dup(mounted.place.parent), name
        outer, last = self._targets.open_parent(found)
        try:
            return os.open(last, _DIRECTORY, dir_fd=outer), name
        finally:
            os.close(outer)


def cleaned(path: bytes) -> bytes:
    """The absolute path without dots and double slashes."""
    return posixpath.normpath(b"/" + path.lstrip(b"/"))

"""A tree copied from one directory into another, through descriptors alone.

What is read is held as a place first (``kernel.places``), so no symlink is followed and no
device or FIFO opened; what is made gets its attributes through its own descriptor. A file
lies beside its name until it is whole, then takes the place of what had it: a copy that is
stopped leaves no half file under a name that was there before.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from overlayctl.kernel import libc, places
from overlayctl.kernel.rooted import Parents
from overlayctl.layer import making
from overlayctl.layer.attributes import is_carried
from overlayctl.layer.making import Attributes, Identity
from overlayctl.layer.tar_writer import CHANGED, GONE, SOCKET
from overlayctl.whiteout import OVERLAY

ITSELF = "the copy itself, left out"
XATTR_REFUSED = "an xattr left out that the filesystem does not take"

_PIECE = 1 << 20
# /proc and cgroups (statfs(2)).
_MADE_UP = (0x9FA0, 0x6367_7270)
# What copy_file_range(2) says of a pair of files that it does not do.
_BY_HAND = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


class Copied(NamedTuple):
    """``size`` bytes of files (no holes) in ``entries`` names; remarks, and the paths of each."""

    size: int
    entries: int
    notes: dict[str, list[bytes]]


class _Known(NamedTuple):
    """Where something was made, and how to know it again."""

    path: bytes
    identity: Identity


def copy_tree(
    source: int, name: bytes, target: int, renamed: bytes, *, owner: tuple[int, int] | None = None
) -> Copied:
    """Copy what lies at ``name`` in the directory ``source`` to ``renamed`` in ``target``.

    ``.`` as either name is the directory itself, which must be there and keeps its own
    attributes as a target. A directory goes into one that is there; anything else takes the
    place of what has the name. With ``owner`` all that is new belongs to that uid and gid, and
    what ran with the rights of another owner does not. Nothing is synced. Paths in ``notes`` and in
    errors are below ``name``.

    Raises Conflict for a directory in the way of something else, or the other way round;
    OSError naming the path.
    """
    return TreeCopy(target, owner=owner).copy(source, name, renamed)


class TreeCopy:
    """Copies into ``target``; what several calls copied keeps its hard links."""

    def __init__(self, target: int, *, owner: tuple[int, int] | None = None) -> None:
        self._target = target
        self._owner = owner
        self._size = 0
        self._entries = 0
        self._notes: dict[str, list[bytes]] = {}
        self._links: dict[Identity, _Known] = {}
        self._fresh: set[bytes] = set()
        self._own: set[Identity] = set()

    def copy(
        self, source: int, name: bytes, renamed: bytes, *, hidden: Collection[bytes] = ()
    ) -> Copied:
        """As ``copy_tree``; the numbers are of all calls. Below ``hidden`` paths nothing is copied.

        What ``renamed`` has above its last name is made if it is missing.
        """
        directories: list[tuple[_Known, Attributes]] = []
        name, renamed = (b"" if one == b"." else one for one in (name, renamed))
        pending = [b""]
        with Parents(source) as sources, Parents(self._target) as targets:
            parts = renamed.split(b"/")
            for depth in range(1, len(parts)):
                self._directory(b"/".join(parts[:depth]), targets)
            while pending:
                path = pending.pop()
                with _told(path or name):
                    try:
                        place = places.at(*sources.of(places.below(name, path)))
                    except OSError as error:
                        if error.errno not in places.GONE or not path:
                            raise
                        self._note(GONE, path)
                        continue
                    try:
                        info = os.fstat(place)
                        where = places.below(renamed, path)
                        if not stat.S_ISDIR(info.st_mode):
                            self._leaf(place, info, path, where, targets)
                        elif (info.st_dev, info.st_ino) in self._own:
                            self._note(ITSELF, path)
                        else:
                            made = self._directory(where, targets)
                            if path not in hidden:
                                names = places.names(place)
                                pending += [places.below(path, one) for one in names]
                            if where:
                                directories.append((made, self._attributes(place, info)))
                    finally:
                        os.close(place)
            for made, attributes in reversed(directories):
                with _told(made.path):
                    self._dress_directory(made, attributes, targets)
        return Copied(self._size, self._entries, self._notes)

    def _note(self, kind: str, path: bytes) -> None:
        self._notes.setdefault(kind, []).append(path)

    def _directory(self, path: bytes, targets: Parents) -> _Known:
        """A directory that is there now; its attributes come later, for a new name changes them."""
        made = making.directory(*targets.of(path), path)
        self._entries += 1
        if made.fresh:
            self._fresh.add(path)
            self._own.add(made.identity)
        return _Known(path, made.identity)

    def _dress_directory(self, made: _Known, attributes: Attributes, targets: Parents) -> None:
        place = self._again(made, targets)
        if place is None:
            self._note(CHANGED, made.path)
            return
        try:
            if self._owner and made.path not in self._fresh:
                # Only what is new has to become somebody's.
                info = os.fstat(place)
                attributes = attributes._replace(uid=info.st_uid, gid=info.st_gid)
            self._dress(place, attributes, made.path)
        finally:
            os.close(place)

    def _again(self, made: _Known, targets: Parents) -> int | None:
        """The place of what was made before, if it is still the same."""
        try:
            place = places.at(*targets.of(made.path))
        except OSError as error:
            if error.errno not in places.GONE:
                raise
            return None
        if making.identity(place) == made.identity:
            return place
        os.close(place)
        return None

    def _leaf(
        self, place: int, info: os.stat_result, path: bytes, where: bytes, targets: Parents
    ) -> None:
        """Anything but a directory."""
        if stat.S_ISSOCK(info.st_mode):
            self._note(SOCKET, path)
            return
        self._entries += 1
        source = info.st_dev, info.st_ino
        if source in self._links and self._link(self._links[source], where, targets):
            return
        attributes = self._attributes(place, info)
        kind = stat.S_IFMT(info.st_mode)
        target = os.readlink(b"", dir_fd=place) if kind == stat.S_IFLNK else b""
        parent, name = targets.of(where)
        with making.named(parent, name, where, fresh=self._is_fresh(where)) as beside:
            made = making.entry(parent, beside, kind, device=info.st_rdev, target=target)
            try:
                if kind == stat.S_IFREG:
                    self._content(place, info, made, path)
                self._dress(made, attributes, path)
                if info.st_nlink > 1:
                    self._links[source] = _Known(where, making.identity(made))
            finally:
                os.close(made)

    def _is_fresh(self, path: bytes) -> bool:
        """Whether the directory above was made by this copy: then no name in it is taken."""
        return path.rpartition(b"/")[0] in self._fresh

    def _link(self, first: _Known, path: bytes, targets: Parents) -> bool:
        """Give what was made before another name; False if that cannot be."""
        with Parents(self._target) as others:
            place = self._again(first, others)
            if place is None:
                return False
            try:
                parent, name = targets.of(path)
                return making.link(place, parent, name, path, fresh=self._is_fresh(path))
            finally:
                os.close(place)

    def _content(self, place: int, info: os.stat_result, made: int, path: bytes) -> None:
        """As much as the file had when it was looked at, its holes left out."""
        fd = places.read(place)
        try:
            size = info.st_size
            pieces = places.data(fd, size)
            if not size and (size := _untold(fd)):
                pieces = iter([(0, size)])
            for offset, length in pieces:
                done = copy_range(fd, made, offset, length, to=offset)
                self._size += done
                if done < length:
                    size = offset + done
                    break
            os.ftruncate(made, size)
            if places.version(os.fstat(fd)) != places.version(info):
                self._note(CHANGED, path)
        finally:
            os.close(fd)

    def _attributes(self, place: int, info: os.stat_result) -> Attributes:
        mode, xattrs = stat.S_IMODE(info.st_mode), places.xattrs(place)
        uid, gid = self._owner or (info.st_uid, info.st_gid)
        if (uid, gid) != (info.st_uid, info.st_gid) and not stat.S_ISDIR(info.st_mode):
            # It was to run with the rights of another.
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
        kept = {
            name: value
            for name, value in xattrs.items()
            if is_carried(name) and not name.startswith(OVERLAY)
        }
        return Attributes(mode, uid, gid, info.st_mtime_ns, kept)

    def _dress(self, made: int, attributes: Attributes, path: bytes) -> None:
        if not making.dress(made, attributes):
            self._note(XATTR_REFUSED, path)


def _untold(fd: int) -> int:
    """How long a file is that the kernel makes up as it is read: such a one says 0."""
    if libc.fstatfs(fd).magic not in _MADE_UP:
        return 0
    size = 0
    while piece := os.pread(fd, _PIECE, size):
        size += len(piece)
    return size


def copy_range(source: int, target: int, offset: int, length: int, *, to: int) -> int:
    """Copy bytes to the offset ``to``, sharing blocks where that can be; how many there were."""
    end = offset + length
    at = offset
    by_hand = False
    while at < end:
        there = to + at - offset
        if by_hand:
            piece = os.pread(source, min(_PIECE, end - at), at)
            done = len(piece)
            view = memoryview(piece)
            while view:
                view = view[os.pwrite(target, view, there + done - len(view)) :]
        else:
            try:
                done = os.copy_file_range(source, target, end - at, at, there)
            except OSError as error:
                if error.errno not in _BY_HAND:
                    raise
                by_hand = True
                continue
        if not done:
            break
        at += done
    return at - offset


@contextmanager
def _told(path: bytes) -> Iterator[None]:
    """Name the path in what the system refuses."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error

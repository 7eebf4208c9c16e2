"""A tree copied from one directory into another, through descriptors alone.

What is read is held as a place first (``kernel.places``), so no symlink is followed and no
device or FIFO opened; what is made gets its attributes through its own descriptor. A file
lies beside its name until it is whole, then takes the place of what had it: a copy that is
stopped leaves no half file under a name that was there before.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from overlayctl.errors import Conflict
from overlayctl.kernel import places
from overlayctl.kernel.rooted import Parents
from overlayctl.layer.attributes import ACLS, is_carried
from overlayctl.layer.fields import shown
from overlayctl.layer.tar_writer import CHANGED, GONE, SOCKET
from overlayctl.whiteout import OVERLAY

ITSELF = "the copy itself, left out"
XATTR_REFUSED = "an xattr left out that the filesystem does not take"

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE = 1 << 20
_ROOM = 1 << 20
# What copy_file_range(2) says of a pair of files that it does not do.
_BY_HAND = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
_XATTR_REFUSED = (errno.ENOTSUP, errno.EPERM, errno.EINVAL, errno.ERANGE, errno.E2BIG)


class Copied(NamedTuple):
    """``size`` bytes of files (no holes) in ``entries`` names; remarks, and the paths of each."""

    size: int
    entries: int
    notes: dict[str, list[bytes]]


class Attributes(NamedTuple):
    """What an entry is to look like. ``mtime`` is in nanoseconds."""

    mode: int
    uid: int
    gid: int
    mtime: int
    xattrs: dict[bytes, bytes]


class _Made(NamedTuple):
    """A directory or a file of several names that is there: how to find it, and know it again."""

    path: bytes
    identity: tuple[int, int]


def copy_tree(
    source: int, name: bytes, target: int, renamed: bytes, *, owner: tuple[int, int] | None = None
) -> Copied:
    """Copy what lies at ``name`` in the directory ``source`` to ``renamed`` in ``target``.

    ``.`` as either name is the directory itself, which must be there and keeps its own
    attributes as a target. A directory goes into one that is there; anything else takes the
    place of what has the name. With ``owner`` all belongs to that uid and gid, and what ran
    with the rights of another owner does not. Nothing is synced. Paths in ``notes`` and in
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
        self._links: dict[tuple[int, int], _Made] = {}
        self._fresh: set[bytes] = set()
        self._own: set[tuple[int, int]] = set()

    def copy(self, source: int, name: bytes, renamed: bytes) -> Copied:
        """As ``copy_tree``; the numbers are of all calls."""
        directories: list[tuple[_Made, Attributes]] = []
        pending = [b""]
        with Parents(source) as sources, Parents(self._target) as targets:
            while pending:
                path = pending.pop()
                with _told(path or name):
                    try:
                        place = places.at(*sources.of(_below(name, path)))
                    except OSError as error:
                        if error.errno not in places.GONE or not path:
                            raise
                        self.note(GONE, path)
                        continue
                    try:
                        info = os.fstat(place)
                        where = _below(renamed, path)
                        if stat.S_ISDIR(info.st_mode):
                            if (info.st_dev, info.st_ino) in self._own:
                                self.note(ITSELF, path)
                                continue
                            made = self.directory(where, targets)
                            start = path + b"/" if path else b""
                            pending += [start + child for child in places.names(place)]
                            if where:
                                directories.append((made, self._attributes(place, info)))
                        else:
                            self._leaf(place, info, path, where, targets)
                    finally:
                        os.close(place)
            for made, attributes in reversed(directories):
                with _told(made.path):
                    self.dress_directory(made, attributes, targets)
        return self.copied

    @property
    def copied(self) -> Copied:
        """What was done so far."""
        return Copied(self._size, self._entries, self._notes)

    def note(self, kind: str, path: bytes) -> None:
        """Remark something about an entry."""
        self._notes.setdefault(kind, []).append(path)

    # --- what is made -----------------------------------------------------------------------

    def directory(self, path: bytes, targets: Parents) -> _Made:
        """Make a directory, if none is there; its attributes come later (``dress_directory``).

        Raises Conflict if something else is there.
        """
        parent, name = targets.of(path)
        self._entries += 1
        if name:
            try:
                # Nobody else's until it is dressed.
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                pass
            else:
                self._fresh.add(path)
        place = places.at(parent, name)
        try:
            info = os.fstat(place)
            if not stat.S_ISDIR(info.st_mode):
                raise Conflict(
                    f"{shown(path)} is there and is no directory: a directory does not replace it",
                    hint="remove it first, or copy to another name",
                )
            made = _Made(path, (info.st_dev, info.st_ino))
            if path in self._fresh:
                self._own.add(made.identity)
                _strip_acls(place)
            return made
        finally:
            os.close(place)

    def dress_directory(self, made: _Made, attributes: Attributes, targets: Parents) -> None:
        """Give a directory its attributes, now that it is full: a new name changes its time."""
        try:
            place = places.at(*targets.of(made.path))
        except OSError as error:
            if error.errno not in places.GONE:
                raise
            self.note(CHANGED, made.path)
            return
        try:
            if _identity(place) == made.identity:
                self._dress(place, attributes, made.path)
            else:
                self.note(CHANGED, made.path)
        finally:
            os.close(place)

    @contextmanager
    def making(self, path: bytes, targets: Parents) -> Iterator[tuple[int, bytes]]:
        """The directory and the name under which to make an entry that is no directory.

        It gets its own name when the block ends, in the place of what has it. Raises Conflict
        if that is a directory.
        """
        parent, name = targets.of(path)
        fresh = path.rpartition(b"/")[0] in self._fresh
        beside = name if fresh else b".overlayctl-" + secrets.token_hex(8).encode()
        try:
            yield parent, beside
            if not fresh:
                os.rename(beside, name, src_dir_fd=parent, dst_dir_fd=parent)
        except FileExistsError:
            raise
        except BaseException as error:
            with suppress(FileNotFoundError):
                os.unlink(beside, dir_fd=parent)
            if isinstance(error, IsADirectoryError):
                raise Conflict(
                    f"{shown(path)} is a directory: only a directory goes into its place",
                    hint="remove it first, or copy to another name",
                ) from None
            raise
        self._entries += 1

    def _leaf(
        self, place: int, info: os.stat_result, path: bytes, where: bytes, targets: Parents
    ) -> None:
        """Anything but a directory."""
        if stat.S_ISSOCK(info.st_mode):
            self.note(SOCKET, path)
            return
        several = info.st_nlink > 1
        if several and self.link(self._links.get((info.st_dev, info.st_ino)), where, targets):
            return
        attributes = self._attributes(place, info)
        with self.making(where, targets) as (parent, name):
            if stat.S_ISREG(info.st_mode):
                made = os.open(name, _NEW, 0o600, dir_fd=parent)
            else:
                if stat.S_ISLNK(info.st_mode):
                    os.symlink(os.readlink(b"", dir_fd=place), name, dir_fd=parent)
                else:
                    mode = stat.S_IFMT(info.st_mode) | 0o600
                    os.mknod(name, mode, info.st_rdev, dir_fd=parent)
                made = places.at(parent, name)
            try:
                if stat.S_ISREG(info.st_mode):
                    self._content(place, info, made, path)
                self._dress(made, attributes, path)
                if several:
                    identity = _identity(made)
                    self._links[info.st_dev, info.st_ino] = _Made(where, identity)
            finally:
                os.close(made)

    def link(self, first: _Made | None, path: bytes, targets: Parents) -> bool:
        """Give what was made before another name; False if that cannot be."""
        if first is None:
            return False
        with Parents(self._target) as others:
            try:
                place = places.at(*others.of(first.path))
            except OSError as error:
                if error.errno in places.GONE:
                    return False
                raise
            try:
                if _identity(place) != first.identity:
                    return False
                with self.making(path, targets) as (parent, name):
                    os.link(places.link(place), name, dst_dir_fd=parent, follow_symlinks=True)
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.EXDEV):
                    raise
                return False
            finally:
                os.close(place)
        return True

    def _content(self, place: int, info: os.stat_result, made: int, path: bytes) -> None:
        """As much as the file had when it was looked at, its holes left out."""
        fd = places.read(place)
        try:
            size = info.st_size
            for offset, length in places.data(fd, size):
                done = copy_range(fd, made, offset, length)
                self._size += done
                if done < length:
                    size = offset + done
                    break
            os.ftruncate(made, size)
            if places.version(os.fstat(fd)) != places.version(info):
                self.note(CHANGED, path)
        finally:
            os.close(fd)

    # --- attributes -------------------------------------------------------------------------

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

    def _dress(self, made: int, wanted: Attributes, path: bytes) -> None:
        """Owner, mode, xattrs, time, in the order in which none undoes another."""
        link, info = places.link(made), os.fstat(made)
        if (info.st_uid, info.st_gid) != (wanted.uid, wanted.gid):
            os.chown(link, wanted.uid, wanted.gid)
        _strip_acls(made)
        if not stat.S_ISLNK(info.st_mode):
            os.chmod(link, wanted.mode)
        for name, value in wanted.xattrs.items():
            try:
                os.setxattr(link, name, value)
            except OSError as error:
                # ext4 says ENOSPC also for xattrs that its inode and one block cannot take.
                free = os.fstatvfs(made)
                large = error.errno == errno.ENOSPC and free.f_bavail * free.f_frsize >= _ROOM
                if not large and error.errno not in _XATTR_REFUSED:
                    raise
                self.note(XATTR_REFUSED, path)
        os.utime(link, ns=(wanted.mtime, wanted.mtime))


def copy_range(source: int, target: int, offset: int, length: int) -> int:
    """Copy bytes to the same offset, sharing blocks where that can be; how many there were."""
    end = offset + length
    at = offset
    by_hand = False
    while at < end:
        if not by_hand:
            try:
                done = os.copy_file_range(source, target, end - at, at, at)
            except OSError as error:
                if error.errno not in _BY_HAND:
                    raise
                by_hand = True
                continue
        else:
            view = memoryview(os.pread(source, min(_PIECE, end - at), at))
            done = len(view)
            while view:
                view = view[os.pwrite(target, view, at + done - len(view)) :]
        if not done:
            break
        at += done
    return at - offset


def _below(top: bytes, path: bytes) -> bytes:
    """The path of what is at ``path`` below ``top``; ``.`` is no name."""
    if top == b".":
        return path
    return top + b"/" + path if path else top


def _identity(place: int) -> tuple[int, int]:
    info = os.fstat(place)
    return info.st_dev, info.st_ino


def _strip_acls(place: int) -> None:
    """Take away what the directory above gave its new entry."""
    link = places.link(place)
    for name in os.listxattr(link):
        if os.fsencode(name) in ACLS:
            os.removexattr(link, name)


@contextmanager
def _told(path: bytes) -> Iterator[None]:
    """Name the path in what the system refuses."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error

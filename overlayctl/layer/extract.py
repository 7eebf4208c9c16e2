"""A tar put into a directory that is there.

As docker does with a tar for ``cp``: names are below one directory, a directory goes into one
that is there, anything else takes the place of what has the name, what is above an entry is
made if it is missing. Marks of layers mean nothing here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from overlayctl.errors import BadTar
from overlayctl.kernel import places
from overlayctl.layer import making
from overlayctl.layer.attributes import check_owner, is_carried
from overlayctl.layer.copy import XATTR_REFUSED, Copied, copy_range
from overlayctl.layer.fields import shown
from overlayctl.layer.making import Attributes, Identity
from overlayctl.layer.tar_writer import CHANGED
from overlayctl.whiteout import OVERLAY

if TYPE_CHECKING:
    from overlayctl.layer.tar import Member

Parent = Callable[[bytes], tuple[int, bytes]]
"""Gives an fd of the directory that holds a path, made if it is missing, and the last name (empty
for the top itself). The fd is the caller's."""

_KINDS = {
    b"0": stat.S_IFREG,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"6": stat.S_IFIFO,
}


class Extraction:
    """Puts entries where ``parent`` leads; the tar lies at ``start`` in the file ``tar``, an fd.

    Raises BadTar for a name that leads outside and for a hard link to nothing, LimitExceeded,
    Conflict as ``copy_tree``, OSError naming the entry.
    """

    def __init__(self, tar: int, start: int, parent: Parent) -> None:
        self._tar = tar
        self._start = start
        self._parent = parent
        self._size = 0
        self._notes: dict[str, list[bytes]] = {}

    def run(self, members: Iterable[Member]) -> Copied:
        """Put all of them in place."""
        directories: list[tuple[bytes, Identity, Attributes]] = []
        entries = 0
        for member in members:
            check_owner(member)
            path = _inside(member.name, member)
            entries += 1
            parent, name = self._parent(path)
            try:
                if member.type == b"5":
                    made = making.directory(parent, name, path)
                    if name:
                        directories.append((path, made.identity, _attributes(member)))
                elif member.type == b"1":
                    self._link(member, parent, name, path)
                else:
                    self._leaf(member, parent, name, path)
            except OSError as error:
                raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error
            finally:
                os.close(parent)
        for made_at, identity, attributes in reversed(directories):
            self._dress_again(made_at, identity, attributes)
        return Copied(self._size, entries, self._notes)

    def _note(self, kind: str, path: bytes) -> None:
        self._notes.setdefault(kind, []).append(path)

    def _leaf(self, member: Member, parent: int, name: bytes, path: bytes) -> None:
        device = os.makedev(member.major, member.minor)
        with making.named(parent, name, path, fresh=False) as beside:
            made = making.entry(
                parent, beside, _KINDS[member.type], device=device, target=member.linkname
            )
            try:
                if member.type == b"0":
                    self._content(member, made)
                if not making.dress(made, _attributes(member)):
                    self._note(XATTR_REFUSED, path)
            finally:
                os.close(made)

    def _content(self, member: Member, made: int) -> None:
        at = self._start + member.data
        for offset, length in member.extents or ((0, member.stored),):
            self._size += copy_range(self._tar, made, at, length, to=offset)
            at += length
        os.ftruncate(made, member.size)

    def _link(self, member: Member, parent: int, name: bytes, path: bytes) -> None:
        above, last = self._parent(_inside(member.linkname, member))
        try:
            place = places.at(above, last)
        except FileNotFoundError:
            raise BadTar(
                f"entry {shown(member.name)} is a hard link to {shown(member.linkname)}, "
                "which is not there",
                offset=member.offset,
            ) from None
        finally:
            os.close(above)
        try:
            if stat.S_ISDIR(os.fstat(place).st_mode):
                raise BadTar(
                    f"entry {shown(member.name)} is a hard link to a directory",
                    offset=member.offset,
                )
            if not making.link(place, parent, name, path, fresh=False):
                raise OSError(0, "the file can have no more names, or not there")
        finally:
            os.close(place)

    def _dress_again(self, path: bytes, identity: Identity, attributes: Attributes) -> None:
        """A directory gets its attributes when it is full: a new name changes its time."""
        parent, name = self._parent(path)
        try:
            place = places.at(parent, name)
            try:
                if making.identity(place) != identity:
                    self._note(CHANGED, path)
                elif not making.dress(place, attributes):
                    self._note(XATTR_REFUSED, path)
            finally:
                os.close(place)
        finally:
            os.close(parent)


def _inside(name: bytes, member: Member) -> bytes:
    """The path below the top. Raises BadTar for one that leads out of it."""
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b".." and not parts:
            raise BadTar(
                f"entry {shown(member.name)} leads out of the directory that it is for",
                offset=member.offset,
            )
        if part == b"..":
            parts.pop()
        elif part not in {b"", b"."}:
            parts.append(part)
    if not parts and member.type != b"5":
        raise BadTar(f"entry {shown(member.name)} has no name", offset=member.offset)
    return b"/".join(parts)


def _attributes(member: Member) -> Attributes:
    xattrs = {
        name: value
        for name, value in member.xattrs.items()
        if is_carried(name) and not name.startswith(OVERLAY)
    }
    time = member.mtime * 1_000_000_000 + member.mtime_ns
    return Attributes(stat.S_IMODE(member.mode), member.uid, member.gid, time, xattrs)

"""Attributes of a layer's entries: their limits, and what the layers below lend."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, NamedTuple, Protocol

from overlayctl.errors import BadInput, BadTar, LimitExceeded
from overlayctl.layer.fields import shown
from overlayctl.layer.format import NAME_MAX, XATTR_NAMES_MAX, XATTR_VALUE_MAX
from overlayctl.whiteout import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from overlayctl.layer.tar import Member, Xattrs

NO_ID = 0xFFFF_FFFF
TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
"""What people call each type of a file."""
_ELSEWHERE = {
    b"trusted.overlay.metacopy": "the content of {} lies in the layers below",
    b"trusted.overlay.redirect": "the directory {} was renamed, and its content lies below",
}
_EXT4_XATTRS = 4040
# struct posix_acl_xattr_header: version 2, then entries of eight bytes.
_ACL_VERSION = bytes([2, 0, 0, 0])
# What EROFS and the kernel's own filesystems can hold.
_NAMESPACES = (b"user.", b"trusted.", b"security.")
ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_IGNORED = b"security.selinux"


class Borrowed(Protocol):
    """The content of a file of a layer below, kept in this one for a hard link to it."""

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes of the file from ``offset``."""

    def stored(self) -> int:
        """How many of its bytes are no holes."""


class Inherited(NamedTuple):
    """What the layers below show at a path: attributes, and for a file its content."""

    mode: int
    uid: int
    gid: int
    mtime: int
    mtime_ns: int
    size: int
    rdev: int
    xattrs: Xattrs
    target: bytes
    content: Borrowed | None


class Wants(NamedTuple):
    """Paths that only the layers below can complete, each list in tree order."""

    directories: tuple[bytes, ...]
    links: tuple[bytes, ...]


def device_number(member: Member) -> int:
    """The number of a device entry as EROFS and the kernel encode it. Raises BadTar for 0:0."""
    major, minor = member.major, member.minor
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise LimitExceeded(
            f"the device {shown(member.name)} has numbers out of range: {major}:{minor}"
        )
    if member.type == b"3" and major == minor == 0:
        raise BadTar(
            f"entry {shown(member.name)} is a character device 0:0, which overlayfs would "
            "take for a whiteout",
            hint="a tar of a raw upper directory? overlayctl import --whiteouts=overlay takes it; "
            "in a layer's tar whiteouts are .wh. files",
            offset=member.offset,
        )
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def check_owner(member: Member) -> None:
    """Raises LimitExceeded for an owner that no overlay could ever delete."""
    if member.uid >= NO_ID or member.gid >= NO_ID:
        raise LimitExceeded(
            f"entry {shown(member.name)} belongs to {member.uid}:{member.gid}: "
            "ids end at 4294967294, the next one could never be deleted"
        )


def check_complete(path: bytes, stored: Iterable[bytes]) -> None:
    """Raises BadInput for an entry of an upper directory that says nothing without those below.

    ``stored`` are the names of its xattrs.
    """
    for name in stored:
        if name in _ELSEWHERE:
            raise BadInput(
                f"{_ELSEWHERE[name].format(shown(path))}: another program mounted it with "
                "options that overlayctl does not use",
                hint="mount it over its layers with those options, and copy what is seen there",
            )


def is_carried(name: bytes) -> bool:
    """Whether layers carry xattrs of this name."""
    return name in ACLS or (name.startswith(_NAMESPACES) and name != _IGNORED)


def stored_xattrs(member: Member, note: Callable[[str, bytes], None]) -> Xattrs:
    """The xattrs of an entry as the layer stores them, overlay's own names escaped.

    ``note`` is told what a person would want to know. Raises LimitExceeded.
    """
    kept: Xattrs = {}
    for name, value in member.xattrs.items():
        if not is_carried(name):
            if name != _IGNORED:
                note("xattr of an unknown namespace ignored", member.name)
            continue
        stored = escape(name)
        if len(stored) > NAME_MAX or len(value) > XATTR_VALUE_MAX:
            raise LimitExceeded(
                f"entry {shown(member.name)} has an xattr {shown(name)} that is too large: "
                f"names end at {NAME_MAX} bytes, values at {XATTR_VALUE_MAX}"
            )
        kept[stored] = value
        if name == b"security.capability":
            note("file capability", member.name)
        elif name in ACLS and (value[:4] != _ACL_VERSION or len(value) % 8 != 4):
            note("malformed ACL that cannot be copied up", member.name)
        elif name.startswith(b"user.") and member.type not in (b"0", b"5"):
            note("user xattr that cannot be copied up", member.name)
    if sum(len(name) + 1 for name in kept) > XATTR_NAMES_MAX:
        raise LimitExceeded(f"entry {shown(member.name)} has more than 64 KiB of xattr names")
    if sum(len(name) + len(value) for name, value in kept.items()) > _EXT4_XATTRS:
        note("xattrs too large to be copied up on ext4", member.name)
    return kept

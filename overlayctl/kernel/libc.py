"""System calls that Python's ``os`` lacks, one small typed function each.

No policy and no paths of our own: a call that fails raises OSError naming the call, with
the kernel's errno. Every fd returned is close-on-exec and belongs to the caller. Numbers
from 424 on are the same on every architecture Linux has but alpha.

Sources: the man page of each call; include/uapi/linux/{mount,stat,openat2,fs}.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from contextlib import suppress
from fcntl import ioctl
from typing import NamedTuple

Path = str | bytes

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
MOVE_MOUNT_F_EMPTY_PATH = 4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
OPEN_TREE_CLONE = 1
AT_RECURSIVE = 0x8000

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80

MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_REC = 1 << 14
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
CLONE_FS = 0x0000_0200
CLONE_NEWNS = 0x0002_0000
CLONE_NEWCGROUP = 0x0200_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

RESOLVE_NO_MAGICLINKS = 2
RESOLVE_NO_SYMLINKS = 4
RESOLVE_BENEATH = 8
RESOLVE_IN_ROOT = 16

SYNC_FILE_RANGE_WRITE = 2
ST_RDONLY = 1
STATX_ATTR_MOUNT_ROOT = 0x2000
STATX_INO = 0x100
STATX_MNT_ID = 0x1000
STATX_MNT_ID_UNIQUE = 0x4000

EROFS_MAGIC = 0xE0F5_E1E2
TMPFS_MAGIC = 0x0102_1994
OVERLAYFS_MAGIC = 0x794C_7630

_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_SET_FD = 5
_FSCONFIG_CMD_CREATE = 6
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_CAPABILITY_VERSION_3 = 0x2008_0522
_STATMOUNT_OPTIONS = 0x80
_MOUNT_OPTIONS_MAX = 4096
_FS_IOC_GETFSUUID = 0x8011_1500

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 428, 429, 430, 431, 432
_OPENAT2, _MOUNT_SETATTR, _STATMOUNT = 437, 442, 457

_KEYCTL_JOIN_SESSION_KEYRING = 1
# On the architectures whose calls are numbered as asm-generic/unistd.h has them it is 219.
_KEYCTL = {"x86_64": 250, "i686": 288, "armv7l": 311, "ppc64le": 271, "s390x": 280}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _failed(name: str) -> OSError:
    error = ctypes.get_errno()
    return OSError(error, os.strerror(error), name)


def _path(path: Path) -> bytes:
    """The bytes of a path. The kernel would stop at a NUL, and act on another path."""
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise OSError(errno.EINVAL, "a NUL in a path", path)
    return raw


def _call(name: str, number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char]) -> int:
    """A raw system call. Integers travel as longs: varargs would cut them to 32 bits."""
    result = int(
        _libc.syscall(
            ctypes.c_long(number),
            *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments),
        )
    )
    if result < 0:
        raise _failed(name)
    return result


def fsopen(fs_type: str) -> int:
    """An fd of a new filesystem context (fsopen(2))."""
    return _call("fsopen", _FSOPEN, os.fsencode(fs_type), FSOPEN_CLOEXEC)


def fsconfig_string(fd: int, key: str, value: Path) -> None:
    """Set a parameter to text: at most 255 bytes, longer is EINVAL without a word in the log."""
    _call("fsconfig", _FSCONFIG, fd, _FSCONFIG_SET_STRING, key.encode(), _path(value), 0)


def fsconfig_flag(fd: int, key: str) -> None:
    """Set a parameter that has no value."""
    _call("fsconfig", _FSCONFIG, fd, _FSCONFIG_SET_FLAG, key.encode(), 0, 0)


def fsconfig_fd(fd: int, key: str, value: int) -> None:
    """Set a parameter to an open file: a path of any length and any bytes."""
    _call("fsconfig", _FSCONFIG, fd, _FSCONFIG_SET_FD, key.encode(), 0, value)


def fsconfig_create(fd: int) -> None:
    """Make the superblock that the parameters describe."""
    _call("fsconfig", _FSCONFIG, fd, _FSCONFIG_CMD_CREATE, 0, 0, 0)


def fsmount(fd: int, attributes: int) -> int:
    """An fd of a detached mount of the context's superblock; closing it unmounts."""
    return _call("fsmount", _FSMOUNT, fd, FSMOUNT_CLOEXEC, attributes)


def move_mount(fd: int, target: Path | int) -> None:
    """Attach the detached mount ``fd`` at ``target``: a path, or what an fd has open."""
    flags = MOVE_MOUNT_F_EMPTY_PATH
    if isinstance(target, int):
        _call("move_mount", _MOVE_MOUNT, fd, b"", target, b"", flags | MOVE_MOUNT_T_EMPTY_PATH)
        return
    _call("move_mount", _MOVE_MOUNT, fd, b"", AT_FDCWD, _path(target), flags)


def open_tree(place: Path | int, *, clone: bool = False, recursive: bool = False) -> int:
    """An fd of the mount at a path or of an fd, or of a detached copy of it.

    ``recursive`` copies what is mounted below, too.
    """
    flags = os.O_CLOEXEC | (OPEN_TREE_CLONE if clone else 0) | (AT_RECURSIVE if recursive else 0)
    if isinstance(place, int):
        return _call("open_tree", _OPEN_TREE, place, b"", flags | AT_EMPTY_PATH)
    return _call("open_tree", _OPEN_TREE, AT_FDCWD, _path(place), flags)


def mount_setattr(
    fd: int, *, add: int = 0, remove: int = 0, propagation: int = 0, recursive: bool = False
) -> None:
    """Change attributes or propagation of the mount that ``fd`` is the root of.

    ``recursive`` changes those below it, too.
    """
    attributes = ctypes.create_string_buffer(struct.pack("QQQQ", add, remove, propagation, 0), 32)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _call("mount_setattr", _MOUNT_SETATTR, fd, b"", flags, attributes, 32)


def openat2(dirfd: int, path: Path, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """Open ``path`` below ``dirfd`` under the RESOLVE_* rules (openat2(2))."""
    how = ctypes.create_string_buffer(struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve), 24)
    return _call("openat2", _OPENAT2, dirfd, _path(path), how, 24)


def is_mount_root(fd: int) -> bool:
    """Whether ``fd`` is the root of a mount (statx(2), STATX_ATTR_MOUNT_ROOT)."""
    answer = _statx(fd, b"", AT_EMPTY_PATH, 0)
    return bool(struct.unpack_from("Q", answer, 8)[0] & STATX_ATTR_MOUNT_ROOT)


def mount_id(fd: int) -> int:
    """The 64-bit id, never used again, of the mount that ``fd`` lies on (since 6.8)."""
    return _mount_id(_statx(fd, b"", AT_EMPTY_PATH, STATX_MNT_ID_UNIQUE))


def table_id(fd: int) -> int:
    """The id that mountinfo has for the mount that ``fd`` lies on: used again after unmount."""
    return _mount_id(_statx(fd, b"", AT_EMPTY_PATH, STATX_MNT_ID))


def table_id_at(path: Path) -> int:
    """``table_id`` of what ``path`` leads to, without asking a server that may not answer."""
    return _mount_id(_statx(AT_FDCWD, _path(path), AT_STATX_DONT_SYNC, STATX_MNT_ID))


def place_at(path: Path) -> tuple[int, int]:
    """The mount (as ``table_id_at``) and the inode number of what ``path`` leads to."""
    answer = _statx(AT_FDCWD, _path(path), AT_STATX_DONT_SYNC, STATX_INO | STATX_MNT_ID)
    return _mount_id(answer), int(struct.unpack_from("Q", answer, 0x20)[0])


def _mount_id(answer: bytes) -> int:
    return int(struct.unpack_from("Q", answer, 0x90)[0])


def _statx(fd: int, path: bytes, flags: int, mask: int) -> bytes:
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(fd, path, flags, mask, buffer) < 0:
        raise _failed("statx")
    return buffer.raw


def mount_options(unique_id: int) -> str:
    """The filesystem's options of an attached mount as the kernel shows them (statmount(2))."""
    request = ctypes.create_string_buffer(
        struct.pack("IIQQQ", 32, 0, unique_id, _STATMOUNT_OPTIONS, 0), 32
    )
    size = 1 << 16
    while True:
        buffer = ctypes.create_string_buffer(size)
        try:
            _call("statmount", _STATMOUNT, request, buffer, size, 0)
        except OSError as error:
            if error.errno != errno.EOVERFLOW or size > 1 << 22:
                raise
            size *= 4
            continue
        # struct statmount: size, mnt_opts (offset into the strings at 512), mask, ...
        offset = struct.unpack_from("I", buffer.raw, 4)[0]
        return os.fsdecode(buffer.raw[512 + offset :].split(b"\0", 1)[0])


def umount2(target: Path, flags: int) -> None:
    """Unmount (umount2(2))."""
    if _libc.umount2(_path(target), flags) < 0:
        raise _failed("umount2")


def mount(source: Path, target: Path, fs_type: str, options: bytes) -> None:
    """Mount in the way of old (mount(2)). E2BIG where the kernel would cut ``options``.

    It copies 4,095 bytes, drops the rest, and mounts whatever the shorter text means.
    """
    if len(options) >= _MOUNT_OPTIONS_MAX:
        raise OSError(errno.E2BIG, "mount(2) would cut the options", "mount")
    if _libc.mount(_path(source), _path(target), fs_type.encode(), 0, options) < 0:
        raise _failed("mount")


def make_private(target: Path) -> None:
    """Stop mount events at ``target`` and all below from passing to other namespaces."""
    if _libc.mount(b"none", _path(target), None, MS_PRIVATE | MS_REC, None) < 0:
        raise _failed("mount")


def unshare(flags: int) -> None:
    """Leave the namespaces that ``flags`` name for new ones (unshare(2))."""
    if _libc.unshare(flags) < 0:
        raise _failed("unshare")


def setns(fd: int, flags: int) -> None:
    """Enter the namespace ``fd`` (setns(2))."""
    if _libc.setns(fd, flags) < 0:
        raise _failed("setns")


def pivot_root() -> None:
    """Make the current directory, which is the root of a mount, the root; the old one goes.

    The old root ends up on top of the new one, and is detached from there (pivot_root(2)).
    """
    if _libc.pivot_root(b".", b".") < 0:
        raise _failed("pivot_root")
    umount2(b".", MNT_DETACH)


def die_with_parent(signal: int) -> None:
    """Have this process sent ``signal`` when its parent ends (PR_SET_PDEATHSIG(2const)).

    A change of user or group forgets it.
    """
    _prctl(_PR_SET_PDEATHSIG, signal)


def drop_from_bounding_set(capability: int) -> None:
    """Nothing that this process executes gets that capability (PR_CAPBSET_DROP(2const))."""
    _prctl(_PR_CAPBSET_DROP, capability)


def drop_inheritable() -> None:
    """Let what this process executes inherit no capability (capset(2)).

    Root would have those beyond its bounding set.
    """
    header = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), 8)
    # Twice: effective, permitted, inheritable.
    data = ctypes.create_string_buffer(24)
    if _libc.capget(header, data) < 0:
        raise _failed("capget")
    sets = list(struct.unpack("6I", data.raw))
    sets[2] = sets[5] = 0
    if _libc.capset(header, ctypes.create_string_buffer(struct.pack("6I", *sets), 24)) < 0:
        raise _failed("capset")


def new_session_keyring() -> None:
    """Leave the caller's session keyring, and the keys in it, for an empty one (keyctl(2)).

    A kernel without keys, or a filter that forbids them, has none to leave.
    """
    number = _KEYCTL.get(os.uname().machine, 219)
    with suppress(OSError):
        _call("keyctl", number, _KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), *(ctypes.c_ulong(0),) * 3) < 0:
        raise _failed("prctl")


def sync_file_range(fd: int, offset: int, length: int, flags: int) -> None:
    """Start write-back of a part of a file, without waiting (sync_file_range(2))."""
    if _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), flags) < 0:
        raise _failed("sync_file_range")


def syncfs(fd: int) -> None:
    """Make the whole filesystem of ``fd`` durable (syncfs(2))."""
    if _libc.syncfs(fd) < 0:
        raise _failed("syncfs")


class FileSystem(NamedTuple):
    """What fstatfs(2) says: the filesystem's magic number and its mount flags."""

    magic: int
    flags: int


def fstatfs(fd: int) -> FileSystem:
    """The kind of filesystem that ``fd`` lies on."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer) < 0:
        raise _failed("fstatfs")
    # struct statfs of 64-bit Linux: f_type first, f_flags after nine more words.
    return FileSystem(
        struct.unpack_from("l", buffer.raw, 0)[0] & 0xFFFF_FFFF,
        struct.unpack_from("l", buffer.raw, 80)[0],
    )


def fs_uuid(fd: int) -> bytes | None:
    """The filesystem's UUID, or None before Linux 6.9. ``fd`` must be open for reading."""
    buffer = bytearray(17)
    try:
        ioctl(fd, _FS_IOC_GETFSUUID, buffer)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    return bytes(buffer[1 : 1 + buffer[0]])

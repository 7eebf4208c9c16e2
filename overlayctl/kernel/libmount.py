"""The libmount of util-linux: loop devices, and the mount table as mount(8) reads it.

Bound with ctypes because neither Debian nor PyPI has util-linux's own Python module.
Sources: libmount's reference manual ("Mount context", "Table of filesystems"), loop(4).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import ioctl
from functools import cache

from overlayctl.errors import HostCannot, KernelRefused

_MS_RDONLY = 1
# libmount.h: its own errors begin here, errnos lie below.
_MNT_ERR = 5000
_LOOP_MAJOR = 7
# include/uapi/linux/loop.h
_LOOP_SET_DIRECT_IO = 0x4C08
_LOOP_CTL_GET_FREE = 0x4C82


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libmount.so.1", use_errno=True)
    except OSError as error:
        raise HostCannot("libmount.so.1 is not installed", hint="apt install libmount1") from error
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("mnt_new_context", pointer, ()),
        ("mnt_free_context", None, (pointer,)),
        ("mnt_context_set_source", ctypes.c_int, (pointer, ctypes.c_char_p)),
        ("mnt_context_set_target", ctypes.c_int, (pointer, ctypes.c_char_p)),
        ("mnt_context_set_fstype", ctypes.c_int, (pointer, ctypes.c_char_p)),
        ("mnt_context_set_options", ctypes.c_int, (pointer, ctypes.c_char_p)),
        ("mnt_context_set_mflags", ctypes.c_int, (pointer, ctypes.c_ulong)),
        ("mnt_context_disable_mtab", ctypes.c_int, (pointer, ctypes.c_int)),
        ("mnt_context_prepare_mount", ctypes.c_int, (pointer,)),
        ("mnt_context_get_fs", pointer, (pointer,)),
        ("mnt_fs_get_srcpath", ctypes.c_char_p, (pointer,)),
        ("mnt_new_table_from_file", pointer, (ctypes.c_char_p,)),
        ("mnt_unref_table", None, (pointer,)),
        ("mnt_table_find_target", pointer, (pointer, ctypes.c_char_p, ctypes.c_int)),
        ("mnt_fs_get_fstype", ctypes.c_char_p, (pointer,)),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


@contextmanager
def loop_device(image: str) -> Iterator[str]:
    """The path of a read-only loop device over ``image``.

    It goes away with its last user: keep the block until a mount holds it. Raises
    KernelRefused where there is none to have, HostCannot without libmount.
    """
    library = _library()
    _make_node()
    context = library.mnt_new_context()
    device = ""
    fd = -1
    try:
        library.mnt_context_disable_mtab(context, 1)
        library.mnt_context_set_source(context, os.fsencode(image))
        library.mnt_context_set_target(context, b"/")
        library.mnt_context_set_fstype(context, b"erofs")
        library.mnt_context_set_options(context, b"loop,ro")
        library.mnt_context_set_mflags(context, _MS_RDONLY)
        failed = library.mnt_context_prepare_mount(context)
        if not failed:
            device = os.fsdecode(library.mnt_fs_get_srcpath(library.mnt_context_get_fs(context)))
        if failed or not device.startswith("/dev/loop"):
            code = abs(failed) or ctypes.get_errno()
            own = code >= _MNT_ERR
            raise KernelRefused(
                "loop device for", image, errno.EIO if own else code,
                log=[f"libmount's error {code}"] if own else [],
                hint="is /dev/loop-control there? modprobe loop",
            )  # fmt: skip
        # The context closes its own fd when freed; this one carries the device to the mount.
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        library.mnt_free_context(context)
        context = None
        with suppress(OSError):
            # Without it the image's pages are cached twice. Disks with larger sectors, and
            # filesystems without direct I/O, refuse: then the device reads through the cache.
            ioctl(fd, _LOOP_SET_DIRECT_IO, 1)
        yield device
    finally:
        if context is not None:
            library.mnt_free_context(context)
        if fd >= 0:
            os.close(fd)


def _make_node() -> None:
    """Have a device node for the loop device that is free.

    A container's own /dev does not follow the kernel's. Raises KernelRefused where the
    kernel has no loop devices or they are forbidden here.
    """
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise KernelRefused(
            "open", "/dev/loop-control", error.errno or errno.EIO,
            hint="modprobe loop; in a container: --privileged, or --device /dev/loop-control",
        ) from error  # fmt: skip
    try:
        number = ioctl(control, _LOOP_CTL_GET_FREE)
        with suppress(FileExistsError):
            os.mknod(f"/dev/loop{number}", 0o600 | stat.S_IFBLK, os.makedev(_LOOP_MAJOR, number))
    except OSError as error:
        raise KernelRefused("loop device", "of /dev", error.errno or errno.EIO) from error
    finally:
        os.close(control)


def fs_type_at(target: str) -> str | None:
    """What mount(8) would call the filesystem mounted at ``target``; None if nothing is."""
    library = _library()
    table = library.mnt_new_table_from_file(b"/proc/self/mountinfo")
    try:
        found = library.mnt_table_find_target(table, os.fsencode(target), 1)
        return os.fsdecode(library.mnt_fs_get_fstype(found)) if found else None
    finally:
        library.mnt_unref_table(table)

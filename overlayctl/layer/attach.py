"""Attaching: a layer's tree becomes visible at its diff path, in this mount namespace.

The mountpoints live on a private tmpfs, so that a diff path which is not attached does
not exist: over a plain directory that lost its mount, an overlay would see an empty layer.
One attach serves every overlay above it, which also makes its page cache one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from overlayctl.errors import Damaged, KernelRefused, OverlayctlError
from overlayctl.kernel import libc, mounter, mounttable
from overlayctl.layer.format import HEADER
from overlayctl.mount import Erofs, Tmpfs

if TYPE_CHECKING:
    from overlayctl.layout import Layout

EMPTY = "empty"
_SUPERBLOCK_UUID = slice(HEADER + 48, HEADER + 64)


def prepare(layout: Layout, store_id: str) -> None:
    """Make ``attached/`` the private tmpfs of this namespace if it is not yet."""
    if mounttable.at(layout.attached) is None:
        mounter.mount(Tmpfs(f"overlayctl:{store_id}:attached:"), layout.attached)
    for name in ("layers", "merged"):
        os.makedirs(layout.path("attached", name), mode=0o700, exist_ok=True)


def attach(layout: Layout, store_id: str, names: Iterable[str], mode: str = "auto") -> None:
    """Make the diff paths of the named layers there; the caller holds the store's lock.

    ``mode`` buffered, directio or loop forces a way; ``auto`` has the kernel read the file
    and falls back to a loop device. Raises KernelRefused, Damaged for a diff path under
    which something else lies.
    """
    prepare(layout, store_id)
    for name in names:
        image = layout.empty if name == EMPTY else layout.layer_file(name)
        target = layout.diff(name)
        try:
            os.mkdir(target, 0o700)
        except FileExistsError:
            if is_attached(layout, name):
                continue
        try:
            _mount(image, target, mode)
        except OverlayctlError:
            os.rmdir(target)
            raise


def _mount(image: str, target: str, mode: str) -> None:
    if mode != "loop":
        try:
            mounter.mount(Erofs(image, directio=mode == "directio"), target)
        except KernelRefused:
            if mode != "auto":
                raise
        else:
            return
    mounter.mount(Erofs(image, loop=True), target)


def is_attached(layout: Layout, name: str) -> bool:
    """Whether the diff path shows the layer's file of today.

    Raises Damaged if it shows something else.
    """
    try:
        fd = os.open(layout.diff(name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if not libc.is_mount_root(fd):
            return False
        uuid = libc.fs_uuid(fd)
        other = libc.fstatfs(fd).magic != libc.EROFS_MAGIC
    finally:
        os.close(fd)
    image = layout.empty if name == EMPTY else layout.layer_file(name)
    if not other and uuid is not None:
        try:
            with open(image, "rb") as file:
                other = uuid != file.read(HEADER + 64)[_SUPERBLOCK_UUID]
        except FileNotFoundError:
            other = True
    elif not other:
        # Before 6.9 no ioctl tells the UUID: then the mount's source has to.
        mount = mounttable.at(layout.diff(name))
        other = mount is None or _backing(mount.source) != image
    if other:
        raise Damaged(
            f"{layout.diff(name)} shows something else than its layer",
            hint=f"overlayctl layer detach {name[:12]}",
        )
    return True


def _backing(source: str) -> str:
    """The file behind a mount's source: the source itself, or what its loop device reads."""
    if not source.startswith("/dev/loop"):
        return source
    try:
        with open(f"/sys/block/{source[5:]}/loop/backing_file", "rb") as file:
            return os.fsdecode(file.read().removesuffix(b"\n"))
    except FileNotFoundError:
        return source


def attached(layout: Layout) -> list[str]:
    """The names of the layers attached in this namespace, and of the empty image."""
    place = layout.path("attached", "layers")
    return sorted({os.path.basename(mount.mount_point) for mount in mounttable.below(place)})


def detach(layout: Layout, name: str) -> bool:
    """Take a diff path away, here and where other namespaces inherited it; False if not there.

    Raises InUse naming the processes that work below it. Overlays above go on: they
    hold the layer themselves.
    """
    target = layout.diff(name)
    if not os.path.lexists(target):
        return False
    if is_mounted(target):
        mounter.unmount(target)
    # Removing the mountpoint detaches the copies that other namespaces have of the mount.
    os.rmdir(target)
    return True


def is_mounted(path: str) -> bool:
    """Whether something is mounted at ``path``."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return libc.is_mount_root(fd)
    finally:
        os.close(fd)

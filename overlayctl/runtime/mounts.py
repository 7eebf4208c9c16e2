"""Merged views: mounted under the locks, found again in the mount table, taken down.

The source of every overlay names its owner: ``overlayctl:<store id>:<kind>:<id>``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from overlayctl.errors import Holder, InUse, NotFound, OverlayctlError
from overlayctl.kernel import libc, mounter, mounttable
from overlayctl.layer import attach
from overlayctl.mount import Merged
from overlayctl.store import snapshots

if TYPE_CHECKING:
    from overlayctl.kernel.mounttable import MountInfo
    from overlayctl.layout import Layout
    from overlayctl.store.opened import Store


def source(store_id: str, kind: str, identifier: str) -> str:
    """What the mount table calls an overlay of ours."""
    return f"overlayctl:{store_id}:{kind}:{identifier}"


def mounted(store_id: str, *, everywhere: bool = False) -> list[Merged]:
    """The merged views of this store: of this mount namespace, or of all that can be read."""
    prefix = f"overlayctl:{store_id}:"
    if everywhere:
        table = list(mounttable.everywhere())
    else:
        table = [(os.getpid(), mount) for mount in mounttable.read()]
    return [
        _merged(pid, mount)
        for pid, mount in table
        if mount.fs_type == "overlay" and mount.source.startswith(prefix)
    ]


def _merged(pid: int, mount: MountInfo) -> Merged:
    kind, _, identifier = mount.source.split(":", 2)[2].partition(":")
    return Merged(
        kind,
        identifier,
        mount.mount_point,
        tuple(mount.option("lowerdir+")),
        "".join(mount.option("upperdir")),
        "".join(mount.option("workdir")),
        mount.options,
        pid,
    )


def mount_image(
    layout: Layout, store_id: str, image: str, layers: Sequence[str], directory: str | None,
    *, suid: bool = False, dev: bool = False,
) -> str:  # fmt: skip
    """Mount the read-only view of an image; the path. The caller holds the store's lock.

    Without ``directory`` it is the store's own mountpoint, mounted once. Outside the store,
    which only root can enter, an image's setuid files would be everyone's: so
    ``nosuid,nodev`` there unless asked otherwise.
    """
    used = snapshots.lowers(layout, layers)
    attach.attach(layout, store_id, [*used, attach.EMPTY])
    overlay = snapshots.view(layout, source(store_id, "image", image), layers)
    if directory is not None:
        if not os.path.isdir(directory):
            raise NotFound(f"{directory} is no directory", hint=f"mkdir -p {directory}")
        attributes = 0 if suid else libc.MOUNT_ATTR_NOSUID
        attributes |= 0 if dev else libc.MOUNT_ATTR_NODEV
        mounter.mount(overlay, directory, attributes=attributes)
        return directory
    target = layout.merged(image)
    fresh = _mountpoint(target)
    if not attach.is_mounted(target):
        try:
            mounter.mount(overlay, target)
        except OverlayctlError:
            if fresh:
                os.rmdir(target)
            raise
    return target


def _mountpoint(target: str) -> bool:
    """Make a mountpoint; False if it was there.

    Then it is not ours to remove: other namespaces share the directory, and rmdir would
    detach what they have mounted on it.
    """
    try:
        os.mkdir(target, 0o700)
    except FileExistsError:
        return False
    return True


def mount_container(store: Store, key: str, *, volatile: bool, xino: bool) -> str:
    """Mount a container's writable view; the path, also if it is mounted here already.

    Raises InUse if another mount namespace has it, KernelRefused for less than was asked.
    """
    layout, store_id = store.layout, store.id
    with store.holding(key), store.locked():
        target = layout.merged(key)
        for view in mounted(store_id, everywhere=True):
            if view.kind == "container" and view.id == key:
                if view.pid == os.getpid():
                    return view.target
                raise InUse(f"container {key[:12]}", [holder(view, key[:12])])
        used = snapshots.lowers(layout, snapshots.get(layout, key).layers)
        attach.attach(layout, store_id, used or [attach.EMPTY])
        overlay = snapshots.mounts(
            layout, source(store_id, "container", key), key, volatile=volatile, xino=xino
        )
        fresh = _mountpoint(target)
        try:
            mounter.mount(overlay, target)
        except OverlayctlError:
            if fresh:
                os.rmdir(target)
            shutil.rmtree(overlay.workdir, ignore_errors=True)
            raise
        # Only now is it sure that nobody else works in the older ones.
        for name in snapshots.work_directories(layout, key):
            if layout.snapshot(key, name) != overlay.workdir:
                shutil.rmtree(layout.snapshot(key, name), ignore_errors=True)
        return target


def unmount(store: Store, view: Merged, *, lazy: bool) -> None:
    """Take a merged view down. Raises InUse naming the processes that are in it.

    Its mountpoint stays while another namespace has the view, too.
    """
    mounter.unmount(view.target, lazy=lazy)
    if view.target == store.layout.merged(view.id):
        views = mounted(store.id, everywhere=True)
        if not any(other.target == view.target for other in views):
            os.rmdir(view.target)


def holder(view: Merged, name: str) -> Holder:
    """A merged view as the reason of a refusal, with the command that takes it down."""
    command = f"overlayctl umount {name}"
    if view.pid == os.getpid():
        return Holder("mount", view.target, command)
    where = f"{view.target} in the mount namespace of process {view.pid}"
    return Holder("mount", where, f"nsenter -m -t {view.pid} {command}")

"""Merged views: mounted under the locks, found again in the mount table, taken down.

The source of every overlay names its owner: ``overlayctl:<store's mark>:<kind>:<id>``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from overlayctl.errors import Holder, InUse, NotFound, OverlayctlError
from overlayctl.kernel import libc, mounter, mounttable, rooted
from overlayctl.layer import attach
from overlayctl.mount import Merged, Overlay
from overlayctl.runtime import running
from overlayctl.store import containers, images, snapshots
from overlayctl.store.records import fault

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from overlayctl.kernel.mounttable import MountInfo
    from overlayctl.layout import Layout
    from overlayctl.store.opened import Store


def source(store: Store, kind: str, identifier: str) -> str:
    """What the mount table calls an overlay of ours."""
    return f"overlayctl:{store.mark}:{kind}:{identifier}"


def mounted(store: Store, *, everywhere: bool = False) -> list[Merged]:
    """The merged views of this store: of this mount namespace, or of all that can be read."""
    prefix = f"overlayctl:{store.mark}:"
    if everywhere:
        table = list(mounttable.everywhere())
    else:
        table = [(os.getpid(), mount) for mount in mounttable.read()]
    return [
        _merged(store.layout, pid, mount)
        for pid, mount in table
        if mount.fs_type == "overlay" and mount.source.startswith(prefix)
    ]


def views(store: Store, kind: str, identifier: str, *, everywhere: bool = True) -> list[Merged]:
    """The merged views of one container or image, as ``mounted`` finds them."""
    found = mounted(store, everywhere=everywhere)
    return [view for view in found if view.kind == kind and view.id == identifier]


def _merged(layout: Layout, pid: int, mount: MountInfo) -> Merged:
    kind, _, identifier = mount.source.split(":", 2)[2].partition(":")
    work = "".join(mount.option("workdir"))
    if work.isdigit():
        # Mounted by numbers of descriptors that are long closed; there is one after a mount.
        left = snapshots.work_directories(layout, identifier)
        work = layout.snapshot(identifier, left[-1]) if left else ""
    return Merged(
        kind,
        identifier,
        mount.mount_point,
        layout.snapshot(identifier, "upper") if kind == "container" else "",
        work,
        mount.options,
        pid,
    )


def mount_image(
    store: Store, image: str, layers: Sequence[str], directory: str | None,
    *, suid: bool = False, dev: bool = False,
) -> str:  # fmt: skip
    """Mount the read-only view of an image; the path. The caller holds the store's lock.

    Without ``directory`` it is the store's own mountpoint, mounted once. Outside the store,
    which only root can enter, an image's setuid files would be everyone's: so
    ``nosuid,nodev`` there unless asked otherwise.
    """
    layout = store.layout
    overlay = _image_view(store, image, layers)
    if directory is not None and not os.path.isdir(directory):
        raise NotFound(f"{directory} is no directory", hint=f"mkdir -p {directory}")
    _note_view(layout, image, overlay)
    if directory is not None:
        attributes = 0 if suid else libc.MOUNT_ATTR_NOSUID
        attributes |= 0 if dev else libc.MOUNT_ATTR_NODEV
        mounter.mount(overlay, directory, attributes=attributes)
        return directory
    target = layout.merged(image)
    fresh = _mountpoint(target)
    there = mounttable.at(target)
    if there is not None and there.source != overlay.source:
        # An image has the same id in every store, and so in one that lay here before.
        mounter.unmount(target)
        there = None
    if there is None:
        try:
            mounter.mount(overlay, target)
        except OverlayctlError:
            if fresh:
                os.rmdir(target)
            raise
    return target


def _image_view(store: Store, image: str, layers: Sequence[str]) -> Overlay:
    """The view of an image whose layers are attached now; the caller holds the store's lock."""
    layout = store.layout
    used = snapshots.lowers(layout, layers)
    store.attach(used if len(used) > 1 else [*used, attach.EMPTY])
    overlay = snapshots.view(layout, source(store, "image", image), layers)
    return overlay._replace(rung=store.rung)


def _note_view(layout: Layout, image: str, overlay: Overlay) -> None:
    if any(attach.is_unpacked(lower) for lower in overlay.lowers):
        images.note_view(layout, image)


def detached_image(store: Store, image: str, layers: Sequence[str]) -> AbstractContextManager[int]:
    """As ``mounter.detached``: an image's read-only view; the caller holds the store's lock.

    Whoever is done with it calls ``forget_view``.
    """
    overlay = _image_view(store, image, layers)
    _note_view(store.layout, image, overlay)
    return mounter.detached(overlay)


def forget_view(store: Store, image: str) -> None:
    """Forget the note about a view of an image if there is none any more."""
    if images.is_viewed(store.layout, image):
        with store.locked():
            if not views(store, "image", image):
                images.forget_view(store.layout, image)


def _mountpoint(target: str) -> bool:
    """Make a mountpoint; False if it was there.

    Then it is not ours to remove: other namespaces share the directory, and rmdir would
    detach what they have mounted on it.
    """
    try:
        os.mkdir(target, 0o700)
    except FileExistsError:
        return False
    fault("mount:after-mountpoint")
    return True


def mount_container(
    store: Store, key: str, *, volatile: bool, xino: bool, held: bool = True
) -> str:
    """Mount a container's writable view; the path, also if it is mounted here already.

    ``held`` is whether it stays mounted until somebody unmounts it; else whoever is the last to
    run something in it does. Raises InUse if another mount namespace has it, KernelRefused for
    less than was asked.
    """
    with store.holding(key):
        path = store.attaching(lambda: _mount_container(store, key, volatile=volatile, xino=xino))
        if held:
            os.close(os.open(store.layout.held(key), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC))
    return path


def _mount_container(store: Store, key: str, *, volatile: bool, xino: bool) -> str:
    layout = store.layout
    target = layout.merged(key)
    for view in views(store, "container", key):
        if view.pid == os.getpid():
            return view.target
        raise InUse(f"container {key[:12]}", [holder(view, key[:12])])
    used = snapshots.lowers(layout, snapshots.get(layout, key).layers)
    store.attach(used or [attach.EMPTY])
    fault("mount:after-attach")
    overlay = snapshots.mounts(
        layout, source(store, "container", key), key, volatile=volatile, xino=xino
    )
    overlay = overlay._replace(rung=store.rung)
    fresh = _mountpoint(target)
    try:
        mounter.mount(overlay, target)
    except OverlayctlError:
        if fresh:
            os.rmdir(target)
        rooted.remove_tree(overlay.workdir, ignore_errors=True)
        raise
    fault("mount:after-mount")
    if not volatile:
        snapshots.forget_volatile(layout, key)
    # Only now is it sure that nobody else works in the older ones.
    for name in snapshots.work_directories(layout, key):
        if layout.snapshot(key, name) != overlay.workdir:
            rooted.remove_tree(layout.snapshot(key, name), ignore_errors=True)
    return target


def unmount_image(store: Store, name: str, *, lazy: bool) -> str:
    """Unmount an image's views here, or the one at a directory; the image id.

    Raises NotFound, InUse.
    """
    with store.locked():
        mine = [view for view in mounted(store) if view.kind == "image"]
        there = [view for view in mine if view.target == os.path.realpath(name)]
        if not there and os.path.isabs(name):
            raise NotFound(f"nothing of this store is mounted at {name}", hint="overlayctl mounts")
        if not there:
            image, _ = images.resolve(store.layout, name)
            there = [view for view in mine if view.id == image.hex]
        if not there:
            raise NotFound(f"{name} is not mounted", hint="overlayctl mounts lists what is")
        for view in there[::-1]:
            unmount(store, view, lazy=lazy)
        return f"sha256:{there[0].id}"


def unmount_container(store: Store, name: str, *, lazy: bool) -> str:
    """Unmount a container; its id. Raises NotFound, InUse for processes in it, unless ``lazy``."""
    with store.locked(exclusive=False):
        found = containers.resolve(store.layout, name)
    idle = nullcontext() if lazy else running.idle(store, found.id, found.name)
    with store.holding(found.id), idle:
        own = views(store, "container", found.id, everywhere=False)
        if not own:
            others = views(store, "container", found.id)
            if others:
                raise InUse(f"container {name}", [holder(v, name) for v in others])
            raise NotFound(f"container {name} is not mounted", hint="overlayctl mounts")
        unmount(store, own[-1], lazy=lazy)
        with suppress(FileNotFoundError):
            os.unlink(store.layout.held(found.id))
    return found.id


def unmount(store: Store, view: Merged, *, lazy: bool) -> None:
    """Take a merged view down. Raises InUse naming the processes that are in it.

    Its mountpoint stays while another namespace has the view, too.
    """
    mounter.unmount(view.target, lazy=lazy)
    fault("umount:after-umount")
    own = view.target == store.layout.merged(view.id)
    noted = view.kind == "image" and images.is_viewed(store.layout, view.id)
    # Every process is asked for its mounts: only where the answer matters.
    left = mounted(store, everywhere=True) if own or noted else []
    if own and not any(other.target == view.target for other in left):
        # Nothing else being mounted, all of attached/ may have been taken away meanwhile.
        with suppress(FileNotFoundError):
            os.rmdir(view.target)
    if noted and not any(other.id == view.id for other in left):
        images.forget_view(store.layout, view.id)


def unseen(store: Store, image: str) -> list[Holder]:
    """A view that a note tells of, where not every mount namespace can be looked at."""
    if not images.is_viewed(store.layout, image) or mounttable.sees_all():
        return []
    return [
        Holder(
            "a view",
            "over its unpacked layers, mounted since the host started and not seen from here",
            "unmount it where it was mounted, with overlayctl umount, or repeat this on the host",
        )
    ]


def holder(view: Merged, name: str) -> Holder:
    """A merged view as the reason of a refusal, with the command that takes it down."""
    command = f"overlayctl umount {name}"
    if view.pid == os.getpid():
        return Holder("mount", view.target, command)
    where = f"{view.target} in the mount namespace of process {view.pid}"
    return Holder("mount", where, f"nsenter -m -t {view.pid} {command}")

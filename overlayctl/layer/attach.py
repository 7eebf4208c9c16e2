"""Attaching: a layer's tree becomes visible at its diff path, in this mount namespace.

A diff path which is not attached does not exist: over a plain directory that lost its
mount, an overlay would see an empty layer. So its mountpoint lies on a tmpfs of its own,
which no other mount namespace sees. ``attached/`` is a tmpfs too; one that was there when
a namespace was copied is in both, and so are directories that are made in it later.
One attach serves every overlay above it, which also makes its page cache one.

    buffered   the kernel reads the layer's file, through the page cache
    directio   the same past the page cache
    loop       a loop device reads the file
    unpacked   the layer's ``tree/`` once more, read-only, where no kernel mounts the file
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from overlayctl.errors import Damaged, InUse, NotFound
from overlayctl.kernel import libc, lowers, mounter, mounttable, probe
from overlayctl.layer.format import HEADER, PAGE
from overlayctl.mount import Bind, Erofs, Lower, Mount, Tmpfs

if TYPE_CHECKING:
    from overlayctl.layout import Layout

EMPTY = "empty"
_SUPERBLOCK_UUID = slice(HEADER + 48, HEADER + 64)


class TreeMissingError(Exception):
    """These layers are not unpacked, and this kernel mounts no layer's file."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(*names)
        self.names = names


def prepare(layout: Layout, mark: str) -> None:
    """Make ``attached/`` the private tmpfs of this namespace if it is not yet."""
    if mounttable.at(layout.attached) is None:
        mounter.mount(Tmpfs(f"overlayctl:{mark}:attached:"), layout.attached)
    for name in ("layers", "merged", "run", "held"):
        os.makedirs(layout.path("attached", name), mode=0o700, exist_ok=True)


def attach(layout: Layout, mark: str, names: Iterable[str], setting: probe.Setting) -> None:
    """Make the diff paths of the named layers there; the caller holds the store's lock.

    An attach of an older file is replaced where nobody uses it. Raises KernelRefused,
    Damaged for a diff path under which something else lies, TreeMissingError.
    """
    prepare(layout, mark)
    mounts = lowers.table()
    wanted = [name for name in names if not _is_there(layout, name, mounts)]
    if not wanted:
        return
    for name in wanted:
        if not os.path.exists(_image(layout, name)):
            raise NotFound(f"the layer {name[:12]} is missing", hint="overlayctl system check")
    way = probe.attach_way(dict.fromkeys((layout.empty, _image(layout, wanted[0]))), setting)
    if way == "unpacked":
        lacking = [n for n in wanted if n != EMPTY and not os.path.isdir(layout.layer_tree(n))]
        if lacking:
            raise TreeMissingError(tuple(lacking))
    for name in wanted:
        _attach(layout, mark, name, _mount(layout, mark, name, way))


def _attach(layout: Layout, mark: str, name: str, mount: Mount) -> None:
    point, target = layout.attach_point(name), layout.diff(name)
    with ExitStack() as undo:
        with suppress(FileExistsError):
            os.mkdir(point, 0o700)
            # One that was there is also other namespaces': rmdir would take what they have.
            undo.callback(os.rmdir, point)
        if not is_mounted(point):
            mounter.mount(Tmpfs(f"overlayctl:{mark}:layer:{name}"), point)
            undo.callback(mounter.unmount, point)
        with suppress(FileExistsError):
            os.mkdir(target, 0o700)
        mounter.mount(mount, target)
        undo.pop_all()


def _mount(layout: Layout, mark: str, name: str, way: probe.Way) -> Mount:
    if way == "unpacked":
        if name == EMPTY:
            return Tmpfs(f"overlayctl:{mark}:{EMPTY}:", read_only=True)
        return Bind(layout.layer_tree(name))
    return Erofs(_image(layout, name), loop=way == "loop", directio=way == "directio")


def _image(layout: Layout, name: str) -> str:
    return layout.empty if name == EMPTY else layout.layer_file(name)


def _is_there(layout: Layout, name: str, mounts: lowers.Table) -> bool:
    """Whether the layer need not be attached; what shows its older file is taken away."""
    try:
        return is_attached(layout, name, mounts)
    except Damaged:
        mount = mounttable.at(layout.diff(name))
        if mount is None or not is_stale(layout, name, mount):
            raise
    with suppress(InUse):
        detach(layout, name)
        return False
    raise Damaged(
        f"{layout.diff(name)} shows an older file of its layer, and is in use",
        hint=f"stop what uses it, then overlayctl layer detach {name[:12]}",
    )


def lower(layout: Layout, name: str) -> Lower:
    """How to know the attached layer. Raises Damaged if its file is gone or cut."""
    image = _image(layout, name)
    try:
        with open(image, "rb", buffering=0) as file:
            uuid = file.read(PAGE)[_SUPERBLOCK_UUID]
    except FileNotFoundError:
        uuid = b""
    if len(uuid) != _SUPERBLOCK_UUID.stop - _SUPERBLOCK_UUID.start:
        raise Damaged(
            f"the file of layer {name[:12]} is gone or cut", hint="overlayctl system check"
        )
    if name == EMPTY:
        return Lower(layout.diff(name), uuid, os.path.basename(image))
    return Lower(layout.diff(name), uuid, _tail(image), layout.layer_tree(name))


def _tail(image: str) -> str:
    """What every path to a layer's file ends in, wherever its store was or is."""
    directory, name = os.path.split(image)
    return f"{os.path.basename(directory)}/{name}"


def is_unpacked(lower: Lower) -> bool:
    """Whether the attached layer is seen as its tree, not its file."""
    fd = os.open(lower.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return bool(lower.tree) and libc.fstatfs(fd).magic != libc.EROFS_MAGIC
    finally:
        os.close(fd)


def is_stale(layout: Layout, name: str, mount: mounttable.MountInfo) -> bool:
    """Whether a mount at a layer's diff path shows another file, or tree, than that of today."""
    if name == EMPTY:
        return False
    today = layout.layer_file(name) if mount.fs_type == "erofs" else layout.layer_tree(name)
    layer, shown = os.path.split(_tail(shows(mount)))
    return layer == name and shown != os.path.basename(today)


def shows(mount: mounttable.MountInfo) -> str:
    """The path, as far as the mount table has it, of what an attach shows: a file or a tree."""
    if mount.fs_type != "erofs":
        return mount.root
    return lowers.backing(mount.source).removesuffix(" (deleted)")


def layer_at(layout: Layout, mount_point: str) -> str | None:
    """The layer whose diff path that is."""
    point, diff = os.path.split(mount_point)
    above, name = os.path.split(point)
    return name if diff == "diff" and above == layout.path("attached", "layers") else None


def is_attached(layout: Layout, name: str, mounts: lowers.Table | None = None) -> bool:
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
        wrong = lowers.problem(fd, lower(layout, name), mounts or lowers.table())
    finally:
        os.close(fd)
    if wrong:
        raise Damaged(f"{layout.diff(name)} {wrong}", hint=f"overlayctl layer detach {name[:12]}")
    return True


def attached(layout: Layout) -> list[str]:
    """The names of the layers attached in this namespace, and of the empty image."""
    place = layout.path("attached", "layers")
    found = (layer_at(layout, mount.mount_point) for mount in mounttable.below(place))
    return sorted({name for name in found if name})


def detach(layout: Layout, name: str) -> bool:
    """Take a diff path away, here and where other namespaces inherited it; False if not there.

    Raises InUse naming the processes that work below it. Overlays above go on: they
    hold the layer themselves.
    """
    point, target = layout.attach_point(name), layout.diff(name)
    if not is_mountpoint(layout, point):
        return False
    for place in (target, point):
        if os.path.lexists(place) and is_mounted(place):
            mounter.unmount(place)
    with suppress(FileNotFoundError):
        os.rmdir(target)
    # Removing the mountpoint detaches the copies that other namespaces have of the mounts.
    os.rmdir(point)
    return True


def leave(layout: Layout) -> None:
    """Take ``attached/`` itself away if nothing is mounted in it: it keeps a disk from going."""
    if len(mounttable.below(layout.attached)) == 1:
        with suppress(InUse):
            mounter.unmount(layout.attached)


def is_mountpoint(layout: Layout, path: str) -> bool:
    """Whether there is such a directory in this namespace's ``attached/``.

    A store that was copied while things were attached has files below its own, which
    nobody sees once the tmpfs is mounted.
    """
    return os.path.lexists(path) and is_mounted(layout.attached)


def is_mounted(path: str) -> bool:
    """Whether something is mounted at ``path``."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return libc.is_mount_root(fd)
    finally:
        os.close(fd)

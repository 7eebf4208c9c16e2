"""Snapshots: a writable state on top of layers. They say how to mount it and never mount.

    prepare(key, layers)   snapshots/<key>/ with an empty upper
    mounts(key)            -> an Overlay value, for whoever mounts
    view(layers)           -> the read-only Overlay of the layers alone
    reading(key)           -> the read-only Overlay of a snapshot that is not mounted
    remove(key)            unmakes it: ``keep`` first

``layers`` are names in the store, bottom to top; the lowerdirs that come out are topmost first.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from overlayctl import names
from overlayctl.errors import BadInput, Damaged, HostCannot, NotFound
from overlayctl.kernel import libc, rooted
from overlayctl.layer import attach
from overlayctl.mount import MAX_LOWERS, Lower, Overlay
from overlayctl.store import layers as stored_layers
from overlayctl.store import records
from overlayctl.store.records import fault
from overlayctl.whiteout import unescape

if TYPE_CHECKING:
    from contextlib import ExitStack

    from overlayctl.layer.index import Index
    from overlayctl.layout import Layout


class Snapshot(NamedTuple):
    """A snapshot's record."""

    key: str
    owner: str
    layers: tuple[str, ...]


class Usage(NamedTuple):
    """``size`` in bytes, as files are long; ``disk`` in bytes, as blocks are taken.

    Hard links count once, the upper itself does not.
    """

    size: int
    disk: int
    inodes: int


def prepare(layout: Layout, staging: str, key: str, owner: str, layers: Sequence[str]) -> None:
    """Make the snapshot ``key``; the caller holds the store's lock.

    The upper's root gets the attributes of the merged root, because it will be that root.
    """
    _refuse_overlay(layout)
    staged = os.path.join(staging, key)
    os.mkdir(staged, 0o700)
    upper = os.path.join(staged, "upper")
    os.mkdir(upper)
    os.chmod(upper, 0o755)  # noqa: S103 (a root directory)
    if layers:
        _dress(layout, upper, layers[-1])
    records.sync_directory(upper)
    records.write(
        os.path.join(staged, "snapshot.json"),
        records.encode({"key": key, "owner": owner, "layers": list(layers)}),
    )
    records.write(os.path.join(staged, "keep"), b"")
    records.sync_directory(staged)
    fault("snapshot:before-rename")
    os.rename(staged, layout.snapshot(key))
    records.sync_directory(layout.path("snapshots"))
    fault("snapshot:after-rename")


def _refuse_overlay(layout: Layout) -> None:
    """The kernel takes no upper directory on an overlay: nothing could ever be written there."""
    fd = os.open(layout.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if libc.fstatfs(fd).magic != libc.OVERLAYFS_MAGIC:
            return
    finally:
        os.close(fd)
    raise HostCannot(
        f"the store {layout.root} lies on an overlay, and the kernel takes no writable layer there",
        hint="inside a container: put the store on a volume (-v /var/lib/overlayctl), on a tmpfs, "
        "or on a filesystem in a file (mkfs.ext4, mount -o loop), and name it with --root",
    )


def _dress(layout: Layout, upper: str, top: str) -> None:
    with stored_layers.open_index(layout, top) as index:
        root = index.root
        for name, value in index.xattrs(root).items():
            if unescape(name) is not None:
                _set_xattr(upper, name, value)
    os.chown(upper, root.uid, root.gid)
    os.chmod(upper, stat.S_IMODE(root.mode))
    time = root.mtime * 1_000_000_000 + root.mtime_ns
    os.utime(upper, ns=(time, time))


def _set_xattr(upper: str, name: bytes, value: bytes) -> None:
    try:
        os.setxattr(upper, name, value)
    except OSError as error:
        if error.errno not in {
            errno.ENOTSUP, errno.EINVAL, errno.ENOSPC, errno.E2BIG, errno.ERANGE,
        }:  # fmt: skip
            raise
        raise HostCannot(
            f"the store's filesystem does not take the xattr {os.fsdecode(name)} of the image's "
            f"root directory: {error.strerror}",
            hint="if loading noted it as malformed the image is broken, else try another "
            "filesystem (--root)",
        ) from error


def get(layout: Layout, key: str) -> Snapshot:
    """The snapshot with that key. Raises NotFound, Damaged."""
    return parse(key, read(layout, key))


def read(layout: Layout, key: str) -> records.Record:
    """The snapshot's record as it is. Raises NotFound, Damaged."""
    try:
        return records.read(layout.snapshot(key, "snapshot.json"))
    except NotFound as error:
        error.hint = "overlayctl system check --repair"
        raise


def parse(key: str, record: records.Record) -> Snapshot:
    """What a snapshot's record says. Raises Damaged."""
    layers = record.get("layers")
    if isinstance(layers, list) and all(map(stored_layers.is_name, layers)):
        return Snapshot(key, str(record.get("owner")), tuple(layers))
    raise Damaged(
        f"the record of snapshot {names.short(key)} is damaged: it names no list of layers",
        hint="overlayctl system check",
    )


def find(layout: Layout, key: str) -> Snapshot | None:
    """The snapshot's record; None where it is missing or damaged."""
    try:
        return get(layout, key)
    except (NotFound, Damaged):
        return None


def is_written(layout: Layout, key: str) -> bool:
    """Whether the upper holds anything."""
    return bool(records.names(layout.snapshot(key, "upper")))


def open_upper(layout: Layout, key: str) -> int:
    """An fd of the upper directory, the caller's. Raises Damaged where it is gone."""
    path = layout.snapshot(key, "upper")
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(
            f"{path} is gone, with what was written", hint="overlayctl system check"
        ) from None


def listed(layout: Layout) -> list[str]:
    """The keys of all snapshots that are kept."""
    return [key for key in stored(layout) if os.path.exists(layout.snapshot(key, "keep"))]


def stored(layout: Layout) -> list[str]:
    """The keys of all snapshots, of those too that are being unmade."""
    return [
        key
        for key in records.names(layout.path("snapshots"))
        if key != "lost+found" and stat.S_ISDIR(_mode(layout.snapshot(key)))
    ]


def _mode(path: str) -> int:
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0


def open_lowers(layout: Layout, layers: Sequence[str], owned: ExitStack) -> list[Index]:
    """The indexes of ``lowers``, topmost first, open until ``owned`` is left.

    They are read from the layers' files, attached or not. Raises NotFound, Damaged.
    """
    names = lowers(layout, layers)
    return [owned.enter_context(stored_layers.open_index(layout, name)) for name in names]


def lowers(layout: Layout, layers: Sequence[str]) -> list[str]:
    """The layers that take part in a mount, topmost first.

    The kernel refuses the same lower twice, and only the topmost of equal layers is seen.
    It ignores the opaque mark of a layer's root: such a layer ends the list instead.
    """
    found: list[str] = []
    for name in reversed(layers):
        if name not in found:
            found.append(name)
            with stored_layers.open_index(layout, name) as index:
                if index.is_opaque(index.root):
                    break
    return found


def view(layout: Layout, source: str, layers: Sequence[str]) -> Overlay:
    """The read-only merged view of the layers, which must be attached, with the empty image.

    Raises BadInput where there are no layers.
    """
    used = lowers(layout, layers)
    if not used:
        raise BadInput("the image has no layers: there is nothing to mount")
    # One lower without an upper is EINVAL; a second that holds nothing changes nothing.
    if len(used) == 1:
        used.append(attach.EMPTY)
    return Overlay(source, tuple(attach.lower(layout, name) for name in used))


def mounts(layout: Layout, source: str, key: str, *, volatile: bool, xino: bool) -> Overlay:
    """The writable overlay of a snapshot, with a new work directory for this mount."""
    snapshot = get(layout, key)
    used = lowers(layout, snapshot.layers) or [attach.EMPTY]
    number = 1 + max(
        (int(name[5:]) for name in work_directories(layout, key) if name[5:].isdigit()), default=0
    )
    if volatile:
        _note_volatile(layout, key)
    work = layout.snapshot(key, f"work.{number}")
    os.mkdir(work, 0o700)
    fault("snapshot:after-workdir")
    return Overlay(
        source,
        tuple(attach.lower(layout, name) for name in used),
        layout.snapshot(key, "upper"),
        work,
        volatile=volatile,
        xino=xino,
    )


def reading(layout: Layout, source: str, key: str) -> Overlay:
    """The read-only overlay of a snapshot that is not mounted; its layers must be attached.

    The upper is its topmost layer: so it needs no work directory, and nothing is written.
    Raises NotFound and Damaged for the record, HostCannot where the upper is one layer too many.
    """
    used = lowers(layout, get(layout, key).layers) or [attach.EMPTY]
    if len(used) >= MAX_LOWERS:
        raise HostCannot(
            f"with {MAX_LOWERS} layers the kernel does not take the container's as one more",
            hint=f"overlayctl mount {key[:12]}, then repeat the command",
        )
    upper = layout.snapshot(key, "upper")
    layers = (attach.lower(layout, name) for name in used)
    return Overlay(source, (Lower(upper, b"", "", tree=upper), *layers))


def _note_volatile(layout: Layout, key: str) -> None:
    """Remember, before it is mounted, that the kernel will sync nothing of it.

    The kernel's own mark lies in the work directory and is as volatile as the rest.
    """
    note = layout.snapshot(key, "volatile")
    if not os.path.exists(note):
        records.write(note, records.boot_id().encode() + b"\n")
        records.sync_directory(layout.snapshot(key))


def forget_volatile(layout: Layout, key: str) -> None:
    """Sync what volatile mounts wrote, and forget them; losses of an earlier boot stay noted.

    Only when it is mounted otherwise: before, an overlay that nobody sees may still write.
    """
    note = layout.snapshot(key, "volatile")
    if os.path.exists(note) and not lost_writes(layout, key):
        fd = os.open(layout.snapshot(key), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            libc.syncfs(fd)
        finally:
            os.close(fd)
        records.remove(note)


def lost_writes(layout: Layout, key: str) -> bool:
    """Whether the host stopped after a volatile mount that nothing has synced since."""
    try:
        with open(layout.snapshot(key, "volatile")) as file:
            return file.read().strip() != records.boot_id()
    except FileNotFoundError:
        return False


def work_directories(layout: Layout, key: str) -> list[str]:
    """The names of the snapshot's work directories."""
    return [name for name in records.names(layout.snapshot(key)) if name.startswith("work.")]


def usage(layout: Layout, key: str) -> Usage:
    """What was written in the snapshot. Raises NotFound."""
    seen: set[tuple[int, int]] = set()
    size = disk = 0
    try:
        for found in rooted.stats(layout.snapshot(key, "upper")):
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                disk += found.st_blocks * 512
                size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    except FileNotFoundError:
        raise NotFound(f"there is no snapshot {key}") from None
    return Usage(size, disk, len(seen))


def remove(layout: Layout, key: str) -> None:
    """Unmake a snapshot that is not mounted: ``keep`` first, then the rest in place."""
    records.remove(layout.snapshot(key, "keep"))
    fault("snapshot:after-unlink")
    if os.path.isdir(layout.snapshot(key, "upper")):
        rooted.remove_tree(layout.snapshot(key, "upper"))
    fault("snapshot:after-upper")
    if os.path.isdir(layout.snapshot(key)):
        rooted.remove_tree(layout.snapshot(key))
    fault("snapshot:after-removal")

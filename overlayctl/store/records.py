"""Records: small JSON files, written once, synced, readable with cat; and the store's marker."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from datetime import UTC, datetime
from typing import Any

from overlayctl.errors import Conflict, Damaged, HostCannot, NotFound
from overlayctl.layout import (
    COMPATIBLE,
    DIRECTORIES,
    FORMAT_VERSION,
    INCOMPATIBLE,
    READ_ONLY_COMPATIBLE,
    Layout,
)

Record = dict[str, Any]
_MARKER_LOST = (
    "everything else is still there: put a copy back, or write the record again as "
    "docs/store-format.md says (any id will do)"
)
VERSION = 1
_NO_TEXT = re.compile("[\ud800-\udc7f\udd00-\udfff]")


POINTS = frozenset(
    {
        "store:after-directories",
        "store:after-empty",
        "store:after-marker",
        "ingest:after-sync",
        "layer:after-rename",
        "layer:after-unlink",
        "layer:after-removal",
        "image:before-rename",
        "image:after-rename",
        "image:after-detach",
        "image:after-unlink",
        "image:after-removal",
        "tag:before-rename",
        "tag:after-rename",
        "tag:after-unlink",
        "snapshot:before-rename",
        "snapshot:after-rename",
        "snapshot:after-workdir",
        "snapshot:after-unlink",
        "snapshot:after-upper",
        "snapshot:after-removal",
        "container:after-name",
        "container:after-rename",
        "container:after-unlink",
        "volume:before-rename",
        "volume:after-rename",
        "volume:before-fill",
        "volume:after-fill",
        "volume:after-keep",
        "volume:after-unlink",
        "volume:after-data",
        "volume:after-removal",
        "commit:after-tar",
        "mount:after-attach",
        "mount:after-mountpoint",
        "mount:after-mount",
        "umount:after-umount",
        "repair:before-rename",
        "repair:after-rename",
    }
)
"""Where a crash between two instructions matters. Each has a test that kills there."""


def fault(point: str) -> None:
    """Nothing; unless a crash test arms this point, which then kills the process here."""
    if point not in POINTS:
        raise LookupError(point)
    if os.environ.get("OVERLAYCTL_FAULT") == point:
        os.kill(os.getpid(), signal.SIGKILL)


def now() -> str:
    """The time in RFC 3339, UTC, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def boot_id() -> str:
    """What is the same until this kernel ends (proc_sys_kernel(5), random/boot_id)."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def encode(record: Record) -> bytes:
    """A record as it is stored: indented, with the record version."""
    return json.dumps({"version": VERSION, **record}, indent=2).encode() + b"\n"


def write(path: str, data: bytes) -> None:
    """Make a new file, durable but for its name in the directory. FileExistsError if there."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: str) -> Record:
    """The record at ``path``. Raises NotFound, Damaged (not a record, a later version)."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no record {path}") from None
    except IsADirectoryError:
        data = b""
    try:
        record = decoded(data)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("version"), int):
        raise Damaged(f"the record {path} is damaged", hint="overlayctl system check", path=path)
    if record["version"] > VERSION:
        raise HostCannot(f"the record {path} was written by a later overlayctl", hint="update it")
    return record


def decoded(data: bytes) -> Any:
    """The value that JSON says, in text that can be written: a lone surrogate is replaced.

    But for those that stand for a byte (PEP 383). Raises ValueError, RecursionError.
    """
    value = json.loads(data)
    if b"\\ud" in data.lower():
        text = json.dumps(value, ensure_ascii=False)
        value = json.loads(_NO_TEXT.sub("\ufffd", text))
    return value


def sync_directory(path: str) -> None:
    """Make the names in a directory durable (fsync(2))."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: str) -> bool:
    """Unlink a file; False if it was not there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def is_gone(path: str) -> bool:
    """Whether nothing is there, for who deletes the rest: what cannot be looked at may be."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def names(path: str) -> list[str]:
    """The names in a directory, sorted; none if it is not there."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def open_store(root: str, *, create: bool) -> tuple[Layout, Record]:
    """The store at ``root`` and its marker; made if it is not there and ``create`` is set.

    Raises NotFound, Damaged, HostCannot for a store of a later format (with ``create`` also
    for one that may only be read), Conflict for making one in a directory that holds
    something else, DiskFull.
    """
    layout = Layout(root)
    if create and not os.path.exists(layout.marker):
        from overlayctl.kernel import disk

        disk.refuse_unfit(layout.root)
        with disk.told(layout.root):
            _make(layout)
    try:
        marker = read(layout.marker)
    except Damaged as error:
        error.hint = _MARKER_LOST
        raise
    except NotFound:
        raise NotFound(
            f"there is no store at {layout.root}", hint="overlayctl load FILE makes one"
        ) from None
    features, version = marker.get("incompatible"), marker.get("format")
    if not isinstance(features, list) or not isinstance(version, int):
        raise Damaged(f"the record {layout.marker} is damaged", hint=_MARKER_LOST)
    unknown = set(map(str, features)) - set(INCOMPATIBLE)
    if unknown or version > FORMAT_VERSION:
        raise HostCannot(
            f"the store at {layout.root} was made by a later overlayctl"
            f" ({', '.join(sorted(unknown)) or 'format ' + str(version)})",
            hint="update overlayctl",
        )
    if create:
        refuse_writing(marker)
    return layout, marker


def refuse_writing(marker: Record) -> None:
    """Raises HostCannot if the store has a feature that this program would break by writing."""
    features = marker.get("read_only_compatible")
    unknown = set(map(str, features if isinstance(features, list) else ())) - {
        *READ_ONLY_COMPATIBLE
    }
    if unknown:
        raise HostCannot(
            f"the store can be read, not written: a later overlayctl made it"
            f" ({', '.join(sorted(unknown))})",
            hint="update overlayctl",
        )


def _make(layout: Layout) -> None:
    import secrets

    from overlayctl.layer import erofs
    from overlayctl.store.staging import staging

    _claim(layout)
    for name in DIRECTORIES:
        os.makedirs(layout.path(name), mode=0o700, exist_ok=True)
    fault("store:after-directories")
    with staging(layout) as place:
        if not os.path.exists(layout.empty):
            staged = os.path.join(place, "empty.erofs")
            erofs.write_empty(staged)
            sync_file(staged)
            os.rename(staged, layout.empty)
            fault("store:after-empty")
        marker = {
            "id": secrets.token_hex(8),
            "format": FORMAT_VERSION,
            "compatible": list(COMPATIBLE),
            "read_only_compatible": list(READ_ONLY_COMPATIBLE),
            "incompatible": list(INCOMPATIBLE),
            "created": now(),
        }
        staged = os.path.join(place, "overlayctl.json")
        write(staged, encode(marker))
        # Two first commands at once: the one whose link comes second takes the other's marker.
        with contextlib.suppress(FileExistsError):
            os.link(staged, layout.marker)
        fault("store:after-marker")
    sync_directory(layout.root)
    sync_directory(os.path.dirname(layout.root))


def _claim(layout: Layout) -> None:
    """Make the root, 0700. Another's directory would lose its mode now and its files at reset."""
    if os.path.exists(layout.root) and not os.path.isdir(layout.root):
        raise Conflict(f"{layout.root} is no directory", hint="choose another --root")
    ours = {*DIRECTORIES, "overlayctl.json", "empty.erofs", "lost+found"}
    foreign = [name for name in names(layout.root) if name not in ours]
    if foreign:
        raise Conflict(
            f"{layout.root} is no store and holds something else: {foreign[0]}",
            hint="give --root an empty or a new directory",
        )
    os.makedirs(layout.root, mode=0o700, exist_ok=True)
    # All that is made below would inherit the one, and layers and uppers show it.
    for name in ("system.posix_acl_default", "system.posix_acl_access"):
        with contextlib.suppress(OSError):
            os.removexattr(layout.root, name)
    os.chmod(layout.root, 0o700)


def sync_file(path: str) -> None:
    """Make a file's content durable (fsync(2))."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""A container's writable layer as a layer of a new image.

The upper directory becomes a tar, written once and straight into a layer file in staging. The
same upper gives the same tar, and so the same diff id. With ``SOURCE_DATE_EPOCH`` set
(reproducible-builds.org/specs/source-date-epoch) the image is of that moment, and so is every
file in the layer that claims to be newer.

The config is what ``docker commit`` makes of it: the image's, with what the container was made
with over it (environment, command, labels, anonymous volumes), then the changes that were asked
for. ONBUILD triggers were for who built on the image; docker's record of the container that made
it (``container``, ``container_config``) is none of the new one.
"""

from __future__ import annotations

import json
import os
import re
import stat
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from overlayctl import names, oci
from overlayctl.errors import Damaged, NotFound
from overlayctl.kernel import places
from overlayctl.layer import diff, stubs
from overlayctl.layer.stack import Stack
from overlayctl.layer.stream import Candidate
from overlayctl.layer.tar_writer import TarWriter
from overlayctl.runtime import loading, mounts
from overlayctl.runtime.changes import changed, sound
from overlayctl.store import containers, images, records, snapshots, staging
from overlayctl.store.ingest import Wanted
from overlayctl.whiteout import OPAQUE_XATTR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from overlayctl.digest import DiffID
    from overlayctl.store.containers import Container
    from overlayctl.store.images import Image
    from overlayctl.store.ingest import Ingested, Progress
    from overlayctl.store.opened import Store
    from overlayctl.store.snapshots import Snapshot

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# What docker says of how an image came to be; of this one it would not be true.
_OF_THE_IMAGE = ("author", "comment", "container", "container_config", "docker_version", "id",
                 "parent")  # fmt: skip
_SURROGATES = re.compile("[\ud800-\udfff]")


class Committed(NamedTuple):
    """The new image. ``diff_id`` is its new layer's, None where nothing was written.

    ``moved`` is the image that had the reference before. ``notes`` are for a person;
    ``remarks`` maps a kind of remark about the files to their paths.
    """

    container: str
    image_id: str
    reference: str | None
    moved: str | None
    diff_id: DiffID | None
    size: int
    notes: tuple[str, ...]
    remarks: dict[str, list[bytes]]


class Wish(NamedTuple):
    """What the image is to say: ``changes`` in a Dockerfile's words, ``epoch`` in seconds.

    ``sparse`` is whether files with holes keep them, see ``TarWriter``.
    """

    message: str = ""
    author: str = ""
    changes: Sequence[str] = ()
    epoch: int | None = None
    sparse: bool = False


def commit(
    store: Store, name: str, *, reference: str | None, wish: Wish, progress: Progress
) -> Committed:
    """Make an image of a container, whatever goes on in it; only its removal has to wait.

    Raises Usage for a change that is none, BadInput for an upper directory that another program
    has mounted with options that make it mean nothing alone, Damaged where the container's or
    its image's record is lost, DiskFull.
    """
    tags = [names.stored(reference)] if reference else []
    changed({}, wish.changes)
    with store.locked(exclusive=False):
        found = containers.resolve(store.layout, name)
    records.refuse_writing(store.marker)
    with (
        store.holding(found.id, exclusive=False),
        staging.staging(store.layout) as place,
        ExitStack() as owned,
    ):
        image, snapshot = _known(store, found)
        config = new_config(images.config(store.layout, image), found, wish)
        upper = snapshots.open_upper(store.layout, found.id)
        owned.callback(os.close, upper)
        notes = _notes(store, found)
        stack = Stack(snapshots.open_lowers(store.layout, snapshot.layers, owned))
        left_out, written = _written(upper, stack)
        layer = Candidate(os.path.join(place, "layer"), 0, "the container's layer")
        tar = TarWriter(
            upper,
            layer=True,
            sparse=wish.sparse,
            leave_out=left_out,
            is_below=lambda path: stack.find(path) is not None,
            latest=wish.epoch,
        )
        progress.start(None, 1)
        if written:
            layer.receive(tar, progress.advance)
            records.fault("commit:after-tar")
        else:
            config["history"][-1]["empty_layer"] = True

        def made(ingested: Ingested) -> tuple[bytes, None]:
            config["rootfs"] = {"type": "layers", "diff_ids": list(ingested.diff_ids)}
            return _encoded(config), None

        wanted = [Wanted(None, layer)] if written else []
        stored = loading.put(
            store, place, made, wanted, tags, f"container {found.id}", progress, on=snapshot.layers
        )
        new = layer.received(None) if written else None
    return Committed(
        found.id,
        stored.image_id,
        stored.references[0] if stored.references else None,
        stored.moved[0][1] if stored.moved else None,
        new.diff_id if new else None,
        new.size if new else 0,
        (*notes, *stored.notes),
        tar.notes,
    )


def _known(store: Store, found: Container) -> tuple[Image, Snapshot]:
    """The container's image and what it lies on. Raises Damaged."""
    snapshot = snapshots.find(store.layout, found.id)
    lost = f"container {names.short(found.id)}"
    if found.image and snapshot is not None:
        try:
            return images.get(store.layout, found.image), snapshot
        except NotFound:
            lost = f"its image {names.short(found.image)}"
    raise Damaged(
        f"the record of {lost} is lost: what the image is to be made of is not known",
        hint=f"overlayctl export -o FILE {names.short(found.id)}, then overlayctl import FILE",
    )


def _notes(store: Store, found: Container) -> list[str]:
    """What a person should know: who may be writing, and what is no part of the image."""
    notes = []
    if mounts.views(store, "container", found.id):
        notes.append(
            "the container is mounted: what is written meanwhile may be in the image or not"
        )
    if placed := [one.target for one in found.config.mounts]:
        notes.append(f"not in the image: what is mounted at {', '.join(placed)}")
    return notes


def _written(upper: int, below: Stack) -> tuple[frozenset[bytes], bool]:
    """What to leave out of the upper directory, and whether then anything is left.

    Who only made something to mount on changed nothing but a directory's time.
    """
    left_out = set(stubs.found(upper, below))
    inside = {path.partition(b"/")[2] for path in left_out if b"/" in path}
    if inside and b"etc" not in left_out:
        etc = os.open(b"etc", _DIRECTORY, dir_fd=upper)
        try:
            if set(_listed(etc)) == inside and _looks_as(etc, below, b"etc", time=False):
                left_out.add(b"etc")
        finally:
            os.close(etc)
    others = set(_listed(upper)) - left_out
    written = bool(others) or not _looks_as(upper, below, b"", time=not left_out)
    return frozenset(left_out), written


def _listed(fd: int) -> list[bytes]:
    return [os.fsencode(name) for name in os.listdir(fd)]


def _looks_as(fd: int, below: Stack, path: bytes, *, time: bool) -> bool:
    """Whether an upper directory has the attributes of what it lies on, and does not hide it."""
    there = below.inherited(path)
    info = os.fstat(fd)
    stored = places.xattrs(fd)
    xattrs = diff.carried(stored)
    # The kernel ignores the mark of the root.
    if path and stored.get(OPAQUE_XATTR) == b"y":
        return False
    if there is None:
        # Without a layer below, a new root directory.
        return not path and stat.S_IMODE(info.st_mode) == 0o755 and not xattrs
    seconds, nanoseconds = divmod(info.st_mtime_ns, 1_000_000_000)
    same = (there.mode, there.uid, there.gid) == (info.st_mode, info.st_uid, info.st_gid)
    dated = (there.mtime, there.mtime_ns) == (seconds, nanoseconds)
    return same and diff.carried(there.xattrs) == xattrs and (dated or not time)


# --- the config -------------------------------------------------------------------------------


def new_config(config: dict[str, Any], container: Container, wish: Wish) -> dict[str, Any]:
    """The image's ``config`` as the container has it, with one more line of history.

    What is not known here stays. The layers are the caller's to add. Raises Usage.
    """
    created = _time(wish.epoch)
    result = {key: value for key, value in config.items() if key not in _OF_THE_IMAGE}
    result["created"] = created
    if wish.author:
        result["author"] = wish.author
    result["config"] = changed(_of_the_container(oci.said(config), container), wish.changes)
    step = {
        "created": created,
        "author": wish.author,
        "created_by": " ".join(container.config.command),
        "comment": wish.message,
    }
    result["history"] = [
        *_history(config),
        {key: value for key, value in step.items() if value},
    ]
    return result


def _of_the_container(inner: dict[str, Any], container: Container) -> dict[str, Any]:
    asked = container.config
    inner = sound(inner)
    result = {key: value for key, value in inner.items() if key != "OnBuild"}
    said = {
        "Entrypoint": list(asked.entrypoint or ()) or None,
        "Cmd": list(asked.command) or None,
        "Env": list(asked.environment) or None,
        "WorkingDir": asked.directory,
        "User": asked.user,
        "Labels": dict(container.labels) or None,
    }
    # What the image left out, and nobody said, stays out.
    result |= {key: value for key, value in said.items() if value or inner.get(key)}
    if own := [one.target for one in asked.mounts if one.anonymous]:
        result["Volumes"] = {**(inner.get("Volumes") or {}), **{path: {} for path in own}}
    return result


def _history(config: dict[str, Any]) -> list[Any]:
    """The history so far. One that tells of too few layers would put the next at the wrong one."""
    told = config.get("history")
    history = list(told) if isinstance(told, list) else []
    rootfs = config.get("rootfs")
    diff_ids = (rootfs.get("diff_ids") if isinstance(rootfs, dict) else None) or []
    tells = sum(1 for row in history if isinstance(row, dict) and not row.get("empty_layer"))
    return history + [{} for _ in range(len(diff_ids) - tells)]


def _time(epoch: int | None) -> str:
    """Now, or that moment, as records have it."""
    if epoch is None:
        return records.now()
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _encoded(config: dict[str, Any]) -> bytes:
    """The config as JSON: what is not Unicode is replaced, as Go's writers do."""
    text = json.dumps(config, ensure_ascii=False, separators=(",", ":"))
    return _SURROGATES.sub("\ufffd", text).encode()

"""``check``: every layer re-hashed, files and records compared both ways."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from overlayctl import names
from overlayctl.digest import chain_ids, hex_of, of_bytes
from overlayctl.errors import BadTar, Damaged, HostCannot, NotFound, OverlayctlError, Usage
from overlayctl.kernel import mounttable
from overlayctl.layer import attach, index, stack, unpack
from overlayctl.layer.format import HEADER
from overlayctl.layout import DIRECTORIES
from overlayctl.store import (
    containers,
    gc,
    images,
    layers,
    records,
    snapshots,
    staging,
    volume_check,
)
from overlayctl.store.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Collection

    from overlayctl.layout import Layout

EMPTY_IMAGE = "sha256:9269da81bd6f69fc82683e26a2ee9e9da19cfc49ec254c91fb2f7309a71485c8"
"""The digest of the image of nothing, which has no header that could tell."""


class Stale(NamedTuple):
    """An attach of a file that is no longer the layer's: who sees it (a pid), and what it shows."""

    layer: str
    pid: int
    shows: str


def check(
    layout: Layout,
    *,
    quick: bool = False,
    deep: bool = False,
    only: Collection[str] | None = None,
) -> list[Finding]:
    """What is wrong with the store; ``quick`` leaves the hashing of layers out.

    ``deep`` derives every index again. ``only`` reads but the layers with these files or trees.
    Raises HostCannot where a deep check cannot be done.
    """
    users = gc.layer_users(layout)
    found = []
    for name in records.names(layout.path("layers")):
        paths = (layout.layer_file(name), layout.layer_tree(name))
        read = not quick and (only is None or any(path in only for path in paths))
        found += layer(layout, name, tuple(users.get(name, ())), quick=not read, deep=deep and read)
    return found + but_layers(layout)


def but_layers(layout: Layout) -> list[Finding]:
    """What is wrong beside the content of layers: no layer is read."""
    users = gc.layer_users(layout)
    found = [
        Finding("directory-missing", layout.path(name), "a directory of the store is gone")
        for name in DIRECTORIES
        if not os.path.isdir(layout.path(name))
    ]
    found += [
        Finding("layer-missing", layout.layer_file(name), f"layer {name[:12]} is gone", tuple(who))
        for name, who in users.items()
        if not layers.exists(layout, name)
    ]
    found += [
        Finding("layer-orphan", layout.layer(name), f"nobody names layer {name[:12]}")
        for name in gc.orphans(layout)
    ]
    for name in layers.listed(layout):
        found += [
            Finding("layer-superseded", path, "a newer file of that layer is what counts")
            for path in superseded(layout, name)
        ]
    found += _attached(layout)
    found += _empty_image(layout)
    found += _images(layout)
    found += _tags(layout)
    found += _containers(layout)
    found += _snapshots(layout)
    found += _names(layout)
    found += volume_check.findings(layout)
    found += [
        Finding("staging-left", layout.path("ingest", name), "left by a command that was killed")
        for name in staging.abandoned(layout)
    ]
    return found


def superseded(layout: Layout, name: str) -> list[str]:
    """The files of a layer that no longer count, the newest of them first."""
    return [path for path in layers.files(layout, name)[-2::-1] if os.path.isfile(path)]


def layer(
    layout: Layout, name: str, users: tuple[str, ...], *, quick: bool, deep: bool = False
) -> list[Finding]:
    """What is wrong with one layer: which part of its file, and whom it harms."""
    path = layout.layer_file(name)
    if not os.path.isdir(layout.layer(name)):
        return [Finding("layer-foreign", layout.layer(name), "this is no layer")]
    try:
        fd = layers.open_file(layout, name)
    except FileNotFoundError:
        return [Finding("layer-empty", layout.layer(name), "a layer's directory without its file")]
    except OSError as error:
        return [Finding("layer-unreadable", path, error.strerror or str(error), users)]
    try:
        found = _content(path, name, fd, users, quick=quick)
        if deep and not found:
            found = _not_derived(layout, name, fd, users)
        return found or ([] if quick else _tree(layout, name, fd, users))
    finally:
        os.close(fd)


def _content(
    path: str, name: str, fd: int, users: tuple[str, ...], *, quick: bool
) -> list[Finding]:
    wrong: list[str] = []
    try:
        wrong = [] if quick else index.verify(fd)
        with index.Index.open(fd) as opened:
            recorded = hex_of(opened.header.diff_id) + stack.facts_suffix(opened.facts())
    except OverlayctlError as error:
        recorded = name
        if not wrong:
            return [Finding("layer-damaged", path, str(error), users)]
    except OSError as error:
        return [Finding("layer-unreadable", path, error.strerror or str(error), users)]
    found = [
        Finding("layer-damaged", path, f"the {part} of layer {name[:12]} is damaged", users)
        for part in wrong
    ]
    if recorded != name and not wrong:
        found.append(Finding("layer-misnamed", path, f"it holds layer {recorded}", users))
    return found


def _tree(layout: Layout, name: str, fd: int, users: tuple[str, ...]) -> list[Finding]:
    """Compare the layer unpacked, where it is, with its file, which is whole."""
    path = layout.layer_tree(name)
    try:
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [Finding("tree-damaged", path, error.strerror or str(error), users)]
    try:
        with index.Index.open(fd) as opened:
            other = unpack.difference(opened, root)
    except OSError as error:
        return [Finding("tree-damaged", path, error.strerror or str(error), users)]
    finally:
        os.close(root)
    if other is None:
        return []
    what = f"{os.fsdecode(other) or '/'} is not what the layer's file says"
    return [Finding("tree-damaged", path, what, users)]


def _not_derived(layout: Layout, name: str, fd: int, users: tuple[str, ...]) -> list[Finding]:
    """Compare a layer that agrees with itself with what its tar and the layers below give."""
    try:
        why = _difference(layout, name, fd)
    except NotFound:
        return []  # What lies below is what is wrong, and is named for itself.
    except (Damaged, BadTar) as error:
        why = str(error)
    return [Finding("layer-not-derived", layout.layer_file(name), why, users)] if why else []


def _difference(layout: Layout, name: str, fd: int) -> str:
    from overlayctl.layer import erofs
    from overlayctl.layer.format import Header
    from overlayctl.store import derive

    block = os.pread(fd, HEADER, 0)
    header = Header.parse(block, layout.layer_file(name))
    if header.writer != erofs.WRITER:
        return ""
    try:
        again = os.open(layout.ingest, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            same = derive.write(layout, name, fd, header.tar_size, again).encode() == block
        finally:
            os.close(again)
    except OSError as error:
        if error.errno not in {
            errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP, errno.ENOENT,
        }:  # fmt: skip
            raise
        raise HostCannot(
            f"a deep check writes each layer again, in {layout.ingest}: {error.strerror}",
            hint="overlayctl system check, without --deep, reads only",
        ) from error
    return "" if same else "its index is not what follows from its tar"


def stale(layout: Layout) -> Iterator[Stale]:
    """Attaches, in every mount namespace that can be read, of files that no longer count."""
    for pid, mount in mounttable.everywhere():
        name = attach.layer_at(layout, mount.mount_point)
        if name and attach.is_stale(layout, name, mount):
            yield Stale(name, pid, os.path.basename(attach.shows(mount)))


def _attached(layout: Layout) -> list[Finding]:
    found = []
    for name, pid, shows in stale(layout):
        where, command = "here", f"overlayctl layer detach {name[:12]}"
        if pid != os.getpid():
            where = f"in the mount namespace of process {pid}"
            command = f"nsenter -m -t {pid} {command}"
        message = f"it shows {shows} {where}, which no longer counts: {command}"
        found.append(Finding("attach-stale", layout.diff(name), message))
    return found


def _empty_image(layout: Layout) -> list[Finding]:
    try:
        with open(layout.empty, "rb") as file:
            right = of_bytes(file.read()) == EMPTY_IMAGE
    except OSError as error:
        return [Finding("empty-image-unreadable", layout.empty, error.strerror or str(error))]
    return [] if right else [Finding("empty-image-damaged", layout.empty, "it is not of nothing")]


def _images(layout: Layout) -> list[Finding]:
    found = []
    for name in records.names(layout.path("images")):
        if name == "lost+found":
            continue
        users = (f"image {name}",)
        try:
            found += _image(layout, images.get(layout, name), users)
        except OverlayctlError as error:
            found.append(Finding("image-damaged", layout.image(name), str(error), users))
    return found


def _image(layout: Layout, image: images.Image, users: tuple[str, ...]) -> list[Finding]:
    found = []
    path = layout.image(image.hex, "image.json")
    listed = image.record["layers"]
    if image.record.get("id") != image.id:
        found.append(Finding("image-misnamed", path, "it says that it is another image", users))
    if [name[:64] for name in image.layers] != [hex_of(diff_id) for diff_id in image.diff_ids]:
        found.append(Finding("image-damaged", path, "its layers are not its diff_ids", users))
    chains = [layer["chain_id"] for layer in listed if "chain_id" in layer]
    if chains and chains != chain_ids(image.diff_ids):
        found.append(Finding("image-damaged", path, "its chain ids are wrong", users))
    path = layout.image(image.hex, "config.json")
    try:
        with open(path, "rb") as file:
            right = of_bytes(file.read()) == image.id
    except OSError as error:
        found.append(Finding("config-damaged", path, error.strerror or str(error), users))
    else:
        if not right:
            found.append(Finding("config-damaged", path, "it is not what the id says", users))
        elif _config_layers(layout, image) != image.diff_ids:
            found.append(Finding("image-damaged", path, "it names other layers", users))
    path = layout.image(image.hex, "manifest.json")
    try:
        with open(path, "rb") as file:
            whole = isinstance(json.loads(file.read()), dict)
    except (ValueError, RecursionError):
        whole = False
    except OSError as error:
        found.append(Finding("manifest-missing", path, error.strerror or str(error), users))
        return found
    if not whole:
        found.append(Finding("manifest-damaged", path, "it is no manifest", users))
    return found


def _config_layers(layout: Layout, image: images.Image) -> tuple[str, ...]:
    rootfs = images.config(layout, image).get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    return tuple(map(str, diff_ids or ()))


def _tags(layout: Layout) -> list[Finding]:
    found = []
    known = set(images.listed(layout))
    for name in records.names(layout.path("tags")):
        path = layout.path("tags", name)
        if name == "lost+found":
            continue
        tag = images.read_tag(path)
        if tag is None:
            found.append(Finding("tag-damaged", path, "not an image id and a reference"))
        elif names.tag_file(tag[1]) != name:
            found.append(Finding("tag-misnamed", path, f"it says {tag[1]}, not what its name says"))
        elif tag[0] not in known:
            found.append(Finding("tag-dangling", path, f"{tag[1]} names an image that is gone"))
    return found


def _containers(layout: Layout) -> list[Finding]:
    found = []
    known = set(containers.listed(layout))
    loaded = set(images.listed(layout))
    for container_id in containers.recorded(layout):
        path = layout.container(container_id)
        try:
            record = records.read(path)
            container = containers.parse(container_id, record)
        except OverlayctlError as error:
            found.append(Finding("container-damaged", path, str(error)))
            continue
        if container_id not in known:
            message = "its snapshot is gone: the next command that writes removes it"
            found.append(Finding("container-unfinished", path, message))
            continue
        if record.get("id") != container_id:
            message = "it says that it is another container"
            found.append(Finding("container-misnamed", path, message))
        if container.image not in loaded:
            message = f"its image {names.short(container.image)} is gone"
            found.append(Finding("container-imageless", path, message))
        try:
            names.container_name(container.name)
        except Usage as error:
            found.append(Finding("container-damaged", path, str(error)))
            continue
        container = containers.called(layout, container)
        if containers.named(layout, container.name) != container_id:
            path = layout.container_name(container.name)
            message = f"it does not lead to container {container_id[:12]}, whose name it is"
            found.append(Finding("container-nameless", path, message))
    return found


def _snapshots(layout: Layout) -> list[Finding]:
    found = []
    kept = set(snapshots.listed(layout))
    for key in snapshots.stored(layout):
        path = layout.snapshot(key)
        if key not in kept:
            message = "it is being removed: the next command that writes finishes that"
            found.append(Finding("snapshot-unfinished", path, message))
            continue
        try:
            record = snapshots.read(layout, key)
            snapshots.parse(key, record)
            if record.get("key") != key:
                message = "it says that it is another snapshot"
                found.append(Finding("snapshot-misnamed", path, message))
        except OverlayctlError as error:
            found.append(Finding("snapshot-damaged", path, str(error)))
        if snapshots.lost_writes(layout, key):
            message = "the host stopped after a volatile mount: what was written may be incomplete"
            found.append(Finding("snapshot-volatile", path, message))
        if not os.path.isdir(layout.snapshot(key, "upper")):
            found.append(Finding("snapshot-damaged", path, "its upper directory is gone"))
        if not os.path.exists(layout.container(key)):
            short = names.short(key)
            message = f"its container's record {layout.container(key)} is gone: " + (
                f"overlayctl export {short} saves what is in it, overlayctl rm {short} removes it"
                if snapshots.is_written(layout, key)
                else "nothing was written in it, and the next command that writes removes it"
            )
            found.append(Finding("snapshot-orphan", path, message))
    return found


def _names(layout: Layout) -> list[Finding]:
    found = []
    known = set(containers.recorded(layout))
    for name in records.names(layout.path("containers", "names")):
        path = layout.container_name(name)
        holder = containers.named(layout, name)
        if holder is None:
            if name != "lost+found":
                found.append(Finding("name-foreign", path, "this is no symlink to a container"))
        elif holder not in known:
            found.append(Finding("name-dangling", path, "it names no container"))
    return found

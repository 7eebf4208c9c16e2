"""One layer: found by what people call it, described, listed, read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from overlayctl import names
from overlayctl.digest import hex_of
from overlayctl.errors import Ambiguous, BadInput, Damaged, NotFound, Usage
from overlayctl.layer import attach
from overlayctl.layer.attributes import TYPES
from overlayctl.layer.index import device_number
from overlayctl.store import gc, images, layers
from overlayctl.whiteout import ORIGIN_XATTR, unescape

if TYPE_CHECKING:
    from overlayctl.layer.index import Node
    from overlayctl.layout import Layout

_PIECE = 1 << 20


def named(layout: Layout, spec: str) -> str:
    """The layer of ``REF:N`` (1 is the bottom) or of an id's start.

    Raises NotFound, Ambiguous, Usage for an image without a number.
    """
    reference, _, number = spec.rpartition(":")
    if reference not in ("", "sha256") and number.isdigit() and not images.exists(layout, spec):
        image, _ = images.resolve(layout, reference)
        if not 1 <= int(number) <= len(image.layers):
            raise NotFound(f"{reference} has layers 1 to {len(image.layers)}, bottom to top")
        return image.layers[int(number) - 1]
    known = layers.listed(layout)
    prefix = hex_of(spec)
    if prefix in known:
        return prefix
    hexes = {name[:64] for name in known}
    try:
        found = names.match(prefix, hexes)
    except NotFound:
        if not images.exists(layout, spec):
            raise NotFound(f"there is no layer {spec!r}", hint="overlayctl layer ls") from None
        raise Usage(
            f"{spec} is an image: say which of its layers", hint=f"{spec}:1 is the bottom one"
        ) from None
    same = [name for name in known if name.startswith(found)]
    if len(same) > 1:
        raise Ambiguous(spec, same)
    return same[0]


def rows(layout: Layout) -> list[dict[str, Any]]:
    """One row for each stored layer; the size is null where the file is damaged."""
    users = gc.layer_users(layout)
    attached = set(attach.attached(layout))
    found = []
    for name in layers.listed(layout):
        try:
            size = layers.stat(layout, name).header.size
        except Damaged:
            size = None
        found.append(
            {
                "Name": name,
                "DiffID": f"sha256:{name[:64]}",
                "Size": size,
                "DiskUsage": layers.disk(layout, name),
                "Images": sum(user.startswith("image ") for user in users.get(name, [])),
                "Attached": name in attached,
                "DiffPath": layout.diff(name) if name in attached else None,
            }
        )
    return found


def describe(layout: Layout, name: str, unseen: str | None) -> dict[str, Any]:
    """One layer: what its header says, who uses it, where it is seen."""
    found = layers.stat(layout, name)
    with layers.open_index(layout, name) as index:
        facts = index.facts()
    is_attached = name in attach.attached(layout)
    return {
        "Name": name,
        "DiffID": found.header.diff_id,
        "File": layout.layer_file(name),
        "DiffPath": layout.diff(name) if is_attached else None,
        "Attached": is_attached,
        "AttachError": unseen,
        "Size": found.header.size,
        "DiskUsage": found.disk,
        "TarSize": found.header.tar_size,
        "Entries": found.header.entries,
        "IndexSHA256": found.header.index_sha256,
        "InheritedFacts": facts.decode(errors="replace"),
        "Users": gc.layer_users(layout).get(name, []),
    }


def files(layout: Layout, name: str) -> Iterator[dict[str, Any]]:
    """Each entry of a layer in tree order, the root (an empty path) first."""
    with layers.open_index(layout, name) as index:
        for path, node in index.walk():
            yield {
                "Path": path,
                "Type": "whiteout" if index.is_whiteout(node) else TYPES[stat.S_IFMT(node.mode)],
                "Mode": f"{stat.S_IMODE(node.mode):04o}",
                "Uid": node.uid,
                "Gid": node.gid,
                "Size": node.size if not stat.S_ISDIR(node.mode) else 0,
                "Mtime": _time(node),
                "Target": index.target(node) if stat.S_ISLNK(node.mode) else None,
                "Device": _device(node),
                "Xattrs": sorted(
                    name.decode(errors="backslashreplace")
                    for name in index.xattrs(node)
                    if unescape(name) is not None and name != ORIGIN_XATTR
                ),
                "Whiteout": index.is_whiteout(node),
                "Opaque": index.is_opaque(node),
            }


def cat(layout: Layout, name: str, path: bytes) -> Iterator[bytes]:
    """The bytes of one file of a layer. Raises NotFound, BadInput for no file."""
    with layers.open_index(layout, name) as index:
        node = index.lookup(b"/".join(part for part in path.split(b"/") if part not in (b"", b".")))
        if node is None:
            raise NotFound(
                f"layer {names.short(name)} has no {os.fsdecode(path)}",
                hint="overlayctl layer files lists",
            )
        if not stat.S_ISREG(node.mode):
            raise BadInput(f"{os.fsdecode(path)} is no regular file in layer {names.short(name)}")
        for offset in range(0, node.size, _PIECE):
            yield index.read(node, offset, min(_PIECE, node.size - offset))


def _device(node: Node) -> str | None:
    if stat.S_IFMT(node.mode) not in (stat.S_IFCHR, stat.S_IFBLK):
        return None
    major, minor = device_number(node)
    return f"{major}:{minor}"


def _time(node: Node) -> str:
    """A node's time, RFC 3339 UTC with nanoseconds; beyond the calendar, seconds as ``@N``."""
    try:
        when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=node.mtime)
    except OverflowError:
        return f"@{node.mtime}.{node.mtime_ns:09}"
    return f"{when:%Y-%m-%dT%H:%M:%S}.{node.mtime_ns:09}Z"

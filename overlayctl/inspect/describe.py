"""Images and mounts in docker's words, for ``inspect``, ``ls`` and ``history``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from overlayctl import names
from overlayctl.digest import chain_ids
from overlayctl.errors import OverlayctlError
from overlayctl.layer import attach
from overlayctl.oci import created_by, said
from overlayctl.store import containers, gc, images, layers, snapshots

if TYPE_CHECKING:
    from overlayctl.layout import Layout
    from overlayctl.mount import Merged


# Of what an image need not say docker shows this.
_SAYS_NOTHING: dict[str, Any] = {
    "Env": [], "Cmd": None, "Entrypoint": None, "Labels": {}, "User": "", "WorkingDir": "",
}  # fmt: skip


def image_rows(layout: Layout) -> list[dict[str, Any]]:
    """One row for each image, newest first."""
    by_image: dict[str, list[str]] = {}
    for reference, image_hex in images.tags(layout).items():
        by_image.setdefault(image_hex, []).append(names.familiar(reference))
    users: dict[str, int] = {}
    for container in containers.readable(layout):
        users[container.image] = users.get(container.image, 0) + 1
    rows = []
    for image in images.readable(layout):
        recorded = image.record["layers"]
        rows.append(
            {
                "Id": image.id,
                "RepoTags": sorted(by_image.get(image.hex, [])),
                "Created": str(image.record.get("created") or image.created),
                "Size": sum(int(layer["size"]) for layer in recorded),
                "DiskUsage": sum(layers.disk(layout, name) for name in dict.fromkeys(image.layers)),
                "Layers": len(image.layers),
                "Containers": users.get(image.hex, 0),
            }
        )
    return sorted(rows, key=lambda row: (str(row["Created"]), str(row["Id"])), reverse=True)


def image(layout: Layout, found: images.Image, unseen: str | None) -> dict[str, Any]:
    """The ``image inspect`` of docker, with the paths of every layer bottom to top.

    ``unseen`` is why a layer could not be attached, where one is not.
    """
    config = images.config(layout, found)
    users = gc.layer_users(layout)
    attached = set(attach.attached(layout))
    history = created_by(config, len(found.layers))
    rows = []
    for number, (name, diff_id, chain_id) in enumerate(
        zip(found.layers, found.diff_ids, chain_ids(found.diff_ids), strict=True)
    ):
        others = [user for user in users.get(name, []) if user != f"image {found.hex}"]
        rows.append(
            {
                "DiffID": diff_id,
                "ChainID": chain_id,
                "DiffPath": layout.diff(name) if name in attached else None,
                "Attached": name in attached,
                "File": layout.layer_file(name),
                "Size": int(found.record["layers"][number]["size"]),
                "DiskUsage": layers.disk(layout, name),
                "CreatedBy": history[number],
                "SharedWith": others,
            }
        )
    # A path that is not attached is not there: null, never a place where nothing lies.
    lowers = [layout.diff(name) for name in snapshots.lowers(layout, found.layers)]
    visible = all(row["Attached"] for row in rows)
    return {
        "Id": found.id,
        "RepoTags": sorted(
            names.familiar(ref) for ref, hex_ in images.tags(layout).items() if hex_ == found.hex
        ),
        "RepoDigests": [],
        "Created": config.get("created") or found.created,
        "Author": config.get("author", ""),
        "Architecture": config.get("architecture", ""),
        "Variant": config.get("variant", ""),
        "Os": config.get("os", ""),
        "Config": _SAYS_NOTHING | {k: v for k, v in said(config).items() if v is not None},
        "Size": sum(row["Size"] for row in rows),
        "DiskUsage": sum(layers.disk(layout, name) for name in dict.fromkeys(found.layers)),
        "GraphDriver": {
            "Name": "overlayctl",
            "Data": {
                "LowerDir": ":".join(lowers) if visible else None,
                "UpperDir": None,
                "WorkDir": None,
                "MergedDir": None,
            },
        },
        "RootFS": {"Type": "layers", "Layers": list(found.diff_ids)},
        "Layers": rows,
        "AttachError": unseen,
        "Metadata": {"LoadedAt": found.created, "Origin": found.record.get("origin", "")},
    }


def history(layout: Layout, found: images.Image) -> list[dict[str, Any]]:
    """The history, newest first, each row that made a layer with that layer's real id."""
    config = images.config(layout, found)
    recorded = config.get("history")
    rows = [row for row in recorded if isinstance(row, dict)] if isinstance(recorded, list) else []
    if sum(not row.get("empty_layer") for row in rows) != len(found.layers):
        rows = [{"created_by": line} for line in created_by(config, len(found.layers))]
    attached = set(attach.attached(layout))
    number = 0
    listed = []
    for row in rows:
        entry: dict[str, Any] = {
            "Created": row.get("created", ""),
            "CreatedBy": row.get("created_by", ""),
            "Comment": row.get("comment", ""),
            "EmptyLayer": bool(row.get("empty_layer")),
            "Size": 0,
            "Id": None,
            "DiffID": None,
            "DiffPath": None,
        }
        if not row.get("empty_layer"):
            name = found.layers[number]
            entry |= {
                "Id": name[:12],
                "DiffID": found.diff_ids[number],
                "DiffPath": layout.diff(name) if name in attached else None,
                "Size": int(found.record["layers"][number]["size"]),
            }
            number += 1
        listed.append(entry)
    return listed[::-1]


def mount_rows(layout: Layout, views: Iterable[Merged]) -> list[dict[str, Any]]:
    """One row for each merged view."""
    known = {found.id: found.name for found in containers.readable(layout)}
    tags = {h: names.familiar(r) for r, h in images.tags(layout).items()}
    return [
        {
            "Kind": view.kind,
            "Id": view.id,
            "Name": known.get(view.id) or tags.get(view.id, ""),
            "MountPoint": view.target,
            "LowerDir": ":".join(_lower_paths(layout, view)),
            "UpperDir": view.upper or None,
            "WorkDir": view.work or None,
            "Options": view.options,
        }
        for view in views
    ]


def _lower_paths(layout: Layout, view: Merged) -> list[str]:
    """The diff paths in a view, topmost first; none where its record cannot be read."""
    read = snapshots.get if view.kind == "container" else images.get
    try:
        used = snapshots.lowers(layout, read(layout, view.id).layers)
    except OverlayctlError:
        return []
    return [layout.diff(name) for name in used]

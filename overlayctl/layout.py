"""Where everything lies. This page is the store's map.

    <root>/                              0700, a repository of plain files: ls and cat suffice
      overlayctl.json                    store id, format version, features
      layers/<diff_id hex>[-<facts>]/    layer.erofs: the tar that is a filesystem
      images/<image id hex>/             image.json (its layers), config.json, manifest.json
      tags/<encoded reference>           two lines: the image id, the reference
      snapshots/<key>/                   snapshot.json, keep, upper/, work.<k>/
      containers/<id>.json               image, configuration, snapshot key
      containers/names/<name>            a symlink to the id
      volumes/<name>/                    volume.json, _data/
      ingest/                            staging: everything here is disposable
      empty.erofs                        an image of nothing, the second lower of a lone layer
      attached/                          a private tmpfs with the mountpoints of this namespace

State the kernel knows (mounted, in use) is never stored.
"""

from __future__ import annotations

import os

FORMAT_VERSION = 1
COMPATIBLE: tuple[str, ...] = ()
READ_ONLY_COMPATIBLE: tuple[str, ...] = ()
INCOMPATIBLE: tuple[str, ...] = ("erofs-tar-1",)
DIRECTORIES = (
    "layers",
    "images",
    "tags",
    "snapshots",
    "containers",
    "containers/names",
    "volumes",
    "ingest",
    "attached",
)


class Layout:
    """The paths under one root, which is absolute and may contain any bytes."""

    __slots__ = ("root",)

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root)

    def path(self, *names: str) -> str:
        """A path below the root. The names are ours: digests, keys, encoded references."""
        return os.path.join(self.root, *names)

    @property
    def marker(self) -> str:
        """overlayctl.json."""
        return self.path("overlayctl.json")

    @property
    def empty(self) -> str:
        """The image of nothing."""
        return self.path("empty.erofs")

    @property
    def ingest(self) -> str:
        """Staging."""
        return self.path("ingest")

    @property
    def attached(self) -> str:
        """The mountpoint of the private tmpfs."""
        return self.path("attached")

    def layer(self, name: str) -> str:
        """A layer's directory."""
        return self.path("layers", name)

    def layer_file(self, name: str) -> str:
        """A layer's one file."""
        return self.path("layers", name, "layer.erofs")

    def diff(self, name: str) -> str:
        """Where a layer's tree is seen while it is attached: its diff path."""
        return self.path("attached", "layers", name)

    def merged(self, key: str) -> str:
        """Where a container's or an image's merged view is mounted."""
        return self.path("attached", "merged", key)

    def image(self, image_hex: str, name: str = "") -> str:
        """An image's directory, or a file in it."""
        return self.path("images", image_hex, name) if name else self.path("images", image_hex)

    def snapshot(self, key: str, name: str = "") -> str:
        """A snapshot's directory, or something in it."""
        return self.path("snapshots", key, name) if name else self.path("snapshots", key)

    def container(self, container_id: str) -> str:
        """A container's record."""
        return self.path("containers", container_id + ".json")

    def container_name(self, name: str) -> str:
        """The symlink that makes a container's name."""
        return self.path("containers", "names", name)

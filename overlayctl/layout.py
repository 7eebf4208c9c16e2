"""Where everything lies. This page is the store's map.

    <root>/                              0700, a repository of plain files: ls and cat suffice
      overlayctl.json                    store id, format version, features
      layers/<diff_id hex>[-<facts>]/    layer.erofs: the tar that is a filesystem
                                         tree/: the same, unpacked, where no kernel mounts it
                                         (made again: layer-2.erofs, tree-2/; the highest counts)
      images/<image id hex>/             image.json (its layers), config.json, manifest.json
      tags/<encoded reference>           two lines: the image id, the reference
      snapshots/<key>/                   snapshot.json, keep, upper/, work.<k>/
      containers/<id>.json               image, configuration, snapshot key
      containers/names/<name>            a symlink to the id
      volumes/<name>/                    volume.json, keep, made, fresh, _data/
      ingest/                            staging: everything here is disposable
      empty.erofs                        an image of nothing, the second lower of a lone layer
      attached/                          a private tmpfs with the mountpoints of this namespace:
                                         layers/<layer>/diff, merged/<key>

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


def generation(name: str, stem: str, suffix: str) -> int:
    """1 for ``<stem><suffix>``, N for ``<stem>-N<suffix>``, 0 for any other name."""
    if name == stem + suffix:
        return 1
    number = name.removeprefix(stem + "-").removesuffix(suffix)
    plain = number.isascii() and number.isdigit() and not number.startswith("0")
    return int(number) if plain and int(number) > 1 and name == f"{stem}-{number}{suffix}" else 0


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

    def layer_file(self, name: str, *, after: int = 0) -> str:
        """A layer's file of today: the highest of layer.erofs, layer-2.erofs, and so on.

        ``after`` 1 gives the one that a repair makes next.
        """
        return self._newest(name, "layer", ".erofs", after)

    def layer_tree(self, name: str, *, after: int = 0) -> str:
        """A layer's unpacked tree of today, as ``layer_file`` finds its file."""
        return self._newest(name, "tree", "", after)

    def _newest(self, name: str, stem: str, suffix: str, after: int) -> str:
        directory = self.path("layers", name)
        try:
            numbers = [generation(found, stem, suffix) for found in os.listdir(directory)]
        except (FileNotFoundError, NotADirectoryError):
            numbers = []
        number = max(numbers, default=0) + after
        return os.path.join(directory, f"{stem}-{number}{suffix}" if number > 1 else stem + suffix)

    def attach_point(self, name: str) -> str:
        """Where a layer's own tmpfs is mounted, which holds its diff path."""
        return self.path("attached", "layers", name)

    def diff(self, name: str) -> str:
        """Where a layer's tree is seen while it is attached: its diff path."""
        return self.path("attached", "layers", name, "diff")

    def merged(self, key: str) -> str:
        """Where a container's or an image's merged view is mounted."""
        return self.path("attached", "merged", key)

    def run(self, key: str, *names: str) -> str:
        """Where the files of the processes in a container are, or one of them."""
        return self.path("attached", "run", key, *names)

    def held(self, key: str) -> str:
        """The mark of a container that a person mounted: nobody else unmounts it."""
        return self.path("attached", "held", key)

    def image(self, image_hex: str, name: str = "") -> str:
        """An image's directory, or a file in it."""
        return self.path("images", image_hex, name) if name else self.path("images", image_hex)

    def snapshot(self, key: str, name: str = "") -> str:
        """A snapshot's directory, or something in it."""
        return self.path("snapshots", key, name) if name else self.path("snapshots", key)

    def container(self, container_id: str) -> str:
        """A container's record."""
        return self.path("containers", container_id + ".json")

    def volume(self, volume: str, name: str = "") -> str:
        """A volume's directory, or something in it."""
        return self.path("volumes", volume, name) if name else self.path("volumes", volume)

    def container_name(self, name: str) -> str:
        """The symlink that makes a container's name."""
        return self.path("containers", "names", name)

"""What is mounted in a container beside its tree, as detached mounts, and as a runtime is told.

Every source is opened here, once. Neither runtime finds it by a path that somebody could bend.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from overlayctl.kernel import furnishing, libc
from overlayctl.placed import is_of_kernel
from overlayctl.runtime.builtin import Placement
from overlayctl.runtime.bundle import Source
from overlayctl.runtime.targets import Targets

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import ExitStack

    from overlayctl.placed import Placed
    from overlayctl.runtime.volumes import Bound

_ATTRIBUTES = {
    "nosuid": libc.MOUNT_ATTR_NOSUID,
    "nodev": libc.MOUNT_ATTR_NODEV,
    "noexec": libc.MOUNT_ATTR_NOEXEC,
    "noatime": libc.MOUNT_ATTR_NOATIME,
    "strictatime": libc.MOUNT_ATTR_STRICTATIME,
    "nodiratime": libc.MOUNT_ATTR_NODIRATIME,
}
_FLAGS = ("sync", "dirsync")
_PROPAGATION = {"shared": libc.MS_SHARED, "slave": libc.MS_SLAVE, "private": libc.MS_PRIVATE}


def files(root: int, directory: str, names: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """Where in the container its own files are mounted, and what is; ``root`` is its merged root.

    The places are there then, on whose way no link is. What is ``taken`` is somebody else's,
    and an image whose link leads into a filesystem of the kernel does without the file.
    """
    places = Targets(root)
    found = {}
    for name in names:
        wanted = os.fsencode(f"/etc/{name}")
        place = os.fsdecode(places.resolve(wanted))
        if place not in taken and not is_of_kernel(place):
            places.resolve(wanted, make="file")
            found[place] = os.path.join(directory, name)
    return found


def place(
    owned: ExitStack, own: str, root: int, bounds: Iterable[Bound], files: Mapping[str, str]
) -> tuple[list[Placement], list[Source]]:
    """The mounts in the order in which they are made; ``own`` is the process's directory.

    All that is asked of them they are already: a runtime only has to show them.
    """
    found = [_bound(owned, root, one) for one in bounds]
    found += [(Source(target, path), _copy(owned, path)) for target, path in files.items()]
    found.sort(key=lambda each: each[0].target.count("/"))
    placements, sources = [], []
    for number, (source, mount) in enumerate(found):
        staged = os.path.join(own, "mounts", str(number))
        if stat.S_ISDIR(os.fstat(mount).st_mode):
            os.mkdir(staged, 0o700)
        else:
            os.close(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        placements.append(Placement(source.target, mount, staged))
        sources.append(source._replace(source=staged))
    return placements, sources


def sources(bounds: Iterable[Bound], files: Mapping[str, str]) -> list[Source]:
    """The mounts by their paths on the host, for who makes them later."""
    found = [Source(b.target, b.source, b.placed.read_only, b.placed.options) for b in bounds]
    found += [Source(target, path) for target, path in files.items()]
    return sorted(found, key=lambda one: one.target.count("/"))


def _bound(owned: ExitStack, root: int, one: Bound) -> tuple[Source, int]:
    placed = one.placed
    if placed.kind == "tmpfs":
        return Source(one.target), _tmpfs(owned, root, one.target, placed)
    mount = _copy(owned, one.source)
    change = libc.MOUNT_ATTR_RDONLY if placed.read_only else 0
    libc.mount_setattr(mount, add=change, propagation=_propagation(placed.options), recursive=True)
    return Source(one.target, one.source, options=placed.options), mount


def _copy(owned: ExitStack, path: str) -> int:
    mount = libc.open_tree(path, clone=True, recursive=True)
    owned.callback(os.close, mount)
    return mount


def _propagation(options: Iterable[str]) -> int:
    """How mounts made later travel; docker's default is not at all."""
    word = next((one.removeprefix("r") for one in options), "private")
    return _PROPAGATION.get(word, libc.MS_PRIVATE)


def _tmpfs(owned: ExitStack, root: int, target: str, placed: Placed) -> int:
    """A new tmpfs with options of mount(8), else with the mode of what it covers."""
    attributes = libc.MOUNT_ATTR_RDONLY if placed.read_only else 0
    options: dict[str, str | None] = {}
    for word in placed.options:
        name, equals, value = word.partition("=")
        attributes |= _ATTRIBUTES.get(word, 0)
        if equals:
            options[name] = value
        elif word in _FLAGS:
            options[word] = None
    if "mode" not in options:
        with suppress(OSError):
            covered = libc.openat2(root, target, os.O_PATH, resolve=libc.RESOLVE_IN_ROOT)
            options["mode"] = f"{stat.S_IMODE(os.fstat(covered).st_mode):o}"
            os.close(covered)
    mount = furnishing.new("tmpfs", options, attributes)
    owned.callback(os.close, mount)
    return mount

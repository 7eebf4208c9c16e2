"""Mounts as values: whoever knows what to mount returns these, only ``kernel.mounter`` acts."""

from __future__ import annotations

from typing import NamedTuple


class Erofs(NamedTuple):
    """One layer file (or the empty image) as a read-only EROFS, never executable in place.

    ``loop`` asks for a loop device instead of the kernel reading the file itself;
    ``directio`` has the kernel bypass the page cache of the file (6.12 and later).
    """

    image: str
    loop: bool = False
    directio: bool = False


class Overlay(NamedTuple):
    """An overlay. ``lowerdirs`` are topmost first; each must be the root of an EROFS mount.

    Without ``upperdir`` the mount is read-only. ``source`` names the owner in the mount table.
    """

    source: str
    lowerdirs: tuple[str, ...]
    upperdir: str = ""
    workdir: str = ""
    volatile: bool = False
    xino: bool = False


class Tmpfs(NamedTuple):
    """A private tmpfs that holds nothing but mountpoints."""

    source: str


Mount = Erofs | Overlay | Tmpfs


class Merged(NamedTuple):
    """A merged view that is mounted: ``kind`` is image or container. Lowers are topmost first."""

    kind: str
    id: str
    target: str
    lowers: tuple[str, ...]
    upper: str
    work: str
    options: str
    pid: int

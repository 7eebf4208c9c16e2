"""Mounts as values: whoever knows what to mount returns these, only ``kernel.mounter`` acts."""

from __future__ import annotations

from typing import Literal, NamedTuple

Rung = Literal["auto", "fds", "strings", "mount"]
"""How the kernel is given an overlay: layers by descriptor, by name, or all by mount(2).

``auto`` is the first of them that this kernel has.
"""


MAX_LOWERS = 500
"""As many layers as the kernel's overlay takes."""


class Erofs(NamedTuple):
    """One layer file (or the empty image) as a read-only EROFS, never executable in place.

    ``loop`` asks for a loop device instead of the kernel reading the file itself;
    ``directio`` has the kernel bypass the page cache of the file (6.12 and later).
    """

    image: str
    loop: bool = False
    directio: bool = False


class Bind(NamedTuple):
    """A directory once more, read-only and never executable in place."""

    directory: str


class Lower(NamedTuple):
    """An attached layer: the path where it is seen, and how to know that this is it.

    An EROFS is known by its ``uuid`` and the end of its file's path (``file``), a directory
    by being ``tree``; where there is no tree, an empty read-only tmpfs stands for nothing. An
    upper directory that is only read is its own ``path`` and ``tree``.
    """

    path: str
    uuid: bytes
    file: str
    tree: str = ""


class Overlay(NamedTuple):
    """An overlay. ``lowers`` are topmost first.

    Without ``upperdir`` the mount is read-only. ``source`` names the owner in the mount table.
    """

    source: str
    lowers: tuple[Lower, ...]
    upperdir: str = ""
    workdir: str = ""
    volatile: bool = False
    xino: bool = False
    rung: Rung = "auto"


class Tmpfs(NamedTuple):
    """A private tmpfs that holds nothing but mountpoints, or read-only and empty, nothing."""

    source: str
    read_only: bool = False


Mount = Erofs | Bind | Overlay | Tmpfs


class Merged(NamedTuple):
    """A merged view that is mounted: ``kind`` is image or container; ``pid`` sees it."""

    kind: str
    id: str
    target: str
    upper: str
    work: str
    options: str
    pid: int

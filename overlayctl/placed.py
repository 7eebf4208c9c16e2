"""What is mounted into a container beside its own tree: volumes, directories of the host, tmpfs."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["volume", "bind", "tmpfs"]


class Placed(NamedTuple):
    """One of them.

    ``source`` is a volume's name or a path of the host; a tmpfs has none. ``target`` is an
    absolute path in the container, without dots. ``copy`` is whether the image's content goes
    into a new, empty volume; ``anonymous`` whether nobody gave the volume its name.
    """

    kind: Kind
    source: str
    target: str
    read_only: bool = False
    options: tuple[str, ...] = ()
    copy: bool = True
    anonymous: bool = False

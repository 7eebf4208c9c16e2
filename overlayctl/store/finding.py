"""What a check says."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """One thing that is wrong. ``users`` are the images and snapshots it harms."""

    tag: str
    path: str
    message: str
    users: tuple[str, ...] = ()

"""Who a container's process is: names are looked up in the image's own files, which may lie.

They are found below the container's root and nowhere else, opened only where they are
regular files, and read up to a limit. One that is anything else counts as not there.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import NamedTuple

from overlayctl.errors import BadInput, HostCannot, OverlayctlError
from overlayctl.kernel import libc
from overlayctl.runtime.targets import Targets

_LARGEST = 4 << 20
_HIGHEST = (1 << 31) - 1
_RULES = libc.RESOLVE_IN_ROOT | libc.RESOLVE_NO_MAGICLINKS


class User(NamedTuple):
    """Numbers; ``groups`` holds ``gid``, too."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def resolve(root: int, text: str) -> User:
    """The user of ``USER[:GROUP]``, as docker finds it; ``root`` is an fd of the merged root.

    Numbers need not be in the files. Raises BadInput for a name that is not there.
    """
    wanted, _, group = text.partition(":")
    name, uid, gid, home = "", 0, 0, "/"
    number = _number(wanted or "0")
    for fields in _entries(root, "etc/passwd", 6):
        its = _number(fields[2])
        if its is not None and (its == number if number is not None else fields[0] == wanted):
            name, uid, gid, home = fields[0], its, _number(fields[3]) or 0, fields[5] or "/"
            break
    else:
        if number is None:
            raise _unknown("user", wanted, "etc/passwd")
        uid = number
    if not group:
        found = [
            its
            for fields in _entries(root, "etc/group", 4)
            if name and name in fields[3].split(",") and (its := _number(fields[2])) is not None
        ]
        return User(uid, gid, tuple(dict.fromkeys((gid, *found))), home)
    number = _number(group)
    for fields in _entries(root, "etc/group", 3):
        its = _number(fields[2])
        if its is not None and (its == number if number is not None else fields[0] == group):
            return User(uid, its, (its,), home)
    if number is None:
        raise _unknown("group", group, "etc/group")
    return User(uid, number, (number,), home)


def refuse_waiting(root: int) -> None:
    """Raise HostCannot for a file that runc and crun open themselves, whatever it is.

    They would wait for somebody to write in a FIFO, or read what is typed.
    """
    places = Targets(root)
    for path in (b"/etc/passwd", b"/etc/group"):
        with suppress(OverlayctlError, OSError):
            found = places.resolve(path)
            info = places.stat(found)
            covered = found.startswith((b"/proc/", b"/dev/", b"/sys/"))
            if covered or (info and not stat.S_ISREG(info.st_mode)):
                break
    else:
        return
    raise HostCannot(
        f"{path.decode()} of the container is no regular file, and a runtime would open it",
        hint="--runtime builtin looks at regular files alone",
    )


def _unknown(kind: str, name: str, file: str) -> BadInput:
    return BadInput(f"/{file} of the container has no {kind} {name!r}", hint="-u UID[:GID]")


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()) or len(text) > 10:
        return None
    return int(text) if int(text) <= _HIGHEST else None


def _entries(root: int, path: str, fields: int) -> list[list[str]]:
    """The lines of a file like passwd(5) with at least that many fields."""
    lines = _read(root, path).decode("utf-8", "surrogateescape").split("\n")
    found = [line.strip().split(":") for line in lines if not line.startswith("#")]
    return [entry for entry in found if len(entry) >= fields]


def _read(root: int, path: str) -> bytes:
    """The content of a regular file below ``root``, nothing if it is none or too large."""
    try:
        # Only a place: neither a device nor a FIFO notices.
        place = libc.openat2(root, path, os.O_PATH, resolve=_RULES)
    except OSError:
        return b""
    try:
        info = os.fstat(place)
        if not stat.S_ISREG(info.st_mode) or info.st_size > _LARGEST:
            return b""
        with open(f"/proc/self/fd/{place}", "rb", buffering=0) as file:
            return file.read(_LARGEST) or b""
    finally:
        os.close(place)

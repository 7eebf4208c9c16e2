"""Control groups: which a process is in, joining them, and taking away one that is empty."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

from overlayctl.kernel import mounttable


def _hierarchies() -> Iterator[tuple[str, str]]:
    """Where each hierarchy is mounted, and the controllers in its name; none is the unified one."""
    for mount in mounttable.read():
        if mount.fs_type == "cgroup2":
            yield mount.mount_point, ""
        elif mount.fs_type == "cgroup":
            yield mount.mount_point, mount.super_options


def entrances(text: str) -> list[int]:
    """Fds of the groups that /proc/PID/cgroup, ``text``, names (cgroups(7)): for ``join``.

    A hierarchy that is not mounted, or may not be written, is left alone.
    """
    there = list(_hierarchies())
    found = []
    for line in text.splitlines():
        _, names, path = line.split(":", 2)
        for place, options in there:
            wanted = set(names.split(",")) if names else set()
            if ".." not in path and (wanted <= set(options.split(",")) if wanted else not options):
                with suppress(OSError):
                    found.append(os.open(f"{place}{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
                break
    return found


def join(entrances: Iterable[int]) -> None:
    """Move this process into the groups, whose fds are closed then."""
    for fd in entrances:
        with suppress(OSError):
            os.write(fd, b"0")
        os.close(fd)


def remove(name: str) -> None:
    """Take away the groups of that name below each hierarchy's root, if they are empty."""
    for place, _ in _hierarchies():
        with suppress(OSError):
            os.rmdir(os.path.join(place, name))

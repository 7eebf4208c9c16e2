"""An OCI runtime bundle's config.json: what a container is, as runc and crun want it told.

Nothing in it is more than the caller has: no capability and no limit (runtime-spec, config.md
and config-linux.md). What is masked and read-only is docker's list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from overlayctl.errors import BadInput

if TYPE_CHECKING:
    from overlayctl.runtime.users import User

MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
    "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list",
    "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
)  # fmt: skip
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


class Process(NamedTuple):
    """What is executed. ``directory`` is absolute, ``capabilities`` are those it may get."""

    words: tuple[str, ...]
    environment: tuple[str, ...]
    directory: str
    user: User
    terminal: bool
    capabilities: tuple[str, ...]


class Source(NamedTuple):
    """What is mounted in a container beside its tree.

    ``source`` is a path of the host, or nothing for a tmpfs. The ``options`` of a tmpfs are those
    of mount(8), of a path how mounts made later travel.
    """

    target: str
    source: str = ""
    read_only: bool = False
    options: tuple[str, ...] = ()


class Room(NamedTuple):
    """Where it is executed: ``root`` is the path of the merged view.

    ``cgroup`` is the name of one of its own, if it is to have one, ``sees_cgroup`` whether the
    files of cgroups are mounted in it.
    """

    root: str
    hostname: str
    network: str
    read_only: bool
    sources: tuple[Source, ...] = ()
    cgroup: str = ""
    sees_cgroup: bool = True


def refuse_impossible(process: Process) -> None:
    """Raise BadInput for what execve(2) cannot be given: a NUL, no bytes, a nameless variable."""
    for what, texts in (
        ("command", process.words),
        ("environment", process.environment),
        ("working directory", (process.directory,)),
    ):
        for text in texts:
            nameless = what == "environment" and text.startswith("=")
            if nameless or not _is_bytes(text):
                why = "a variable without a name" if nameless else "what no process can be given"
                raise BadInput(
                    f"the container's {what} has {why}: {text[:80]!r}",
                    hint="the image may say so: give -e, -w or a command of your own",
                )


def _is_bytes(text: str) -> bool:
    """Whether it is some file's name or argument: no NUL, and surrogates for odd bytes alone."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def document(process: Process, room: Room) -> bytes:
    """The config.json. Raises BadInput for words that JSON cannot carry: no UTF-8."""
    namespaces = ["pid", "mount", "ipc", "uts"]
    if room.network == "none":
        namespaces.append("network")
    if room.sees_cgroup:
        namespaces.append("cgroup")
    linux: dict[str, Any] = {
        "namespaces": [{"type": name} for name in namespaces],
        "maskedPaths": list(MASKED),
        "readonlyPaths": list(READ_ONLY),
        # What every container may use, a runtime adds.
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    }
    for word in ("shared", "slave"):
        if any(word in option for one in room.sources if one.source for option in one.options):
            linux.setdefault("rootfsPropagation", f"r{word}")
    if room.cgroup:
        linux["cgroupsPath"] = f"/{room.cgroup}"
    whole = {
        "ociVersion": "1.0.2",
        "process": _process(process),
        "root": {"path": room.root, "readonly": room.read_only},
        "hostname": room.hostname,
        "mounts": [*_filesystems(room), *map(_mount, room.sources)],
        "linux": linux,
    }
    try:
        return json.dumps(whole, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            "a runtime's config.json cannot hold words that are not UTF-8",
            hint="--runtime builtin takes any bytes",
        ) from error


def _process(process: Process) -> dict[str, Any]:
    names = list(process.capabilities)
    sets: Sequence[str] = ("bounding", "effective", "permitted")
    return {
        "terminal": process.terminal,
        "user": {
            "uid": process.user.uid,
            "gid": process.user.gid,
            "additionalGids": list(process.user.groups),
        },
        "args": list(process.words),
        "env": list(process.environment),
        "cwd": process.directory,
        # As execve(2) would leave them to a user who is not root.
        "capabilities": dict.fromkeys(sets if not process.user.uid else sets[:1], names),
        "noNewPrivileges": False,
    }


def _filesystems(room: Room) -> list[dict[str, Any]]:
    strict = ["nosuid", "noexec", "nodev"]
    devpts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
    table: list[tuple[str, str, list[str]]] = [
        ("/proc", "proc", strict),
        ("/dev", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", devpts),
        ("/dev/shm", "tmpfs", [*strict, "mode=1777", "size=65536k"]),  # noqa: S108
        ("/dev/mqueue", "mqueue", strict),
        ("/sys", "sysfs", [*strict, "ro"]),
    ]
    if room.sees_cgroup:
        table.append(("/sys/fs/cgroup", "cgroup", [*strict, "ro"]))
    return [
        {"destination": place, "type": kind, "source": kind, "options": options}
        for place, kind, options in table
    ]


def _mount(one: Source) -> dict[str, Any]:
    if not one.source:
        options = [*one.options, "ro" if one.read_only else "rw"]
        return {"destination": one.target, "type": "tmpfs", "source": "tmpfs", "options": options}
    options = ["rbind", *(one.options or ["rprivate"]), "ro" if one.read_only else "rw"]
    return {"destination": one.target, "type": "bind", "source": one.source, "options": options}

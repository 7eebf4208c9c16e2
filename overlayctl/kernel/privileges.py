"""Capabilities: which there are, which this process may hand on, and giving the rest up."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

from overlayctl.kernel import libc

# include/uapi/linux/capability.h, from 0.
_NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID",
    "SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW",
    "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT",
    "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD",
    "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG",
    "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE",
)  # fmt: skip
_DEFAULT = frozenset({
    "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP",
    "SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
})  # fmt: skip
"""What a container has where nothing else is said: docker's list."""


def handed_on() -> tuple[str, ...]:
    """The names (``CAP_...``) of docker's default capabilities that this process has itself."""
    own = _set("CapBnd") & _set("CapEff")
    return tuple(
        f"CAP_{name}"
        for number, name in enumerate(_NAMES)
        if name in _DEFAULT and own >> number & 1
    )


def bounding(proc: str) -> frozenset[str]:
    """The names in the bounding set of a process, given by its directory in a /proc."""
    has = _set("CapBnd", proc)
    return frozenset(f"CAP_{name}" for number, name in enumerate(_NAMES) if has >> number & 1)


def keep_only(names: Iterable[str]) -> None:
    """Drop every other capability from the bounding set: root executes with no more than that.

    Raises OSError.
    """
    kept = {name.removeprefix("CAP_") for name in names}
    for number, name in enumerate(_NAMES):
        # EINVAL: a capability that this kernel does not have.
        if name not in kept:
            with suppress(OSError):
                libc.drop_from_bounding_set(number)
    libc.drop_inheritable()


def become(uid: int, gid: int, groups: Iterable[int]) -> None:
    """Become that user for good."""
    os.setgroups(list(groups))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _set(name: str, proc: str = "/proc/self") -> int:
    """A set of a process (proc_pid_status(5))."""
    with open(f"{proc}/status") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key == name:
                return int(value, 16)
    return 0

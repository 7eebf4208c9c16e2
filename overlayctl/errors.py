"""Every error a front end may meet. A class is a stable code and an exit status.

    OverlayctlError         error               1   failed
    |- BadInput             bad-input           1   what was given is not what it should be
    |  |- BadTar            bad-tar             1   a layer tar not to be trusted
    |  |- BadArchive        bad-archive         1   no image, or one that contradicts itself
    |  |- DigestMismatch    digest-mismatch     1   the bytes are not the promised ones
    |  `- LimitExceeded     limit-exceeded      1   larger than a stated limit
    |- DiskFull             disk-full           1   no room: bytes, inodes or a quota
    |- Usage                usage               2   the call's words are off
    |- CannotExecute        cannot-execute    126   a container's command is no program
    |- NotFound             not-found           3
    |  `- CommandNotFound   command-not-found 127   a container's command is not there
    |- Conflict             conflict            4   in the way of something that exists
    |  |- InUse             in-use              4   somebody needs it: the holders are named
    |  `- Ambiguous         ambiguous           4   several things answer to that name
    |- HostCannot           host-cannot         5   this host, kernel or privilege
    |  `- KernelRefused     kernel-refused      5   a system call failed, with the kernel's words
    |- Damaged              damaged             6   stored bytes are not what they were
    `- Locked               locked              7   waited for a lock in vain

``str(error)`` says what and why; ``hint`` is what to type next; ``details`` are
plain values for ``--json``. Nothing but a front end catches these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple


class OverlayctlError(Exception):
    """The root of the tree."""

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", **details: object) -> None:
        super().__init__(message)
        self.hint = hint
        self.details: Mapping[str, object] = details


class BadInput(OverlayctlError):
    """What was given is not what it should be."""

    code = "bad-input"


class BadTar(BadInput):
    """A layer tar that cannot be trusted: cut, corrupt, or against the rules."""

    code = "bad-tar"


class BadArchive(BadInput):
    """Not an image archive, or one that contradicts itself."""

    code = "bad-archive"


class DigestMismatch(BadInput):
    """The bytes are not the promised ones."""

    code = "digest-mismatch"

    def __init__(self, what: str, *, expected: str, actual: str) -> None:
        super().__init__(
            f"{what} does not match its digest: expected {expected}, got {actual}",
            hint="the archive is damaged: fetch or save it again",
            what=what,
            expected=expected,
            actual=actual,
        )


class LimitExceeded(BadInput):
    """Larger than a stated limit."""

    code = "limit-exceeded"


class DiskFull(OverlayctlError):
    """The store's disk has too few bytes or inodes, or a quota is used up.

    What is needed is not known where the kernel refused in the course of the work: then
    ``said`` are its words. ``free_inodes`` is None on a filesystem that does not count them.
    """

    code = "disk-full"

    def __init__(
        self, *, free_bytes: int, free_inodes: int | None, needed_bytes: int = 0,
        needed_inodes: int = 0, reserve: int = 0, said: str = "",
    ) -> None:  # fmt: skip
        missing_bytes = max(0, needed_bytes - free_bytes)
        missing_inodes = 0 if free_inodes is None else max(0, needed_inodes - free_inodes)
        parts = []
        if missing_bytes:
            kept = f" ({reserve:,} of them as a reserve)" if reserve else ""
            parts.append(
                f"{needed_bytes:,} bytes are needed{kept}, {free_bytes:,} are free, "
                f"{missing_bytes:,} are missing"
            )
        if missing_inodes:
            parts.append(
                f"{needed_inodes:,} inodes are needed, {free_inodes:,} are free, "
                f"{missing_inodes:,} are missing"
            )
        hint = "make room with overlayctl image rm and container rm, then repeat the command"
        if not parts:
            inodes = "" if free_inodes is None else f" and {free_inodes:,} inodes"
            parts.append(f"{said}, with {free_bytes:,} bytes{inodes} free")
            if free_inodes is None:
                # What is full there may be the metadata (docs/limits.md).
                hint += "; on btrfs it finds the room within a minute"
        super().__init__(
            f"the store's disk is full: {'; '.join(parts)}",
            hint=hint,
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
            missing_bytes=missing_bytes,
            needed_inodes=needed_inodes,
            free_inodes=free_inodes,
            missing_inodes=missing_inodes,
        )
        self.free_bytes = free_bytes
        self.free_inodes = free_inodes


class Usage(OverlayctlError):
    """The call's words are off."""

    code = "usage"
    exit_status = 2


class NotFound(OverlayctlError):
    """Nothing answers to that name."""

    code = "not-found"
    exit_status = 3


class CommandNotFound(NotFound):
    """The command of a container is not there; the status is a shell's."""

    code = "command-not-found"
    exit_status = 127


class CannotExecute(OverlayctlError):
    """The command of a container is there and cannot be executed; the status is a shell's."""

    code = "cannot-execute"
    exit_status = 126


class Conflict(OverlayctlError):
    """In the way of something that exists."""

    code = "conflict"
    exit_status = 4


class Holder(NamedTuple):
    """Somebody who needs a thing: what kind, which one, and what would let go of it."""

    kind: str
    name: str
    release: str


class InUse(Conflict):
    """Somebody needs it. Every holder is named."""

    code = "in-use"

    def __init__(self, what: str, holders: Sequence[Holder]) -> None:
        named = ", ".join(f"{h.kind} {h.name}" for h in holders)
        super().__init__(
            f"{what} is in use by {named}",
            hint="; ".join(dict.fromkeys(h.release for h in holders if h.release)),
            what=what,
            holders=[h._asdict() for h in holders],
        )
        self.holders = tuple(holders)


class Ambiguous(Conflict):
    """Several things answer to that name."""

    code = "ambiguous"

    def __init__(self, name: str, candidates: Sequence[str]) -> None:
        super().__init__(
            f"{name!r} is ambiguous: {', '.join(candidates)}",
            hint="give more of the id",
            name=name,
            candidates=list(candidates),
        )


class HostCannot(OverlayctlError):
    """This host, its kernel, or this process's privilege does not allow it."""

    code = "host-cannot"
    exit_status = 5


class KernelRefused(HostCannot):
    """A system call failed: which, on what, and what the kernel itself said."""

    code = "kernel-refused"

    def __init__(
        self, call: str, what: str, error: int, *, log: Sequence[str] = (), hint: str = ""
    ) -> None:
        import os

        said = "; ".join(log) or os.strerror(error)
        super().__init__(
            f"{call} {what}: {said}", hint=hint, call=call, what=what, errno=error, log=list(log)
        )
        self.errno = error


class Damaged(OverlayctlError):
    """Stored bytes are not what they were."""

    code = "damaged"
    exit_status = 6


class Locked(OverlayctlError):
    """Waited for a lock in vain."""

    code = "locked"
    exit_status = 7

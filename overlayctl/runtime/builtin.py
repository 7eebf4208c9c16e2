"""The built-in runtime: a container's process, made by system calls of this program.

It keeps apart what a container writes, and its processes, names and network. It is no
security boundary: there is no seccomp filter. There is no device cgroup either, so a container
makes no devices, and those that lie in its tree or its volumes open nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, NoReturn

from overlayctl.errors import CannotExecute, CommandNotFound, HostCannot, OverlayctlError
from overlayctl.kernel import furnishing, libc, namespaces, privileges, pseudoterminal, waiting
from overlayctl.runtime import talk
from overlayctl.runtime.bundle import MASKED, READ_ONLY, Process

_MAKES_DEVICES = "CAP_MKNOD"
# As many as execve(2) follows.
_INTERPRETERS = 5


class Placement(NamedTuple):
    """A detached mount, to be attached at an absolute path of the container.

    ``staged`` is where another runtime finds it.
    """

    target: str
    mount: int
    staged: str


class Built(NamedTuple):
    """A container's root, a detached mount, and what is mounted in it, in this order.

    Without a root, -1, it is this host's.
    """

    root: int
    placements: tuple[Placement, ...]
    hostname: str
    network: str
    read_only: bool


def run(process: Process, built: Built, place: str, end: socket.socket) -> int:
    """Start the process in new namespaces; its pid. Its root comes to be at ``place`` first.

    It is the first of a pid namespace. What goes wrong it tells to ``end``.
    """
    names = tuple(name for name in process.capabilities if name != _MAKES_DEVICES)
    process = process._replace(capabilities=names)
    if built.network == "none":
        from overlayctl.kernel import netns

        libc.unshare(libc.CLONE_NEWNET)
        netns.loopback_up()

    def act() -> NoReturn:
        with telling(end, "cannot make the container's namespaces"):
            namespaces.own_mounts()
            libc.unshare(libc.CLONE_NEWIPC | libc.CLONE_NEWUTS)
            with suppress(OSError):  # a kernel without cgroups
                libc.unshare(libc.CLONE_NEWCGROUP)
        with telling(end, "cannot make the container's root"):
            libc.move_mount(built.root, place)
            _furnish(built)
            furnishing.enter(built.root)
            socket.sethostname(built.hostname)
        execute(process, end)

    kept = [built.root, end.fileno(), *(one.mount for one in built.placements)]
    return namespaces.start(act, alone=True, keep=kept)


def _furnish(built: Built) -> None:
    libc.mount_setattr(built.root, add=libc.MOUNT_ATTR_NODEV)
    furnishing.furnish(built.root)
    for path in READ_ONLY:
        furnishing.protect(built.root, path)
    for path in MASKED:
        furnishing.mask(built.root, path)
    for one in built.placements:
        # Who names a device as what is to be mounted wants it.
        if not _is_device(os.fstat(one.mount).st_mode):
            libc.mount_setattr(one.mount, add=libc.MOUNT_ATTR_NODEV, recursive=True)
        furnishing.mount_at(built.root, one.target, one.mount)
    if built.read_only:
        libc.mount_setattr(built.root, add=libc.MOUNT_ATTR_RDONLY)


def _is_device(mode: int) -> bool:
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def execute(process: Process, end: socket.socket) -> NoReturn:
    """Become the process, in the namespaces that this one is in."""
    with telling(end, "cannot become the container's process"):
        os.setsid()
        if process.terminal:
            master, slave = pseudoterminal.new()
            talk.terminal(end, master)
            os.close(master)
            pseudoterminal.take(slave)
            if slave > 2:
                os.close(slave)
        os.umask(0o022)
        libc.new_session_keyring()
        with _hint(f"-w: {process.directory!r} must be a directory"):
            furnishing.directory(process.directory)
        privileges.keep_only(process.capabilities)
        privileges.become(process.user.uid, process.user.gid, process.user.groups)
        libc.die_with_parent(signal.SIGKILL)
    environment = dict(one.split("=", 1) for one in process.environment)
    with telling(end, "cannot look at the command"):
        _refuse_ourselves(process.words[0], environment.get("PATH", ""))
    namespaces.listen()
    try:
        os.execvpe(process.words[0], process.words, environment)  # noqa: S606
    except OSError as error:
        talk.failed(end, not_executed(process.words[0], error.strerror, error))
        os._exit(125)


def _refuse_ourselves(word: str, path: str) -> None:
    """Raise CannotExecute where a link in /proc leads to what executes this very process.

    That is a file of the host: what it becomes in there could write to it once we have ended.
    """
    own = os.stat("/proc/self/exe")
    for first in [word] if "/" in word else [f"{one}/{word}" for one in path.split(":")]:
        place = first
        for _ in range(_INTERPRETERS):
            try:
                fd = os.open(place, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                break
            try:
                info = os.fstat(fd)
                if os.path.samestat(info, own) and _is_magic(place):
                    raise CannotExecute(
                        f"{word!r} in the container leads to a program of the host",
                        hint="before a command has begun /proc/self/exe is the runtime's",
                    )
                if not stat.S_ISREG(info.st_mode):
                    break
                with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as file:
                    start = file.read(256)
            finally:
                os.close(fd)
            words = start[2:].split(b"\n")[0].split() if start.startswith(b"#!") else []
            if not words:
                break
            place = os.fsdecode(words[0])


def _is_magic(place: str) -> bool:
    """Whether the path leads through a link of /proc that is none of a tree (openat2(2))."""
    try:
        fd = libc.openat2(libc.AT_FDCWD, place, os.O_PATH, resolve=libc.RESOLVE_NO_MAGICLINKS)
    except OSError:
        return True
    os.close(fd)
    return False


def not_executed(word: str, why: str | None, error: OSError | None = None) -> OverlayctlError:
    """What to say where a command was not executed: it is not there, or it cannot be."""
    if error is not None and furnishing.is_missing(error):
        hint = "overlayctl run IMAGE ls /bin shows some that it has"
        if word.startswith("-"):
            hint = "options come before the name of the image or container: what follows is run"
        return CommandNotFound(f"the container has no command {word!r}: {why}", hint=hint)
    return CannotExecute(f"cannot execute {word!r} in the container: {why}", hint="chmod +x")


@contextmanager
def _hint(hint: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostCannot(str(error), hint=hint) from error


@contextmanager
def telling(end: socket.socket, what: str) -> Iterator[None]:
    """Tell ``end`` what goes wrong in the block, and be gone."""
    try:
        yield
    except OverlayctlError as error:
        talk.failed(end, error)
        os._exit(125)
    except (OSError, ValueError) as error:
        talk.failed(end, HostCannot(f"{what}: {error}"))
        os._exit(125)


def follow(child: int) -> int:
    """Wait for ``child``, signals being passed on; its exit status, as a shell has it."""
    with waiting.passing(lambda number: os.kill(child, number)) as woken:
        return waiting.end(child, woken)

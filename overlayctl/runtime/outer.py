"""The process around a container: the first of an outer pid namespace, with mounts of its own.

It dies with the command that started it, and takes everything in it along, whatever the
runtime does. It keeps nothing of the host in use but what programs need. So that a runtime
finds what it is told of by path, a few mounts are made again in here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from overlayctl.errors import HostCannot
from overlayctl.kernel import furnishing, libc, mounter, namespaces
from overlayctl.mount import Tmpfs
from overlayctl.runtime import builtin, talk
from overlayctl.runtime.builtin import Built, telling

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from overlayctl.runtime.bundle import Process


class Launch(NamedTuple):
    """What is to be run in there.

    ``program`` is a runtime's path, or empty for the built-in one. ``attached`` is the path
    under which a runtime looks; ``files`` the directory of the container's files there, of
    which ``run`` is a detached copy; ``own`` the directory of this process in it.
    """

    program: str
    process: Process
    built: Built
    root: str
    attached: str
    files: str
    run: int
    own: str
    name: str
    stdin: bool
    quiet: bool = False


def start(launch: Launch, end: socket.socket) -> int:
    """Start it; the pid. The first that it tells is that it has let go of the host's mounts.

    Until then the caller holds the store's lock: it has copies of what is mounted.
    """

    def act() -> NoReturn:
        with telling(end, "cannot prepare the container's process"):
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            for fd in (*(() if launch.stdin else (0,)), *((1, 2) if launch.quiet else ())):
                os.dup2(null, fd)
            if not launch.program and launch.built.network == "none":
                # Later nothing may be found any more that is to be imported.
                from overlayctl.kernel import netns  # noqa: F401
            namespaces.import_nothing()
            _apart(launch)
            talk.ready(end)
            if launch.program:
                _stage(launch)
                namespaces.listen()
                os.execv(launch.program, _command(launch))  # noqa: S606
            child = builtin.run(launch.process, launch.built, launch.attached, end)
            _note_pid(launch.run, launch.own, child)
        end.close()
        os._exit(builtin.follow(child))

    built = launch.built
    mounts = [launch.run, built.root, *(one.mount for one in built.placements)]
    kept = [end.fileno(), *(fd for fd in mounts if fd >= 0)]
    try:
        return namespaces.start(act, alone=True, keep=kept)
    except PermissionError as error:
        raise HostCannot(
            f"cannot make the container's namespaces: {error.strerror}",
            hint="it takes CAP_SYS_ADMIN outside of any user namespace (unshare -r, rootless)",
        ) from error


def _apart(launch: Launch) -> None:
    """Leave the host's mounts, all but those that programs need."""
    namespaces.own_mounts()
    proc = furnishing.new("proc", {}, furnishing.STRICT)
    libc.move_mount(proc, "/proc")
    os.close(proc)
    namespaces.let_go([launch.program] if launch.program else [], launch.attached)


def _stage(launch: Launch) -> None:
    """Put the root, the container's files and its mounts where the runtime looks for them."""
    root = launch.built.root
    if root < 0:
        root = libc.open_tree("/", clone=True, recursive=True)
    stage(launch.attached, {launch.root: root, launch.files: launch.run})
    for one in launch.built.placements:
        libc.move_mount(one.mount, one.staged)


def stage(attached: str, mounts: Mapping[str, int]) -> None:
    """Make ``attached`` a tmpfs of this mount namespace, with detached mounts of directories."""
    mounter.mount(Tmpfs("overlayctl:outer"), attached)
    for path, mount in mounts.items():
        os.makedirs(path)
        libc.move_mount(mount, path)


def _command(launch: Launch) -> list[str]:
    own = launch.own
    return [
        launch.program, "--root", f"{own}/state", "--log", f"{own}/log", "--log-format", "json",
        "run", "--bundle", own, "--pid-file", f"{own}/pid", launch.name,
    ]  # fmt: skip


def _note_pid(run: int, own: str, pid: int) -> None:
    """Leave the process's number in the outer pid namespace, as a runtime does."""
    name = f"{os.path.basename(own)}/pid"
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=run)
    os.write(fd, str(pid).encode())
    os.close(fd)

"""Joining a container that runs: its first process's namespaces and cgroup, whatever made them."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from overlayctl.errors import HostCannot
from overlayctl.kernel import cgroups, libc, namespaces, privileges
from overlayctl.runtime import builtin
from overlayctl.runtime.builtin import telling

if TYPE_CHECKING:
    import socket

    from overlayctl.runtime.bundle import Process
    from overlayctl.runtime.running import Running

_SOON = 5.0


def first_process(joined: Running) -> str:
    """The directory in /proc of the container's first process. Raises HostCannot, if it ended.

    Its number is known in the outer pid namespace, whose /proc the outer process sees; that
    one's mounts are nobody's in the container.
    """
    until = time.monotonic() + _SOON
    while time.monotonic() < until and namespaces.known(joined.outer.pid) == joined.outer:
        try:
            with open(os.path.join(joined.directory, "pid")) as file:
                text = file.read().strip()
        except FileNotFoundError:
            text = ""
        if text.isdigit():
            return f"/proc/{joined.outer.pid}/root/proc/{text}"
        time.sleep(0.002)
    raise HostCannot(
        "the container's process has just ended, or does not begin", hint="repeat the command"
    )


def start(joined: Running, process: Process, end: socket.socket, *, stdin: bool) -> int:
    """Start the process in there; the pid of one that waits for it and passes signals on."""
    proc = first_process(joined)

    parent = os.getpid()

    def act() -> NoReturn:
        with telling(end, "cannot enter the container"):
            os.setsid()
            if not stdin:
                null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                os.dup2(null, 0)
            with open(f"{proc}/cgroup") as file:
                groups = cgroups.entrances(file.read())
            with open("/proc/self/cgroup") as file:
                before = cgroups.entrances(file.read())
            # What the container's first process may never get, nobody gets in there.
            most = privileges.bounding(proc)
            allowed = process._replace(
                capabilities=tuple(name for name in process.capabilities if name in most)
            )
            cgroups.join(groups)
            namespaces.import_nothing()
            namespaces.enter(proc)
            child = namespaces.start(
                lambda: builtin.execute(allowed, end), alone=False, keep=[end.fileno()]
            )
        end.close()
        # Who waits is none of the container's: its groups are to go with its processes.
        cgroups.join(before)
        _end_with(parent, child)
        os._exit(builtin.follow(child))

    return namespaces.start(act, alone=False, keep=[end.fileno()])


def _end_with(parent: int, child: int) -> None:
    """When ``parent`` ends have ``child`` ended, and wait for it.

    Killed like others, this process would leave it to the host's first process, which may
    never look: and what is left unlooked at keeps a pid namespace from ending.
    """

    def orphaned(_number: int, _frame: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, orphaned)
    libc.die_with_parent(signal.SIGALRM)
    if os.getppid() != parent:
        orphaned(0, None)

"""What a new process tells the one that started it: that it could not, or its terminal."""

from __future__ import annotations

import array  # noqa: F401 (send_fds would load it when nothing may be loaded any more)
import json
import socket
from typing import NamedTuple

from overlayctl.errors import CannotExecute, CommandNotFound, HostCannot, OverlayctlError

_LONGEST = 1 << 16
_CLASSES = {one.code: one for one in (HostCannot, CannotExecute, CommandNotFound)}


class Heard(NamedTuple):
    """``terminal`` is an fd of the end to serve; both are None where it just went on."""

    terminal: int | None = None
    error: OverlayctlError | None = None


def pair() -> tuple[socket.socket, socket.socket]:
    """One end for each; it says nothing more when the other one's program begins."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def failed(end: socket.socket, error: OverlayctlError) -> None:
    """Tell why the process is not there."""
    told = {"code": error.code, "message": str(error)[: _LONGEST // 8], "hint": error.hint}
    end.send(json.dumps(told).encode())


def terminal(end: socket.socket, master: int) -> None:
    """Hand the end of a terminal over."""
    socket.send_fds(end, [b"terminal"], [master])


def ready(end: socket.socket) -> None:
    """Tell that the process is by itself now: what else is mounted is nothing to it."""
    end.send(b"ready")


def hear(end: socket.socket) -> Heard:
    """Wait for what the process says next."""
    said, fds, _, _ = socket.recv_fds(end, _LONGEST, 1)
    if fds:
        return Heard(fds[0])
    if said in {b"", b"ready"}:
        return Heard()
    told = json.loads(said)
    kind = _CLASSES.get(told["code"], HostCannot)
    return Heard(error=kind(told["message"], hint=told["hint"]))

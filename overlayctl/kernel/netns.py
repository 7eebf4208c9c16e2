"""The network of a container that has none: its loopback device, which is down at first."""

from __future__ import annotations

from pyroute2 import IPRoute


def loopback_up() -> None:
    """Bring up ``lo`` of the network namespace that this process is in (rtnetlink(7))."""
    with IPRoute() as routes:
        # The first device of every network namespace.
        routes.link("set", index=1, state="up")

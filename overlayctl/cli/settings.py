"""What is chosen outside the command's own words: flag, then environment, file, default.

    key      environment          /etc/overlayctl/overlayctl.toml, default
    root     OVERLAYCTL_ROOT      root = "/srv/overlayctl"       /var/lib/overlayctl
    attach   OVERLAYCTL_ATTACH    attach = "loop"                auto
    mount    OVERLAYCTL_MOUNT     mount = "strings"              auto

``attach`` is buffered, directio, loop, unpacked (``layer.attach``); ``mount`` is fds,
strings, mount (``kernel.mounter``): ``auto`` is the first that this host has.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from overlayctl.kernel.probe import Setting
    from overlayctl.mount import Rung

ROOT = "/var/lib/overlayctl"
CONFIGURATION = "/etc/overlayctl/overlayctl.toml"
_VALUES = {
    "attach": ("auto", "buffered", "directio", "loop", "unpacked"),
    "mount": ("auto", "fds", "strings", "mount"),
}


class Chosen(NamedTuple):
    """A value and who chose it."""

    value: str
    source: str


def root(flag: str) -> Chosen:
    """Where the store is. Raises BadInput for a file that makes no sense."""
    if flag:
        return Chosen(flag, "--root")
    chosen = _chosen("root", ROOT)
    if chosen.source == CONFIGURATION and not chosen.value.startswith("/"):
        from overlayctl.errors import BadInput

        raise BadInput(
            f"{CONFIGURATION}: root is no absolute path",
            hint='for example root = "/srv/overlayctl"',
        )
    return chosen


def attach() -> Setting:
    """How layers are attached. Raises BadInput, Usage."""
    return cast("Setting", one_of("attach").value)


def mount() -> Rung:
    """How overlays are mounted. Raises BadInput, Usage."""
    return cast("Rung", one_of("mount").value)


def one_of(key: str) -> Chosen:
    """The choice for ``attach`` or ``mount``. Raises BadInput, Usage for one that is none."""
    chosen = _chosen(key, "auto")
    if chosen.value not in _VALUES[key]:
        from overlayctl.errors import Usage

        raise Usage(
            f"{chosen.source}: {key} is one of {', '.join(_VALUES[key])}, not {chosen.value!r}",
            hint=f"OVERLAYCTL_{key.upper()}=auto",
        )
    return chosen


def _chosen(key: str, default: str) -> Chosen:
    variable = f"OVERLAYCTL_{key.upper()}"
    if value := os.environ.get(variable):
        return Chosen(value, variable)
    configured = _file().get(key)
    return (
        Chosen(default, "default") if configured is None else Chosen(str(configured), CONFIGURATION)
    )


@cache
def _file() -> dict[str, Any]:
    try:
        with open(CONFIGURATION, "rb") as file:
            import tomllib

            return tomllib.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        from overlayctl.errors import BadInput

        raise BadInput(f"{CONFIGURATION}: {error}", hint="mend or remove that file") from None

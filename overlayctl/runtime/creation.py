"""Making a container: an image and a writable layer of its own. No process is needed."""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from overlayctl import names, oci, placed
from overlayctl.runtime import volumes
from overlayctl.store import containers, images, records, snapshots

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from overlayctl.layout import Layout
    from overlayctl.store.containers import Config, Container
    from overlayctl.store.opened import Store

_KINDS = (
    "amber", "banded", "bright", "calm", "coarse", "crimson", "dark", "dense", "eroded", "faint",
    "fine", "folded", "glacial", "golden", "grey", "hidden", "layered", "mossy", "muddy", "pale",
    "patient", "quiet", "rough", "sandy", "silver", "smooth", "solid", "steep", "tidal", "upright",
    "weathered", "white",
)  # fmt: skip
_ROCKS = (
    "basalt", "breccia", "chalk", "chert", "clay", "coal", "dolomite", "dune", "flint", "gabbro",
    "gneiss", "granite", "gravel", "gypsum", "jasper", "lava", "lignite", "limestone", "loam",
    "marble", "marl", "obsidian", "peat", "pumice", "quartz", "sandstone", "schist", "shale",
    "slate", "till", "travertine", "tuff",
)  # fmt: skip


def create(
    store: Store, image: str, *, name: str | None, asked: Config, labels: Mapping[str, str],
    lives: ExitStack | None = None,
) -> Container:  # fmt: skip
    """The new container; without ``name`` it is given one that nobody has.

    With ``lives`` a process of this command runs in it, from before anybody sees it until that
    is left.

    What ``asked`` says comes before what the image says. Raises Usage for a name that cannot
    be one, NotFound, Conflict for one that is taken, HostCannot where nothing could ever be
    written in it, BadInput for a volume of the image that can be nowhere.
    """
    if name is not None:
        names.container_name(name)
    identifier = secrets.token_hex(32)
    with ExitStack() as made:
        volumes.find_directories(asked.mounts, made)
        # Undone under the lock: after it, whoever writes next would put away the same.
        with store.deciding() as own, ExitStack() as undo:
            found, reference = images.resolve(store.layout, image)
            said = oci.said(images.config(store.layout, found))
            snapshots.prepare(store.layout, own, identifier, "container", found.layers)
            undo.callback(snapshots.remove, store.layout, identifier)
            if lives is not None:
                # Nobody knows the key: it is not waited for, whatever other lock is held.
                lives.enter_context(store.running(identifier))
            config = configured(said, asked)
            declared = placed.declared(_volumes(said), config.mounts)
            mounts = placed.ordered((*config.mounts, *declared))
            container = containers.Container(
                identifier,
                name or _new_name(store.layout),
                found.hex,
                reference or found.id,
                config._replace(mounts=volumes.find_volumes(store.layout, own, mounts, undo)),
                {**_labels(said), **labels},
                records.now(),
            )
            containers.commit(store.layout, own, container)
            undo.pop_all()
        made.pop_all()
    return container


def _new_name(layout: Layout) -> str:
    """Two words that no container has, and a number where chance finds none."""
    number = 0
    while True:
        name = f"{secrets.choice(_KINDS)}_{secrets.choice(_ROCKS)}"
        name += str(number - 8) if number > 8 else ""
        if not os.path.lexists(layout.container_name(name)):
            return name
        number += 1


def configured(said: dict[str, Any], asked: Config) -> Config:
    """What an image's ``config`` says, with what was asked for over it, as docker does.

    Another entrypoint leaves the image's command out; of two variables of one name the later
    counts. What is of another type than the image-spec's (config.md) is not there.
    """
    entrypoint, command = _words(said, "Entrypoint"), _words(said, "Cmd")
    if asked.entrypoint is not None:
        entrypoint, command = asked.entrypoint, ()
    return asked._replace(
        entrypoint=entrypoint,
        command=asked.command or command,
        environment=variables((*_words(said, "Env"), *asked.environment)),
        directory=asked.directory or _text(said, "WorkingDir"),
        user=asked.user or _text(said, "User"),
    )


def variables(texts: Iterable[str]) -> tuple[str, ...]:
    """``NAME=value`` each, of every name the last one; a name alone takes the variable away."""
    last: dict[str, str | None] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        last[name] = value if equals else None
    return tuple(f"{name}={value}" for name, value in last.items() if value is not None)


def _words(said: dict[str, Any], key: str) -> tuple[str, ...]:
    words = said.get(key)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return ()
    return tuple(words)


def _text(said: dict[str, Any], key: str) -> str:
    text = said.get(key)
    return text if isinstance(text, str) else ""


def _volumes(said: dict[str, Any]) -> list[str]:
    paths = said.get("Volumes")
    return list(paths) if isinstance(paths, dict) else []


def _labels(said: dict[str, Any]) -> dict[str, str]:
    labels = said.get("Labels")
    return {str(k): str(v) for k, v in labels.items()} if isinstance(labels, dict) else {}

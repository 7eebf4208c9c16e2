"""Making a container: an image and a writable layer of its own. No process is needed."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from overlayctl import names
from overlayctl.errors import Conflict
from overlayctl.store import containers, images, records, snapshots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from overlayctl.store.containers import Container
    from overlayctl.store.opened import Store


def create(
    store: Store, image: str, *, name: str | None, command: Sequence[str], labels: dict[str, str]
) -> Container:
    """The new container; without ``name`` it has the start of its id for one.

    Raises Usage for a name that cannot be one, NotFound, Conflict for one that is taken,
    HostCannot where nothing could ever be written in it.
    """
    if name is not None:
        names.container_name(name)
    identifier = secrets.token_hex(32)
    with store.deciding() as own:
        found, reference = images.resolve(store.layout, image)
        default = images.command(images.config(store.layout, found))
        container = containers.Container(
            identifier,
            name or identifier[:12],
            found.hex,
            reference or found.id,
            tuple(command) or default,
            labels,
            records.now(),
        )
        snapshots.prepare(store.layout, own, identifier, "container", found.layers)
        try:
            containers.commit(store.layout, own, container)
        except (Conflict, OSError):
            snapshots.remove(store.layout, identifier)
            raise
    return container

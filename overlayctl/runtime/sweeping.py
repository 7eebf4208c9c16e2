"""Putting away what processes leave: the mounts made for them, the containers that go with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from overlayctl.errors import OverlayctlError
from overlayctl.kernel import namespaces, rooted
from overlayctl.runtime import mounts, removal, running
from overlayctl.store import containers, locks, records

if TYPE_CHECKING:
    from overlayctl.store.opened import Store


def leave(store: Store, key: str) -> None:
    """Put away what nobody in the container needs any more; a running process keeps all.

    What a person mounted stays mounted. Raises Locked where its lock is not to be had.
    """
    upper = store.layout.snapshot(key, "upper")
    if os.path.isdir(upper):
        with locks.attempt(upper) as others:
            if others:
                # They are later than we are, and do it: no need to wait for whoever reads.
                return
    with store.holding(key):
        _put_away(store, key)


def sweep(store: Store) -> None:
    """Put away what killed commands left, in this mount namespace: mounts and containers.

    What is in use is left, whoever uses it, and what cannot go hinders nobody.
    """
    for key in _left(store):
        if not os.path.isdir(store.layout.snapshot(key)):
            _clear_strays(store, key)
            continue
        with suppress(OverlayctlError), locks.attempt(store.layout.snapshot(key)) as others:
            if not others:
                _put_away(store, key)


def _clear_strays(store: Store, key: str) -> None:
    """Of a trial that was killed, or a container that is gone."""
    kind, _, pid = key.partition(".")
    lives = namespaces.known(int(pid)) if kind == running.TRIAL else running.of(store, key)
    if not lives:
        running.forget(store, key)


def _left(store: Store) -> Iterator[str]:
    """The containers that may have something to put away."""
    layout = store.layout
    found = dict.fromkeys(records.names(layout.path("attached", "run")))
    for view in mounts.mounted(store):
        if view.kind == "container" and not os.path.exists(layout.held(view.id)):
            found[view.id] = None
    found.update((one.id, None) for one in containers.readable(layout) if one.config.disposable)
    yield from found


def _put_away(store: Store, key: str) -> None:
    """The caller holds the container's lock."""
    layout = store.layout
    if not os.path.isdir(layout.snapshot(key, "upper")):
        rooted.remove_tree(layout.run(key), ignore_errors=True)
        return
    with locks.attempt(layout.snapshot(key, "upper")) as others:
        if others:
            return
        running.forget(store, key)
        found = containers.find(layout, key)
        views = mounts.views(store, "container", key)
        if found.config.disposable:
            if all(view.pid == os.getpid() for view in views):
                with store.unmaking():
                    removal.take_away(store, found, views)
            return
        if not os.path.exists(layout.held(key)):
            for view in views:
                if view.pid == os.getpid():
                    mounts.unmount(store, view, lazy=False)

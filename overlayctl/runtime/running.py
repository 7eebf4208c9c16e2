"""The processes in containers: what is noted of them.

A process's directory, ``attached/run/<container>/<token>/``, is gone with the mount namespace.
What it says is believed only of processes that are still the same ones.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.errors import Holder, InUse
from overlayctl.kernel import cgroups, namespaces, rooted
from overlayctl.kernel.namespaces import Known
from overlayctl.store import locks, records

if TYPE_CHECKING:
    from overlayctl.store.containers import Container
    from overlayctl.store.opened import Store

_SOON = 5.0
_AT_ONCE = 1.0
_NOTE = "process.json"
TRIAL = "trial"
"""What ``TRIAL.<pid>`` has its files in is no container: that process tries a runtime."""


class Running(NamedTuple):
    """A process in a container.

    ``supervisor`` is the command that waits for it, ``outer`` what ends it. ``first`` is
    whether it is what the container was made for, so that others may join it.
    """

    directory: str
    supervisor: Known
    outer: Known
    first: bool
    words: tuple[str, ...]


def begin(store: Store, key: str) -> str:
    """A new directory for a process in the container, which is mounted."""
    token = secrets.token_hex(8)
    os.makedirs(store.layout.run(key, token, "mounts"), mode=0o700)
    return store.layout.run(key, token)


def note(directory: str, outer: int, *, first: bool, words: tuple[str, ...]) -> None:
    """Say what runs there. One that has ended by now is nobody's."""
    both = [namespaces.known(os.getpid()), namespaces.known(outer)]
    text = json.dumps({"processes": both, "first": first, "words": words})
    with open(os.path.join(directory, ".note"), "w", encoding="utf-8") as file:
        file.write(text)
    os.rename(os.path.join(directory, ".note"), os.path.join(directory, _NOTE))


def cgroup(store: Store, directory: str) -> str:
    """The name of a cgroup of that process alone."""
    return f"overlayctl-{store.id}-{os.path.basename(directory)}"


def of(store: Store, key: str) -> list[Running]:
    """What runs in the container, as far as this namespace knows; the first process first."""
    found = []
    for token in records.names(store.layout.run(key)):
        directory = store.layout.run(key, token)
        with suppress(OSError, ValueError, KeyError, TypeError):
            with open(os.path.join(directory, _NOTE), encoding="utf-8") as file:
                said = json.load(file)
            supervisor, outer = (Known(*one) for one in said["processes"])
            one = Running(directory, supervisor, outer, said["first"], tuple(said["words"]))
            if namespaces.known(outer.pid) == outer:
                found.append(one)
    return sorted(found, key=lambda one: not one.first)


def holders(store: Store, key: str, name: str) -> list[Holder]:
    """What runs in the container, as the reason of a refusal."""
    return [
        Holder(
            "process",
            f"{one.supervisor.pid} ({' '.join(one.words)})",
            f"overlayctl rm -f {name} ends it, too",
        )
        for one in of(store, key)
    ]


@contextmanager
def idle(store: Store, key: str, name: str) -> Iterator[None]:
    """As ``Store.idle``; what runs there is named with its command."""
    with ExitStack() as held:
        try:
            held.enter_context(store.idle(key))
        except InUse as error:
            found = holders(store, key, name)
            raise InUse(f"container {name}", found or error.holders) from None
        yield


def refuse_elsewhere(store: Store, container: Container) -> None:
    """Raise InUse for what a command runs that was given in another mount namespace.

    There the container stays mounted, whoever is killed.
    """
    for one in of(store, container.id):
        pid = one.supervisor.pid
        with suppress(OSError):
            if not os.path.samestat(os.stat("/proc/self/ns/mnt"), os.stat(f"/proc/{pid}/ns/mnt")):
                where = f"{pid} ({' '.join(one.words)}) in another mount namespace"
                hint = f"nsenter -m -t {pid} overlayctl rm -f {container.name}"
                raise InUse(f"container {container.name}", [Holder("process", where, hint)])


def end(store: Store, key: str) -> None:
    """Kill what runs in the container, and wait until it is gone.

    Whoever waits for it is told by its end; one that does not react is killed as well.
    """
    found = of(store, key)
    for one in found:
        namespaces.send(one.outer, 9)
    for one in found:
        namespaces.ended(one.outer, _SOON)
    upper = store.layout.snapshot(key, "upper")
    for one in found:
        # It gives its lock up at once, unless it is stopped.
        if namespaces.known(one.supervisor.pid) == one.supervisor and not _is_free(upper):
            namespaces.send(one.supervisor, 9)
            namespaces.ended(one.supervisor, _SOON)


def _is_free(upper: str) -> bool:
    import time

    until = time.monotonic() + _AT_ONCE
    while time.monotonic() < until:
        with locks.attempt(upper) as others:
            if not others:
                return True
        time.sleep(0.005)
    return False


def clear(store: Store, directory: str) -> None:
    """Take a process's directory away, and its cgroup; it has ended."""
    cgroups.remove(cgroup(store, directory))
    rooted.remove_tree(directory, ignore_errors=True)


def forget(store: Store, key: str) -> None:
    """Take away all that is noted of processes in a container; nobody lives in it."""
    for token in records.names(store.layout.run(key)):
        _clear_ended(store, store.layout.run(key, token))
    rooted.remove_tree(store.layout.run(key), ignore_errors=True)


def _clear_ended(store: Store, directory: str) -> None:
    """Its command is gone; what it started was killed then, and may need a moment."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with open(os.path.join(directory, _NOTE), encoding="utf-8") as file:
            outer = Known(*json.load(file)["processes"][1])
        namespaces.ended(outer, _SOON)
    clear(store, directory)

"""``with``: a program of the host in a merged view, which is there for as long as it runs."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NoReturn

from overlayctl.errors import CannotExecute, CommandNotFound
from overlayctl.kernel import furnishing, libc, namespaces, rooted, waiting
from overlayctl.runtime import builtin, creation, mounts, outer, process, running, talk
from overlayctl.store import containers, images
from overlayctl.store.containers import Config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from overlayctl.store.containers import Container
    from overlayctl.store.opened import Store

VARIABLE = "OVERLAYCTL_MERGED"


def run(
    store: Store, name: str, words: Sequence[str], *, kind: str, writable: bool,
    note: Callable[[str], None],
) -> int:  # fmt: skip
    """Run a program of the host in the merged view of a container or an image; its status.

    Without ``writable`` it sees the view read-only, in a mount namespace of its own. What it
    writes stays in a container, and goes with a view of an image. Raises NotFound,
    CommandNotFound, CannotExecute.
    """
    if kind == "image" and not writable:
        return _in_image(store, name, words)
    with ExitStack() as lives:
        if kind == "image":
            asked = Config(command=tuple(words), disposable=True, volatile=True)
            found = creation.create(store, name, name=None, asked=asked, labels={}, lives=lives)
        else:
            with store.locked(exclusive=False):
                found = containers.resolve(store.layout, name)
            lives.enter_context(store.running(found.id))
        try:
            return _in_container(store, found, words, writable=writable)
        finally:
            lives.close()
            process.leave(store, found.id, note)


def _in_container(store: Store, found: Container, words: Sequence[str], *, writable: bool) -> int:
    merged = process.mounted(store, found)
    own = running.begin(store, found.id)
    with ExitStack() as owned:
        owned.callback(running.clear, store, own)
        if writable:
            return _wait(store, merged, words, own)
        view = rooted.open_overlay(merged, os.getpid())
        owned.callback(os.close, view)
        libc.mount_setattr(view, add=libc.MOUNT_ATTR_RDONLY)
        return _wait(store, merged, words, own, view)


def _in_image(store: Store, name: str, words: Sequence[str]) -> int:
    """In a read-only view that nobody else sees: it goes with the program, whatever happens."""
    with ExitStack() as owned:

        def act() -> tuple[int, str]:
            image, _ = images.resolve(store.layout, name)
            view = owned.enter_context(mounts.detached_image(store, image.hex, image.layers))
            return view, image.hex

        view, image = store.attaching(act)
        owned.callback(mounts.forget_view, store, image)
        return _wait(store, store.layout.merged(image), words, "", view)


def _wait(
    store: Store, merged: str, words: Sequence[str], own: str, view: int | None = None
) -> int:
    """Run the program in ``merged``, where it alone sees ``view``, if there is one."""
    ours, theirs = talk.pair()

    def act() -> NoReturn:
        with builtin.telling(theirs, "cannot enter the merged view"):
            if view is not None:
                namespaces.own_mounts()
                namespaces.let_go(None, store.layout.attached)
                outer.stage(store.layout.attached, {merged: view})
            talk.ready(theirs)
            os.chdir(merged)
        namespaces.listen()
        try:
            os.execvpe(words[0], list(words), {**os.environ, VARIABLE: merged})  # noqa: S606
        except OSError as error:
            kind = CommandNotFound if furnishing.is_missing(error) else CannotExecute
            what = f"cannot execute {words[0]!r}: {error.strerror}"
            talk.failed(theirs, kind(what, hint="it is a program of the host that is run"))
            os._exit(125)

    kept = [] if view is None else [view]
    with ours, ExitStack() as owned:
        with store.locked():
            with theirs:
                child = namespaces.start(act, alone=False, keep=[theirs.fileno(), *kept])
            owned.push(waiting.killing(child))
            # It has copies of all that is mounted until then.
            heard = talk.hear(ours)
        with _left_to_the_program():
            if own:
                running.note(own, child, first=False, words=tuple(words))
            return process.wait(child, ours, heard, typed=False)


@contextmanager
def _left_to_the_program() -> Iterator[None]:
    """What is typed at the terminal to stop it, the program gets itself (system(3))."""
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGQUIT):
            before[number] = signal.signal(number, signal.SIG_IGN)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

"""``run``, ``exec``: a process in a container, and this command waiting for it.

This command holds the container's running lock for as long as the process lives. Whoever
comes last unmounts what was mounted for it.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.errors import Conflict, HostCannot, NotFound, OverlayctlError, Usage
from overlayctl.kernel import inuse, libc, privileges, pseudoterminal, rooted, waiting
from overlayctl.runtime import (
    builtin,
    bundle,
    creation,
    engines,
    executable,
    joining,
    mounts,
    outer,
    placing,
    running,
    sweeping,
    talk,
    users,
    volumes,
)
from overlayctl.store import containers

if TYPE_CHECKING:
    import socket

    from overlayctl.store.containers import Config, Container
    from overlayctl.store.opened import Store

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BUILTIN = "note: the built-in runtime keeps processes apart, and is no security boundary"
_IMPATIENT = 3
_SOON = 5.0
_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}


class Command(NamedTuple):
    """What to execute in a container, where it differs from what its configuration says."""

    words: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    directory: str = ""
    user: str = ""
    terminal: bool = False
    stdin: bool = False


def run(
    store: Store, image: str, *, name: str | None, asked: Config, labels: Mapping[str, str],
    runtime: str, note: Callable[[str], None],
) -> int:  # fmt: skip
    """Make a container of an image and run its command in it; the command's exit status.

    Raises CommandNotFound, CannotExecute, HostCannot where it did not begin; and what
    ``creation.create`` raises.
    """
    with ExitStack() as lives:
        container = creation.create(
            store, image, name=name, asked=asked, labels=labels, lives=lives
        )
        try:
            config = container.config
            command = Command(config.words, terminal=config.terminal, stdin=config.stdin)
            status = _foreground(store, container, command, runtime, note, first=True)
        finally:
            lives.close()
            leave(store, container.id, note)
    return status


def execute(
    store: Store, name: str, command: Command, *, runtime: str, note: Callable[[str], None]
) -> int:
    """Execute a command in a container, running or not; its exit status.

    In one that runs it joins the first process; one that does not is mounted for it. Raises as
    ``run`` does, NotFound.
    """
    with store.locked(exclusive=False):
        found = containers.resolve(store.layout, name)
    try:
        with store.running(found.id):
            joined = next((one for one in running.of(store, found.id) if one.first), None)
            if joined:
                return _join(store, found, command, joined)
            return _foreground(store, found, command, runtime, note, first=False)
    finally:
        leave(store, found.id, note)


def write_bundle(store: Store, name: str, directory: str) -> str:
    """Write an OCI bundle for a container that is mounted into a directory; its absolute path.

    The directory is made if it is missing. Raises NotFound for a container that is not
    mounted, Conflict where there is a bundle already.
    """
    with store.locked(exclusive=False):
        found = containers.resolve(store.layout, name)
    with store.running(found.id), ExitStack() as owned:
        views = mounts.views(store, "container", found.id, everywhere=False)
        if not views:
            raise NotFound(
                f"container {found.name} is not mounted, and a bundle names its merged view",
                hint=f"overlayctl mount {found.name}",
            )
        root = rooted.open_overlay(views[0].target, os.getpid())
        owned.callback(os.close, root)
        config = found.config
        hostname = config.hostname or found.id[:12]
        command = Command(config.words, terminal=config.terminal)
        process = described(root, config, command, hostname)
        bounds = volumes.prepare(store, found, root)
        place = os.path.realpath(directory)
        os.makedirs(place, exist_ok=True)
        path = os.path.join(place, "config.json")
        if os.path.lexists(path):
            raise Conflict(f"there is a bundle in {place}", hint="name another directory")
        names = write_files(place, hostname, config.network)
        files = placing.files(root, place, names, [one.target for one in bounds])
        room = bundle.Room(
            views[0].target, hostname, config.network, config.read_only,
            tuple(placing.sources(bounds, files)), sees_cgroup=engines.sees_cgroup(store),
        )  # fmt: skip
        with open(path, "xb") as file:
            file.write(bundle.document(process, room))
    return place


def leave(store: Store, key: str, note: Callable[[str], None]) -> None:
    """Put away what is not needed any more; the command's own status counts, whatever happens."""
    try:
        sweeping.leave(store, key)
    except NotFound:
        return
    except OverlayctlError as error:
        note(f"note: {error}")


def _foreground(
    store: Store, container: Container, command: Command, runtime: str,
    note: Callable[[str], None], *, first: bool,
) -> int:  # fmt: skip
    """Run a command in namespaces of its own; the container's running lock is held."""
    layout, config = store.layout, container.config
    _refuse_no_terminal(command)
    merged = mounted(store, container)
    own = running.begin(store, container.id)
    with ExitStack() as owned:
        owned.callback(running.clear, store, own)
        chosen = engines.choose(store, runtime)
        if not chosen.program:
            note(_BUILTIN)
        root = rooted.open_overlay(merged, os.getpid())
        owned.callback(os.close, root)
        hostname = config.hostname or container.id[:12]
        process = described(root, config, command, hostname)
        _refuse_links(root)
        if chosen.program:
            users.refuse_odd(root)
            if not config.mounts:
                executable.refuse_missing(root, process)
        bounds = volumes.prepare(store, container, root, lives=owned)
        names = write_files(layout.run(container.id), hostname, config.network)
        taken = [one.target for one in bounds]
        files = placing.files(root, layout.run(container.id), names, taken)
        placements, sources = placing.place(owned, own, root, bounds, files)
        room = bundle.Room(
            merged, hostname, config.network, config.read_only,
            tuple(sources), running.cgroup(store, own), chosen.sees_cgroup,
        )  # fmt: skip
        if chosen.program:
            with open(os.path.join(own, "config.json"), "wb") as file:
                file.write(bundle.document(process, room))
        run_files = libc.open_tree(layout.run(container.id), clone=True)
        owned.callback(os.close, run_files)
        built = builtin.Built(root, tuple(placements), hostname, config.network, config.read_only)
        launch = outer.Launch(
            chosen.program, process, built, merged, layout.attached, layout.run(container.id),
            run_files, own, running.cgroup(store, own), command.stdin,
        )  # fmt: skip
        ours, theirs = talk.pair()
        owned.callback(ours.close)
        with store.locked():
            # Its end has to be the only one: else nobody hears that it was killed.
            with theirs:
                child = outer.start(launch, theirs)
            owned.push(waiting.killing(child))
            # Before it makes anything that outlives it: whoever puts that away waits for its end.
            running.note(own, child, first=first, words=process.words)
            heard = talk.hear(ours)
        pid_file = os.path.join(own, "pid")
        listens = pid_file if chosen.program else ""
        status = wait(child, ours, heard, typed=command.stdin, note=listens)
        if chosen.program and status and not os.path.exists(pid_file):
            raise _not_begun(process.words[0], engines.failure(own))
    return status


def _join(store: Store, container: Container, command: Command, joined: running.Running) -> int:
    """Run a command in the namespaces of the container's first process."""
    _refuse_no_terminal(command)
    config = container.config
    with ExitStack() as owned:
        root = rooted.open_overlay(mounted(store, container), os.getpid())
        owned.callback(os.close, root)
        process = described(root, config, command, config.hostname or container.id[:12])
        ours, theirs = talk.pair()
        owned.callback(ours.close)
        with theirs:
            child = joining.start(joined, process, theirs, stdin=command.stdin)
            owned.push(waiting.killing(child))
        return wait(child, ours, talk.Heard(), typed=command.stdin)


def mounted(store: Store, container: Container) -> str:
    """Mount the container where it is not; the path. Its running lock is held, so it stays."""
    key, config = container.id, container.config
    for view in mounts.views(store, "container", key, everywhere=False):
        return view.target
    volatile = config.volatile or config.disposable
    return inuse.patiently(
        lambda: mounts.mount_container(store, key, volatile=volatile, xino=False, held=False)
    )


def described(root: int, config: Config, command: Command, hostname: str) -> bundle.Process:
    """The process that a command is, in the container whose merged root is ``root``."""
    if not command.words:
        raise Usage("the image names no command, and none was given", hint="run IMAGE COMMAND")
    if not command.words[0]:
        why = "its name is empty"
        raise builtin.not_executed("", why, FileNotFoundError(errno.ENOENT, why))
    user = users.resolve(root, command.user or config.user)
    first = [f"PATH={_PATH}", f"HOSTNAME={hostname}"]
    if command.terminal:
        first.append("TERM=xterm")
    said = creation.variables((*first, *config.environment, *command.environment))
    if not any(one.startswith("HOME=") for one in said):
        said = (*said, f"HOME={user.home}")
    directory = command.directory or config.directory
    process = bundle.Process(
        command.words, said, os.path.normpath("/" + directory.lstrip("/")), user, command.terminal,
        privileges.handed_on(),
    )  # fmt: skip
    bundle.refuse_impossible(process)
    return process


def _refuse_no_terminal(command: Command) -> None:
    if command.terminal and not os.isatty(0):
        raise Usage("-t: standard input is no terminal", hint="leave out -t, or use script(1)")


def _refuse_links(root: int) -> None:
    """Where a filesystem is to be mounted, an image may have put a symlink."""
    for name in ("proc", "sys", "dev"):
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(name, dir_fd=root).st_mode):
                raise HostCannot(
                    f"/{name} in the container is no directory: nothing can be mounted there",
                    hint="remove it in the image",
                )


def write_files(directory: str, hostname: str, network: str) -> list[str]:
    """Write the files of /etc that every container has of its own; their names."""
    local = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    texts = {"hostname": hostname + "\n", "hosts": f"{local}127.0.1.1\t{hostname}\n"}
    for name in ("resolv.conf", "hosts"):
        if network == "host" or name not in texts:
            texts[name] = _host_file(f"/etc/{name}") or texts.get(name, "")
    for name, text in texts.items():
        path = os.path.join(directory, name)
        # What runs in the container already has the file, and may have changed it.
        with suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
    return list(texts)


def _host_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _not_begun(word: str, said: str) -> OverlayctlError:
    """What a runtime's last words mean, where it did not get to execute the command."""
    if "executable file not found" in said or "no such file or directory" in said:
        return builtin.not_executed(word, said, FileNotFoundError(2, said))
    if "permission denied" in said or "exec format error" in said or "is a directory" in said:
        return builtin.not_executed(word, said)
    return HostCannot(f"the runtime could not begin: {said}", hint="--runtime builtin")


def wait(child: int, ours: socket.socket, heard: talk.Heard, *, typed: bool, note: str = "") -> int:
    """Wait for the process, signals being passed on; its exit status.

    ``heard`` is what it has told before. ``note`` is a file that is there when it listens to
    signals.
    """
    signals = _Signals(child)
    with waiting.passing(signals.pass_on) as woken:
        try:
            if heard.error is None:
                heard = talk.hear(ours)
            with ExitStack() as served:
                if heard.terminal is not None:
                    terminal = heard.terminal
                    served.callback(os.close, terminal)
                    heard = talk.hear(ours)
                    signals.listens = lambda: not note or os.path.exists(note)
                    if heard.error is None:
                        pseudoterminal.serve(terminal, woken, signals.again, typed=typed)
        finally:
            signals.listens = lambda: not note or os.path.exists(note)
            status = waiting.end(child, woken, signals.again)
    if heard.error is not None:
        raise heard.error
    return status


class _Signals:
    """Gives ``child`` the signals that this command gets; who insists ends it for good.

    What comes before it ``listens`` is kept: the first process of a pid namespace does not
    notice what it has no handler for.
    """

    def __init__(self, child: int) -> None:
        self._child = child
        self._insisted = 0
        self._kept: list[int] = []
        self._since = 0.0
        self.listens: Callable[[], bool] = lambda: False

    def pass_on(self, number: int) -> None:
        """Take a signal."""
        self._insisted += number in (signal.SIGINT, signal.SIGTERM)
        if self._insisted >= _IMPATIENT:
            os.kill(self._child, signal.SIGKILL)
        self._since = self._since if self._kept else time.monotonic()
        self._kept.append(number)
        self.again()

    def again(self) -> float | None:
        """Pass on what was kept; in how many seconds to try again.

        What is to end and does not even begin is killed after a while.
        """
        if self._kept and self.listens():
            kept, self._kept = self._kept, []
            for number in kept:
                with suppress(ProcessLookupError):
                    os.kill(self._child, number)
        elif _ENDING.intersection(self._kept) and time.monotonic() - self._since > _SOON:
            with suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
        return 0.01 if self._kept else None

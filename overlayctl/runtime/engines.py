"""Which runtime executes containers: runc or crun where one works here, else the built-in one."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.errors import HostCannot, NotFound
from overlayctl.kernel import libc, privileges, rooted, waiting
from overlayctl.runtime import builtin, bundle, outer, running, talk
from overlayctl.runtime.users import User

if TYPE_CHECKING:
    from overlayctl.store.opened import Store

_PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAMES = ("runc", "crun")
_WORKS, _BLIND = "works", "works without cgroups to see"


class Runtime(NamedTuple):
    """``program`` is its path, empty for the built-in one."""

    program: str = ""
    sees_cgroup: bool = True


def choose(store: Store, wanted: str) -> Runtime:
    """The runtime ``auto``, ``builtin``, a name or a path; layers are attached already.

    Raises NotFound, HostCannot for one that does not work here.
    """
    if wanted == "builtin":
        return Runtime()
    for name in _NAMES if wanted == "auto" else (wanted,):
        program = _find(name)
        if program is None:
            continue
        answer = _tried(store, program)
        if answer in (_WORKS, _BLIND):
            return Runtime(program, answer == _WORKS)
        if wanted != "auto":
            raise HostCannot(
                f"{program} does not work here: {answer}", hint="--runtime builtin needs none"
            )
    if wanted != "auto":
        raise NotFound(f"there is no runtime {wanted!r}", hint="--runtime auto, or a path")
    return Runtime()


def sees_cgroup(store: Store) -> bool:
    """Whether a container of this host's runtime can have the files of cgroups mounted."""
    return choose(store, "auto").sees_cgroup


def _find(name: str) -> str | None:
    path = os.pathsep.join((os.environ.get("PATH", ""), _PLACES))
    found = shutil.which(name, path=path)
    return os.path.realpath(found) if found else None


def _tried(store: Store, program: str) -> str:
    """What a trial of the runtime gave; remembered as long as this host and program are the same.

    Programs and privileges differ between namespaces, so it is where these end. A trial that
    was killed, or had no memory, says nothing about the next one.
    """
    info = os.stat(program)
    told = (program, info.st_dev, info.st_ino, info.st_mtime_ns, privileges.handed_on())
    name = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
    memory = store.layout.path("attached", f"runtime.{name}")
    with suppress(FileNotFoundError), open(memory, encoding="utf-8") as file:
        return file.read()
    trial = _try(store, program, sees_cgroup=True)
    answer = trial.refused
    if answer and not _try(store, program, sees_cgroup=False).refused:
        answer = _BLIND
    elif answer and not trial.certain:
        return answer
    answer = answer or _WORKS
    with open(f"{memory}.{os.getpid()}", "w", encoding="utf-8") as file:
        file.write(answer)
    os.rename(file.name, memory)
    return answer


class _Trial(NamedTuple):
    """Why the runtime did not run, or nothing; ``certain`` is whether it said so itself."""

    refused: str
    certain: bool


def _try(store: Store, program: str, *, sees_cgroup: bool) -> _Trial:
    """Run a shell that does nothing, with this host's own root."""
    layout = store.layout
    key = f"{running.TRIAL}.{os.getpid()}"
    own = running.begin(store, key)
    rooted_at = layout.merged(key)
    try:
        process = bundle.Process(
            ("/bin/sh", "-c", ":"), (f"PATH={_PLACES}",), "/", User(0, 0, (0,), "/"),
            terminal=False, capabilities=privileges.handed_on(),
        )  # fmt: skip
        name = running.cgroup(store, own)
        room = bundle.Room(
            rooted_at, "trial", "none", read_only=True, cgroup=name, sees_cgroup=sees_cgroup
        )
        with open(f"{own}/config.json", "wb") as file:
            file.write(bundle.document(process, room))
        run = libc.open_tree(layout.run(key), clone=True)
        ours, theirs = talk.pair()
        built = builtin.Built(-1, (), "trial", "none", read_only=True)
        launch = outer.Launch(
            program, process, built, rooted_at, layout.attached, layout.run(key), run, own, name,
            stdin=False, quiet=True,
        )  # fmt: skip
        with store.locked():
            child = outer.start(launch, theirs)
            theirs.close()
            running.note(own, child, first=False, words=process.words)
            heard = talk.hear(ours)
        ours.close()
        os.close(run)
        status = waiting.exit_status(os.waitpid(child, 0)[1])
        if heard.error is not None:
            return _Trial(str(heard.error), certain=False)
        said = failure(own) if status else ""
        return _Trial(said or (f"it ends with {status}" if status else ""), certain=bool(said))
    finally:
        running.clear(store, own)
        rooted.remove_tree(layout.run(key), ignore_errors=True)


def failure(own: str) -> str:
    """The last error that a runtime noted."""
    import json

    said = ""
    with suppress(OSError), open(f"{own}/log", encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                said = entry["msg"] if entry["level"] in {"error", "fatal"} else said
    return said

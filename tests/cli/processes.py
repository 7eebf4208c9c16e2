"""Commands as processes of their own: what runs in containers outlives no call in this one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from overlayctl.cli import main
from overlayctl.engine import Engine
from tests import busybox
from tests.store.stores import Silent

RUNTIMES = ("runc", "builtin")
NOTE = "note: the built-in runtime keeps processes apart, and is no security boundary\n"


class Done(NamedTuple):
    """What a command said and how it ended."""

    out: str
    err: str
    status: int


class Cli:
    """Runs commands on one store, with options of its choice for those that run something."""

    def __init__(self, store: str, runtime: str = "auto") -> None:
        self.store = store
        self.runtime = runtime

    def words(self, *arguments: str) -> list[str]:
        """The whole command."""
        given = list(arguments)
        if given[0] in {"run", "exec"} and self.runtime != "auto":
            given[1:1] = ["--runtime", self.runtime]
        return [sys.executable, "-m", "overlayctl", "--root", self.store, *given]

    def __call__(
        self, *arguments: str, ok: int | None = 0, given: bytes = b"", **more: Any
    ) -> Done:
        """Run a command to its end; ``ok`` is the status that it must have.

        One that runs nothing may do so in this process, which is ten times as fast.
        """
        if arguments[0] not in {"run", "exec", "with"} and not more:
            done = self._here(arguments)
            assert ok is None or done.status == ok, done
            return done
        command = self.words(*arguments)
        ended = subprocess.run(
            command, input=given, capture_output=True, check=False, timeout=60, **more
        )
        done = Done(os.fsdecode(ended.stdout), os.fsdecode(ended.stderr), ended.returncode)
        done = done._replace(err=done.err.removeprefix(NOTE))
        assert "Traceback" not in done.err, done
        assert ok is None or done.status == ok, done
        return done

    def _here(self, arguments: tuple[str, ...]) -> Done:
        streams = [
            io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape", "", write_through=True)
            for _ in range(2)
        ]
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            status = main(["--root", self.store, *arguments])
        for stream in streams:
            stream.seek(0)
        return Done(streams[0].read(), streams[1].read(), status)

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[bytes]:
        """Begin a command, its output a pipe."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **more}
        return subprocess.Popen(self.words(*arguments), **options)

    def begun(self, *arguments: str, **more: Any) -> subprocess.Popen[bytes]:
        """Begin a command, and wait for its first line."""
        process = self.start(*arguments, **more)
        assert process.stdout is not None
        assert process.stdout.readline()
        return process

    def containers(self) -> dict[str, str]:
        """The state of each container by name."""
        rows = json.loads(self("ps", "-a", "--json").out)
        return {"".join(row["Names"]).lstrip("/"): row["Status"] for row in rows}

    def mounted(self) -> list[str]:
        """The ids of containers that are mounted here."""
        place = os.path.join(self.store, "attached", "merged")
        with open("/proc/self/mountinfo") as table:
            points = [line.split()[4] for line in table]
        return [os.path.basename(point) for point in points if os.path.dirname(point) == place]

    def sound(self) -> None:
        """Nothing that ran has left anything, and check finds nothing."""
        engine = Engine.open(self.store)
        assert engine.check() == []
        assert self.mounted() == []
        for name in ("run", "held", "merged"):
            place = engine.layout.path("attached", name)
            assert not os.path.isdir(place) or os.listdir(place) == [], name
        assert cgroups(engine.store.id) == []


def load(cli: Cli, tmp_path: Path, *more: bytes, **options: Any) -> None:
    """Load the image ``box``, with more entries and another configuration."""
    archive = busybox.archive(tmp_path / "box.tar", *more, **options)
    engine = Engine.open(cli.store, create=True)
    engine.load(str(archive), tag=None, platform=None, progress=Silent())


def cgroups(store: str) -> list[str]:
    """The control groups that were made for a store and that are still there."""
    found = []
    for place, names, _ in os.walk("/sys/fs/cgroup"):
        ours = [name for name in names if name.startswith(f"overlayctl-{store}-")]
        found += [os.path.join(place, name) for name in ours]
    return found


def living(word: str, program: str = "") -> list[int]:
    """The processes with that word among their arguments, but for those that have ended.

    Of that ``program`` alone, if one is named.
    """
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(word.encode() in one for one in words) and program.encode() in (b"", words[0]):
            found.append(int(pid))
    return found


def until(holds: Callable[[], object], seconds: float = 10.0) -> bool:
    """Whether something comes to hold in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.01)
    return bool(holds())

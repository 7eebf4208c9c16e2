"""Commands as a shell runs them, with a look at the store's soundness after each."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from overlayctl.cli import main
from overlayctl.engine import Engine
from tests.cli.processes import RUNTIMES, Cli, load
from tests.rootmount import require


class Done(NamedTuple):
    """What a command said and how it ended; names that are not UTF-8 are surrogates."""

    out: str
    err: str
    status: int


class Shell:
    """Runs commands on one store; calling it returns what the command said.

    They run in the process of the tests, which is ten times as fast, unless a fault is armed.
    """

    def __init__(self, store: str) -> None:
        self.store = store

    def __call__(
        self, *arguments: str | Path, ok: int = 0, sound: bool = True, fault: str = ""
    ) -> Done:
        """Run a command that must exit with ``ok``; ``sound`` is whether check must be clean."""
        done = self._run(arguments, fault)
        assert done.status == ok, done
        assert "Traceback" not in done.err
        if sound and os.path.exists(os.path.join(self.store, "overlayctl.json")):
            assert self.findings() == ""
        return done

    def findings(self) -> str:
        """What check finds; nothing if the store is sound."""
        done = self._run(("system", "check"), "")
        assert done.status in (0, 6), done
        return done.out if done.status else ""

    def path(self, *arguments: str | Path) -> Path:
        """The path that a command prints."""
        return Path(self(*arguments).out.removesuffix("\n"))

    def _run(self, arguments: tuple[str | Path, ...], fault: str) -> Done:
        if fault:
            done = subprocess.run(
                [sys.executable, "-m", "overlayctl", "--root", self.store, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                env={**os.environ, "OVERLAYCTL_FAULT": fault},
            )
            return Done(os.fsdecode(done.stdout), os.fsdecode(done.stderr), done.returncode)
        out, err = _text(), _text()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["--root", self.store, *map(str, arguments)])
        for stream in (out, err):
            stream.seek(0)
        return Done(out.read(), err.read(), status)


def _text() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape", "", write_through=True)


def reset(store: str) -> None:
    """Leave nothing of a store, nor anything mounted."""
    if os.path.exists(os.path.join(store, "overlayctl.json")):
        Engine.open(store).reset(dry_run=False)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    place = str(tmp_path / "store")
    yield place
    reset(place)


@pytest.fixture
def run(store: str) -> Shell:
    return Shell(store)


@pytest.fixture(params=RUNTIMES)
def cli(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cli]:
    """Commands as processes, for each runtime; what runs leaves nothing."""
    if request.param != "builtin":
        require(request.param)
    cli = Cli(str(tmp_path / "store"), request.param)
    yield cli
    if os.path.exists(cli.store):
        cli.sound()
        reset(cli.store)


@pytest.fixture
def box(cli: Cli, tmp_path: Path) -> Cli:
    """The same with the image ``box``."""
    load(cli, tmp_path)
    return cli


@pytest.fixture
def odd_run(tmp_path: Path) -> Iterator[Shell]:
    """The same with a store whose path has everything that needs quoting somewhere."""
    place = os.path.join(tmp_path, os.fsdecode(b"a b:c,d\\e\nf\xff"), "store")
    os.mkdir(os.path.dirname(place))
    yield Shell(place)
    reset(place)

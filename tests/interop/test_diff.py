"""``diff`` against ``docker diff``: the same changes, made in a container of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import changes
from tests.cli.conftest import Shell, reset
from tests.oracles.peers import RUN_OPTIONS, Dockerd
from tests.rootmount import require


class Difference(NamedTuple):
    """What is listed here and not by docker, and why."""

    reason: str
    ours: frozenset[str]


def _lines(*lines: str) -> frozenset[str]:
    return frozenset(lines)


STATED = {
    "device-time": Difference(
        "docker takes block devices for directories, whose time does not count",
        _lines("C /device-time/tree/loop"),
    ),
    "symlink-same-length": Difference(
        "docker compares size and time of a symlink, not where it points",
        _lines("C /symlink-same-length", "C /symlink-same-length/tree")
        | _lines("C /symlink-same-length/tree/link"),
    ),
    "time-without-nanoseconds": Difference(
        "to docker a time in whole seconds is any time in that second",
        _lines("C /time-without-nanoseconds", "C /time-without-nanoseconds/a"),
    ),
    "swap": Difference(
        "docker looks at no content: here two files of one size and one time change places",
        _lines("C /swap", "C /swap/tree", "C /swap/tree/one", "C /swap/tree/two"),
    ),
    "xattr": Difference(
        "docker compares no xattrs but capabilities",
        _lines("C /xattr", "C /xattr/tree", "C /xattr/tree/one", "C /xattr/tree/sub"),
    ),
    "xattr-value": Difference(
        "docker compares no xattrs but capabilities", _lines("C /xattr-value", "C /xattr-value/a")
    ),
    "xattr-removed": Difference(
        "docker compares no xattrs but capabilities",
        _lines("C /xattr-removed", "C /xattr-removed/a"),
    ),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dockerd]:
    require("dockerd", "docker", "runc", "mount")
    with Dockerd(tmp_path_factory.mktemp("docker")) as docker:
        yield docker


@pytest.fixture(scope="module")
def archive(daemon: Dockerd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = changes.build(tmp_path_factory.mktemp("image"))
    daemon.load(path)
    return path


def by_docker(daemon: Dockerd, *cases: changes.Case) -> list[str]:
    """What docker lists after a container has done that."""
    script = changes.everything(cases)
    container = daemon.docker("create", *RUN_OPTIONS, changes.NAME, "/bin/sh", "-c", script)
    try:
        daemon.docker("start", "--attach", container)
        return lines(daemon.docker("diff", container))
    finally:
        daemon.docker("rm", container)


def lines(text: str) -> list[str]:
    """The lines of a listing that escapes nothing: a name may go on in the next one."""
    found: list[str] = []
    for line in text.split("\n"):
        if line[:3] in ("A /", "C /", "D /"):
            found.append(line)
        elif found:
            found[-1] += "\n" + line
    return found


@pytest.fixture(scope="module")
def theirs(daemon: Dockerd, archive: Path) -> list[str]:
    """What docker lists, one container having done it all."""
    return by_docker(daemon, *changes.CASES)


@pytest.fixture(scope="module")
def ours(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What overlayctl lists."""
    store = str(tmp_path_factory.mktemp("store") / "store")
    run = Shell(store)
    try:
        run("load", archive)
        run("create", "--name", "changed", changes.NAME)
        changes.run(run.path("mount", "changed"))
        mounted = run("diff", "-0", "changed").out
        run("unmount", "changed")
        assert run("diff", "-0", "changed").out == mounted
    finally:
        reset(store)
    # Docker's interface is JSON: it has no names that are not UTF-8.
    return [os.fsencode(line).decode(errors="replace") for line in mounted.split("\0")[:-1]]


def test_the_cases_are_many_and_have_names_of_their_own() -> None:
    names = {case.name for case in changes.CASES}
    assert len(names) == len(changes.CASES) >= 40
    assert names >= STATED.keys()


@pytest.mark.parametrize("case", changes.CASES, ids=lambda case: case.name)
def test_the_same_as_docker(case: changes.Case, theirs: list[str], ours: list[str]) -> None:
    stated = STATED.get(case.name)
    found = changes.of(case.name, ours)
    assert found - changes.of(case.name, theirs) == (stated.ours if stated else set())
    assert changes.of(case.name, theirs) - found == set()


def test_nothing_else_is_listed(ours: list[str], theirs: list[str]) -> None:
    for listed in (ours, theirs):
        known = set().union(*(changes.of(case.name, listed) for case in changes.CASES))
        assert set(listed) - known == set()
        assert len(listed) == len(set(listed))
    names = [line[3:].encode().split(b"/") for line in ours]
    assert names == sorted(names)

"""Locks on directories, and the lock that says a staging directory is alive."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayctl.errors import Locked, NotFound
from overlayctl.store import check, locks, staging
from tests.store import stores


def _hold(path: str, ready: object, done: object) -> None:
    with locks.hold(path, exclusive=True):
        ready.set()  # type: ignore[attr-defined]
        done.wait()  # type: ignore[attr-defined]


@contextlib.contextmanager
def held(path: str) -> Iterator[int]:
    """Another process, whose id is given, holds the lock."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(path, ready, done))
    other.start()
    try:
        assert ready.wait(20)
        yield other.pid or 0
    finally:
        done.set()
        other.join()


def test_the_holder_is_named(tmp_path: Path) -> None:
    with (
        held(str(tmp_path)) as pid,
        pytest.raises(Locked, match=rf"process {pid} \("),
        locks.hold(str(tmp_path), exclusive=False, timeout=0.05),
    ):
        pass


def test_a_try_waits_for_nobody_and_names_the_holder(tmp_path: Path) -> None:
    path = str(tmp_path)
    with held(path) as pid:
        before = time.monotonic()
        with locks.attempt(path) as others:
            assert [(other.kind, other.name.split()[0]) for other in others] == [
                ("process", str(pid))
            ]
        assert time.monotonic() - before < 1
    with pytest.raises(NotFound), locks.attempt(os.path.join(path, "none")):
        pass


def test_shared_holders_do_not_hinder_each_other(tmp_path: Path) -> None:
    path = str(tmp_path)
    with (
        locks.hold(path, exclusive=False),
        locks.hold(path, exclusive=False, timeout=0),
        locks.attempt(path) as others,
    ):
        assert [holder.name.split()[0] for holder in others] == [str(os.getpid())] * 2
    with locks.attempt(path) as others:
        assert others == []
        with pytest.raises(Locked), locks.hold(path, exclusive=False, timeout=0):
            pass


def _list_often(path: str, gate: str, until: float) -> None:
    while time.monotonic() < until:
        with locks.hold(path, exclusive=False, turnstile=gate):
            time.sleep(0.02)


def test_who_lists_in_turns_does_not_keep_others_from_writing(tmp_path: Path) -> None:
    path, gate = str(tmp_path), str(tmp_path / "gate")
    os.mkdir(gate)
    context = multiprocessing.get_context("fork")
    until = time.monotonic() + 3
    readers = [context.Process(target=_list_often, args=(path, gate, until)) for _ in range(4)]
    for reader in readers:
        reader.start()
    time.sleep(0.2)
    times = 0
    while time.monotonic() < until - 0.5:
        with locks.hold(path, exclusive=True, turnstile=gate):
            times += 1
    for reader in readers:
        reader.join()
    assert times >= 10
    assert [reader.exitcode for reader in readers] == [0] * 4


def test_a_directory_that_was_replaced_meanwhile_is_locked_again(tmp_path: Path) -> None:
    path, old = tmp_path / "it", tmp_path / "old"
    path.mkdir()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(path), ready, done))
    other.start()
    assert ready.wait(20)
    path.rename(old)
    path.mkdir()
    with locks.hold(str(path), exclusive=True, timeout=0) as fd:
        assert os.path.samestat(os.fstat(fd), path.stat())
        assert not os.get_inheritable(fd)
    done.set()
    other.join()


def test_a_directory_that_is_gone_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound), locks.hold(str(tmp_path / "none"), exclusive=True):
        pass


def _stage_often(root: str, until: float) -> None:
    from overlayctl.layout import Layout

    while time.monotonic() < until:
        with staging.staging(Layout(root)) as place:
            with open(os.path.join(place, "file"), "w") as file:
                file.write("x")
            assert os.listdir(place) == ["file"]


def test_sweeping_never_takes_staging_from_under_its_owner(tmp_path: Path) -> None:
    layout = stores.new(tmp_path / "store")
    context = multiprocessing.get_context("fork")
    until = time.monotonic() + 1.5
    owners = [context.Process(target=_stage_often, args=(layout.root, until)) for _ in range(3)]
    for owner in owners:
        owner.start()
    while time.monotonic() < until:
        staging.sweep(layout)
    for owner in owners:
        owner.join()
    assert [owner.exitcode for owner in owners] == [0, 0, 0]
    assert os.listdir(layout.ingest) == []


def test_what_a_killed_command_left_in_staging_goes(tmp_path: Path) -> None:
    layout = stores.new(tmp_path / "store")
    Path(layout.ingest, "dead").mkdir()
    Path(layout.ingest, "dead", "layer.erofs").write_bytes(b"half")
    Path(layout.ingest, "file").write_bytes(b"half")
    assert {found.tag for found in check.check(layout)} == {"staging-left"}
    with staging.staging(layout) as place:
        staging.sweep(layout)
        assert os.listdir(layout.ingest) == [os.path.basename(place)]
        assert check.check(layout) == []


def test_a_look_at_staging_leaves_its_lock_alone(tmp_path: Path) -> None:
    layout = stores.new(tmp_path / "store")
    with staging.staging(layout) as place:
        check.check(layout)
        fd = os.open(place, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(fd)

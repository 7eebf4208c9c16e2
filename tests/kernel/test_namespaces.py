"""Processes of their own: known again, ended with their parent, with nothing of the host's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import NoReturn

from overlayctl.kernel import namespaces, waiting


def test_a_process_is_not_taken_for_another() -> None:
    child = subprocess.Popen(["sleep", "600"])
    known = namespaces.known(child.pid)
    assert known is not None
    assert not namespaces.ended(known, 0.01)
    other = known._replace(start=known.start + 1)
    namespaces.send(other, signal.SIGKILL)
    assert namespaces.ended(other, 0)
    assert child.poll() is None
    namespaces.send(known, signal.SIGKILL)
    assert namespaces.ended(known, 5)
    assert namespaces.known(child.pid) is None
    assert child.wait() == -signal.SIGKILL


def test_what_is_started_alone_is_the_first_and_has_only_what_is_kept() -> None:
    reader, writer = os.pipe()
    spare = os.open("/dev/null", os.O_RDONLY)

    def act() -> NoReturn:
        lost = spare not in map(int, os.listdir("/proc/self/fd"))
        os.write(writer, f"{os.getpid()} {lost}".encode())
        os._exit(7)

    child = namespaces.start(act, alone=True, keep=[writer])
    os.close(spare)
    assert os.read(reader, 100) == b"1 True"
    assert waiting.exit_status(os.waitpid(child, 0)[1]) == 7
    # Later ones are where this one is.
    own = os.readlink("/proc/self/ns/pid")
    assert os.readlink("/proc/self/ns/pid_for_children") == own
    for fd in (reader, writer):
        os.close(fd)


def test_an_error_never_runs_on_as_the_parent() -> None:
    def act() -> NoReturn:
        raise ValueError

    child = namespaces.start(act, alone=False, keep=[])
    assert waiting.exit_status(os.waitpid(child, 0)[1]) == 125


def test_nothing_is_imported_any_more_and_descriptors_can_still_be_sent() -> None:
    script = (
        "import socket, os;"
        "from overlayctl.kernel import namespaces;"
        "from overlayctl.runtime import talk;"
        "namespaces.import_nothing();"
        "ours, theirs = talk.pair();"
        "talk.terminal(theirs, 0);"
        "assert talk.hear(ours).terminal is not None\n"
        "try: import colorsys\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"colorsys is not loaded yet, and from here on cannot be\n"


def test_no_signal_is_lost_while_a_child_is_waited_for() -> None:
    got: list[int] = []
    child = subprocess.Popen(["sleep", "2"])
    begin = time.monotonic()
    sender = subprocess.Popen(
        ["sh", "-c", f"for i in 1 2 3 4 5; do sleep 0.1; kill -USR1 {os.getpid()}; done"]
    )
    with waiting.passing(got.append) as woken:
        status = waiting.end(child.pid, woken, lambda: child.kill() if len(got) == 5 else None)
    sender.wait()
    child.returncode = -signal.SIGKILL
    assert (status, got) == (137, [signal.SIGUSR1] * 5)
    assert time.monotonic() - begin < 2

"""The demonstration that the README promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parent.parent / "scripts" / "demo.py"


def test_every_step_of_the_demo_holds_and_nothing_is_left(tmp_path: Path) -> None:
    before = _mountpoints()
    done = subprocess.run(
        [sys.executable, DEMO],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything held; nothing is left" in done.stdout
    assert "still mounted" not in done.stderr
    assert _mountpoints() == before
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_does_not_hold_fails_the_demo_and_leaves_nothing(tmp_path: Path) -> None:
    before = _mountpoints()
    # A wrong expectation while both containers are mounted; -O does not take the checks away.
    broken = tmp_path / "broken.py"
    broken.write_text(DEMO.read_text().replace('"rmi", IMAGE, status=4', '"rmi", IMAGE, status=3'))
    place = tmp_path / "place"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-O", broken],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=DEMO.parent.parent,
        env=os.environ | {"TMPDIR": str(place), "PYTHONPATH": str(DEMO.parent.parent)},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "exit status 4, not 3" in done.stderr
    assert _mountpoints() == before
    assert list(place.iterdir()) == []


def _mountpoints() -> list[str]:
    return [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]

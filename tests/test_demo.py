"""The demonstration that the README promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parent.parent / "scripts" / "demo.py"


def test_every_step_of_the_demo_holds() -> None:
    done = subprocess.run(
        [sys.executable, DEMO], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything held; nothing is left" in done.stdout

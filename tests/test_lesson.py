"""What the README has a person type: each command must say what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import reset
from tests.rootmount import require

TOP = Path(__file__).parent.parent
TYPED = ("## The lesson", "## The layer tarball is the filesystem")
# What is another one each time: ids, ages, and how large this host's busybox is.
_EACH_TIME = (
    (re.compile(r"\b[0-9a-f]{64}\b"), "<id>"),
    (re.compile(r"\b(?=[0-9]*[a-f])[0-9a-f]{12}\b"), "<short id>"),
    (re.compile(r"\b(Less than a second|\d+ seconds?|About a minute) ago\b"), "<ago>"),
    (re.compile(r"\(virtual [\d.]+[kM]B\)"), "(virtual <size>)"),
    (re.compile(r"\bfreed [\d.]+[kM]B"), "freed <size>"),
    (re.compile(r" {2,}"), "  "),
)


def steps(text: str) -> list[tuple[str, str]]:
    """The commands, and what each prints, in the page's order; a section begins where all do."""
    found: list[tuple[str, str]] = []
    lines: list[str] = []
    for heading in TYPED:
        lines.append('    # cd "$HERE"')
        lines += text.partition(heading + "\n")[2].partition("\n## ")[0].splitlines()
    for line in lines:
        if line.startswith("    # "):
            found.append((line[6:], ""))
        elif line.startswith("    "):
            command, output = found[-1]
            found[-1] = (command, f"{output}{line[4:]}\n")
    return found


def same_each_time(text: str, store: str) -> str:
    for pattern, name in _EACH_TIME:
        text = pattern.sub(name, text.replace(store, "/var/lib/overlayctl"))
    return text


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory in which the image of the lesson lies."""
    require("busybox")
    demo = TOP / "scripts" / "demo.py"
    subprocess.run([sys.executable, demo, "--build", tmp_path / "demo.tar"], check=True)
    return tmp_path


def test_the_lesson_holds_word_for_word(place: Path) -> None:
    store = str(place / "store")
    program = place / "bin" / "overlayctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m overlayctl "$@"\n')
    program.chmod(0o755)
    shell = subprocess.Popen(
        ["bash", "--norc"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=place,
        env={
            **os.environ,
            "HERE": str(place),
            "OVERLAYCTL_ROOT": store,
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(TOP),
        },
    )
    assert shell.stdin is not None
    assert shell.stdout is not None
    taught = steps((TOP / "README.md").read_text())
    assert len(taught) > 15
    try:
        for command, page in taught:
            shell.stdin.write(f"{command}\necho end-of-step\n")
            shell.stdin.flush()
            said = "".join(iter(shell.stdout.readline, "end-of-step\n"))
            # Blank lines at the end are no part of a block of Markdown.
            told = said.rstrip("\n")
            assert same_each_time(told, store) == same_each_time(page[:-1], store), command
    finally:
        shell.communicate("exit\n", timeout=60)
        reset(store)

"""Run a program and keep its words when it fails.

``subprocess.CalledProcessError`` does not print stderr, which is the one thing that a failed oracle
has to say.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

Argument = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class CommandError(Exception):
    """A program that an oracle needs exited with something else than 0."""

    def __init__(self, argv: tuple[Argument, ...], status: int, stderr: str) -> None:
        super().__init__(argv, status, stderr)
        self.argv = argv
        self.status = status
        self.stderr = stderr

    def __str__(self) -> str:
        words = " ".join(os.fsdecode(word) for word in self.argv)
        return f"`{words}` exited with {self.status}:\n{self.stderr.strip()}"


def output(
    *argv: Argument, env: Mapping[str, str] | None = None, cwd: Argument | None = None
) -> str:
    """Return what the program writes on stdout; its stderr becomes the exception when it fails.

    ``env`` is added to the environment. Messages come untranslated.
    """
    done = subprocess.run(
        argv,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
    )
    stderr = done.stderr.decode(errors="replace")
    if done.returncode != 0:
        raise CommandError(argv, done.returncode, stderr)
    return done.stdout.decode(errors="surrogateescape")

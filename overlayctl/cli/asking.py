"""Asking before something is removed: what it would be, then a typed yes."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from overlayctl.cli.render import note
from overlayctl.errors import Usage

Unasked = Annotated[bool, typer.Option("--force", "-f", "--yes", "-y", help="Do not ask.")]


def somebody(what: str) -> None:
    """Raise Usage where nobody could answer."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise Usage(f"{what} and nobody is here to ask", hint="add --yes")


def confirmed(planned: Sequence[str], question: str) -> bool:
    """Whether a person who is told what is planned types yes; nothing planned needs none."""
    for one in planned:
        note(one)
    if planned and not agreed(question):
        note("overlayctl: nothing was removed")
        return False
    return True


def agreed(question: str) -> bool:
    """Whether a person types yes."""
    sys.stdout.flush()
    sys.stderr.write(f"{question} Type yes: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}

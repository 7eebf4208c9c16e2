"""``commit``: a container's writable layer becomes a layer of a new image."""

import contextlib
import os
from datetime import UTC, datetime
from typing import Annotated

import typer

from overlayctl.cli import asked, engine, render
from overlayctl.cli.render import Verb, note
from overlayctl.errors import Usage

app = render.noun()

_EPOCH = "SOURCE_DATE_EPOCH"


@app.command("commit", cls=Verb)
def commit(
    container: Annotated[str, typer.Argument(metavar="CONTAINER")],
    reference: Annotated[
        str | None, typer.Argument(metavar="[NAME[:TAG]]", help="Name the image this.")
    ] = None,
    *,
    message: Annotated[
        str, typer.Option("--message", "-m", metavar="TEXT", help="For the image's history.")
    ] = "",
    author: Annotated[
        str, typer.Option("--author", "-a", metavar="TEXT", help="As in: Jo Doe <jo@doe.org>.")
    ] = "",
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--change",
            "-c",
            metavar="LINE",
            help='A Dockerfile\'s line, as CMD ["sh"]; repeatable.',
        ),
    ] = None,
    pause: Annotated[
        bool | None,
        typer.Option("--pause/--no-pause", "-p", help="Nothing is paused: only --no-pause."),
    ] = None,
    sparse: Annotated[
        bool,
        typer.Option(
            "--sparse", help="Keep holes: docker and podman load that, and cannot save it again."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Make an image of a container: its image's layers, and what was written as one more.

    The container may be mounted, and goes on. Volumes and what else is mounted in it are never
    part of the image; sockets are left out. With SOURCE_DATE_EPOCH set, the image is of that
    moment and nothing in the new layer is younger.

    --change takes CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER,
    VOLUME and WORKDIR.
    """
    from overlayctl.cli.progress import progress
    from overlayctl.runtime.commit import Wish

    if pause:
        raise Usage(
            "overlayctl pauses no process: a file that changes while it is read is named",
            hint="leave --pause out",
        )
    wish = Wish(message, author, tuple(change or ()), _epoch(), sparse)
    with contextlib.closing(progress(quiet=quiet)) as bar:
        done = engine().commit(container, reference=reference, wish=wish, progress=bar)
    if done.moved is not None:
        note(f"note: {done.reference} was {render.identifier(done.moved)} before")
    for text in done.notes:
        note(f"note: {text}")
    for kind, paths in done.remarks.items():
        for path in paths:
            note(f"note: {render.printable(path or b'.')}: {kind}")
    if not asked.json:
        render.line(done.image_id)
        return
    render.document(
        {
            "Id": done.image_id,
            "Container": done.container,
            "Reference": done.reference,
            "Previous": done.moved,
            "DiffID": done.diff_id,
            "Size": done.size,
            "Notes": [
                *({"Note": text} for text in done.notes),
                *(
                    {"Note": kind, **render.named("Path", path or b".")}
                    for kind, paths in done.remarks.items()
                    for path in paths
                ),
            ],
        }
    )


def _epoch() -> int | None:
    """The moment that the image is to be of, where one is set. Raises Usage."""
    text = os.environ.get(_EPOCH, "")
    if not text:
        return None
    try:
        seconds = int(text) if text.isascii() and text.isdigit() else -1
        datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        seconds = -1
    if seconds < 0:
        raise Usage(f"{_EPOCH}={text} is no time in seconds", hint=f"{_EPOCH}=$(date +%s)")
    return seconds

"""``cp`` and ``export``: files between containers and the host."""

import os
import sys
from typing import Annotated

import typer

from overlayctl.cli import asked, engine, render
from overlayctl.cli import output as outputs
from overlayctl.cli.render import Verb, note
from overlayctl.errors import Usage

app = render.noun()


@app.command("cp", cls=Verb)
def cp(
    source: Annotated[str, typer.Argument(metavar="[CONTAINER:]PATH|-")],
    target: Annotated[str, typer.Argument(metavar="[CONTAINER:]PATH|-")],
    *,
    archive: Annotated[
        bool,
        typer.Option("--archive", "-a", help="Out of a container: keep owners, else all is yours."),
    ] = False,
    follow: Annotated[
        bool,
        typer.Option("--follow-link", "-L", help="Copy what a link leads to, not the link itself."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Do not say how much was copied.")
    ] = False,
) -> None:
    """Copy files between a container and the host, whatever the container's state.

    CONTAINER:PATH starts at the container's root; links in it never lead out. DIR/. is what is
    in a directory. A target that is a directory takes the source in; one that is a file becomes
    it; one that is missing is made, in a directory that is there. With - the source is a tar on
    standard input, or the target one on standard output. A host's path with a colon is written
    ./a:b, or from / on.
    """
    there, here = _split(source), _split(target)
    if there and here:
        raise Usage(
            "between two containers nothing is copied",
            hint=f"overlayctl cp {source} - | overlayctl cp - {target}",
        )
    inside = there or here
    if inside is None:
        raise Usage(
            "one of the two has to be in a container", hint="overlayctl cp CONTAINER:PATH PATH"
        )
    name, path = inside
    store = engine()
    if there and target == "-":
        with outputs.opened("-") as write:
            done = store.copy_out_tar(name, path, write, follow=follow)
    elif there:
        done = store.copy_out(name, path, target, archive=archive, follow=follow)
    elif source == "-":
        done = store.copy_in_tar(name, path)
    else:
        done = store.copy_in(source, name, path, follow=follow)
    _tell(done.notes, os.fsencode(source))
    if asked.json and target != "-":
        render.document(
            {
                "Id": done.id,
                "Source": source,
                "Target": target,
                "Size": done.size,
                "Entries": done.entries,
                "Notes": _notes(done.notes),
            }
        )
    elif not quiet and sys.stderr.isatty():
        note(f"Successfully copied {render.size(done.size)} to {target}")


def _split(text: str) -> tuple[str, bytes] | None:
    """The container and the path in it; None for a path of the host, as docker tells them apart."""
    container, colon, path = text.partition(":")
    if not colon or text.startswith(("/", ".")):
        return None
    return container, os.fsencode(path)


def _tell(notes: dict[str, list[bytes]], root: bytes) -> None:
    """Say what is to be said of paths; ``root`` is what the empty one is called."""
    for kind, paths in notes.items():
        for path in paths:
            note(f"note: {render.printable(path or root)}: {kind}")


def _notes(notes: dict[str, list[bytes]]) -> list[dict[str, str]]:
    return [
        {"Note": kind, **render.named("Path", path or b".")}
        for kind, paths in notes.items()
        for path in paths
    ]


@app.command("export", cls=Verb)
def export(
    container: Annotated[str, typer.Argument(metavar="CONTAINER")],
    *,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Else standard output.")
    ] = "-",
) -> None:
    """Write a container's merged tree as a tar, mounted or not.

    Where the record of its layers is lost: what was written in it, as a layer's tar.
    """
    with outputs.opened(output) as write:
        done = engine().export_container(container, write)
    if done.upper_only:
        note("note: the record of its layers is lost: this is what was written, as a layer")
    _tell(done.notes, b".")
    if asked.json and output != "-":
        render.document(
            {
                "Id": done.id,
                "Output": output,
                "Size": done.size,
                "UpperOnly": done.upper_only,
                "Notes": _notes(done.notes),
            }
        )

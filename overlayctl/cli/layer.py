"""``overlayctl layer``: each changeset by itself, as a directory and as a list."""

import os
import stat
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from overlayctl.cli import asked, engine, found_engine, render
from overlayctl.cli.render import Format, ListFormat, NoTrunc, Quiet, Verb
from overlayctl.cli.system import findings
from overlayctl.errors import Usage

app = render.noun(explained="Show layers. LAYER is IMAGE:N, with N from 1 at the bottom, or an id.")

_LAYERS = {
    "ID": "LAYER",
    "Size": "SIZE",
    "DiskUsage": "DISK USAGE",
    "Images": "IMAGES",
    "DiffPath": "DIFF PATH",
    "Attached": "ATTACHED",
    "Name": "NAME",
    "DiffID": "DIFF ID",
}
_KINDS = {
    "file": "-",
    "directory": "d",
    "symlink": "l",
    "char": "c",
    "block": "b",
    "fifo": "p",
    "socket": "s",
    "whiteout": "c",
}

Layer = Annotated[str, typer.Argument(metavar="LAYER", help="IMAGE:N or the start of an id.")]


@app.command("ls", cls=Verb)
def ls(*, quiet: Quiet = False, no_trunc: NoTrunc = False, template: ListFormat = None) -> None:
    """List stored layers, who uses them, and where they are to be seen."""
    store = found_engine()
    layers = store.layers() if store else []
    rows = [
        {
            "ID": render.identifier(layer["DiffID"], whole=no_trunc),
            "Size": render.size(layer["Size"]),
            "DiskUsage": render.size(layer["DiskUsage"]),
            "Images": render.joined(layer["Images"]),
            "DiffPath": render.joined(layer["DiffPath"]) or "-",
            "Attached": "yes" if layer["Attached"] else "no",
            "Name": render.joined(layer["Name"]),
            "DiffID": render.identifier(layer["DiffID"], whole=True),
        }
        for layer in layers
    ]
    shown = ("ID", "Size", "DiskUsage", "Images", "DiffPath")
    render.listing(layers, rows, _LAYERS, template=template, quiet=quiet, shown=shown)


@app.command("inspect", cls=Verb)
def inspect(
    layers: Annotated[list[str], typer.Argument(metavar="LAYER...")], *, template: Format = None
) -> int:
    """Show everything about layers, as JSON."""
    return render.inspected(layers, engine().inspect_layer, template)


@app.command("path", cls=Verb)
def path(layer: Layer) -> None:
    """Print the directory that shows a layer's files, and see to it that it does.

    For example: cd "$(overlayctl layer path nginx:3)"
    """
    render.path(engine().layer_path(layer))


@app.command("files", cls=Verb)
def files(
    layer: Layer,
    *,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print paths only.")] = False,
    null: Annotated[
        bool, typer.Option("--null", "-0", help="Print paths only, each ended by a NUL.")
    ] = False,
) -> None:
    """List what a layer contains, whiteouts included, without mounting it."""
    found = engine().layer_files(layer)
    if asked.json:
        render.document([_document(entry) for entry in found])
    elif null:
        sys.stdout.flush()
        for entry in found:
            sys.stdout.buffer.write((entry["Path"] or b".") + b"\0")
    else:
        for entry in found:
            render.line(render.printable(entry["Path"] or b".") if quiet else _long(entry))


def _document(entry: Mapping[str, Any]) -> dict[str, object]:
    """An entry for JSON: a name that is not UTF-8 comes in base64 too."""
    told: dict[str, object] = {}
    for key, value in entry.items():
        if isinstance(value, bytes):
            told |= render.named(key, value)
        else:
            told[key] = value
    return told


def _long(entry: Mapping[str, Any]) -> str:
    """One line, as ``ls -l`` has it."""
    kind = _KINDS.get(entry["Type"], "?")
    letters = kind + stat.filemode(int(entry["Mode"], 8))[1:]
    text = (
        f"{letters} {entry['Uid']:>5} {entry['Gid']:>5} {entry['Size']:>10} {entry['Mtime']} "
        f"{render.printable(entry['Path'] or b'.')}"
    )
    if entry["Target"] is not None:
        text += f" -> {render.printable(entry['Target'])}"
    if entry["Whiteout"]:
        text += "  [whiteout]"
    if entry["Opaque"]:
        text += "  [opaque]"
    return text


@app.command("cat", cls=Verb)
def cat(
    layer: Layer, file: Annotated[str, typer.Argument(metavar="PATH", help="A path in the layer.")]
) -> None:
    """Print a file of a layer, be it hidden by the layers above or not."""
    sys.stdout.flush()
    for chunk in engine().layer_cat(layer, os.fsencode(file)):
        sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


@app.command("verify", cls=Verb)
def verify(
    layer: Annotated[
        str | None, typer.Argument(metavar="[LAYER]", help="All layers, if none is named.")
    ] = None,
) -> int:
    """Hash stored layers again; exit status 6 where the bytes are not what they were."""
    return findings(engine().layer_verify(layer))


@app.command("detach", cls=Verb)
def detach(
    layer: Annotated[str | None, typer.Argument(metavar="[LAYER]")] = None,
    *,
    every: Annotated[bool, typer.Option("--all", "-a", help="All that nothing uses.")] = False,
) -> None:
    """Unmount the directories that show layers; the layers stay in the store."""
    if every == (layer is not None):
        raise Usage("name a LAYER, or say --all", hint="overlayctl layer detach --all")
    detached = engine().detach(layer)
    if asked.json:
        render.document(detached)
        return
    for name in detached:
        render.line(name)

"""``overlayctl container``: an image and a writable layer on top of it; no process needed."""

from typing import Annotated, Any

import typer

from overlayctl.cli import asked, engine, found_engine, render
from overlayctl.cli.render import (
    DryRun,
    Force,
    Format,
    Lazy,
    ListFormat,
    NoTrunc,
    Quiet,
    Verb,
    each,
    note,
)
from overlayctl.cli.system import mounted

app = render.noun(
    explained="Make, mount and remove containers: a writable layer on an image.",
    more={"create": "making", "diff": "diff"},
)

_CONTAINERS = {
    "ID": "CONTAINER ID",
    "Image": "IMAGE",
    "Command": "COMMAND",
    "CreatedSince": "CREATED",
    "Status": "STATUS",
    "Names": "NAMES",
    "CreatedAt": "CREATED AT",
    "ImageID": "IMAGE ID",
    "Labels": "LABELS",
    "Mounted": "MOUNTED",
    "Size": "SIZE",
}


@app.command("ls", cls=Verb)
def ls(
    *,
    every: Annotated[bool, typer.Option("--all", "-a", help="Those not mounted too.")] = False,
    quiet: Quiet = False,
    no_trunc: NoTrunc = False,
    template: ListFormat = None,
) -> None:
    """List the containers that are mounted; with -a all."""
    store = found_engine()
    containers = store.containers(everything=every) if store else []
    rows = [_row(container, whole=no_trunc) for container in containers]
    shown = ("ID", "Image", "Command", "CreatedSince", "Status", "Names")
    render.listing(containers, rows, _CONTAINERS, template=template, quiet=quiet, shown=shown)


def _row(container: dict[str, Any], *, whole: bool) -> dict[str, str]:
    command = render.joined(container["Command"], " ")
    if not whole and len(command) > 20:
        command = command[:19] + "…"
    labels = container["Labels"] or {}
    return {
        "ID": container["Id"] if whole else render.identifier(container["Id"]),
        "Image": render.joined(container["Image"]),
        "Command": f'"{command}"',
        "CreatedSince": render.ago(container["Created"]),
        "Status": render.joined(container["Status"]),
        "Names": render.joined(container["Names"], ",").lstrip("/"),
        "CreatedAt": render.joined(container["Created"]),
        "ImageID": render.identifier(container["ImageID"], whole=whole),
        "Labels": ",".join(f"{key}={value}" for key, value in labels.items()),
        "Mounted": "yes" if container["Mounted"] else "no",
        "Size": render.size(container.get("SizeRw")),
    }


@app.command("inspect", cls=Verb)
def inspect(
    names: Annotated[list[str], typer.Argument(metavar="CONTAINER...")], *, template: Format = None
) -> int:
    """Show everything about containers, as JSON.

    GraphDriver.Data has the lower, upper, work and merged directories.
    """
    return render.inspected(names, engine().inspect_container, template)


@app.command("mount", cls=Verb)
def mount(
    container: Annotated[str | None, typer.Argument(metavar="[CONTAINER]")] = None,
    *,
    volatile: render.Volatile = False,
    xino: render.Xino = False,
) -> None:
    """Mount a container's merged view, writable, and print where.

    Without a container: list what is mounted.
    """
    if container is None:
        found = found_engine()
        mounted([one for one in found.mounts() if one["Kind"] == "container"] if found else [])
        return
    render.path(engine().mount_container(container, volatile=volatile, xino=xino))


@app.command("unmount", cls=Verb)
def unmount(
    names: Annotated[list[str], typer.Argument(metavar="CONTAINER...")], *, lazy: Lazy = False
) -> int:
    """Unmount containers; what was written stays."""
    store = engine()
    return render.let_go(names, lambda name: store.unmount_container(name, lazy=lazy))


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
    from overlayctl.cli import output as outputs

    with outputs.opened(output) as write:
        done = engine().export_container(container, write)
    if done.upper_only:
        note("note: the record of its layers is lost: this is what was written, as a layer")
    for kind, paths in done.notes.items():
        for path in paths:
            note(f"note: {render.printable(path or b'.')}: {kind}")
    if asked.json and output != "-":
        render.document(
            {
                "Id": done.id,
                "Output": output,
                "Size": done.size,
                "UpperOnly": done.upper_only,
                "Notes": [
                    {"Note": kind, **render.named("Path", path or b".")}
                    for kind, paths in done.notes.items()
                    for path in paths
                ],
            }
        )


@app.command("rm", cls=Verb)
def rm(
    names: Annotated[list[str], typer.Argument(metavar="CONTAINER...")],
    *,
    force: Force = False,
    dry_run: DryRun = False,
) -> int:
    """Remove containers and what was written in them; with -f mounted ones too."""
    store = engine()

    def remove(name: str) -> dict[str, str]:
        return {
            "Name": name,
            "Id": store.remove_container(name, force=force, dry_run=dry_run),
        }

    removed, status = each(names, remove)
    if asked.json:
        render.document(removed)
        return status
    for one in removed:
        text = render.printable(one["Name"])
        render.line(f"Would be removed: {text}" if dry_run else text)
    return status


@app.command("exists", cls=Verb)
def exists(container: Annotated[str, typer.Argument(metavar="CONTAINER")]) -> int:
    """Tell by the exit status whether a container is here: 0 yes, 1 no."""
    store = found_engine()
    return render.answer(found=store is not None and store.container_exists(container))

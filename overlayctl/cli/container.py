"""``overlayctl container``: an image and a writable layer on top of it; no process needed."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from overlayctl.cli import asked, asking, engine, found_engine, render
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
    more={
        "bundle": "process",
        "commit": "commit",
        "cp": "copy",
        "create": "making",
        "diff": "diff",
        "exec": "process",
        "export": "copy",
        "run": "process",
    },
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
    every: Annotated[
        bool, typer.Option("--all", "-a", help="Those neither mounted nor running too.")
    ] = False,
    filters: render.Filters = None,
    sizes: Annotated[
        bool, typer.Option("--size", "-s", help="How much was written, and that with the image.")
    ] = False,
    quiet: Quiet = False,
    no_trunc: NoTrunc = False,
    template: ListFormat = None,
) -> None:
    """List the containers that are mounted or running; with -a all.

    Filters: id, name, label, status, ancestor, volume, before, since, until.
    """
    if filters:
        from overlayctl.inspect import filters as given

        given.check(filters, given.CONTAINERS)
    sizes = sizes or ".Size" in (template or "")
    store = found_engine()
    containers = (
        store.containers(everything=every, filters=filters or (), sizes=sizes) if store else []
    )
    rows = [_row(container, whole=no_trunc) for container in containers]
    shown = ["ID", "Image", "Command", "CreatedSince", "Status", "Names"]
    shown += ["Size"] if sizes else []
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
        "Size": _size(container),
    }


def _size(container: Mapping[str, Any]) -> str:
    """What was written, then that with the image, as docker shows it."""
    written, whole = (container.get(key) for key in ("SizeRw", "SizeRootFs"))
    return f"{render.size(written)} (virtual {render.size(whole)})"


@app.command("inspect", cls=Verb)
def inspect(
    names: Annotated[list[str], typer.Argument(metavar="CONTAINER...")],
    *,
    sizes: Annotated[bool, typer.Option("--size", "-s", help="SizeRw and SizeRootFs too.")] = False,
    template: Format = None,
) -> int:
    """Show everything about containers, as JSON.

    GraphDriver.Data has the lower, upper, work and merged directories.
    """
    store = engine()
    return render.inspected(
        names, lambda name: store.inspect_container(name, sizes=sizes), template
    )


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


@app.command("rename", cls=Verb)
def rename(
    container: Annotated[str, typer.Argument(metavar="CONTAINER")],
    name: Annotated[str, typer.Argument(metavar="NEW_NAME")],
) -> None:
    """Give a container another name."""
    engine().rename_container(container, name)


@app.command("prune", cls=Verb)
def prune(
    *, filters: render.PruneFilters = None, dry_run: DryRun = False, force: asking.Unasked = False
) -> int:
    """Remove the containers that are neither mounted nor running, and what was written in them.

    Lists them first, and asks. Filters: until, label, and those of ls.
    """
    store = engine()
    agreed = None
    if not dry_run and not force:
        asking.somebody("prune removes containers and what was written in them")
        planned = store.prune_containers(filters=filters or (), dry_run=True)
        told = [f"container {p['Names']} ({p['Id'][:12]}) would go, {_size(p)}" for p in planned]
        if not asking.confirmed(told, f"Remove {len(planned)}?"):
            return 1
        agreed = [one["Id"] for one in planned]
    gone = store.prune_containers(filters=filters or (), dry_run=dry_run, agreed=agreed)
    freed = sum(one["SizeRw"] for one in gone)
    if asked.json:
        render.document({"Containers": [one["Id"] for one in gone], "Size": freed})
        return 0
    for one in gone:
        render.line(f"{'Would be deleted' if dry_run else 'Deleted'}: {one['Names']} {one['Id']}")
    note(f"{'would free' if dry_run else 'freed'} {render.size(freed)}")
    return 0


@app.command("rm", cls=Verb)
def rm(
    names: Annotated[list[str], typer.Argument(metavar="CONTAINER...")],
    *,
    force: Force = False,
    volumes: Annotated[
        bool, typer.Option("--volumes", "-v", help="Its anonymous volumes, too.")
    ] = False,
    dry_run: DryRun = False,
) -> int:
    """Remove containers and what was written in them; with -f mounted and running ones too.

    With -f one that is not there is no failure.
    """
    store = engine()

    def remove(name: str) -> dict[str, str]:
        return {
            "Name": name,
            "Id": store.remove_container(name, force=force, dry_run=dry_run, volumes=volumes),
        }

    return render.removed(*each(names, remove, absent=force), dry_run=dry_run)


@app.command("exists", cls=Verb)
def exists(container: Annotated[str, typer.Argument(metavar="CONTAINER")]) -> int:
    """Tell by the exit status whether a container is here: 0 yes, 1 no."""
    store = found_engine()
    return render.answer(found=store is not None and store.container_exists(container))

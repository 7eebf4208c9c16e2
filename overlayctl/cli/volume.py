"""``overlayctl volume``: directories that outlive the containers they are mounted in."""

from typing import Annotated, Any

import typer

from overlayctl.cli import asked, asking, engine, found_engine, render
from overlayctl.cli.render import DryRun, Format, ListFormat, Verb, each, note
from overlayctl.errors import Usage
from overlayctl.inspect import filters as given

app = render.noun(explained="Make, list and remove volumes: data that outlives containers.")

_VOLUMES = {
    "Driver": "DRIVER",
    "Name": "VOLUME NAME",
    "UsedBy": "USED BY",
    "Scope": "SCOPE",
    "Mountpoint": "MOUNTPOINT",
    "Labels": "LABELS",
    "Links": "LINKS",
    "Size": "SIZE",
    "CreatedAt": "CREATED AT",
}
Label = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="May be repeated.")
]


@app.command("create", cls=Verb)
def create(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None,
    *,
    label: Label = None,
    driver: Annotated[
        str, typer.Option("--driver", "-d", metavar="local", help="There is no other.")
    ] = "local",
    option: Annotated[
        list[str] | None, typer.Option("--opt", "-o", metavar="KEY=VALUE", hidden=True)
    ] = None,
) -> None:
    """Make a volume, and print its name; one that is there already stays as it is."""
    from overlayctl.cli.making import labels

    if driver != "local":
        raise Usage(f"there is no volume driver {driver!r}", hint="-d local, or leave it out")
    if option:
        raise Usage(
            f"a volume takes no options: {option[0]!r}",
            hint="mount it yourself, then -v DIR:/path",
        )
    wanted = labels(label or [])
    made = engine(create=True).create_volume(name, wanted)
    if not made.new and wanted and dict(made.volume.labels) != wanted:
        note("note: the volume is there already, and keeps its labels")
    if asked.json:
        render.document({"Name": made.volume.name, "Created": made.new})
    else:
        render.line(made.volume.name)


@app.command("ls", cls=Verb)
def ls(
    *,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print names only.")] = False,
    filters: render.Filters = None,
    template: ListFormat = None,
) -> None:
    """List volumes and the containers that have them.

    Filters: dangling, name, label, driver.
    """
    sizes = asked.json or (template is not None and "Size" in template)
    given.check(filters or (), given.VOLUMES)
    store = found_engine()
    found = store.volumes(sizes=sizes, filters=filters or ()) if store else []
    rows = [
        {
            "ID": row["Name"],
            "Driver": row["Driver"],
            "Name": row["Name"],
            "UsedBy": render.joined(row["UsedBy"]) or "-",
            "Scope": row["Scope"],
            "Mountpoint": row["Mountpoint"],
            "Labels": ",".join(f"{key}={value}" for key, value in row["Labels"].items()),
            "Links": str(len(row["UsedBy"])),
            "Size": render.size(row.get("DiskUsage")),
            "CreatedAt": row["CreatedAt"],
        }
        for row in found
    ]
    shown = ("Driver", "Name", "UsedBy")
    render.listing(found, rows, _VOLUMES, template=template, quiet=quiet, shown=shown)


@app.command("inspect", cls=Verb)
def inspect(
    names: Annotated[list[str], typer.Argument(metavar="VOLUME...")], *, template: Format = None
) -> int:
    """Show everything about volumes, as JSON: where they lie, who has them, what they take."""
    return render.inspected(names, engine().inspect_volume, template)


@app.command("rm", cls=Verb)
def rm(
    names: Annotated[list[str], typer.Argument(metavar="VOLUME...")],
    *,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="One that is not there is no error.")
    ] = False,
    dry_run: DryRun = False,
) -> int:
    """Remove volumes and what is in them; never one that a container has."""
    store = engine()

    def remove(name: str) -> dict[str, Any]:
        there = store.remove_volume(name, force=force, dry_run=dry_run)
        return {"Name": name, "Removed": there and not dry_run, "WasThere": there}

    return render.removed(*each(names, remove), dry_run=dry_run)


@app.command("prune", cls=Verb)
def prune(
    *,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Named volumes, too.")] = False,
    filters: render.PruneFilters = None,
    dry_run: DryRun = False,
    force: asking.Unasked = False,
) -> int:
    """Remove the anonymous volumes that no container has; with -a all of them.

    Lists them first, and asks. Filter: label.
    """
    labels = given.wanted_labels(filters or ())
    store = engine()
    limit = None
    if not dry_run and not force:
        asking.somebody("prune removes volumes and what is in them")
        limit = store.prune_volumes(everything=everything, labels=labels, dry_run=True)
        planned = [f"volume {name} would go" for name in limit.names]
        if not asking.confirmed(planned, f"Free {render.size(limit.freed)}?"):
            return 1
    done = store.prune_volumes(everything=everything, labels=labels, dry_run=dry_run, agreed=limit)
    if asked.json:
        render.document({"Volumes": list(done.names), "Freed": done.freed, "Kept": list(done.kept)})
    else:
        for name in done.names:
            render.line(f"{'Would be deleted' if dry_run else 'Deleted'}: volume {name}")
    for text in done.kept:
        note(f"note: kept: {text}")
    if done.unread:
        note("note: a container's record cannot be read, so no volume goes: system check names it")
    note(f"{'would free' if dry_run else 'freed'} {render.size(done.freed)}")
    return 0


@app.command("exists", cls=Verb)
def exists(volume: Annotated[str, typer.Argument(metavar="VOLUME")]) -> int:
    """Tell by the exit status whether a volume is here: 0 yes, 1 no."""
    store = found_engine()
    return render.answer(found=store is not None and store.volume_exists(volume))

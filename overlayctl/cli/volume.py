"""``overlayctl volume``: directories that outlive the containers they are mounted in."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from overlayctl.cli import asked, engine, found_engine, render
from overlayctl.cli.render import DryRun, Format, ListFormat, Verb, each, note
from overlayctl.cli.system import Unasked, agreed, somebody_to_ask
from overlayctl.errors import Usage

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
_FILTERS = {"dangling": "true|false", "name": "PART", "label": "KEY[=VALUE]", "driver": "local"}

Filter = Annotated[
    list[str] | None,
    typer.Option("--filter", metavar="KEY=VALUE", help="May be repeated; see docker's."),
]
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
    wanted: Filter = None,
    template: ListFormat = None,
) -> None:
    """List volumes and the containers that have them."""
    filters = _filters(wanted or [], _FILTERS)
    sizes = asked.json or (template is not None and "Size" in template)
    store = found_engine()
    found = [row for row in (store.volumes(sizes=sizes) if store else []) if _fits(row, filters)]
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


def _filters(texts: Sequence[str], known: Mapping[str, str]) -> dict[str, list[str]]:
    """What ``--filter`` asks for, by key. Raises Usage."""
    found: dict[str, list[str]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            ways = ", ".join(f"{key}={what}" for key, what in known.items())
            raise Usage(f"there is no filter {text!r}", hint=f"--filter {ways}")
        if key == "dangling" and value not in {"true", "false", "1", "0"}:
            raise Usage(f"dangling is true or false, not {value!r}", hint="--filter dangling=true")
        found.setdefault(key, []).append(value)
    return found


def _fits(row: Mapping[str, Any], filters: Mapping[str, Sequence[str]]) -> bool:
    """Whether a volume is asked for: one value of each filter, but every label (docker)."""
    return (
        all(
            (value in {"true", "1"}) == (not row["UsedBy"]) for value in filters.get("dangling", ())
        )
        and any(value in row["Name"] for value in filters.get("name", ("",)))
        and row["Driver"] in filters.get("driver", ("local",))
        and all(
            key in row["Labels"] and value in {None, row["Labels"][key]}
            for key, value in _labels(filters.get("label", ())).items()
        )
    )


def _labels(texts: Sequence[str]) -> dict[str, str | None]:
    """Labels that are asked for; the value is None where any will do."""
    pairs = [text.partition("=") for text in texts]
    return {key: value if equals else None for key, equals, value in pairs}


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

    removed, status = each(names, remove)
    if asked.json:
        render.document(removed)
        return status
    for one in removed:
        text = render.printable(one["Name"])
        render.line(f"Would be removed: {text}" if dry_run else text)
    return status


@app.command("prune", cls=Verb)
def prune(
    *,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Named volumes, too.")] = False,
    wanted: Filter = None,
    dry_run: DryRun = False,
    force: Unasked = False,
) -> int:
    """Remove the anonymous volumes that no container has; with -a all of them.

    Lists them first, and asks.
    """
    labels = _labels(_filters(wanted or [], {"label": _FILTERS["label"]}).get("label", ()))
    store = engine()
    limit = None
    if not dry_run and not force:
        somebody_to_ask("prune removes volumes and what is in them")
        limit = store.prune_volumes(everything=everything, labels=labels, dry_run=True)
        for name in limit.names:
            note(f"volume {name} would go")
        if limit.names and not agreed(f"Free {render.size(limit.freed)}?"):
            note("overlayctl: nothing was removed")
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

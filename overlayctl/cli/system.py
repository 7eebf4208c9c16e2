"""``overlayctl system``, and the short forms that take an image or a container."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overlayctl.cli import asked, asking, engine, found_engine, location, render, settings
from overlayctl.cli.render import DryRun, Format, Lazy, Verb, note
from overlayctl.errors import Usage

if TYPE_CHECKING:
    from overlayctl.runtime.prune import Pruned

app = render.noun(explained="Check the store, tell about this host, remove what is unused, or all.")
either = render.noun(explained="Short forms.")


@app.command("check", cls=Verb)
def check(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Records only, no hashing.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also derive every index again.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Repair what can be; never what a person wrote.")
    ] = False,
) -> int:
    """Compare every stored byte with what it was; exit status 6 where damage is found, or stays."""
    if quick and (deep or repair):
        raise Usage("--quick reads no layer, --deep and --repair do", hint="leave --quick out")
    if repair:
        return repaired(engine().repair(deep=deep))
    return findings(engine().check(quick=quick, deep=deep))


@app.command("info", cls=Verb)
def info(*, template: Format = None) -> None:
    """Tell where the store is, what this host can do, and how layers are attached here."""
    from overlayctl.inspect import host
    from overlayctl.kernel import probe

    root, source = location()
    store = found_engine()
    told = {"Root": root, "RootFrom": source, **(store.info() if store else host.host(root))}
    for key, ladder in (("attach", probe.LADDER), ("mount", probe.RUNGS)):
        chosen = settings.one_of(key)
        told[f"{key.title()}By"] = host.taken(told[key.title()], ladder, *chosen)
    if template is not None:
        render.formatted(template, told)
    elif asked.json:
        render.document(told)
    else:
        render.tree(told)


@app.command("prune", cls=Verb)
def prune(
    *,
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Tagged images that nobody uses, too.")
    ] = False,
    dry_run: DryRun = False,
    force: asking.Unasked = False,
) -> int:
    """Remove what nobody uses: untagged images, layers that nobody names, what a kill left.

    Containers, and the images that they or a mount use, stay. Lists it first, and asks.
    """
    store = engine()
    agreed = None
    if not dry_run and not force:
        asking.somebody("prune removes images and layers")
        agreed = store.prune(everything=everything, dry_run=True)
        planned = [f"{one} would go" for one in _pruned(agreed)]
        if not asking.confirmed(planned, f"Free {render.size(agreed.freed)}?"):
            return 1
    done = store.prune(everything=everything, dry_run=dry_run, agreed=agreed)
    if asked.json:
        render.document(
            {
                "Images": [{"Id": image, "RepoTags": list(tags)} for image, tags in done.images],
                "Layers": list(done.layers),
                "Staging": list(done.staging),
                "Freed": done.freed,
                "Kept": [str(error) for error in done.kept],
            }
        )
    else:
        for one in _pruned(done):
            render.line(render.printable(f"{'Would be deleted' if dry_run else 'Deleted'}: {one}"))
    for error in done.kept:
        note(f"note: kept: {error}")
    if done.unread:
        note("note: a record cannot be read, so no image and no layer goes: system check names it")
    note(f"{'would free' if dry_run else 'freed'} {render.size(done.freed)}")
    return 0


def _pruned(what: "Pruned") -> list[str]:
    """Each thing of it in words."""
    return [
        *(f"image {' '.join((image, *tags))}" for image, tags in what.images),
        *(f"layer {name}" for name in what.layers),
        *(f"staging {name}" for name in what.staging),
    ]


@app.command("reset", cls=Verb)
def reset(*, dry_run: DryRun = False, force: asking.Unasked = False) -> int:
    """Remove everything: images, layers, containers and what was written in them.

    Lists it first, and asks.
    """
    store = engine()
    listed = store.reset(dry_run=True)
    if not dry_run and not force:
        asking.somebody("reset removes everything")
        sys.stderr.write("This would go:\n")
    if dry_run or not asked.json:
        (render.document if asked.json else render.tree)(listed)
    if dry_run:
        return 0
    if not force and not asking.agreed("Remove all of it?"):
        note("overlayctl: nothing was removed")
        return 1
    removed = store.reset(dry_run=False)
    if asked.json:
        render.document(removed)
    return 0


@either.command("inspect", cls=Verb)
def inspect(
    names: Annotated[list[str], typer.Argument(metavar="NAME...")],
    *,
    template: Format = None,
    kind: Annotated[
        str | None,
        typer.Option("--type", metavar="image|container|volume", help="Only of this kind."),
    ] = None,
) -> int:
    """Show everything about containers, images and volumes, as JSON."""
    if kind not in {None, "image", "container", "volume"}:
        raise Usage(f"--type is image, container or volume, not {kind!r}", hint="--type image")
    store = engine()
    ways = {
        "image": store.inspect_image,
        "container": store.inspect_container,
        "volume": store.inspect_volume,
    }
    return render.inspected(names, ways.get(kind or "", store.inspect), template)


@either.command("mount", cls=Verb)
def mount(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None,
    directory: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="Mount an image there.")
    ] = None,
    *,
    options: Annotated[
        str | None, typer.Option("--options", "-o", metavar="suid,dev", help="Allow these at DIR.")
    ] = None,
    volatile: render.Volatile = False,
    xino: render.Xino = False,
) -> None:
    """Mount a container, else an image, of that name, and print where.

    Without a name: list what is mounted.
    """
    allowed = mount_options(options)
    if name is None:
        mounts()
        return
    store = engine()
    if store.kind_of(name) == "container" and directory is None and not allowed:
        render.path(store.mount_container(name, volatile=volatile, xino=xino))
    elif volatile or xino:
        raise Usage("--volatile and --xino are for containers", hint="overlayctl ps -a lists them")
    else:
        render.path(
            store.mount_image(name, directory, suid="suid" in allowed, dev="dev" in allowed)
        )


@either.command("umount", cls=Verb)
def umount(
    names: Annotated[list[str], typer.Argument(metavar="NAME|DIR...")], *, lazy: Lazy = False
) -> int:
    """Unmount containers, else images, of these names, or what is mounted at a directory."""
    store = engine()

    def let_go(name: str) -> str:
        if name.startswith("/"):
            there = os.path.realpath(name)
            for one in store.mounts():
                if one["Kind"] == "container" and one["MountPoint"] == there:
                    return store.unmount_container(one["Id"], lazy=lazy)
        elif store.kind_of(name) == "container":
            return store.unmount_container(name, lazy=lazy)
        return store.unmount_image(name, lazy=lazy)

    return render.let_go(names, let_go)


@either.command("mounts", cls=Verb)
def mounts(*, template: render.ListFormat = None, no_trunc: render.NoTrunc = False) -> None:
    """List what of this store is mounted, and where."""
    store = found_engine()
    mounted(store.mounts() if store else [], template=template, whole=no_trunc)


# --- what other nouns say too -----------------------------------------------------------------

_MOUNTS = {"Kind": "KIND", "ID": "ID", "Name": "NAME", "MountPoint": "MOUNTPOINT"}


def mount_options(text: str | None) -> frozenset[str]:
    """Return what ``-o`` allows. Raises Usage."""
    given = frozenset(filter(None, (text or "").split(",")))
    if not given <= {"suid", "dev"}:
        raise Usage(f"-o takes suid and dev, not {text!r}", hint="-o suid,dev")
    return given


def mounted(
    mounts: Sequence[Mapping[str, Any]], *, template: str | None = None, whole: bool = False
) -> None:
    """Print a list of mounts."""
    rows = [
        {
            "Kind": render.joined(one["Kind"]),
            "ID": render.joined(one["Id"]) if whole else render.identifier(one["Id"]),
            "Name": render.joined(one["Name"]),
            "MountPoint": render.joined(one["MountPoint"]),
        }
        for one in mounts
    ]
    render.listing(mounts, rows, _MOUNTS, template=template)


def findings(found: Sequence[Mapping[str, Any]]) -> int:
    """Print what a check found; exit status 6 if that is anything."""
    if asked.json:
        render.document(found)
    else:
        for one in found:
            render.line(_finding(one))
        render.note(
            "overlayctl system check --repair mends what can be, and says what hinders the rest"
            if found
            else "no damage found"
        )
    return 6 if found else 0


def repaired(told: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    """Print what a repair did and what remains; exit status 6 if that is anything."""
    if asked.json:
        render.document(told)
        return 6 if told["Findings"] else 0
    for one in told["Repaired"]:
        render.line(f"{one['Action']}: {_finding(one)}")
    if not told["Findings"]:
        return 0 if told["Repaired"] else findings([])
    for one in told["Findings"]:
        render.line(_finding(one))
    render.note("what is left is for you: each line says what to do")
    return 6


def _finding(one: Mapping[str, Any]) -> str:
    users = render.joined(one.get("Users"))
    needed = f" (used by {users})" if users else ""
    return render.printable(f"{one['Tag']}: {render.joined(one['Path'])}: {one['Message']}{needed}")

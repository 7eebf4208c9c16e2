"""``overlayctl system``, and the short forms that take an image or a container."""

import sys
from typing import Annotated

import typer

from overlayctl.cli import render
from overlayctl.cli.render import DryRun, Format, Lazy, Verb, engine, note
from overlayctl.errors import Usage

app = render.noun(explained="Check the store, tell about this host, or empty the store.")
either = render.noun(explained="Short forms.")


@app.command("check", cls=Verb)
def check(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Records only, no hashing.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Derive every index again, too.")] = False,
) -> int:
    """Compare every stored byte with what it was; exit status 6 where damage is found."""
    if quick and deep:
        raise Usage("--quick and --deep exclude each other", hint="overlayctl system check --deep")
    return render.findings(engine().check(quick=quick, deep=deep))


@app.command("info", cls=Verb)
def info(*, template: Format = None) -> None:
    """Tell where the store is, what this host can do, and how layers are attached here."""
    root, source = render.location()
    told = {"Root": root, "RootFrom": source, **engine().info()}
    if template is not None:
        render.formatted(template, told)
    elif render.asked.json:
        render.document(told)
    else:
        render.tree(told)


@app.command("reset", cls=Verb)
def reset(
    *,
    dry_run: DryRun = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", "--yes", "-y", help="Do not ask.")
    ] = False,
) -> int:
    """Remove everything: images, layers, containers and what was written in them.

    Lists it first, and asks.
    """
    store = engine()
    listed = store.reset(dry_run=True)
    if not dry_run and not force:
        if sys.stdin is None or not sys.stdin.isatty():
            raise Usage("reset removes everything and nobody is here to ask", hint="add --yes")
        sys.stderr.write("This would go:\n")
    if dry_run or not render.asked.json:
        (render.document if render.asked.json else render.tree)(listed)
    if dry_run:
        return 0
    if not force and not _agreed():
        note("overlayctl: nothing was removed")
        return 1
    removed = store.reset(dry_run=False)
    if render.asked.json:
        render.document(removed)
    return 0


def _agreed() -> bool:
    """Whether a person types yes."""
    sys.stdout.flush()
    sys.stderr.write("Remove all of it? Type yes: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() == "yes"


@either.command("inspect", cls=Verb)
def inspect(
    names: Annotated[list[str], typer.Argument(metavar="NAME...")],
    *,
    template: Format = None,
    kind: Annotated[
        str | None, typer.Option("--type", metavar="image|container", help="Only of this kind.")
    ] = None,
) -> int:
    """Show everything about images and containers, as JSON."""
    if kind not in {None, "image", "container"}:
        raise Usage(f"--type is image or container, not {kind!r}", hint="--type image")
    store = engine()
    ways = {"image": store.inspect_image, "container": store.inspect_container}
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
    allowed = render.mount_options(options)
    store = engine()
    if name is None:
        render.mounted(store.mounts())
    elif directory is None and not allowed and store.container_exists(name):
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
        if store.container_exists(name):
            return store.unmount_container(name, lazy=lazy)
        return store.unmount_image(name, lazy=lazy)

    return render.let_go(names, let_go)


@either.command("mounts", cls=Verb)
def mounts(*, template: render.ListFormat = None, no_trunc: render.NoTrunc = False) -> None:
    """List what of this store is mounted, and where."""
    render.mounted(engine().mounts(), template=template, whole=no_trunc)

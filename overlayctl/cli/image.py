"""``overlayctl image``: from an archive to layers that can be seen, and back to nothing."""

import contextlib
import os
import sys
from typing import Annotated, Any, Literal

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
from overlayctl.cli.system import mount_options, mounted
from overlayctl.errors import Usage
from overlayctl.names import familiar, stored

app = render.noun(explained="Load, show, save, mount and remove images.", more={"save": "save"})

_IMAGES = {
    "Repository": "REPOSITORY",
    "Tag": "TAG",
    "ID": "IMAGE ID",
    "CreatedSince": "CREATED",
    "Size": "SIZE",
    "CreatedAt": "CREATED AT",
    "DiskUsage": "DISK USAGE",
    "Containers": "CONTAINERS",
}
_HISTORY = {
    "ID": "LAYER",
    "CreatedSince": "CREATED",
    "CreatedBy": "CREATED BY",
    "Size": "SIZE",
    "Comment": "COMMENT",
    "CreatedAt": "CREATED AT",
    "DiffPath": "DIFF PATH",
}


@app.command("load", cls=Verb)
def load(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE|DIR|-", help="The archive or OCI layout; - is stdin."),
    ] = None,
    *,
    source: Annotated[
        str | None, typer.Option("--input", "-i", metavar="FILE", help="The same, docker's way.")
    ] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", "-t", metavar="NAME", help="Name the image this.")
    ] = None,
    platform: Annotated[
        str | None, typer.Option(metavar="OS/ARCH", help="Which image of an index.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Load images from a docker archive or an OCI layout.

    What it is, is found by its content: docker save's tar, an OCI layout as a directory or a tar,
    a directory of skopeo's dir: transport; compressed or not. Layers that are there already are not
    stored again.
    """
    from overlayctl.cli.progress import progress

    if file is not None and source is not None:
        raise Usage("one FILE is enough: as argument or with -i", hint="overlayctl load FILE")
    path = _input(file or source)
    with contextlib.closing(progress(quiet=quiet)) as bar:
        loaded = engine(create=True).load(path, tag=tag, platform=platform, progress=bar)
    for one in loaded:
        _told(one)
    if asked.json:
        render.document([_document(one) for one in loaded])
        return
    for one in loaded:
        for name in one.references:
            render.line(f"Loaded image: {name}")
        if not one.references:
            render.line(f"Loaded image ID: {render.identifier(one.image_id, whole=True)}")


def _input(path: str | None) -> str:
    """What to read: no name means stdin, unless somebody types there."""
    if path is not None and path != "-":
        return path
    if sys.stdin is None or sys.stdin.isatty():
        raise Usage("there is nothing to read", hint="overlayctl load FILE, or < FILE")
    return "-"


def _told(loaded: Any) -> None:
    """Say what a load did beside loading."""
    for name, previous in loaded.moved:
        note(f"note: {name} was {render.identifier(previous)} before")
    for text in loaded.notes:
        note(f"note: {text}")


def _document(loaded: Any) -> dict[str, object]:
    return {
        "Id": render.identifier(loaded.image_id, whole=True),
        "RepoTags": list(loaded.references),
        "Moved": [{"Reference": name, "Previous": previous} for name, previous in loaded.moved],
        "Notes": list(loaded.notes),
        "NewLayers": loaded.new_layers,
        "Layers": loaded.layers,
    }


@app.command("import", cls=Verb)
def import_(
    files: Annotated[
        list[str],
        typer.Argument(metavar="TAR... [NAME:TAG]", help="Layers, bottom first; - is stdin."),
    ],
    *,
    whiteouts: Annotated[
        Literal["oci", "overlay"], typer.Option(help="overlay: tars of raw upper directories.")
    ] = "oci",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Make an image of plain layer tars, bottom to top.

    A last argument that is no file is the image's name. With --whiteouts=overlay the tars hold
    what the kernel keeps in an upper directory (tar --xattrs --xattrs-include='*' -C UPPER -c .):
    character devices 0:0 and trusted.overlay.opaque become the marks that layers have.
    """
    from overlayctl.cli.progress import progress

    named = len(files) > 1 and files[-1] != "-" and not os.path.lexists(files[-1])
    paths, reference = (files[:-1], files[-1]) if named else (files, None)
    paths = [_input(path) for path in paths]
    if paths.count("-") > 1:
        raise Usage("stdin can be only one layer", hint="name the other layers' files")
    with contextlib.closing(progress(quiet=quiet)) as bar:
        made = engine(create=True).import_layers(
            paths, reference=reference, progress=bar, raw=whiteouts == "overlay"
        )
    _told(made)
    if asked.json:
        render.document(_document(made))
    else:
        render.line(render.identifier(made.image_id, whole=True))


@app.command("ls", cls=Verb)
def ls(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME[:TAG]]", help="Only images of this name.")
    ] = None,
    *,
    every: Annotated[bool, typer.Option("--all", "-a", help="All; which it always is.")] = False,
    filters: render.Filters = None,
    quiet: Quiet = False,
    no_trunc: NoTrunc = False,
    template: ListFormat = None,
) -> None:
    """List images.

    Filters: dangling, label, reference, before, since, until.
    """
    del every
    if filters:
        from overlayctl.inspect import filters as given

        given.check(filters, given.IMAGES)
    store = found_engine()
    images = store.images(filters=filters or ()) if store else []
    if name is not None:
        wanted = familiar(stored(name))
        repository = None if ":" in name.rsplit("/", 1)[-1] else wanted.rpartition(":")[0]
        for image in images:
            image["RepoTags"] = [
                tag
                for tag in image["RepoTags"]
                if tag == wanted or tag.rpartition(":")[0] == repository
            ]
        images = [image for image in images if image["RepoTags"]]
    rows = [
        _row(image, tag, whole=no_trunc)
        for image in images
        for tag in image["RepoTags"] or [f"{render.NONE}:{render.NONE}"]
    ]
    shown = ("Repository", "Tag", "ID", "CreatedSince", "Size")
    render.listing(images, rows, _IMAGES, template=template, quiet=quiet, shown=shown)


def _row(image: dict[str, Any], tag: str, *, whole: bool) -> dict[str, str]:
    repository, _, version = tag.rpartition(":")
    return {
        "Repository": repository,
        "Tag": version,
        "ID": render.identifier(image["Id"], whole=whole),
        "CreatedSince": render.ago(image["Created"]),
        "Size": render.size(image["Size"]),
        "CreatedAt": render.joined(image["Created"]),
        "DiskUsage": render.size(image["DiskUsage"]),
        "Containers": render.joined(image["Containers"]),
    }


@app.command("inspect", cls=Verb)
def inspect(
    names: Annotated[list[str], typer.Argument(metavar="IMAGE...")], *, template: Format = None
) -> int:
    """Show everything about images, as JSON.

    GraphDriver.Data has the kernel's mount options, topmost layer first; Layers has every layer
    bottom to top, with the directory that shows it.
    """
    return render.inspected(names, engine().inspect_image, template)


@app.command("history", cls=Verb)
def history(
    image: Annotated[str, typer.Argument(metavar="IMAGE")],
    *,
    reverse: Annotated[bool, typer.Option("--reverse", help="Oldest first.")] = False,
    quiet: Quiet = False,
    no_trunc: NoTrunc = False,
    template: ListFormat = None,
) -> None:
    """Show how an image was made, newest step first.

    Every step that changed files names its layer; with --no-trunc also the layer's directory.
    """
    steps = engine().history(image)
    if reverse:
        steps = steps[::-1]
    rows = [
        {
            "ID": render.identifier(step["DiffID"], whole=no_trunc) or "-",
            "CreatedSince": render.ago(step["Created"]),
            "CreatedBy": _cut(render.joined(step["CreatedBy"]), whole=no_trunc),
            "Size": render.size(step["Size"]),
            "Comment": render.joined(step["Comment"]),
            "CreatedAt": render.joined(step["Created"]),
            "DiffPath": render.joined(step["DiffPath"]) or "-",
        }
        for step in steps
    ]
    shown = ["ID", "CreatedSince", "CreatedBy", "Size", "Comment"]
    if no_trunc:
        shown.append("DiffPath")
    render.listing(steps, rows, _HISTORY, template=template, quiet=quiet, shown=shown)


def _cut(text: str, *, whole: bool) -> str:
    return text if whole or len(text) <= 45 else text[:44] + "…"


@app.command("rm", cls=Verb)
def rm(
    names: Annotated[list[str], typer.Argument(metavar="IMAGE...")],
    *,
    force: Force = False,
    dry_run: DryRun = False,
) -> int:
    """Remove images.

    Of several names only the one given goes. Layers that another image or a container uses stay.
    With -f one that is not there is no failure.
    """
    store = engine()
    removed, status = each(
        names,
        lambda name: store.remove_image(name, force=force, dry_run=dry_run),
        absent=force,
    )
    if asked.json:
        render.document(
            [
                {
                    "Untagged": list(one.untagged),
                    "Deleted": one.image_id,
                    "Layers": list(one.layers),
                    "Freed": one.freed,
                }
                for one in removed
            ]
        )
        return status
    untagged, deleted = ("Untagged", "Deleted")
    if dry_run:
        untagged, deleted = ("Would be untagged", "Would be deleted")
    for one in removed:
        for tag in one.untagged:
            render.line(f"{untagged}: {tag}")
        for gone in ([one.image_id] if one.image_id else []) + list(one.layers):
            render.line(f"{deleted}: {render.identifier(gone, whole=True)}")
    for one in removed:
        if one.needed_by:
            render.note(f"the image stays, containers need it: {', '.join(one.needed_by)}")
    freed = sum(one.freed for one in removed)
    if freed:
        note(f"{'would free' if dry_run else 'freed'} {render.size(freed)}")
    return status


@app.command("tag", cls=Verb)
def tag(
    source: Annotated[str, typer.Argument(metavar="IMAGE")],
    target: Annotated[str, typer.Argument(metavar="NAME[:TAG]")],
) -> None:
    """Give an image one more name."""
    previous = engine().tag(source, target)
    if previous is not None:
        note(f"note: {target} was {render.identifier(previous)} before")
    if asked.json:
        render.document({"Source": source, "Target": target, "Previous": previous})


@app.command("mount", cls=Verb)
def mount(
    image: Annotated[str | None, typer.Argument(metavar="[IMAGE]")] = None,
    directory: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="Mount there, nosuid and nodev.")
    ] = None,
    *,
    options: Annotated[
        str | None, typer.Option("--options", "-o", metavar="suid,dev", help="Allow these at DIR.")
    ] = None,
) -> None:
    """Mount an image's merged view, read-only, and print where.

    Without an image: list what is mounted.
    """
    if image is None:
        found = found_engine()
        mounted([one for one in found.mounts() if one["Kind"] == "image"] if found else [])
        return
    allowed = mount_options(options)
    store = engine()
    render.path(store.mount_image(image, directory, suid="suid" in allowed, dev="dev" in allowed))


@app.command("unmount", cls=Verb)
def unmount(
    names: Annotated[list[str], typer.Argument(metavar="IMAGE|DIR...")], *, lazy: Lazy = False
) -> int:
    """Unmount images, by name or by directory."""
    store = engine()
    return render.let_go(names, lambda name: store.unmount_image(name, lazy=lazy))


@app.command("exists", cls=Verb)
def exists(image: Annotated[str, typer.Argument(metavar="IMAGE")]) -> int:
    """Tell by the exit status whether an image is here: 0 yes, 1 no."""
    store = found_engine()
    return render.answer(found=store is not None and store.image_exists(image))

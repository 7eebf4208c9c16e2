"""``overlayctl container diff``: what was written in a container, told against its image."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from overlayctl.cli import asked, engine, render
from overlayctl.cli.render import Verb
from overlayctl.errors import Usage

if TYPE_CHECKING:
    from overlayctl.layer.diff import Change, Look
    from overlayctl.runtime.diff import Version, Versions

app = render.noun()

_KINDS = {"A": "added", "C": "changed", "D": "deleted"}
_COUNTED = ("file", "directory")
# As git decides what is text.
_SNIFFED = 8000


@app.command("diff", cls=Verb)
def diff(
    container: Annotated[str, typer.Argument(metavar="CONTAINER")],
    *,
    size: Annotated[
        bool, typer.Option("--size", "-s", help="How many bytes each change adds.")
    ] = False,
    stat: Annotated[bool, typer.Option("--stat", help="Only how many, and how large.")] = False,
    name_only: Annotated[bool, typer.Option("--name-only", help="Print paths only.")] = False,
    no_parents: Annotated[
        bool, typer.Option("--no-parents", help="No directories that only hold a change.")
    ] = False,
    null: Annotated[
        bool, typer.Option("--null", "-0", help="Names as they are, each line ended by a NUL.")
    ] = False,
    content: Annotated[
        str | None,
        typer.Option("--content", metavar="PATH", help="The lines that one file changed in."),
    ] = None,
) -> None:
    """List what a container changed of its image: A added, C changed, D deleted.

    Mounted, running or neither: nothing is waited for. Volumes and other mounts in it are not
    its own, and not listed.
    """
    if content is not None:
        if size or stat or name_only or no_parents or null:
            raise Usage("--content goes with no other option", hint="--content PATH")
        _content(container, content)
        return
    if stat and (size or name_only or null):
        raise Usage("--stat lists nothing", hint="--stat, or --size")
    found = engine().diff(container, sizes=size or stat or asked.json)
    if stat:
        _stat(found)
        return
    if no_parents:
        found = [change for change in found if not change.is_parent]
    if asked.json:
        render.document([_document(change) for change in found])
    else:
        _list(found, size=size, name_only=name_only, null=null)


def _list(found: Sequence["Change"], *, size: bool, name_only: bool, null: bool) -> None:
    sizes = [_gain(change) for change in found] if size else []
    width = max(map(len, sizes), default=0)
    sys.stdout.flush()
    for number, change in enumerate(found):
        columns: list[str] = [] if name_only else [change.kind]
        if size:
            columns.append(sizes[number].rjust(width))
        start = " ".join([*columns, "/"])
        if null:
            sys.stdout.buffer.write(start.encode() + change.path + b"\0")
        else:
            render.line(start + render.printable(change.path))


def _gain(change: "Change") -> str:
    """How many bytes more a file has, or fewer; ``-`` for what has no bytes of its own."""
    looks = [look for look in (change.before, change.after) if look is not None]
    if change.is_parent or not any(look.type == "file" or look.size for look in looks):
        return "-"
    return _signed(_size(change.after) - _size(change.before))


def _size(look: "Look | None") -> int:
    return look.size if look is not None else 0


def _signed(count: int) -> str:
    sign = "-" if count < 0 else "+" if count else ""
    return sign + render.size(abs(count))


def _document(change: "Change") -> dict[str, object]:
    return {
        "Kind": change.kind,
        **render.named("Path", b"/" + change.path),
        "Parent": change.is_parent,
        "Changed": list(change.fields),
        "Before": _look(change.before),
        "After": _look(change.after),
        **({} if change.linked is None else render.named("LinkOf", b"/" + change.linked)),
    }


def _look(look: "Look | None") -> dict[str, object] | None:
    if look is None:
        return None
    return {
        "Type": look.type,
        "Mode": f"{look.mode:04o}",
        "Uid": look.uid,
        "Gid": look.gid,
        "Size": look.size,
    }


def _stat(found: Iterable["Change"]) -> None:
    """Counts and bytes of each kind; an inode with several new names has its bytes once."""
    rows = {
        kind: {"Files": 0, "Directories": 0, "Others": 0, "Bytes": 0} for kind in _KINDS.values()
    }
    counted: set[bytes] = set()
    for change in found:
        look = change.after or change.before
        if change.is_parent or look is None:
            continue
        row = rows[_KINDS[change.kind]]
        column = {"file": "Files", "directory": "Directories"}.get(look.type, "Others")
        row[column] += 1
        inode = change.path if change.linked is None else change.linked
        row["Bytes"] -= _size(change.before)
        if change.after is not None and inode not in counted:
            counted.add(inode)
            row["Bytes"] += change.after.size
    if asked.json:
        render.document({kind.capitalize(): row for kind, row in rows.items()})
        return
    from overlayctl.cli import table

    render.line(
        table.table(
            ("CHANGE", "FILES", "DIRECTORIES", "OTHERS", "SIZE"),
            [
                (kind, *(str(row[name]) for name in row if name != "Bytes"), _signed(row["Bytes"]))
                for kind, row in rows.items()
            ],
        )
    )


# --- one file -------------------------------------------------------------------------------


def _content(container: str, path: str) -> None:
    name = os.fsencode(path).strip(b"/")
    found = engine().diff_content(container, name)
    is_text = all(_is_text(one) for one in found)
    told = _unified(name, found) if is_text else b""
    if asked.json:
        render.document(
            {
                **render.named("Path", b"/" + name),
                "Before": _version(found.before),
                "After": _version(found.after),
                "Binary": not is_text,
                **({"Diff": None} if not is_text else render.named("Diff", told)),
            }
        )
    elif not is_text:
        if found.before != found.after:
            old, new = (f"{len(one.content):,}" if one else "no" for one in found)
            render.line(
                f"Binary file /{render.printable(name)} differs: {old} bytes before, {new} after"
            )
    elif sys.stdout.isatty():
        for text in told.decode(errors="surrogateescape").split("\n")[:-1]:
            render.line(render.printable(text.replace("\t", " " * 8)))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(told)


def _is_text(version: "Version | None") -> bool:
    return version is None or b"\0" not in version.content[:_SNIFFED]


def _version(version: "Version | None") -> dict[str, object] | None:
    return version and {"Type": version.type, "Size": len(version.content)}


def _unified(name: bytes, found: "Versions") -> bytes:
    """The lines that differ, as ``patch -p1`` takes them; nothing where none does."""
    import difflib

    shown = render.printable(name).encode()
    lines = difflib.diff_bytes(
        difflib.unified_diff,
        _lines(found.before),
        _lines(found.after),
        b"/dev/null" if found.before is None else b"a/" + shown,
        b"/dev/null" if found.after is None else b"b/" + shown,
    )
    return b"".join(
        line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n"
        for line in lines
    )


def _lines(version: "Version | None") -> list[bytes]:
    lines = [line + b"\n" for line in version.content.split(b"\n")] if version else [b"\n"]
    # What follows the last newline is a line only if there is something.
    last = lines.pop().removesuffix(b"\n")
    return [*lines, last] if last else lines

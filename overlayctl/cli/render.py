"""What all commands share: the common options, the way to the store, and what is printed."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from overlayctl.cli import asked, unknown
from overlayctl.cli.settings import CONFIGURATION, ROOT
from overlayctl.errors import NotFound, OverlayctlError

_T = TypeVar("_T")

EXITS = (
    "Exit status: 0 ok, 1 failed or a predicate is false, 2 usage, 3 not found, 4 in use or in"
    " conflict, 5 this host cannot, 6 damage found, 7 locked, 130 SIGINT, 143 SIGTERM, 141 SIGPIPE."
)
NONE = "<none>"

Format = Annotated[
    str | None,
    typer.Option("--format", "-f", metavar="TEMPLATE", help="Go template, as docker's, or json."),
]
ListFormat = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="TEMPLATE", help="Go template, as docker's; 'table TEMPLATE' or json."
    ),
]
_FILTER = "Only what fits; may be repeated."
Filters = Annotated[
    list[str] | None, typer.Option("--filter", "-f", metavar="KEY=VALUE", help=_FILTER)
]
PruneFilters = Annotated[
    list[str] | None, typer.Option("--filter", metavar="KEY=VALUE", help=_FILTER)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print ids only.")]
NoTrunc = Annotated[bool, typer.Option("--no-trunc", help="Do not shorten ids and commands.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Say what would go, remove nothing.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Do it even where something needs it.")]
Lazy = Annotated[
    bool, typer.Option("--lazy", "-l", help="Detach now, let go when the last user is done.")
]

Volatile = Annotated[
    bool, typer.Option("--volatile", help="Do not sync: fast, and lost if the machine crashes.")
]
Xino = Annotated[bool, typer.Option("--xino", help="Inode numbers that are unique across layers.")]


def _ask(_context: Any, parameter: Any, value: object) -> None:
    if value is not None and value is not False:
        setattr(asked, parameter.name, value)


def _common(*, hidden: bool) -> list[Any]:
    return [
        TyperOption(
            param_decls=["--json"],
            is_flag=True,
            expose_value=False,
            callback=_ask,
            help="Print one JSON document; errors too, on stderr.",
        ),
        TyperOption(
            param_decls=["--root"],
            type=str,
            metavar="DIR",
            expose_value=False,
            callback=_ask,
            hidden=hidden,
            help=f"The store; else OVERLAYCTL_ROOT, {CONFIGURATION}, {ROOT}.",
        ),
        TyperOption(
            param_decls=["--lock-timeout"],
            type=float,
            metavar="SECONDS",
            expose_value=False,
            callback=_ask,
            hidden=hidden,
            help="How long to wait for another overlayctl (30).",
        ),
    ]


_WHOLE = 200


class Verb(TyperCommand):
    """A command with the common options."""

    def __init__(self, *args: Any, params: list[Any] | None = None, **more: Any) -> None:
        super().__init__(*args, params=[*(params or ()), *_common(hidden=True)], **more)

    def get_short_help_str(self, limit: int = _WHOLE) -> str:
        """Return the first sentence, which a list of commands wraps and does not cut."""
        return super().get_short_help_str(max(limit, _WHOLE))


class Noun(TyperGroup):
    """A group of commands that knows docker's other words for them."""

    also = {"list": "ls", "remove": "rm", "umount": "unmount"}  # noqa: RUF012
    more: Mapping[str, str] = {}
    """Commands in modules of their own: which one."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands."""
        return [*super().list_commands(ctx), *self.more]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of that name, or of the other word for it."""
        for name in (cmd_name, self.also.get(cmd_name, cmd_name)):
            if name in self.more:
                return loaded(self.more[name], "app").get_command(ctx, name)
            if found := super().get_command(ctx, name):
                return found
        return None

    def get_short_help_str(self, limit: int = _WHOLE) -> str:
        """Return the first sentence, not cut."""
        return super().get_short_help_str(max(limit, _WHOLE))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Explain themselves where no command is given."""
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or say what to use instead. Raises Usage."""
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None:
            unknown(ctx.command_path, name, self.list_commands(ctx))
        return name, command, args[1:]


class Top(Noun):
    """The command that holds all others: the common options are explained here."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.params += _common(hidden=False)


def loaded(module: str, application: str) -> Any:
    """Return the commands of an application of a module of ours, which is imported now."""
    import importlib

    found = importlib.import_module(f"overlayctl.cli.{module}")
    return typer.main.get_group(getattr(found, application))


def noun(
    kind: type[Noun] = Noun, explained: str | None = None, *, more: Mapping[str, str] | None = None
) -> typer.Typer:
    """Return an application that needs neither rich nor shell completion.

    ``more`` are commands of this noun that live elsewhere, and the modules they are in.
    """
    app = typer.Typer(
        cls=type(kind.__name__, (kind,), {"more": more}) if more else kind,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    if explained is not None:
        app.info.help = explained
    return app


def _version(value: bool | None) -> None:  # noqa: FBT001
    if value:
        from overlayctl import __version__

        line(f"overlayctl {__version__}")
        raise typer.Exit


def front(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-v", help="Print the version.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Container images as layers, mounted with the kernel's OverlayFS.

    Load an image, see every layer as a directory, mount it, write on top of it. Docker's
    commands work where no daemon is needed: load, images, run, exec, ps, diff, commit, rm, rmi.
    """


# --- printing -------------------------------------------------------------------------------


def line(text: str) -> None:
    """Print a line of data."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Say something beside the data, on stderr."""
    sys.stderr.write(printable(text) + "\n")


def printable(text: str | bytes) -> str:
    """Return text from an image, safe on a terminal."""
    from overlayctl.cli import table

    return table.printable(text)


def size(count: object) -> str:
    """Return bytes as docker writes them; what is not known is N/A."""
    from overlayctl.cli import table

    return table.size(count) if isinstance(count, int) else "N/A"


def ago(when: object) -> str:
    """Return how long ago a time (RFC 3339) was."""
    from overlayctl.cli import table

    return table.ago(when) if isinstance(when, str) and when else "N/A"


def identifier(value: object, *, whole: bool = False) -> str:
    """Return an id as people see it: 12 digits, or all of it as docker writes it."""
    digits = str(value or "").removeprefix("sha256:")
    return f"sha256:{digits}" if whole and digits else digits[:12]


def joined(value: object, between: str = ", ") -> str:
    """Return a list as text, and text as it is."""
    if isinstance(value, (list, tuple)):
        return between.join(str(one) for one in value)
    return "" if value is None else str(value)


def document(value: object) -> None:
    """Print one JSON document."""
    line(_json(value, indent=2))


def _json(value: object, indent: int | None = None) -> str:
    import json

    def plain(other: object) -> object:
        return os.fsdecode(other) if isinstance(other, bytes) else str(other)

    return json.dumps(value, indent=indent, default=plain)


def formatted(template: str, value: object) -> None:
    """Print a value through a template."""
    from overlayctl.cli import template as templates

    line(_json(value) if template == "json" else templates.render(template, value))


def listing(
    documents: Sequence[object],
    rows: Iterable[Mapping[str, str]],
    headings: Mapping[str, str],
    *,
    template: str | None = None,
    quiet: bool = False,
    shown: Sequence[str] = (),
) -> None:
    """Print a list: JSON of ``documents``, ids, a template of each row, or a table.

    ``headings`` are the fields that a template may name; ``shown`` are the table's, all if empty.
    """
    if asked.json:
        document(documents)
        return
    safe = [{name: printable(text) for name, text in row.items()} for row in rows]
    if quiet:
        for row in safe:
            line(row["ID"])
        return
    from overlayctl.cli import table
    from overlayctl.cli import template as templates

    wanted, pattern = templates.split_table(template or "table ")
    if wanted and pattern:
        cells = [templates.render(pattern, row).split("\t") for row in (headings, *safe)]
        line(table.table(cells[0], cells[1:]))
    elif wanted:
        columns = shown or list(headings)
        line(
            table.table(
                [headings[name] for name in columns],
                [[row[name] for name in columns] for row in safe],
            )
        )
    else:
        for row in safe:
            formatted(pattern, row)


def tree(value: object, indent: str = "") -> None:
    """Print a document as indented lines of ``name: value``."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if isinstance(inner, (Mapping, list, tuple)) and inner:
                line(f"{indent}{printable(str(name))}:")
                tree(inner, indent + "  ")
            else:
                line(f"{indent}{printable(str(name))}: {_scalar(inner)}")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            if isinstance(inner, Mapping):
                line(f"{indent}-")
                tree(inner, indent + "  ")
            else:
                line(f"{indent}{_scalar(inner)}")
    else:
        line(f"{indent}{_scalar(value)}")


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None or value in ("", [], {}, ()) else printable(str(value))


# --- errors ---------------------------------------------------------------------------------


def report(error: OverlayctlError, status: int | None = None) -> int:
    """Say on stderr what went wrong and what to do next; the result is the exit status.

    ``status`` is another one than the error's own.
    """
    status = error.exit_status if status is None else status
    if asked.json or "--json" in asked.args:
        told = {
            "code": error.code,
            "exit": status,
            "message": str(error),
            "hint": error.hint,
            "details": dict(error.details),
        }
        sys.stderr.write(_json(told) + "\n")
        return status
    note(f"overlayctl: {error}")
    if error.hint:
        note(f"hint: {error.hint}")
    return status


def each(
    names: Sequence[str], call: Callable[[str], _T], *, absent: bool = False
) -> tuple[list[_T], int]:
    """Call for every name, however the others fare; the status is that of the first failure.

    With ``absent`` one that is not there is said, and is none.
    """
    done: list[_T] = []
    status = 0
    for name in names:
        try:
            done.append(call(name))
        except OverlayctlError as error:
            if not (absent and isinstance(error, NotFound)):
                status = status or error.exit_status
            report(error)
    return done, status


# --- what several commands say ----------------------------------------------------------------


def path(text: str) -> None:
    """Print one path, byte for byte: a shell takes it from here."""
    if asked.json:
        document({"Path": text})
    else:
        line(text)


def answer(*, found: bool) -> int:
    """Answer yes or no by the exit status."""
    if asked.json:
        document(found)
    return 0 if found else 1


def let_go(names: Sequence[str], call: Callable[[str], str]) -> int:
    """Unmount each of ``names`` and print what docker would: the name."""
    done, status = each(names, lambda name: (name, call(name)))
    if asked.json:
        document([{"Name": name, "Unmounted": what} for name, what in done])
        return status
    for name, _ in done:
        line(printable(name))
    return status


def removed(rows: Sequence[Mapping[str, Any]], status: int, *, dry_run: bool) -> int:
    """Print the names of what was removed, or would be; ``status`` is the result."""
    if asked.json:
        document(rows)
        return status
    for one in rows:
        text = printable(one["Name"])
        line(f"Would be removed: {text}" if dry_run else text)
    return status


def inspected(
    names: Sequence[str], call: Callable[[str], Mapping[str, Any]], template: str | None
) -> int:
    """Print all that is known about each of ``names``: one JSON array, or the template's lines."""
    found, status = each(names, call)
    if template is None or asked.json:
        document(found)
        return status
    for one in found:
        formatted(template, one)
    return status


def named(key: str, name: bytes) -> dict[str, str]:
    """Return the JSON fields of a name, which in a file system is bytes."""
    from overlayctl.cli import table

    fields = table.json_name(name)
    return {key + ("Base64" if field == "name_base64" else ""): fields[field] for field in fields}

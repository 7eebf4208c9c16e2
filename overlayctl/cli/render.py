"""What all commands share: the common options, the way to the store, and what is printed."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from overlayctl.errors import BadInput, HostCannot, OverlayctlError, Usage

if TYPE_CHECKING:
    from overlayctl.engine import Engine

_T = TypeVar("_T")

ROOT = "/var/lib/overlayctl"
CONFIGURATION = "/etc/overlayctl/overlayctl.toml"
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


class _Asked:
    """What the common options say."""

    __slots__ = ("args", "json", "lock_timeout", "root")

    def __init__(self, args: Sequence[str] = ()) -> None:
        self.args = list(args)
        self.json = False
        self.lock_timeout = 30.0
        self.root: str | None = None


asked = _Asked()


def begin(args: Sequence[str]) -> None:
    """Forget the last call. Names that are not UTF-8 are printed as the bytes they are."""
    import io

    asked.__init__(args)  # type: ignore[misc]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


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


class Verb(TyperCommand):
    """A command with the common options."""

    def __init__(self, *args: Any, params: list[Any] | None = None, **more: Any) -> None:
        super().__init__(*args, params=[*(params or ()), *_common(hidden=True)], **more)


class Noun(TyperGroup):
    """A group of commands that knows docker's other words for them."""

    also = {"list": "ls", "remove": "rm", "umount": "unmount"}  # noqa: RUF012

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of that name, or of the other word for it."""
        found = super().get_command(ctx, cmd_name)
        return found or super().get_command(ctx, self.also.get(cmd_name, cmd_name))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Explain themselves where no command is given."""
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or say what to use instead. Raises Usage."""
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None:
            from overlayctl.cli import unknown

            unknown(ctx.command_path, name, self.list_commands(ctx))
        return name, command, args[1:]


class Top(Noun):
    """The command that holds all others: the common options are explained here."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.params += _common(hidden=False)


def noun(kind: type[Noun] = Noun, explained: str | None = None) -> typer.Typer:
    """Return an application that needs neither rich nor shell completion."""
    return typer.Typer(
        cls=kind,
        help=explained,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def _version(value: bool | None) -> None:  # noqa: FBT001
    if value:
        from overlayctl import __version__

        line(f"overlayctl {__version__}")
        raise typer.Exit


def front(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", "-v", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Container images as layers, mounted with the kernel's OverlayFS.

    Load an image, see every layer as a directory, mount it, write on top of it. Docker's short
    commands work: load, images, create, mount, ps, rm, rmi.
    """


# --- the store ------------------------------------------------------------------------------


def location() -> tuple[str, str]:
    """Where the store is, and who says so: flag, environment, configuration file, default."""
    if asked.root:
        return asked.root, "--root"
    if from_environment := os.environ.get("OVERLAYCTL_ROOT"):
        return from_environment, "OVERLAYCTL_ROOT"
    try:
        with open(CONFIGURATION, "rb") as file:
            import tomllib

            configured = tomllib.load(file).get("root")
    except (FileNotFoundError, NotADirectoryError):
        configured = None
    except ValueError as error:
        raise BadInput(f"{CONFIGURATION}: {error}", hint="mend or remove that file") from None
    if configured is None:
        return ROOT, "default"
    if not isinstance(configured, str) or not configured.startswith("/"):
        raise BadInput(
            f"{CONFIGURATION}: root is no absolute path", hint='for example root = "/srv/overlayctl"'
        )
    return configured, CONFIGURATION


def engine(*, create: bool = False) -> "Engine":
    """Open the store. Raises HostCannot where this is not root."""
    if os.geteuid() != 0:
        import shlex

        kept = os.environ.get("OVERLAYCTL_ROOT")
        variable = [f"OVERLAYCTL_ROOT={kept}"] if kept else []
        raise HostCannot(
            "root is needed: mounting takes CAP_SYS_ADMIN, and the store belongs to root",
            hint=shlex.join(["sudo", *variable, "overlayctl", *asked.args]),
            capability="CAP_SYS_ADMIN",
        )
    if not asked.lock_timeout >= 0:
        raise Usage("--lock-timeout takes seconds, 0 or more", hint="--lock-timeout 30")
    from overlayctl.engine import Engine

    return Engine.open(location()[0], lock_timeout=asked.lock_timeout, create=create)


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
    rows: Sequence[Mapping[str, str]],
    headings: Mapping[str, str],
    *,
    template: str | None = None,
    quiet: str | None = None,
    shown: Iterable[str] = (),
) -> None:
    """Print a list: JSON of ``documents``, one column, a template of each row, or a table.

    ``headings`` are the fields that a template may name; ``shown`` are the table's, all if empty.
    """
    if asked.json:
        document(documents)
    elif quiet is not None:
        for row in rows:
            line(row[quiet])
    elif template is None:
        _table(headings, rows, list(shown) or list(headings))
    elif template == "table" or template.startswith("table "):
        from overlayctl.cli import template as templates

        pattern = template.removeprefix("table").strip()
        if not pattern:
            _table(headings, rows, list(shown) or list(headings))
            return
        _columns([templates.render(pattern, row).split("\t") for row in (headings, *rows)])
    else:
        for row in rows:
            formatted(template, dict(row))


def _table(
    headings: Mapping[str, str], rows: Iterable[Mapping[str, str]], shown: Sequence[str]
) -> None:
    _columns([[printable(row[name]) for name in shown] for row in (headings, *rows)])


def _columns(cells: Sequence[Sequence[str]]) -> None:
    from overlayctl.cli import table

    sys.stdout.write(table.table(cells))


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


def report(error: OverlayctlError) -> int:
    """Say on stderr what went wrong and what to do next; the result is the exit status."""
    if asked.json or "--json" in asked.args:
        told = {
            "code": error.code,
            "exit": error.exit_status,
            "message": str(error),
            "hint": error.hint,
            "details": dict(error.details),
        }
        sys.stderr.write(_json(told) + "\n")
        return error.exit_status
    note(f"overlayctl: {error}")
    if error.hint:
        note(f"hint: {error.hint}")
    return error.exit_status


def each(names: Sequence[str], call: Callable[[str], _T]) -> tuple[list[_T], int]:
    """Call for every name, however the others fare; the status is that of the first failure."""
    done: list[_T] = []
    status = 0
    for name in names:
        try:
            done.append(call(name))
        except OverlayctlError as error:
            status = status or error.exit_status
            report(error)
    return done, status


# --- what several commands say ----------------------------------------------------------------

_MOUNTS = {"Kind": "KIND", "ID": "ID", "Name": "NAME", "MountPoint": "MOUNTPOINT"}


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
            "Kind": joined(one["Kind"]),
            "ID": joined(one["Id"]) if whole else identifier(one["Id"]),
            "Name": joined(one["Name"]),
            "MountPoint": joined(one["MountPoint"]),
        }
        for one in mounts
    ]
    listing(mounts, rows, _MOUNTS, template=template)


def let_go(names: Sequence[str], call: Callable[[str], str]) -> int:
    """Unmount each of ``names`` and print what docker would: the name."""
    done, status = each(names, lambda name: (name, call(name)))
    if asked.json:
        document([{"Name": name, "Unmounted": what} for name, what in done])
        return status
    for name, _ in done:
        line(printable(name))
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


def findings(found: Sequence[Mapping[str, Any]]) -> int:
    """Print what a check found; exit status 6 if that is anything."""
    if asked.json:
        document(found)
    else:
        for one in found:
            users = joined(one.get("Users"))
            needed = f" (used by {users})" if users else ""
            line(printable(f"{one['Tag']}: {joined(one['Path'])}: {one['Message']}{needed}"))
        if not found:
            note("no damage found")
    return 6 if found else 0


def named(key: str, name: bytes) -> dict[str, object]:
    """Return the JSON fields of a name, which in a file system is bytes."""
    from overlayctl.cli import table

    return table.json_name(key, name)

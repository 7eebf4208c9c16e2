"""``create``, and the options that it shares with ``run``: what a container is to be like."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperOption

from overlayctl.cli import asked, engine, render
from overlayctl.cli.render import Verb, note
from overlayctl.errors import NotFound, Usage
from overlayctl.store.containers import Config

if TYPE_CHECKING:
    from overlayctl.placed import Placed

app = render.noun()

_MOUNTED = "A volume, or a directory of this host, there."

# Docker's -h is the hostname here.
SETTINGS = {"help_option_names": ["--help"], "allow_interspersed_args": False}


class Wanted(NamedTuple):
    """What the options say; ``config`` with what the image does not decide."""

    name: str | None
    labels: dict[str, str]
    config: Config


def _keep(_context: Any, parameter: Any, value: object) -> None:
    asked.making[parameter.name] = value


def _option(*words: str, metavar: str = "", many: bool = False, **more: Any) -> TyperOption:
    more["is_flag"] = not metavar
    if metavar:
        more |= {"type": str, "metavar": metavar, "multiple": many}
    return TyperOption(param_decls=list(words), expose_value=False, callback=_keep, **more)


def _options() -> list[Any]:
    return [
        _option("--name", metavar="NAME", help="Else one is made up."),
        _option("--label", "-l", metavar="KEY=VALUE", many=True, help="May be repeated."),
        _option("--env", "-e", metavar="NAME[=VALUE]", many=True, help="May be repeated."),
        _option("--env-file", metavar="FILE", many=True, help="Lines of NAME[=VALUE]."),
        _option("--entrypoint", metavar="PROGRAM", help="Instead of the image's."),
        _option("--workdir", "-w", metavar="DIR", help="Where the process begins."),
        _option("--user", "-u", metavar="USER[:GROUP]", help="Names of the image, or numbers."),
        _option("--hostname", "-h", metavar="NAME", help="Else the start of the id."),
        _option(
            "--network", "--net", metavar="none|host", help="Loopback alone (none), or the host's."
        ),
        _option("--volume", "-v", metavar="[NAME|DIR:]/PATH[:ro]", many=True, help=_MOUNTED),
        _option(
            "mounts", "--mount", metavar="type=...,target=...", many=True, help="As docker has it."
        ),
        _option("--tmpfs", metavar="/PATH[:OPTIONS]", many=True, help="A tmpfs there."),
        _option("--interactive", "-i", help="Keep standard input open."),
        _option("--tty", "-t", help="Give the process a terminal."),
        _option("--read-only", help="Mount the container's tree read-only."),
        _option("--rm", help="Remove the container when its process ends."),
        _option("--volatile", help="Do not sync: fast, and lost if the machine crashes."),
    ]


@contextmanager
def understood(name: str, parent: Any) -> Iterator[None]:
    """Docker's options that are none here are refused with what to use instead. Raises Usage."""
    try:
        yield
    except typer.TyperException as error:
        from overlayctl.cli import elsewhere

        said, hint = elsewhere.option(error, f"{parent.command_path} {name}" if parent else name)
        raise Usage(said, hint=hint) from None


class Making(Verb):
    """A command that makes a container; ``wanted`` says what its options said."""

    def __init__(self, *args: Any, params: list[Any] | None = None, **more: Any) -> None:
        super().__init__(*args, params=[*(params or ()), *_options()], **more)

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **more: Any) -> Any:
        """Return the context. Raises Usage."""
        with understood(info_name, parent):
            return super().make_context(info_name, args, parent, **more)


def wanted(command: list[str] | None) -> Wanted:
    """What the options of this call say. Raises Usage, NotFound for a file that is not there."""
    said = asked.making
    network = said["network"] or "none"
    if network not in {"none", "host"}:
        raise Usage(
            f"there is no network {network!r}",
            hint="--network none or --network host; podman and docker have container networks",
        )
    program = said["entrypoint"]
    config = Config(
        entrypoint=None if program is None else (program,) if program else (),
        command=tuple(command or ()),
        environment=environment(said["env_file"], said["env"]),
        directory=absolute(said["workdir"] or ""),
        user=said["user"] or "",
        hostname=_hostname(said["hostname"]),
        terminal=bool(said["tty"]),
        stdin=bool(said["interactive"]),
        read_only=bool(said["read_only"]),
        network=network,
        disposable=bool(said["rm"]),
        volatile=bool(said["volatile"]),
        mounts=_mounts(said),
    )
    return Wanted(said["name"], labels(said["label"]), config)


def absolute(directory: str) -> str:
    """A working directory. Raises Usage."""
    if directory and not directory.startswith("/"):
        raise Usage(f"the working directory {directory!r} is not absolute", hint="-w /DIR")
    return directory


def _mounts(said: dict[str, Any]) -> "tuple[Placed, ...]":
    """What is to be mounted in the container, relative to where the command runs."""
    asked_for = (said["volume"], said["mounts"], said["tmpfs"])
    if not any(asked_for):
        return ()
    from overlayctl import placed

    volumes, mounts, tmpfs = asked_for
    return placed.wanted(volumes=volumes, mounts=mounts, tmpfs=tmpfs, here=os.getcwd())


def labels(texts: list[str]) -> dict[str, str]:
    """Labels as docker takes them: no value is an empty one. Raises Usage."""
    found = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not key:
            raise Usage(f"{text!r} is no label", hint="--label KEY=VALUE")
        found[key] = value
    return found


def environment(files: list[str], texts: list[str]) -> tuple[str, ...]:
    """What is set, of files first; a name alone stands for the variable of this command."""
    lines = [line for file in files for line in _lines(file)]
    return tuple(_variable(text) for text in (*lines, *texts))


def _variable(text: str) -> str:
    name, equals, _ = text.partition("=")
    if not name or "\0" in text:
        raise Usage(f"{text!r} is no variable", hint="-e NAME=VALUE")
    if equals or name not in os.environ:
        return text
    return f"{name}={os.environ[name]}"


def _lines(file: str) -> list[str]:
    """The lines of a file of variables: no comments, no empty ones (docker run, --env-file)."""
    try:
        with open(file, encoding="utf-8", errors="surrogateescape") as opened:
            lines = opened.read().removeprefix("\ufeff").splitlines()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFound(f"{file}: {error.strerror}", hint="--env-file FILE") from None
    found = [line.lstrip() for line in lines]
    for line in found:
        name = line.partition("=")[0]
        if not line.startswith("#") and any(one.isspace() for one in name):
            raise Usage(f"{file}: the variable {name!r} has a space in its name")
    return [line for line in found if line and not line.startswith("#")]


def _hostname(text: str | None) -> str:
    """A host's name (hostname(7)): letters, digits, '-', '.', at most 64 (sethostname(2))."""
    name = text or ""
    plain = name.replace("-", "").replace(".", "").replace("_", "")
    if name and (len(name) > 64 or not (plain.isascii() and plain.isalnum()) or name[0] in "-."):
        raise Usage(f"{name!r} is no valid hostname", hint="letters, digits, '-', '.'")
    return name


@app.command("create", cls=Making, context_settings=SETTINGS)
def create(
    image: Annotated[str, typer.Argument(metavar="IMAGE")],
    command: Annotated[list[str] | None, typer.Argument(metavar="[COMMAND [ARG...]]")] = None,
    *,
    mount: Annotated[bool, typer.Option("--mounted", help="Mount it at once.")] = False,
) -> None:
    """Make a container of an image, and print its id.

    Options come before IMAGE; what follows it is the command.
    """
    said = wanted(command)
    if said.config.disposable:
        raise Usage(
            "--rm removes a container when its process ends, and create begins none",
            hint="overlayctl run --rm IMAGE COMMAND",
        )
    made = engine().create(
        image, name=said.name, asked=said.config, labels=said.labels, mount=mount
    )
    if asked.json:
        render.document(
            {"Id": made.id, "Name": made.name, "MergedDir": made.merged, "Warnings": []}
        )
        return
    render.line(made.id)
    if made.merged is not None:
        note(f"mounted at {made.merged}")

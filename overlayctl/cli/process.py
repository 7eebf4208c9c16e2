"""``run``, ``exec``, ``with``: processes in and on containers. The status is the process's own."""

from typing import Annotated, Any

import typer

from overlayctl.cli import asked, engine, making, render
from overlayctl.cli.making import understood
from overlayctl.cli.render import Verb, note
from overlayctl.errors import OverlayctlError, Usage
from overlayctl.runtime.process import Command

app = render.noun()

EXITS = (
    "Exit status: the command's own, 128 and the number for one that a signal ended, 126 for what"
    " cannot be executed, 127 for what is not there, 125 for every failure of overlayctl."
)
_FAILED = 125
_FIRST = {"allow_interspersed_args": False}

Runtime = Annotated[
    str,
    typer.Option(
        "--runtime", metavar="RUNTIME", help="runc, crun, a path, builtin, or auto: what works."
    ),
]


def _reported(error: OverlayctlError) -> typer.Exit:
    status = error.exit_status if error.exit_status in {126, 127} else _FAILED
    return typer.Exit(render.report(error, status))


def _note(text: str) -> None:
    """Say something beside what the command says, where that is not to be one document."""
    if not asked.json:
        note(text)


class Runs(Verb):
    """A command whose exit status is another program's, so that its own failures have one."""

    def __init__(self, *args: Any, **more: Any) -> None:
        more["epilog"] = EXITS
        super().__init__(*args, **more)

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **more: Any) -> Any:
        """Return the context; a call that makes no sense is a failure of ours."""
        try:
            with understood(info_name, parent):
                return super().make_context(info_name, args, parent, **more)
        except OverlayctlError as error:
            raise _reported(error) from None

    def invoke(self, ctx: Any) -> Any:
        """Run it; what goes wrong is a failure of ours."""
        try:
            return super().invoke(ctx)
        except OverlayctlError as error:
            raise _reported(error) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _reported(OverlayctlError(str(error), errno=error.errno)) from None


class Making(Runs, making.Making):
    """One that makes a container, too."""


@app.command("run", cls=Making, context_settings=making.SETTINGS)
def run(
    image: Annotated[str, typer.Argument(metavar="IMAGE")],
    command: Annotated[list[str] | None, typer.Argument(metavar="[COMMAND [ARG...]]")] = None,
    *,
    runtime: Runtime = "auto",
) -> int:
    """Make a container of an image and run a command in it, in the foreground.

    Options come before IMAGE; what follows it is the command. The network is loopback alone
    unless --network host is given.
    """
    said = making.wanted(command)
    return engine().run(
        image, name=said.name, asked=said.config, labels=said.labels, runtime=runtime, note=_note
    )


@app.command("exec", cls=Runs, context_settings=_FIRST)
def execute(
    container: Annotated[str, typer.Argument(metavar="CONTAINER")],
    command: Annotated[list[str], typer.Argument(metavar="COMMAND [ARG...]")],
    *,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", "-e", metavar="NAME[=VALUE]", help="May be repeated."),
    ] = None,
    env_file: Annotated[
        list[str] | None,
        typer.Option("--env-file", metavar="FILE", help="Lines of NAME[=VALUE]."),
    ] = None,
    workdir: Annotated[
        str, typer.Option("--workdir", "-w", metavar="DIR", help="Where the process begins.")
    ] = "",
    user: Annotated[
        str,
        typer.Option(
            "--user", "-u", metavar="USER[:GROUP]", help="Names of the image, or numbers."
        ),
    ] = "",
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Keep standard input open.")
    ] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give the process a terminal.")] = False,
    runtime: Runtime = "auto",
) -> int:
    """Execute a command in a container, whether or not something runs in it.

    Where a run goes on the command joins it. A container in which nothing runs is mounted
    for it, and unmounted by the last one out, unless it was mounted before.
    """
    said = Command(
        tuple(command),
        making.environment(env_file or [], env or []),
        making.absolute(workdir),
        user,
        tty,
        interactive,
    )
    return engine().execute(container, said, runtime=runtime, note=_note)


@app.command("with", cls=Runs, context_settings=_FIRST)
def within(
    reference: Annotated[str, typer.Argument(metavar="CONTAINER|IMAGE")],
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND [ARG...]")],
    *,
    rw: Annotated[
        bool, typer.Option("--rw", help="Writable: kept in a container, not in an image.")
    ] = False,
) -> int:
    """Run a program of the host in a merged view, mounted for it; then unmount.

    It begins in the view, whose path OVERLAYCTL_MERGED has. Read-only unless --rw is given.
    """
    words = command[1:] if command[0] == "--" else command
    if not words:
        raise Usage("which program is to be run?", hint="overlayctl with IMAGE -- ls")
    return engine().within(reference, words, writable=rw, note=_note)


@app.command("bundle", cls=Verb)
def bundle(
    container: Annotated[str, typer.Argument(metavar="CONTAINER")],
    directory: Annotated[str, typer.Argument(metavar="DIR")],
) -> None:
    """Write an OCI runtime bundle for a container that is mounted, and print where.

    runc run --bundle DIR NAME, or crun, executes it. It has no capability that the caller
    lacks; it names the merged view, so it works for as long as that is mounted.
    """
    render.path(engine().write_bundle(container, directory))

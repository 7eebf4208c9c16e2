"""The command line: words in, one call of the engine, words out.

Nothing here is imported before the command that needs it: the nouns live in modules of their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from types import FrameType

    from overlayctl.engine import Engine

_SHORT = {
    "load": ("image", "app", "load"),
    "import": ("image", "app", "import"),
    "images": ("image", "app", "ls"),
    "inspect": ("system", "either", "inspect"),
    "save": ("save", "app", "save"),
    "history": ("image", "app", "history"),
    "tag": ("image", "app", "tag"),
    "rmi": ("image", "app", "rm"),
    "create": ("making", "app", "create"),
    "run": ("process", "app", "run"),
    "exec": ("process", "app", "exec"),
    "with": ("process", "app", "with"),
    "ps": ("container", "app", "ls"),
    "rename": ("container", "app", "rename"),
    "rm": ("container", "app", "rm"),
    "commit": ("commit", "app", "commit"),
    "diff": ("diff", "app", "diff"),
    "cp": ("copy", "app", "cp"),
    "export": ("copy", "app", "export"),
    "mount": ("system", "either", "mount"),
    "umount": ("system", "either", "umount"),
    "mounts": ("system", "either", "mounts"),
}
"""Docker's short forms: the module, its application, the command there."""

_NOUNS = ("image", "layer", "container", "volume", "system")

_VERSION = "--version"


class _Asked:
    """What the common options say."""

    __slots__ = ("args", "json", "lock_timeout", "making", "root")

    def __init__(self) -> None:
        self.reset(())

    def reset(self, args: Sequence[str]) -> None:
        """Forget what was said before."""
        self.args = list(args)
        self.json = False
        self.lock_timeout = 30.0
        self.root = ""
        self.making: dict[str, Any] = {}


asked = _Asked()
"""Of the call that is running."""


class _Stopped(BaseException):
    """A signal arrived: it unwinds everything, and nothing but ``main`` may catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is its exit status."""
    _fill_standard()
    args = list(sys.argv[1:] if argv is None else argv)
    if args == [_VERSION]:
        # A question that scripts ask often, answered before anything is loaded.
        from overlayctl import __version__

        sys.stdout.write(f"overlayctl {__version__}\n")
        return 0
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    try:
        with _signals():
            status = _reported(args)
    except _Stopped as stopped:
        status = stopped.status
    except KeyboardInterrupt:
        status = 130
    return status


def _fill_standard() -> None:
    """Let what is opened later not be taken for a standard stream that the caller has closed.

    For whoever is given it, reading or writing it stays an error; what is said here goes nowhere.
    """
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free.
            os.set_inheritable(os.open(os.devnull, flags), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def location() -> tuple[str, str]:
    """Where the store is, and who says so: flag, environment, configuration file, default."""
    from overlayctl.cli import settings

    return settings.root(asked.root)


def engine(*, create: bool = False) -> Engine:
    """Open the store. Raises HostCannot where this is not root."""
    if os.geteuid() != 0:
        import shlex

        from overlayctl.errors import HostCannot

        kept = os.environ.get("OVERLAYCTL_ROOT")
        variable = [f"OVERLAYCTL_ROOT={kept}"] if kept else []
        raise HostCannot(
            "root is needed: mounting takes CAP_SYS_ADMIN, and the store belongs to root",
            hint=shlex.join(["sudo", *variable, "overlayctl", *asked.args]),
            capability="CAP_SYS_ADMIN",
        )
    if not asked.lock_timeout >= 0:
        from overlayctl.errors import Usage

        raise Usage("--lock-timeout takes seconds, 0 or more", hint="--lock-timeout 30")
    from overlayctl.cli import settings
    from overlayctl.engine import Engine

    return Engine.open(
        location()[0],
        create=create,
        lock_timeout=asked.lock_timeout,
        attach=settings.attach(),
        rung=settings.mount(),
    )


def found_engine() -> Engine | None:
    """The store for commands that have an answer without one, too: nothing is in it."""
    from overlayctl.errors import NotFound
    from overlayctl.layout import Layout

    try:
        return engine()
    except NotFound:
        root = location()[0]
        if os.path.lexists(Layout(root).marker):
            raise
        sys.stderr.write(f"note: there is no store at {root!r} yet\n")
        return None


def unknown(path: str, word: str, available: Sequence[str]) -> NoReturn:
    """Refuse a word that is no command of ``path``, and name what may have been meant."""
    from overlayctl import names
    from overlayctl.cli.elsewhere import WORDS
    from overlayctl.errors import Usage

    if word == "attach" and path.endswith(" layer"):
        hint = "overlayctl layer path LAYER attaches it, and prints where"
        raise Usage(f"{path} has no command {word!r}", hint=hint, command=word)
    if word in WORDS:
        why, instead = WORDS[word]
        raise Usage(f"{word} {why}", hint=f"use instead: {instead}", command=word)
    hint = names.near(word, available) or f"{path} --help lists the commands"
    raise Usage(f"{path} has no command {word!r}", hint=hint, command=word)


def _reported(args: list[str]) -> int:
    """The exit status of a call, with what went wrong told on stderr."""
    from overlayctl.cli import render
    from overlayctl.errors import OverlayctlError

    _begin(args)
    try:
        status = _call(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OverlayctlError as error:
        status = render.report(error)
    except BrokenPipeError:
        # The reader has left: nothing to say, and nobody to say it to.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        status = 141
    except OSError as error:
        status = render.report(OverlayctlError(str(error), errno=error.errno))
    return status


def _begin(args: Sequence[str]) -> None:
    """Forget the last call. Names that are not UTF-8 are printed as the bytes they are."""
    import io

    asked.reset(args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


def _call(args: list[str]) -> int:
    """Parse and run. Raises OverlayctlError."""
    import typer

    from overlayctl.errors import Usage

    command = _root()
    try:
        with command.make_context("overlayctl", list(args)) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as done:
        return done.exit_code
    except typer.TyperException as error:
        where: Any = getattr(error, "ctx", None)
        path = "overlayctl" if where is None else where.command_path
        raise Usage(error.format_message(), hint=f"{path} --help") from None


def _root() -> Any:
    """The command that holds all others."""
    import typer

    from overlayctl.cli import render

    class Root(render.Top):
        """Finds a command's module only when it is asked for."""

        def list_commands(self, ctx: Any) -> list[str]:
            del ctx
            return [*_NOUNS, *_SHORT]

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if cmd_name in _NOUNS:
                return render.loaded(cmd_name, "app")
            if cmd_name == "unmount":
                cmd_name = "umount"
            if cmd_name not in _SHORT:
                return None
            module, application, name = _SHORT[cmd_name]
            return render.loaded(module, application).get_command(ctx, name)

    app = render.noun(Root)
    app.callback(epilog=render.EXITS)(render.front)
    return typer.main.get_command(app)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP unwind, so that what is there for a moment goes again."""

    def stop(number: int, _frame: FrameType | None) -> None:
        # Once is enough: the next one must not cut the cleaning short.
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise _Stopped(number)

    before: dict[int, Any] = {}
    try:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(one) is not signal.SIG_IGN:  # what nohup and & have set, stays
                with contextlib.suppress(ValueError):  # not the main thread
                    before[one] = signal.signal(one, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

"""Hold the common commands to a budget of imported modules and of start-up time.

Modules are counted after a real call of the command, in a process of its own and on a store of its
own. Those of other packages count as far as an empty typer program does not load them as well: so
the numbers do not depend on the interpreter. Time is compared with that same program in the same
run, call by call in turn, so that neither the machine nor what else it does matters much.

A command that outgrows its budget either loads something that it does not use, or the budget below
is raised in the same change, for all to see.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

EMPTY = """\
import typer
app = typer.Typer()
@app.command()
def main() -> None:
    pass
app()
"""

CALL = """\
import json, os, sys
report = int(sys.argv.pop(1))
try:
    {program}
finally:
    os.write(report, json.dumps(sorted(sys.modules)).encode())
"""
"""The report goes to a descriptor of its own: stdout and stderr are the command's."""

OURS = "import overlayctl.cli; sys.argv[0] = 'overlayctl'; sys.exit(overlayctl.cli.main())"
THEIRS = f"exec({EMPTY!r})"


class Budget(NamedTuple):
    """The most that one command may load."""

    arguments: tuple[str, ...]
    ours: int
    """Modules of overlayctl."""
    others: int
    """Other modules, beyond those of an empty typer program."""
    never: tuple[str, ...]
    """Packages that must not be among them, as far as typer itself does not load them."""
    needs_root: bool


HEAVY = ("pyroute2", "isal", "backports", "compression", "hypothesis", "rich", "concurrent")
BUDGETS = (
    Budget(
        arguments=("--version",),
        ours=8,
        others=12,
        never=(*HEAVY, "ctypes", "mmap", "overlayctl.kernel", "overlayctl.layer"),
        needs_root=False,
    ),
    Budget(arguments=("images",), ours=48, others=40, never=HEAVY, needs_root=True),
    Budget(arguments=("ps",), ours=48, others=40, never=HEAVY, needs_root=True),
)

TIME_RATIO = 1.6
"""How much longer than an empty typer program ``overlayctl --version`` may take."""
TIME_ROUNDS = 15


def environment(root: str) -> dict[str, str]:
    """Return the environment of a measured call: its own store, and no shell completion."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("OVERLAYCTL_", "_OVERLAYCTL"))}
    return {**mine, "OVERLAYCTL_ROOT": root}


def modules(program: str, arguments: tuple[str, ...], root: str) -> set[str]:
    """Run a program and return the names of the modules that it had loaded when it ended."""
    reader, writer = os.pipe()
    code = CALL.format(program=program)
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(writer), *arguments],
        env=environment(root),
        pass_fds=[writer],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        report = pipe.read()
    _, stderr = child.communicate()
    if child.returncode != 0:
        # An error is not the path that the budget is for.
        name = " ".join(("overlayctl", *arguments))
        said = stderr.decode(errors="replace").strip()
        sys.exit(f"import budget: {name} exits with {child.returncode}:\n{said}")
    return set(json.loads(report))


def is_of(name: str, package: str) -> bool:
    """Tell whether a module is a package or within it."""
    return name == package or name.startswith(package + ".")


def over_budget(budget: Budget, empty: set[str], root: str) -> list[str]:
    """Measure one command, print what it loads, and return what is wrong with it."""
    name = " ".join(("overlayctl", *budget.arguments))
    loaded = modules(OURS, budget.arguments, root)
    ours = sorted(m for m in loaded if is_of(m, "overlayctl"))
    others = sorted(loaded - empty - set(ours))
    print(
        f"{name}: {len(ours)} modules of ours (budget {budget.ours}), {len(others)} others beyond"
        f" typer's (budget {budget.others}), {len(loaded)} in all"
    )
    wrong = []
    if len(ours) > budget.ours:
        wrong.append(f"{name} loads {len(ours)} modules of ours: {', '.join(ours)}")
    if len(others) > budget.others:
        wrong.append(f"{name} loads {len(others)} other modules: {', '.join(others)}")
    wrong += [
        f"{name} loads {package}"
        for package in budget.never
        if any(is_of(module, package) for module in loaded - empty)
    ]
    return wrong


def seconds(command: list[str], root: str) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    subprocess.run(command, env=environment(root), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def slowest_imports(command: list[str], root: str) -> str:
    """Return the imports that a Python command spends most of its own time on."""
    done = subprocess.run(
        [command[0], "-X", "importtime", *command[1:]],
        env=environment(root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows = []
    for line in done.stderr.splitlines():
        # "import time:      self [us] | cumulative | imported package" is the heading.
        with contextlib.suppress(ValueError):
            own, _, name = line.removeprefix("import time:").split("|")
            rows.append((int(own), name.strip()))
    return "\n".join(f"  {own:6} us {name}" for own, name in sorted(rows, reverse=True)[:12])


def too_slow(root: str) -> list[str]:
    """Compare the start-up with that of an empty typer program."""
    ours = [sys.executable, "-m", "overlayctl", "--version"]
    theirs = [sys.executable, "-c", EMPTY]
    for command in (ours, theirs):  # compiles and fills the page cache
        seconds(command, root)
    pairs = [(seconds(ours, root), seconds(theirs, root)) for _ in range(TIME_ROUNDS)]
    ratio = statistics.median(a / b for a, b in pairs)
    mine, empty = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"overlayctl --version: {mine:.0f} ms, an empty typer program {empty:.0f} ms:"
        f" {ratio:.2f} times (budget {TIME_RATIO})"
    )
    if ratio <= TIME_RATIO:
        return []
    return [
        f"overlayctl --version takes {ratio:.2f} times as long as an empty typer program:\n"
        + slowest_imports(ours, root)
    ]


def main() -> int:
    """Check every budget; return 1 if one is exceeded."""
    wrong = []
    with tempfile.TemporaryDirectory(prefix="overlayctl-budget-") as directory:
        root = os.path.join(directory, "store")
        empty = modules(THEIRS, (), root)
        for budget in BUDGETS:
            if budget.needs_root and os.geteuid() != 0:
                print(f"overlayctl {' '.join(budget.arguments)}: not measured, it needs root")
            else:
                wrong += over_budget(budget, empty, root)
        wrong += too_slow(root)
    for sentence in wrong:
        print(f"import budget: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

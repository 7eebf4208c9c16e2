"""The pytest plugin behind every test that mounts: what pytest-sudo would be, were it published.

Every test outside ``tests/unit`` is marked ``root``, and for each of those:

* It runs, fixtures of its own included, in a mount namespace of its own, so nothing that it mounts
  can be seen from outside or by the next test. Fixtures of a wider scope must not leave mounts:
  they would vanish with the first test that uses them.
* Overlay and EROFS mounts that are still below pytest's temporary directory when the test's
  fixtures are torn down, mounts that appeared in the namespace outside, and loop devices that
  outlive the test, fail it. What is left mounted is the mistake of a program under test as often as
  that of a test, and the namespace alone would hide it.
* It is never skipped for want of root. A session that selects a root test without being root runs
  itself again under ``sudo -n``; where that is impossible each root test fails and says so: a suite
  that reports success without having mounted anything proves nothing.

Tools and images that are missing are another matter: :func:`require` skips the test, and the last
line of the session says what did not run for want of what. With ``CI`` or
``OVERLAYCTL_REQUIRE_ALL`` set, a missing tool is a failure.

The system calls are made here with ctypes, not through ``overlayctl.kernel``: what judges the
program does not depend on it.
"""

import collections
import ctypes
import errno
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple, NoReturn

import pytest
from _pytest.outcomes import Skipped  # pytest.skip.Exception, by the name that types know

# <linux/sched.h> and <linux/mount.h>; the os module has unshare and setns from 3.12 on only.
CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

UNDER_SUDO = "OVERLAYCTL_TESTS_UNDER_SUDO"
"""Set for the session that sudo started, so that a sudo that gives no root ends there."""

SETTLE_SECONDS = 2.0
"""How long a loop device may take to go: the kernel clears it after the last user has closed it."""

_libc = ctypes.CDLL(None, use_errno=True)


class Missing(Skipped):
    """A test did not run because something is not on this machine; the session's end lists it."""

    def __init__(self, things: tuple[str, ...]) -> None:
        self.things = things
        super().__init__(f"missing here: {', '.join(things)}")


def missing(*things: str) -> NoReturn:
    """End the running test because ``things`` are not here: skipped and listed, in CI failed."""
    if _everything_required():
        pytest.fail(f"missing here, and CI requires it: {', '.join(things)}", pytrace=False)
    raise Missing(things)


def require(*tools: str) -> None:
    """Say which programs the running test needs; if one is missing the test ends here.

    To be called in a test or a fixture. ``/usr/sbin`` and ``/sbin`` are searched as well: they are
    not in the PATH of every shell that root gets.
    """
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    absent = tuple(tool for tool in tools if shutil.which(tool, path=path) is None)
    if absent:
        missing(*absent)


@pytest.fixture(scope="session")
def images(pytestconfig: pytest.Config) -> pathlib.Path:
    """Return the directory of images made by others: ``OVERLAYCTL_TEST_IMAGES``.

    No package provides them, so that they are not at the default place is no failure in CI; that
    they are not where the variable says, is.
    """
    named = os.environ.get("OVERLAYCTL_TEST_IMAGES")
    place = pathlib.Path(named or pytestconfig.rootpath.parent / "shared" / "images")
    if place.is_dir():
        return place
    if named:
        missing(f"OVERLAYCTL_TEST_IMAGES={named}")
    raise Missing(("the test images",))


@pytest.fixture(scope="session")
def image(images: pathlib.Path) -> Callable[[str], pathlib.Path]:
    """Return a function from a name within ``images`` to its path; one that is absent is listed."""

    def find(name: str) -> pathlib.Path:
        place = images / name
        if not place.exists():
            raise Missing((f"image {name}",))
        return place

    return find


REFUSAL = pytest.StashKey[str]()
"""Why a root test cannot run, from entering its namespace to its own set-up."""


# --- the hooks ------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and the part of the plugin that has state."""
    config.addinivalue_line("markers", "root: needs root and runs in a mount namespace of its own")
    config.pluginmanager.register(RootTests(config), "rootmount-session")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test that cannot run.

    Not where that is found out, around all other set-up: pytest's own part of the set-up has to
    happen for its tear-down to work.
    """
    refusal = item.stash.get(REFUSAL, None)
    if refusal is not None:
        pytest.fail(refusal, pytrace=False)


class Mount(NamedTuple):
    """A line of the mount table, as far as leaks are concerned."""

    mountpoint: str
    fs_type: str
    source: str


class Surroundings(NamedTuple):
    """What a test must leave as it found it: mounts outside its namespace, and loop devices."""

    mounts: collections.Counter[Mount]
    loops: collections.Counter[tuple[str, str]]

    @classmethod
    def now(cls) -> "Surroundings":
        """Read both from the kernel, for the namespace that this process is in."""
        return cls(collections.Counter(mount_table()), collections.Counter(loop_devices()))


class RootTests:
    """One session's root tests."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.no_root: str | None = None
        self.before: Surroundings | None = None
        self.not_run: dict[tuple[str, ...], list[str]] = {}
        self.failed: set[str] = set()
        # Opened when the first root test starts, and valid as long as the process lives.
        self.outside: Outside | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Mark what is not a unit test; first, so that ``-m`` selects by it."""
        unit = self.config.rootpath / "tests" / "unit"
        for item in items:
            if not item.path.is_relative_to(unit):
                item.add_marker("root")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Start over under sudo if a root test is left after all selection, and root is not."""
        if os.geteuid() == 0 or self.config.option.collectonly:
            return
        if not any(is_root(item) for item in session.items):
            return
        if os.environ.get(UNDER_SUDO):
            self.no_root = "sudo ran the tests again, but not as root"
            return
        self.no_root = why_no_sudo()
        if self.no_root is None:
            self.rerun()

    def rerun(self) -> NoReturn:
        """Replace this process by the same pytest command under sudo."""
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line("root tests selected: running again under sudo")
        # While pytest captures, descriptors 1 and 2 are temporary files.
        capture = self.config.pluginmanager.get_plugin("capturemanager")
        if capture is not None:
            capture.suspend_global_capture(in_=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os.chdir(self.config.invocation_params.dir)
        command = sudo_command(tuple(str(arg) for arg in self.config.invocation_params.args))
        os.execvp(command[0], command)  # noqa: S606 - no shell is wanted

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        """Enter a new mount namespace before any of the test's fixtures are made."""
        if is_root(item):
            self.enter(item)
        return (yield)

    def enter(self, item: pytest.Item) -> None:
        """Move to a new namespace, or note why the test cannot run."""
        if os.geteuid() != 0:
            reason = self.no_root or "the session is not root any more"
            item.stash[REFUSAL] = f"this test needs root, and {reason}"
            return
        if self.outside is None:
            self.outside = Outside()
        before = Surroundings.now()
        try:
            enter_new_namespace()
        except PermissionError as error:
            item.stash[REFUSAL] = (
                f"this test needs a mount namespace of its own: {error}; root lacks CAP_SYS_ADMIN"
                " here (a container must be privileged)"
            )
            return
        self.before = before

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        """Look for leaks after the last of the test's fixtures has gone, and leave the namespace.

        A fixture that fails must not keep the next test in here, so what it raises waits.
        """
        before, self.before = self.before, None
        if before is None or self.outside is None:
            return (yield)
        try:
            result = yield
        except BaseException as error:
            for leak in self.leave(self.outside, before):
                error.add_note(f"left behind: {leak}")
            raise
        leaks = self.leave(self.outside, before)
        if leaks:
            pytest.fail("the test leaves behind: " + "; ".join(leaks), pytrace=False)
        if item.nodeid not in self.failed:
            remove_tmp_path(item)
        return result

    def leave(self, outside: "Outside", before: Surroundings) -> list[str]:
        """Go back to the session's namespace and return the leaks in both."""
        leaks = [
            f"{mount.fs_type} still mounted at {mount.mountpoint} ({mount.source})"
            for mount in leftover_mounts(self.config)
        ]
        outside.go_back()
        return leaks + leaked(before, self.config)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Remember what did not run, and for want of what.

        Here and not in :func:`missing`: when a session's fixture raises, pytest raises the same
        error again for every other test that uses it.
        """
        report = yield
        if report.failed:
            self.failed.add(item.nodeid)
        if call.excinfo is not None and isinstance(call.excinfo.value, Missing):
            self.not_run.setdefault(call.excinfo.value.things, []).append(item.nodeid)
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> Generator[None, None, None]:
        """Write the closing line, below whatever else the summary says."""
        yield
        terminalreporter.write_line(closing_line(self.not_run))


# --- what they are made of ------------------------------------------------------------------


def is_root(item: pytest.Item) -> bool:
    """Tell whether a test is marked ``root``."""
    return item.get_closest_marker("root") is not None


def closing_line(not_run: dict[tuple[str, ...], list[str]]) -> str:
    """Say which tests did not run for want of what: ``3 tests without dockerd (test_load.py)``."""
    if not not_run:
        return "not run for want of a tool or an image: nothing"
    parts = []
    for things, tests in sorted(not_run.items()):
        files = sorted({nodeid.partition("::")[0].rpartition("/")[2] for nodeid in tests})
        count = "1 test" if len(tests) == 1 else f"{len(tests)} tests"
        parts.append(f"{count} without {' and '.join(things)} ({', '.join(files)})")
    return f"not run: {'; '.join(parts)}"


def _everything_required() -> bool:
    return any(
        os.environ.get(name, "").lower() not in ("", "0", "false", "no")
        for name in ("CI", "OVERLAYCTL_REQUIRE_ALL")
    )


def why_no_sudo() -> str | None:
    """Try sudo without a password, and return why it does not work."""
    try:
        tried = subprocess.run(
            ["sudo", "-n", "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        return f"sudo cannot be run: {error.strerror}; run the tests as root"
    if tried.returncode == 0:
        return None
    said = tried.stderr.strip() or f"it exits with {tried.returncode}"
    return f"`sudo -n` does not give it: {said}; run the tests as root"


def sudo_command(args: tuple[str, ...]) -> list[str]:
    """Return the command that runs pytest with the same arguments as root.

    sudo drops most of the environment, and ``--preserve-env`` needs a permission that a plain rule
    in sudoers does not give; env(1) behind it needs none.
    """
    kept = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name in ("CI", "PATH", "PYTHONPATH", "PYTEST_ADDOPTS", "TMPDIR", "TERM", "NO_COLOR")
        or name.startswith(("OVERLAYCTL_", "HYPOTHESIS_"))
    ]
    python = [sys.executable, "-m", "pytest"]
    return ["sudo", "-n", "env", *kept, f"{UNDER_SUDO}=1", *python, *args]


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def enter_new_namespace() -> None:
    """Move the calling thread to a copy of its mount namespace that propagates nothing.

    unshare(2), mount_namespaces(7): a copy of a shared mount is shared with the original, so that
    what a test mounts would appear outside until the copy is private.
    """
    _check(_libc.unshare(CLONE_NEWNS), "unshare(CLONE_NEWNS)")
    private = ctypes.c_ulong(MS_REC | MS_PRIVATE)
    _check(_libc.mount(b"none", b"/", None, private, None), "mount --make-rprivate /")


class Outside:
    """The mount namespace, root and working directory that the session started in."""

    def __init__(self) -> None:
        self.namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        directory = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self.root = os.open("/", directory)
        self.cwd = os.open(".", directory)

    def go_back(self) -> None:
        """Return to it from a test's namespace, which ends if nothing else is in it.

        setns(2) refuses a thread that shares its root and working directory with another one, as
        any thread does that a test has left running: so those are made its own before. It also
        moves both to the root of the namespace, which is neither the working directory nor, if the
        tests run in a chroot, the root.
        """
        try:
            _check(_libc.unshare(CLONE_FS), "unshare(CLONE_FS)")
            _check(_libc.setns(self.namespace, CLONE_NEWNS), "setns")
            os.fchdir(self.root)
            os.chroot(".")
            os.fchdir(self.cwd)
        except OSError as error:
            pytest.exit(f"cannot leave a test's mount namespace: {error}", returncode=3)


def _unescape(field: str) -> str:
    # proc_pid_mountinfo(5): blanks, newlines and backslashes are three octal digits.
    head, *rest = field.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def mount_table() -> Iterator[Mount]:
    """Read the mounts of the namespace that this process is in."""
    with open("/proc/thread-self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.rstrip("\n").split(" ")
            fs_type, source = fields[fields.index("-", 6) + 1 :][:2]
            yield Mount(_unescape(fields[4]), _unescape(fs_type), _unescape(source))


def loop_devices() -> Iterator[tuple[str, str]]:
    """Read the loop devices in use, whoever uses them: no namespace separates them."""
    for device in sorted(pathlib.Path("/sys/block").glob("loop*")):
        try:
            backing = (device / "loop" / "backing_file").read_bytes()
        except OSError as error:
            # A device that goes meanwhile is not in use.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            continue
        yield device.name, os.fsdecode(backing.rstrip(b"\n"))


def _temporary(config: pytest.Config) -> pathlib.Path:
    # The only name pytest has for it; the tmp_path_factory fixture returns the same object.
    factory: pytest.TempPathFactory = config._tmp_path_factory  # type: ignore[attr-defined]
    return factory.getbasetemp()


def leftover_mounts(config: pytest.Config) -> Iterator[Mount]:
    """Find what the program under test mounted below pytest's directory and nobody unmounted."""
    place = _temporary(config)
    for mount in mount_table():
        if mount.fs_type in ("overlay", "erofs") and _is_below(mount.mountpoint, place):
            yield mount


def leaked(before: Surroundings, config: pytest.Config) -> list[str]:
    """Compare the surroundings with what they were; what is about to go is given time to."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        now = Surroundings.now()
        leaks = [
            f"{mount.fs_type} mounted at {mount.mountpoint} outside the test's namespace"
            for mount in now.mounts - before.mounts
        ] + [
            f"/dev/{name} attached to {backing}"
            for name, backing in now.loops - before.loops
            if not _is_of_another_session(backing, _temporary(config))
        ]
        if not leaks or time.monotonic() > deadline:
            return leaks
        time.sleep(0.02)


def _is_below(path: str, directory: pathlib.Path) -> bool:
    return pathlib.Path(path).is_relative_to(directory)


def _is_of_another_session(backing: str, place: pathlib.Path) -> bool:
    """Tell whether a loop device's file belongs to a pytest that runs beside this one."""
    path = pathlib.Path(backing)
    beside = any(part.startswith("pytest-of-") for part in path.parts)
    return beside and not path.is_relative_to(place)


def remove_tmp_path(item: pytest.Item) -> None:
    """Remove a passed test's directory: images are large.

    From outside its namespace, where nothing is mounted below it that a removal could reach into:
    that is why pytest's own tmp_path_retention_policy, which removes from inside, is not used.
    """
    place = getattr(item, "funcargs", {}).get("tmp_path")
    if isinstance(place, pathlib.Path):
        shutil.rmtree(place, ignore_errors=True)

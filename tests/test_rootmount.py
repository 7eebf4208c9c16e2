"""The plugin, tested from outside: as a pytest of its own, as root and as a plain user."""

import os
import pathlib
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Mapping

import pytest

from tests import rootmount
from tests.rootmount import require

NOBODY = 65534
PLUGIN = pathlib.Path(rootmount.__file__)

# What the outer session was told must not steer the inner one.
OWN_SETTINGS = ("CI", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")


class Inner:
    """A directory with the plugin and one test file, and ways to run pytest there."""

    def __init__(self, place: pathlib.Path) -> None:
        self.place = place
        self.bin = place / "bin"
        self.bin.mkdir()
        shutil.copy(PLUGIN, place / "rootmount.py")
        (place / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")

    def write(self, code: str, name: str = "test_inner.py") -> None:
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(code))

    def run(
        self,
        *args: str,
        wrapper: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        path: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        options = ["-p", "rootmount", "-p", "no:cacheprovider", f"--basetemp={self.place}/base"]
        return subprocess.run(
            [*wrapper, sys.executable, "-m", "pytest", *options, *args],
            cwd=self.place,
            env={
                **{
                    name: value
                    for name, value in os.environ.items()
                    if name not in OWN_SETTINGS and not name.startswith("OVERLAYCTL_")
                },
                "PATH": path or f"{os.environ['PATH']}:/usr/sbin:/sbin",
                "PYTHONPATH": str(self.place),
                "PYTHONDONTWRITEBYTECODE": "1",
                # The plugin alone is under test, and the others take half of the time.
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                **(env or {}),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def as_nobody(self, *args: str, sudo: bool = False) -> subprocess.CompletedProcess[str]:
        """Run it as a plain user, whose PATH has the stand-in sudo of :meth:`stand_in` or none."""
        for directory, _, files in os.walk(self.place):
            for name in (directory, *(os.path.join(directory, file) for file in files)):
                if not os.stat(name).st_mode & stat.S_ISUID:
                    os.chown(name, NOBODY, NOBODY)
        tools = self.place / "tools"
        tools.mkdir(exist_ok=True)
        for tool in ("true", "env", "sh"):
            found = shutil.which(tool)
            assert found is not None
            if not (tools / tool).exists():
                (tools / tool).symlink_to(found)
        path = f"{self.bin}:{tools}" if sudo else str(tools)
        return self.run(*args, wrapper=plain_user(), path=path)

    def stand_in(self, gain: str) -> pathlib.Path:
        """Put a ``sudo`` into the PATH that notes its arguments; ``gain`` is what makes it root."""
        log = self.place / "sudo.log"
        log.touch()
        sudo = self.bin / "sudo"
        sudo.write_text(
            f"#!/bin/sh\nprintf '%s\\0' \"$@\" >>{log}; printf '\\n' >>{log}\n"
            f'[ "$1" = -n ] || exit 64\nshift\nexec {gain} "$@"\n'
        )
        sudo.chmod(0o755)
        return log


def plain_user() -> tuple[str, ...]:
    """The command that gives up root, before a Python command.

    A checkout or an interpreter in root's home directory is out of a plain user's reach. There, and
    only there, the user keeps the one capability that opens directories; it mounts nothing.
    """
    # By its path: the plain user's PATH is searched for it otherwise.
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    ids = (setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    plain = (*ids, "--inh-caps=-all")
    # That Python starts is not enough: setpriv itself still reaches it.
    probe = "import os, sys, pytest; sys.exit(not os.access(sys.executable, os.X_OK))"
    ran = subprocess.run(
        [*plain, sys.executable, "-c", probe], capture_output=True, check=False, cwd="/"
    )
    if ran.returncode == 0:
        return plain
    opener = "+dac_read_search"
    return (*ids, f"--inh-caps=-all,{opener}", f"--ambient-caps={opener}")


@pytest.fixture
def inner() -> Inner:
    """A directory that a plain user can reach, and that nobody outside this test can see."""
    require("mount", "setpriv")
    # /tmp/pytest-of-root is root's alone. This ends with the test's namespace.
    place = pathlib.Path("/mnt")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "inner", place], check=True)
    return Inner(place)


def test_each_root_test_has_its_own_namespace(inner: Inner) -> None:
    inner.write("""
        import os, pathlib, subprocess
        cwd, outside = os.getcwd(), os.readlink("/proc/self/ns/mnt")
        def test_first(tmp_path):
            assert os.readlink("/proc/self/ns/mnt") != outside
            subprocess.run(["mount", "-t", "tmpfs", "seen-by-one", "/media"], check=True)
            os.chdir("/media")
        def test_second(tmp_path):
            assert os.readlink("/proc/self/ns/mnt") != outside
            assert "seen-by-one" not in pathlib.Path("/proc/self/mountinfo").read_text()
            assert os.getcwd() == cwd
    """)
    ran = inner.run()
    assert ran.returncode == 0, ran.stdout
    assert "2 passed" in ran.stdout
    assert "seen-by-one" not in pathlib.Path("/proc/self/mountinfo").read_text()


def test_unit_tests_stay_outside(inner: Inner) -> None:
    inner.write(
        """
        import os
        def test_here():
            assert os.readlink("/proc/self/ns/mnt") == os.readlink(f"/proc/{os.getppid()}/ns/mnt")
        """,
        "tests/unit/test_unit.py",
    )
    ran = inner.run()
    assert ran.returncode == 0, ran.stdout


def test_a_thread_left_running_does_not_keep_the_next_test_inside(inner: Inner) -> None:
    inner.write("""
        import os, subprocess, threading, pathlib
        def test_leaves_a_thread():
            threading.Thread(target=threading.Event().wait, daemon=True).start()
            subprocess.run(["mount", "-t", "tmpfs", "seen-by-one", "/media"], check=True)
        def test_is_outside_again():
            assert "seen-by-one" not in pathlib.Path("/proc/thread-self/mountinfo").read_text()
    """)
    ran = inner.run()
    assert ran.returncode == 0, ran.stdout


def test_the_root_directory_is_kept_in_a_chroot(inner: Inner) -> None:
    root = inner.place / "root"
    root.mkdir()
    subprocess.run(["mount", "--rbind", "/", root], check=True)
    (inner.place / "only-outside").touch()
    inner.write("""
        import os
        def same_root():
            return os.stat("/").st_ino, os.stat("/").st_dev, os.path.exists("/mnt/only-outside")
        at_start = same_root()
        def test_first():
            pass
        def test_second():
            assert same_root() == at_start
    """)
    # Inside, /mnt is what was there before the test's tmpfs: the same tmpfs once more.
    subprocess.run(["mount", "-t", "tmpfs", "inside", root / "mnt"], check=True)
    shutil.copytree(
        inner.place, root / "mnt", dirs_exist_ok=True, ignore=lambda *_: ["root", "only-outside"]
    )
    ran = inner.run(wrapper=("chroot", str(root), "env", "--chdir=/mnt"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 passed" in ran.stdout


def test_a_mount_left_below_tmp_path_fails_the_test(inner: Inner) -> None:
    inner.write("""
        import subprocess
        def test_leaves_overlay(tmp_path):
            for name in ("l", "m x"):
                (tmp_path / name).mkdir()
            subprocess.run(
                ["mount", "-t", "overlay", "left", "-o", f"lowerdir={tmp_path}/l:/usr/share",
                 tmp_path / "m x"],
                check=True,
            )
        def test_cleans_up(tmp_path):
            pass
    """)
    ran = inner.run()
    assert ran.returncode == 1
    assert "2 passed, 1 error" in ran.stdout
    assert "overlay still mounted at /mnt/base/test_leaves_overlay0/m x (left)" in ran.stdout


def test_a_leak_is_named_beside_a_fixture_that_fails(inner: Inner) -> None:
    inner.write("""
        import os, pytest, subprocess
        outside = os.readlink("/proc/self/ns/mnt")
        @pytest.fixture
        def fragile(tmp_path):
            yield
            raise RuntimeError("teardown broke")
        def test_leaves_overlay(tmp_path, fragile):
            options = "lowerdir=/usr/share:/usr/lib"
            subprocess.run(["mount", "-t", "overlay", "left", "-o", options, tmp_path], check=True)
        def test_second():
            with open("/proc/self/mountinfo") as lines:
                assert " left " not in lines.read()
    """)
    ran = inner.run()
    assert ran.returncode == 1
    assert "2 passed, 1 error" in ran.stdout
    assert "teardown broke" in ran.stdout
    assert "left behind: overlay still mounted at /mnt/base/test_leaves_overlay0" in ran.stdout


def test_root_without_the_capability_sees_root_tests_fail(inner: Inner) -> None:
    inner.write("def test_any(): pass\n")
    ran = inner.run(wrapper=("setpriv", "--bounding-set=-sys_admin"))
    assert ran.returncode == 1
    assert "1 error" in ran.stdout
    assert "root lacks CAP_SYS_ADMIN here" in ran.stdout


def test_a_mount_made_outside_fails_the_test(inner: Inner) -> None:
    require("nsenter")
    inner.write("""
        import os, subprocess
        def test_mounts_outside():
            there = ["nsenter", f"--mount=/proc/{os.getppid()}/ns/mnt"]
            subprocess.run([*there, "mount", "-t", "tmpfs", "strange", "/media"], check=True)
        def test_innocent():
            pass
    """)
    ran = inner.run()
    assert ran.returncode == 1
    assert "2 passed, 1 error" in ran.stdout
    assert "tmpfs mounted at /media outside the test's namespace" in ran.stdout


def test_a_loop_device_left_fails_the_test(inner: Inner) -> None:
    require("losetup")
    inner.write("""
        import subprocess
        def test_leaves_loop(tmp_path):
            (tmp_path / "image").write_bytes(bytes(1 << 20))
            command = ["losetup", "--find", "--show", tmp_path / "image"]
            device = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            with open("device", "w") as file:
                file.write(device.strip())
        def test_innocent():
            pass
    """)
    try:
        ran = inner.run()
    finally:
        device = (inner.place / "device").read_text()
        subprocess.run(["losetup", "--detach", device], check=True)
    assert ran.returncode == 1
    assert "2 passed, 1 error" in ran.stdout
    assert f"{device} attached to" in ran.stdout


def test_a_loop_device_that_goes_by_itself_is_no_leak(inner: Inner) -> None:
    require("losetup", "mkfs.ext4")
    inner.write("""
        import subprocess
        def test_mounts_by_loop(tmp_path):
            (tmp_path / "image").write_bytes(bytes(1 << 20))
            subprocess.run(["mkfs.ext4", "-q", tmp_path / "image"], check=True)
            subprocess.run(["mount", "-o", "loop", tmp_path / "image", "/media"], check=True)
    """)
    ran = inner.run()
    assert ran.returncode == 0, ran.stdout


def test_the_directory_of_a_passed_test_is_removed(inner: Inner) -> None:
    inner.write("""
        def test_passes(tmp_path):
            (tmp_path / "large").touch()
        def test_fails(tmp_path):
            (tmp_path / "large").touch()
            assert False
    """)
    assert inner.run().returncode == 1
    assert not (inner.place / "base/test_passes0").exists()
    assert (inner.place / "base/test_fails0/large").exists()


ROOT_AND_UNIT = """
    import os
    def test_needs_root(tmp_path):
        assert os.geteuid() == 0
        open("ran-as-root", "w").close()
    def test_needs_it_too():
        assert os.geteuid() == 0
"""


def test_a_plain_user_without_sudo_sees_every_root_test_fail(inner: Inner) -> None:
    inner.write(ROOT_AND_UNIT)
    ran = inner.as_nobody()
    assert ran.returncode == 1
    assert "2 errors" in ran.stdout
    assert "skipped" not in ran.stdout
    said = "this test needs root, and sudo cannot be run: No such file or directory"
    assert ran.stdout.count(f"\n{said}") == 2
    assert not (inner.place / "ran-as-root").exists()


def test_a_plain_user_without_sudo_can_run_unit_tests(inner: Inner) -> None:
    inner.write(ROOT_AND_UNIT)
    inner.write("def test_unit(): pass\n", "tests/unit/test_unit.py")
    ran = inner.as_nobody("-m", "not root")
    assert ran.returncode == 0, ran.stdout
    assert "1 passed, 2 deselected" in ran.stdout


def test_a_plain_user_whose_sudo_wants_a_password_is_told(inner: Inner) -> None:
    inner.write(ROOT_AND_UNIT)
    sudo = inner.bin / "sudo"
    sudo.write_text("#!/bin/sh\necho 'sudo: a password is required' >&2\nexit 1\n")
    sudo.chmod(0o755)
    ran = inner.as_nobody(sudo=True)
    assert ran.returncode == 1
    assert "2 errors" in ran.stdout
    assert "`sudo -n` does not give it: sudo: a password is required" in ran.stdout


def test_a_plain_user_with_sudo_runs_the_same_session_as_root(inner: Inner) -> None:
    inner.write(ROOT_AND_UNIT)
    # What sudo is, without its rules: a setuid program. Only this namespace can reach it.
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    gain = inner.bin / "gain-root"
    shutil.copy(setpriv, gain)
    gain.chmod(0o4755)
    log = inner.stand_in(f"{gain} --reuid=0 --regid=0 --clear-groups")
    ran = inner.as_nobody("-k", "root or too", sudo=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "running again under sudo" in ran.stdout
    assert "2 passed" in ran.stdout
    assert (inner.place / "ran-as-root").stat().st_uid == 0
    calls = [line.split("\0")[:-1] for line in log.read_text().splitlines()]
    assert calls[0] == ["-n", "true"]
    assert calls[1][:2] == ["-n", "env"]
    assert f"PYTHONPATH={inner.place}" in calls[1]
    again = calls[1].index(sys.executable)
    assert calls[1][again : again + 3] == [sys.executable, "-m", "pytest"]
    assert calls[1][-2:] == ["-k", "root or too"]
    assert len(calls) == 2


def test_a_sudo_that_gives_no_root_ends_in_failures_and_not_in_a_loop(inner: Inner) -> None:
    inner.write(ROOT_AND_UNIT)
    log = inner.stand_in(gain="")
    ran = inner.as_nobody(sudo=True)
    assert ran.returncode == 1
    assert "sudo ran the tests again, but not as root" in ran.stdout
    assert len(log.read_text().splitlines()) == 2


MISSING = """
    import pytest
    from rootmount import require
    @pytest.fixture(scope="session")
    def daemon():
        require("no-such-daemon")
    def test_one(daemon): pass
    def test_two(daemon): pass
    def test_three():
        require("sh", "no-such-tool", "nor-this")
    def test_runs():
        require("sh")
"""


def test_the_closing_line_names_what_was_missing(inner: Inner) -> None:
    inner.write(MISSING)
    ran = inner.run()
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.splitlines()[-2] == (
        "not run: 2 tests without no-such-daemon (test_inner.py);"
        " 1 test without no-such-tool and nor-this (test_inner.py)"
    )
    assert "1 passed, 3 skipped" in ran.stdout


@pytest.mark.parametrize("variable", ["CI", "OVERLAYCTL_REQUIRE_ALL"])
def test_in_ci_a_missing_tool_is_a_failure(inner: Inner, variable: str) -> None:
    inner.write(MISSING)
    ran = inner.run(env={variable: "1"})
    assert ran.returncode == 1
    assert "skipped" not in ran.stdout
    assert "missing here, and CI requires it: no-such-tool, nor-this" in ran.stdout


def test_a_session_without_gaps_says_so(inner: Inner) -> None:
    inner.write("def test_runs(): pass\n")
    assert inner.run().stdout.splitlines()[-2] == "not run for want of a tool or an image: nothing"


def test_images_are_found_and_absent_ones_listed(inner: Inner) -> None:
    (inner.place / "images").mkdir()
    (inner.place / "images/here.tar").touch()
    inner.write("""
        def test_here(image):
            assert image("here.tar").exists()
        def test_absent(image):
            image("dive/absent.tar")
    """)
    there = {"OVERLAYCTL_TEST_IMAGES": str(inner.place / "images")}
    ran = inner.run(env=there)
    assert ran.returncode == 0, ran.stdout
    assert "not run: 1 test without image dive/absent.tar (test_inner.py)" in ran.stdout
    ran = inner.run(env={"OVERLAYCTL_TEST_IMAGES": "/nowhere"})
    assert "not run: 2 tests without OVERLAYCTL_TEST_IMAGES=/nowhere" in ran.stdout
    assert inner.run(env={"OVERLAYCTL_TEST_IMAGES": "/nowhere", "CI": "1"}).returncode == 1

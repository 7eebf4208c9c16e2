"""The life of a container's process: signals, terminals, who joins it, and what ends it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlayctl.engine import Engine
from tests.cli.conftest import reset
from tests.cli.processes import Cli, cgroups, living, load, until

ONE = pytest.mark.parametrize("cli", ["runc"], indirect=True)
"""For what no runtime decides."""
SLEEPS = "echo begun; sleep {} & wait"


@contextmanager
def sleeping(cli: Cli, name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A container of that name, in which something runs until the block ends."""
    process = cli.begun("run", "--name", name, *options, "box", "sh", "-c", SLEEPS.format(600))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)


# --- signals --------------------------------------------------------------------------------------


def test_signals_reach_the_process(box: Cli) -> None:
    script = "".join(
        f"trap 'echo got {name}' {name};" for name in ("INT", "HUP", "QUIT", "USR1", "USR2")
    )
    script += "trap 'echo end; exit 5' TERM; echo begun; while :; do sleep 0.05; done"
    with box.begun("run", "--rm", "box", "sh", "-c", script, start_new_session=True) as process:
        assert process.stdout is not None
        for name in ("INT", "HUP", "USR1", "USR2", "QUIT"):
            process.send_signal(getattr(signal, f"SIG{name}"))
            assert process.stdout.readline() == f"got {name}\n".encode()
        process.terminate()
        assert process.stdout.read() == b"end\n"
        assert process.wait() == 5
    assert box.containers() == {}


def test_who_insists_ends_what_does_not_listen(box: Cli) -> None:
    word = f"46{os.getpid()}"
    with box.start("run", "--name", "deaf", "box", "sleep", word) as process:
        assert until(lambda: len(living(word, "sleep")) == 1)
        for _ in range(3):
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert process.wait(timeout=10) == 137
    assert box.containers() == {"deaf": "not mounted"}
    box("rm", "deaf")


# --- a terminal -----------------------------------------------------------------------------------


class Terminal:
    """A command at a terminal of 33 lines and 101 columns."""

    def __init__(self, words: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execvp(words[0], words)  # noqa: S606
        self.size(33, 101)
        self.seen = b""

    def size(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def expect(self, text: bytes) -> None:
        """Read until that was shown."""
        end = time.monotonic() + 20
        while text not in self.seen:
            assert select.select([self.fd], [], [], max(0, end - time.monotonic()))[0], self.seen
            self.seen += os.read(self.fd, 1 << 16)
        self.seen = self.seen.partition(text)[2]

    def end(self) -> int:
        """The exit status."""
        while True:
            try:
                if not os.read(self.fd, 1 << 16):
                    break
            except OSError:
                break
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_terminal_has_its_size_its_keys_and_its_end(box: Cli) -> None:
    at = Terminal(box.words("run", "-it", "--rm", "box", "sh"))
    at.expect(b"# ")
    at.type(b"tty; stty size; echo TERM=$TERM\n")
    at.expect(b"/dev/pts/0\r\n33 101\r\nTERM=xterm\r\n")
    at.size(44, 120)
    time.sleep(0.3)
    at.type(b"stty size\n")
    at.expect(b"44 120\r\n")
    at.type(b"sleep 600; echo inter$((1+1))\n")
    time.sleep(0.3)
    at.type(b"\x03")
    at.expect(b"^C")
    at.type(b"echo af$((1+1))ter\n")
    at.expect(b"af2ter")
    at.type(b"exit 9\n")
    assert at.end() == 9


def test_a_terminal_in_a_container_that_runs(box: Cli) -> None:
    with sleeping(box, "cc"):
        at = Terminal(box.words("exec", "-it", "cc", "sh"))
        at.expect(b"# ")
        at.type(b"tty; ps\n")
        at.expect(b"/dev/pts/")
        at.expect(b"sleep 600")
        at.type(b"exit 3\n")
        assert at.end() == 3
        box("exec", "cc", "sh", "-c", "rm /dev/ptmx && mkfifo /dev/ptmx")
        at = Terminal(box.words("exec", "-it", "cc", "sh"))
        at.expect(b"no terminal multiplexer")
        assert at.end() == 125
        box("rm", "-f", "cc")


# --- exec -----------------------------------------------------------------------------------------


def test_a_command_joins_what_runs(box: Cli) -> None:
    box("volume", "create", "vol")
    options = ("-v", "vol:/vol", "--tmpfs", "/scratch", "-h", "named", "-e", "A=1", "-w", "/srv")
    with sleeping(box, "cc", *options):
        script = (
            "for n in mnt pid uts ipc net cgroup; do"
            " test $(stat -L -c %i /proc/1/ns/$n) = $(stat -L -c %i /proc/self/ns/$n) || echo $n;"
            "done; cat /proc/1/cgroup > /tmp/1; cat /proc/self/cgroup > /tmp/2; cmp /tmp/1 /tmp/2;"
            "hostname; pwd; env; id; touch /vol/new /scratch/new; grep CapBnd /proc/self/status"
        )
        lines = box("exec", "-e", "B=2", "cc", "sh", "-c", script).out.splitlines()
        assert lines[:2] == ["named", "/srv"]
        assert {"A=1", "B=2", "KEPT=image", "HOME=/root", "HOSTNAME=named"} <= set(lines)
        most = "a80425fb" if box.runtime == "runc" else "a00425fb"
        assert lines[-2:] == ["uid=0(root) gid=0(root) groups=0(root)", f"CapBnd:\t00000000{most}"]
        other = box("exec", "-u", "web", "-w", "/made/here", "cc", "sh", "-c", "id; pwd").out
        assert other == "uid=33(web) gid=44(web) groups=44(web),55(more)\n/made/here\n"
        assert box("exec", "-i", "cc", "cat", given=b"given").out == "given"
        box("exec", "cc", "sh", "-c", "exit 4", ok=4)
        box("exec", "cc", "sh", "-c", "kill -9 $$", ok=137)
        assert "nothing-like-it" in box("exec", "cc", "nothing-like-it", ok=127).err
        box("exec", "cc", "/bin/data", ok=126)
        assert box.containers() == {"cc": "running"}
        box("rm", "-f", "cc")
    box("volume", "rm", "vol")


def test_a_command_that_joined_ends_with_its_caller_and_with_the_first(box: Cli) -> None:
    with sleeping(box, "cc") as first:
        joined = box.begun("exec", "cc", "sh", "-c", "echo in; exec sleep 4711001")
        joined.kill()
        joined.communicate()
        assert until(lambda: not living("4711001"))
        joined = box.begun("exec", "cc", "sh", "-c", "echo in; exec sleep 4711002")
        joined.terminate()
        assert joined.communicate()[0] == b""
        assert joined.returncode == 143
        joined = box.begun("exec", "cc", "sh", "-c", "echo in; exec sleep 4711003")
        first.kill()
        assert joined.wait(timeout=10) == 137
        joined.communicate()
        assert until(lambda: not living("4711003"))
    box("rm", "cc")


@ONE
def test_the_last_of_two_commands_unmounts(box: Cli) -> None:
    box("create", "--name", "cc", "box")
    wait = ("exec", "-i", "cc", "sh", "-c", "echo in > /tmp/$0; echo in; read line")
    one, two = (box.begun(*wait, name, stdin=subprocess.PIPE) for name in ("one", "two"))
    assert len(box.mounted()) == 1
    assert box("exec", "cc", "ls", "/tmp").out == "one\ntwo\n"
    one.communicate(b"\n")
    assert len(box.mounted()) == 1
    two.communicate(b"\n")
    assert (one.returncode, two.returncode, box.mounted()) == (0, 0, [])
    # What a person mounted stays.
    merged = Path(box("mount", "cc").out.rstrip("\n"))
    box("exec", "cc", "rm", "/tmp/one")
    assert os.listdir(merged / "tmp") == ["two"]
    box("umount", "cc")
    box("rm", "cc")


@ONE
def test_a_mount_of_a_person_outlives_the_run_before_it(box: Cli) -> None:
    with sleeping(box, "cc") as process:
        box("mount", "cc")
        done = box("umount", "cc", ok=4)
        assert f"process {process.pid} (sh -c echo begun" in done.err
        process.kill()
    assert len(box.mounted()) == 1
    box("umount", "cc")
    box("rm", "cc")


# --- what others see and do ----------------------------------------------------------------------


def test_a_running_container_is_removed_only_by_force(box: Cli) -> None:
    with sleeping(box, "cc") as process:
        begin = time.monotonic()
        done = box("rm", "cc", ok=4)
        assert time.monotonic() - begin < 5
        assert f"process {process.pid} (sh -c echo begun; sleep 600 & wait)" in done.err
        assert "overlayctl rm -f cc" in done.err
        box("rm", "-f", "cc")
        assert process.wait(timeout=10) == 137
    assert box.containers() == {}
    # Even one whose command is stopped.
    with sleeping(box, "dd") as process:
        process.send_signal(signal.SIGSTOP)
        box("rm", "-f", "dd")
        assert process.wait(timeout=10) == -signal.SIGKILL


@ONE
def test_nothing_waits_for_a_running_container(box: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    with sleeping(box, "cc", "--rm"):
        box("exec", "cc", "touch", "/root/new")
        for words in (
            ("ps",), ("ps", "-a", "-s"), ("inspect", "cc"), ("diff", "cc"), ("mounts",),
            ("commit", "cc", "made"), ("export", "-o", str(tmp_path / "tar"), "cc"),
            ("cp", str(tmp_path / "file"), "cc:/root/file"), ("cp", "cc:/root/new", str(tmp_path)),
            ("exec", "cc", "true"), ("system", "check"), ("system", "df"), ("create", "box"),
        ):  # fmt: skip
            if words[0] == "cp" and "cp" not in box("--help").out.split():
                continue
            if words[:2] == ("system", "df"):
                continue
            box("--lock-timeout", "0.5", *words)
        assert box.containers()["cc"] == "running"
        box("rm", "-f", "cc")
    box("rmi", "made")


def test_what_runs_keeps_nothing_of_the_host_in_use(box: Cli, tmp_path: Path) -> None:
    box("create", "--name", "other", "box")
    box("mount", "other")
    (tmp_path / "apart").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "marked-tmpfs", str(tmp_path / "apart")], check=True)
    with sleeping(box, "cc") as process:
        seen = []
        here = os.readlink("/proc/self/ns/mnt")
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{pid}/ns/mnt") != here:
                    seen.append(Path(f"/proc/{pid}/mountinfo").read_text())
            except OSError:
                continue
        assert any("/etc/hosts" in table for table in seen)
        assert not any("marked-tmpfs" in table for table in seen)
        box("umount", "other")
        box("rm", "other")
        subprocess.run(["umount", str(tmp_path / "apart")], check=True)
        process.kill()
    box("rm", "cc")


def test_ten_containers_are_written_to_at_once(tmp_path: Path) -> None:
    cli = Cli(str(tmp_path / "store"))
    load(cli, tmp_path)
    names = [f"c{number}" for number in range(10)]
    for name in names:
        cli("create", "--name", name, "box")
    script = "for i in 1 2 3 4 5; do echo $0 >> /tmp/log; dd if=/dev/zero of=/tmp/$i bs=1M count=1"
    script += " 2>/dev/null; rm /bin/data 2>/dev/null; done; wc -l < /tmp/log"
    processes = [cli.start("exec", name, "sh", "-c", script, name) for name in names]
    assert [process.communicate()[0] for process in processes] == [b"5\n"] * 10
    assert [process.returncode for process in processes] == [0] * 10
    for name in names:
        assert cli("diff", name).out.count("\n") == 9
        assert cli("export", name).out.count(f"{name}\n{name}\n") >= 1
    cli("rm", *names)
    cli.sound()
    reset(cli.store)


# --- the end, by force ------------------------------------------------------------------------


def nothing_is_left(cli: Cli, word: str) -> None:
    """What the next command finds after a kill, and what it leaves."""
    assert until(lambda: not living(word)), word
    name = cli("create", "box").out.strip()
    assert cli.containers().keys() == {row for row in cli.containers() if row != "gone"}
    cli("rm", name)
    cli.sound()


@pytest.mark.parametrize("moment", [0.15, 0.25, 0.5])
def test_a_killed_run_leaves_no_process_and_the_next_command_nothing(
    box: Cli, moment: float
) -> None:
    word = f"47{os.getpid()}{int(moment * 100)}"
    process = box.start(
        "run", "--rm", "--name", "gone", "-v", "/anonymous", "box",
        "sh", "-c", f"(sleep {word}1 &) ; sh -c 'sleep {word}2; true' & sleep {word}3",
    )  # fmt: skip
    time.sleep(moment)
    process.kill()
    process.communicate()
    nothing_is_left(box, word)
    assert box("volume", "ls", "-q").out == ""


@ONE
def test_a_killed_command_leaves_what_was_written(box: Cli) -> None:
    with sleeping(box, "kept") as process:
        box("exec", "kept", "touch", "/root/new")
        process.kill()
        process.wait()
        assert until(lambda: box.containers() != {"kept": "running"})
        assert box("diff", "kept").out == "C /root\nA /root/new\n"
        assert len(box.mounted()) == 1
        # Whoever writes next unmounts it first.
        box("rm", "kept")
    assert box.mounted() == []


FAULTS = ("volume:after-unlink", "volume:after-removal", "snapshot:after-unlink",
          "snapshot:after-removal", "container:after-unlink")  # fmt: skip


@pytest.mark.parametrize("point", FAULTS)
def test_a_disposable_container_goes_with_its_volumes_wherever_it_is_killed(
    plain: Cli, point: str
) -> None:
    options = ("run", "--runtime", "builtin", "--rm", "-v", "/anonymous", "-v", "mine:/mine")
    plain(*options, "box", "true", ok=-9, env={**os.environ, "OVERLAYCTL_FAULT": point})
    plain("run", "--rm", "box", "true")
    assert plain.containers() == {}
    assert plain("volume", "ls", "-q").out == "mine\n"


def test_who_waits_for_a_command_that_joined_is_not_in_the_containers_groups(plain: Cli) -> None:
    with plain.begun("run", "--rm", "--name", "cc", "box", "sh", "-c", "echo; sleep 99") as first:
        group = "cat /proc/self/cgroup; exec sleep 98"
        second = plain.begun("exec", "cc", "sh", "-c", group)
        waiting = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()[0]
        assert Path(f"/proc/{waiting}/cgroup").read_text() == Path("/proc/self/cgroup").read_text()
        joined = Path(f"/proc/{waiting}/task/{waiting}/children").read_text().split()[0]
        runs = Path(f"/proc/{joined}/cgroup").read_text()
        assert "overlayctl-" in runs or not cgroups(Engine.open(plain.store).store.id)
        plain("rm", "-f", "cc")
        assert first.wait(timeout=10) == 137
        second.communicate()


def test_force_kills_nobody_where_it_cannot_remove(plain: Cli) -> None:
    with plain.begun("run", "--name", "cc", "box", "sh", "-c", "echo; sleep 99") as process:
        elsewhere = ["unshare", "-m", *plain.words("rm", "-f", "cc")]
        done = subprocess.run(elsewhere, capture_output=True, check=False, text=True, timeout=60)
        assert done.returncode == 4, done
        assert f"hint: nsenter -m -t {process.pid} overlayctl rm -f cc" in done.stderr
        refused = plain("system", "reset", "--force", ok=4)
        assert "hint: overlayctl rm -f cc" in refused.err
        assert process.poll() is None
        plain("rm", "-f", "cc")
        assert process.wait(timeout=10) == 137


@pytest.mark.parametrize("command", ["run", "with"])
def test_one_that_is_killed_before_it_begins_keeps_nobody_waiting(
    tmp_path: Path, command: str
) -> None:
    cli = Cli(str(tmp_path / "store"), "builtin")
    load(cli, tmp_path)
    for _ in range(3):
        process = cli.start(command, *(["--rm"] if command == "run" else []), "box", "sleep", "99")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while process.poll() is None and not (found := children.read_text().split()):
            pass
        os.kill(int(found[0]), signal.SIGKILL)
        assert process.wait(timeout=20) == 137
        process.communicate()
    assert cli.containers() == {}
    reset(cli.store)


def test_a_killed_runtime_is_a_status(box: Cli) -> None:
    word = f"48{os.getpid()}"
    process = box.begun("run", "--rm", "box", "sh", "-c", f"echo in; sleep {word}")
    for pid in living(word):
        if pid != process.pid:
            os.kill(pid, signal.SIGKILL)
            break
    assert process.wait(timeout=10) == 137
    process.communicate()
    assert until(lambda: not living(word))
    assert box.containers() == {}


# --- with -------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Cli]:
    """A store with the image ``box``, for what runs on the host."""
    cli = Cli(str(tmp_path / "store"))
    load(cli, tmp_path)
    yield cli
    cli.sound()
    reset(cli.store)


SHOW = 'test "$PWD" = "$OVERLAYCTL_MERGED"; ls etc/passwd; touch new && rm bin/data'


def test_a_program_of_the_host_in_a_view(plain: Cli) -> None:
    plain("create", "--name", "cc", "box")
    for name in ("box", "cc"):
        done = plain("with", name, "--", "sh", "-ec", SHOW, ok=1)
        assert (done.out, "Read-only file system" in done.err) == ("etc/passwd\n", True)
        assert plain.mounted() == []
        plain("with", "--rw", name, "sh", "-ec", SHOW)
        plain("with", name, "sh", "-c", "exit 6", ok=6)
        plain("with", name, "sh", "-c", "kill -9 $$", ok=137)
        plain("with", name, "nothing-like-it", ok=127)
        plain("with", name, "/etc/passwd", ok=126)
    assert plain.containers() == {"cc": "not mounted"}
    assert plain("diff", "cc").out.splitlines() == ["C /bin", "D /bin/data", "A /new"]
    with plain.begun("with", "--rw", "cc", "sh", "-c", "echo in; exec sleep 600") as process:
        assert f"process {process.pid} (sh -c " in plain("rm", "cc", ok=4).err
        # What is below a view that only one program sees may be told from other views.
        view = plain.begun("with", "box", "sh", "-c", "echo in; exec sleep 600")
        assert "in use" in plain("rmi", "-f", "box", ok=4).err
        view.terminate()
        assert view.wait(timeout=10) == 143
        view.communicate()
        plain("rm", "-f", "cc")
        assert process.wait(timeout=10) == 137


def test_a_killed_view_is_put_away(plain: Cli) -> None:
    word = f"49{os.getpid()}"
    for options in (("box",), ("--rw", "box")):
        process = plain.begun("with", *options, "sh", "-c", f"echo in; exec sleep {word}")
        process.kill()
        process.communicate()
        nothing_is_left(plain, word)
    assert plain.containers() == {}


# --- long -------------------------------------------------------------------------------------


@pytest.mark.long
def test_runs_killed_at_a_hundred_moments(box: Cli) -> None:
    namespaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids()}
    for number in range(100):
        word = f"50{os.getpid()}{number}"
        process = box.start("run", "--rm", "--name", "gone", "box", "sleep", word)
        time.sleep(0.05 + number * 0.005)
        process.kill()
        process.communicate()
        nothing_is_left(box, word)
    assert {os.readlink(f"/proc/{pid}/ns/net") for pid in pids()} <= namespaces


@ONE
@pytest.mark.long
def test_commands_come_and_go_in_one_container(box: Cli) -> None:
    box("create", "--name", "cc", "box")
    for _ in range(10):
        processes = [box.start("exec", "cc", "sh", "-c", "echo $$") for _ in range(6)]
        assert [process.communicate()[0] for process in processes] == [b"1\n"] * 6
        assert box.mounted() == []
    box("rm", "cc")


def pids() -> list[str]:
    """The processes whose namespaces can be read."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            os.readlink(f"/proc/{pid}/ns/net")
        except OSError:
            continue
        found.append(pid)
    return found

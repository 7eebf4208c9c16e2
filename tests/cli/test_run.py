"""run: a container's process is what the image and the options say, whatever executes it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from overlayctl.kernel import libc
from tests.cli.conftest import reset
from tests.cli.processes import Cli, load
from tests.layer.tars import directory, entry, symlink
from tests.rootmount import require

DEFAULT_CAPABILITIES = 0xA80425FB
CAP_NET_RAW, CAP_MKNOD = 13, 27
ONE = pytest.mark.parametrize("cli", ["runc"], indirect=True)
"""For what no runtime decides."""


# --- the status -------------------------------------------------------------------------------


def test_the_status_is_the_commands_own(box: Cli) -> None:
    assert box("run", "--rm", "box", "sh", "-c", "echo out; echo err >&2; exit 3", ok=3) == (
        "out\n", "err\n", 3,
    )  # fmt: skip
    box("run", "--rm", "box", "true")
    box("run", "--rm", "box", "sh", "-c", "sh -c 'kill -9 $$'; exit $?", ok=137)


@pytest.mark.parametrize(
    ("command", "status", "code"),
    [
        ("nothing-like-it", 127, "command-not-found"),
        ("/bin/nothing", 127, "command-not-found"),
        ("/bin/data", 126, "cannot-execute"),
        ("/bin/broken", 126, "cannot-execute"),
        ("/etc", 126, "cannot-execute"),
    ],
)
def test_what_cannot_be_executed_has_a_shells_status(
    box: Cli, command: str, status: int, code: str
) -> None:
    done = box("run", "--rm", "--json", "box", command, ok=status)
    told = json.loads(done.err.splitlines()[-1])
    assert (told["code"], told["exit"], done.out) == (code, status, "")
    assert command in told["message"]


@ONE
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("run", "missing"), "missing"),
        (("run", "-u", "nobody", "box"), "nobody"),
        (("run", "-u", "web:none", "box"), "none"),
        (("run", "-d", "box"), "overlayctl run ... &"),
        (("run", "--privileged", "box"), "chroot"),
        (("run", "-p", "80:80", "box"), "podman and docker have container networks"),
        (("run", "--memory", "1g", "box"), "systemd-run"),
        (("run",), "IMAGE"),
        (("run", "-t", "box"), "no terminal"),
        (("run", "--network", "bridge", "box"), "bridge"),
        (("exec", "missing", "true"), "missing"),
        (("with", "missing", "true"), "missing"),
    ],
)
def test_a_failure_of_ours_is_125_and_says_what_to_do(
    box: Cli, words: tuple[str, ...], named: str
) -> None:
    done = box(*words, ok=125)
    assert named in done.err
    assert "hint: " in done.err
    for name in box.containers():
        box("rm", name)


# --- what the process is ------------------------------------------------------------------------


def test_the_images_configuration_counts_and_options_come_before_it(
    cli: Cli, tmp_path: Path
) -> None:
    config = {
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["id; pwd; env"], "User": "web",
        "WorkingDir": "/srv/made", "Env": ["PATH=/bin", "A=1", "B=2"],
    }  # fmt: skip
    load(cli, tmp_path, **config)
    lines = cli("run", "--rm", "box").out.splitlines()
    assert lines[:2] == ["uid=33(web) gid=44(web) groups=44(web),55(more)", "/srv/made"]
    assert {"HOME=/srv", "A=1", "B=2", "PATH=/bin"} <= set(lines)
    (tmp_path / "env").write_text("# comment\nB=file\nC=file\nFROM\n")
    options = ("-u", "0:last", "-w", "/else/where", "-e", "C=4", "-h", "named")
    lines = cli(
        "run", "--rm", "--env-file", str(tmp_path / "env"), *options, "box",
        "id; pwd; env; hostname; cat /etc/hostname; cat /etc/hosts",
        env={**os.environ, "FROM": "here"},
    ).out.splitlines()  # fmt: skip
    assert lines[:2] == ["uid=0(root) gid=66(last) groups=66(last)", "/else/where"]
    assert {"HOME=/root", "A=1", "B=file", "C=4", "FROM=here", "HOSTNAME=named"} <= set(lines)
    assert lines.count("named") == 2
    assert "127.0.0.1\tlocalhost" in lines
    done = cli("run", "--rm", "--entrypoint", "/bin/echo", "box", "a  b", "$c")
    assert done.out == "a  b $c\n"


def test_a_process_is_the_first_of_its_own_namespaces(box: Cli) -> None:
    script = "for n in pid mnt uts ipc net cgroup; do stat -L -c %i /proc/self/ns/$n; done; ps"
    lines = box("run", "--rm", "box", "sh", "-c", script).out.splitlines()
    for kind, inode in zip(("pid", "mnt", "uts", "ipc", "net", "cgroup"), lines, strict=False):
        assert int(inode) != os.stat(f"/proc/self/ns/{kind}").st_ino, kind
    assert [line.split()[0] for line in lines[6:8]] == ["PID", "1"]
    assert len(lines) <= 9


def test_the_network_is_loopback_alone_or_the_hosts(box: Cli) -> None:
    script = "cat /proc/net/dev; cat /sys/class/net/lo/flags; cat /etc/resolv.conf"
    lines = box("run", "--rm", "box", "sh", "-c", script).out.splitlines()
    assert [line.split(":")[0].strip() for line in lines[2:3]] == ["lo"]
    assert int(lines[3], 16) & 1  # IFF_UP
    assert lines[4:] == Path("/etc/resolv.conf").read_text().splitlines()
    script = "stat -L -c %i /proc/self/ns/net; cat /etc/hosts"
    lines = box("run", "--rm", "--network", "host", "box", "sh", "-c", script).out.splitlines()
    assert int(lines[0]) == os.stat("/proc/self/ns/net").st_ino
    assert lines[1:] == Path("/etc/hosts").read_text().splitlines()


def test_capabilities_are_dockers_and_never_more_than_the_callers(box: Cli) -> None:
    def sets(*words: str, **more: Any) -> dict[str, int]:
        out = box("run", "--rm", *words, "box", "cat", "/proc/self/status", **more).out
        pairs = [line.split(":\t") for line in out.splitlines() if line.startswith("Cap")]
        return {name: int(value, 16) for name, value in pairs}

    usual = DEFAULT_CAPABILITIES
    if box.runtime == "builtin":
        usual &= ~(1 << CAP_MKNOD)
    assert sets() == {"CapInh": 0, "CapPrm": usual, "CapEff": usual, "CapBnd": usual, "CapAmb": 0}
    others = sets("-u", "web")
    assert (others["CapEff"], others["CapPrm"]) == (0, 0)
    assert others["CapBnd"] == usual
    less = sets(preexec_fn=lambda: libc.drop_from_bounding_set(CAP_NET_RAW))
    assert less["CapBnd"] == less["CapEff"] == usual & ~(1 << CAP_NET_RAW)
    # What is inheritable would come through an execve(2) by root, bounding set or not.
    require("setpriv")
    words = ["setpriv", "--inh-caps", "+sys_admin", *box.words("run", "--rm", "box", "cat")]
    done = subprocess.run([*words, "/proc/self/status"], capture_output=True, check=True, text=True)
    assert f"CapEff:\t{usual:016x}" in done.stdout
    assert "CapInh:\t0000000000000000" in done.stdout


def test_limits_signals_and_files_of_the_caller(box: Cli) -> None:
    script = "ulimit -n; umask; ls /proc/self/fd | wc -l; grep -E 'Sig(Ign|Blk)' /proc/self/status"
    words = ["sh", "-c", 'ulimit -n 333; exec "$@"', "sh"]
    command = box.words("run", "--rm", "box", "sh", "-c", script)
    with open("/dev/null") as more:
        out = subprocess.run(
            [*words, *command], capture_output=True, check=True, text=True,
            pass_fds=[more.fileno()],
        ).stdout.split()  # fmt: skip
    # ls has the directory open, too.
    assert out[:5] == ["333", "0022", "4", "SigBlk:", "0" * 16]
    # Python ignores these two itself; what its caller has ignored stays so.
    assert int(out[6], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) == 0


def test_what_the_kernel_shows_may_not_be_changed(box: Cli) -> None:
    script = "for f in /proc/sys/kernel/hostname /sys/class/net/lo/mtu /proc/sysrq-trigger; do "
    script += "(echo 1 > $f) 2>/dev/null && echo written $f; done; ls /dev; echo x > /dev/null"
    out = box("run", "--rm", "box", "sh", "-c", script).out.split()
    assert "written" not in out
    assert {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm"} <= set(out)
    assert not [name for name in out if name.startswith(("sd", "vd", "loop", "mem"))]
    masked = "cat /proc/keys /proc/timer_list /proc/interrupts; ls -A /sys/firmware /proc/acpi"
    done = box("run", "--rm", "box", "sh", "-c", f"({masked}) 2>/dev/null; true")
    assert done.out.replace("/sys/firmware:", "").replace("/proc/acpi:", "").split() == []


# --- input, output, a tree -----------------------------------------------------------------------


def test_input_and_output_pass_untouched(box: Cli) -> None:
    data = os.urandom(1 << 20) * 10
    done = subprocess.run(
        box.words("run", "-i", "--rm", "box", "cat"),
        input=data, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == data
    # As docker's, the input is nothing without -i.
    assert box("run", "--rm", "box", "wc", "-c", given=b"four").out.strip() == "0"
    endless = box.start("run", "--rm", "box", "cat", "/dev/zero")
    assert endless.stdout is not None
    assert len(endless.stdout.read(100_000)) == 100_000
    endless.stdout.close()
    # Its reader has left. SIGPIPE, left alone, does nothing to the first of a pid namespace.
    assert endless.wait(timeout=20) == 1


def test_a_stream_that_the_caller_closed_is_nothing_else(box: Cli) -> None:
    words = box.words("run", "--rm", "-i", "box", "sh", "-c", "cat; echo out; echo err >&2; exit 3")
    for closed, out, err in (
        ("<&-", "out\n", "err\n"), (">&-", "", "err\n"), ("2>&-", "out\n", ""),
        ("<&- >&-", "", "err\n"),
    ):  # fmt: skip
        script = f'exec "$@" {closed}'
        done = subprocess.run(
            ["sh", "-c", script, "sh", *words], stdin=subprocess.DEVNULL, capture_output=True,
            check=False, text=True, timeout=60,
        )  # fmt: skip
        assert (done.stdout, done.returncode) == (out, 3), (closed, done)
        assert done.stderr.endswith(err), (closed, done)
        assert "Traceback" not in done.stderr
    words = box.words("run", "--rm", "box", "ls", "/proc/self/fd")
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *words], capture_output=True, check=True, text=True
    )
    assert done.stdout.split() == ["0", "1", "2", "3"]


@ONE
def test_what_it_writes_stays_in_the_container_alone(box: Cli) -> None:
    box("run", "--name", "first", "box", "sh", "-c", "echo kept > /root/new; rm /bin/data")
    assert box.mounted() == []
    box("run", "--name", "second", "box", "test", "-e", "/bin/data")
    assert box("exec", "first", "sh", "-c", "cat /root/new; ls /bin/data", ok=1).out == "kept\n"
    assert box("diff", "first").out.splitlines() == [
        "C /bin", "D /bin/data", "C /root", "A /root/new",
    ]  # fmt: skip
    assert box("diff", "second").out == ""
    box("rm", "first", "second")


def test_read_only_and_tmpfs_and_volumes(box: Cli, tmp_path: Path) -> None:
    (tmp_path / "host" / "below").mkdir(parents=True)
    (tmp_path / "host/file").write_text("of the host")
    script = (
        "touch /new; touch /host/new; touch /vol/new; touch /tmp/fs/new;"
        "cat /host/file; echo; cat /etc/only; grep -c ' /tmp/fs tmpfs' /proc/mounts; ls -A / /vol"
    )
    mounts = [
        "--read-only", "-v", f"{tmp_path}/host:/host:ro", "-v", "kept:/vol", "--tmpfs", "/tmp/fs",
        "--mount", f"type=bind,src={tmp_path}/host/file,dst=/etc/only",
    ]  # fmt: skip
    done = box("run", "--rm", *mounts, "box", "sh", "-c", script)
    assert done.err.count("Read-only file system") == 2
    assert done.out.startswith("of the host\nof the host1\n")
    assert done.out.endswith("/vol:\nnew\n")
    assert not (tmp_path / "host/new").exists()
    assert box("run", "--rm", "-v", "kept:/elsewhere", "box", "ls", "/elsewhere").out == "new\n"
    box("volume", "rm", "kept")


def test_an_image_of_one_program_runs_and_nothing_is_changed(cli: Cli, tmp_path: Path) -> None:
    load(cli, tmp_path, bare=True)
    out = cli("run", "--name", "bare", "-u", "7", "box", "sh", "-c", "id -u; ls /").out
    assert out.split() == ["7", "bin", "dev", "etc", "proc", "sys"]
    assert cli("diff", "bare").out == ""
    cli("exec", "bare", "true")
    cli("commit", "bare", "made")
    cli("rmi", "made")
    cli("rm", "bare")


# --- hostile images --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "target"),
    [(tarfile.FIFOTYPE, ""), (tarfile.SYMTYPE, "/dev/stdin"), (tarfile.SYMTYPE, "host")],
)
def test_users_of_an_image_are_never_the_hosts(
    cli: Cli, tmp_path: Path, kind: bytes, target: str
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("marker:x:4711:4711::/host:/bin/sh\n")
    link = f"/../../..{outside}" if target == "host" else target
    load(cli, tmp_path, entry("etc/passwd", kind, linkname=link))
    assert "no user 'marker'" in cli("run", "--rm", "-u", "marker", "box", "pwd", ok=125).err
    refused = cli.runtime == "runc" and target != "host"
    done = cli("run", "--rm", "-u", "7:8", "box", "stat", "-Lc", "%u", "/proc/self", ok=None)
    if refused:
        # It would open the file itself, in the container, and wait.
        assert (done.status, "is no regular file" in done.err) == (125, True)
    else:
        assert done.out == "7\n"


@ONE
@pytest.mark.parametrize("name", ["proc", "sys", "dev"])
def test_a_link_where_a_filesystem_goes_is_refused(cli: Cli, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    load(cli, tmp_path, symlink(name, f"{tmp_path}/outside"), bare=True)
    done = cli("run", "--rm", "box", "true", ok=125)
    assert f"/{name} in the container is no directory" in done.err
    assert os.listdir(tmp_path / "outside") == []


def test_a_volume_goes_where_links_lead_inside(cli: Cli, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    load(cli, tmp_path, directory("real/"), symlink("way", f"/real/../../../{outside}"))
    cli("run", "--name", "way", "-v", "vol:/way", "box", "sh", "-c", "touch /way/new; ls /way")
    assert os.listdir(outside) == []
    cli("rm", "way")
    cli("volume", "rm", "vol")


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"Env": ["PATH=/bin", "A=b\0c"]}, "environment has what no process can be given"),
    ({"Env": ["PATH=/bin", "=x"]}, "environment has a variable without a name"),
    ({"WorkingDir": "/a\0b"}, "working directory has what no process can be given"),
    ({"Cmd": ["/bin/true", "\0"]}, "command has what no process can be given"),
    ({"WorkingDir": "/" + "a" * 300}, "file name too long"),
]


@pytest.mark.parametrize(("config", "said"), IMPOSSIBLE, ids=range(len(IMPOSSIBLE)))
def test_what_no_process_can_be_given_is_named(
    cli: Cli, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    load(cli, tmp_path, **{"Cmd": ["/bin/true"], **config})
    done = cli("run", "--rm", "box", ok=125)
    assert said in done.err.casefold()
    assert "hint: " in done.err


@pytest.mark.parametrize("name", ["passwd", "group"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "link"])
def test_nobody_waits_for_an_image_to_say_who_is_who(
    cli: Cli, tmp_path: Path, name: str, kind: str
) -> None:
    path = f"etc/{name}"
    odd = {
        "fifo": entry(path, kind=b"6", mode=0o644),
        "directory": directory(f"{path}/"),
        "link": symlink(path, "/dev/stdin"),
    }
    load(cli, tmp_path, directory("etc/"), odd[kind], bare=True)
    if cli.runtime == "builtin":
        assert cli("run", "--rm", "box", "echo", "it").out == "it\n"
    else:
        done = cli("run", "--rm", "box", "echo", "it", ok=125)
        assert f"/etc/{name} of the container is no regular file" in done.err


def test_the_program_of_this_process_is_no_command_of_an_image(tmp_path: Path) -> None:
    cli = Cli(str(tmp_path / "store"), "builtin")
    script = entry("bin/script", data=b"#!/bin/self -c\n", mode=0o755)
    load(cli, tmp_path, symlink("bin/self", "/proc/self/exe"), script)
    for word in ("/proc/self/exe", "self", "script", "/proc/1/root/proc/thread-self/exe"):
        done = cli("run", "--rm", "box", word, ok=126)
        assert "leads to a program of the host" in done.err
    with cli.begun("run", "--rm", "--name", "cc", "box", "sh", "-c", "echo; sleep 99") as first:
        assert "leads to a program of the host" in cli("exec", "cc", "script", ok=126).err
        first.terminate()
        cli("rm", "-f", "cc")
    reset(cli.store)


def test_no_command_has_an_empty_name(box: Cli) -> None:
    assert "has no command ''" in box("run", "--rm", "box", "", ok=127).err


def test_a_working_directory_is_as_deep_as_one_says(tmp_path: Path) -> None:
    cli = Cli(str(tmp_path / "store"), "builtin")
    deep = "/a" * 1500
    load(cli, tmp_path, WorkingDir=deep)
    assert cli("run", "--rm", "box", "pwd").out == f"{deep}\n"
    reset(cli.store)


def test_a_container_without_a_device_cgroup_has_no_devices(tmp_path: Path) -> None:
    cli = Cli(str(tmp_path / "store"), "builtin")
    node = entry("vol/node", kind=b"3", devmajor=1, devminor=5, mode=0o666)
    load(
        cli, tmp_path, directory("vol/"), node, symlink("bin/mknod", "busybox"),
        entry("node", kind=b"3", devmajor=1, devminor=5, mode=0o666),
    )  # fmt: skip
    script = "for f in /node /vol/node /dev/zero /zero; do head -c 1 $f >/dev/null && echo $f; done"
    script += "; mknod /dev/made c 1 5; mknod /vol/made c 1 5"
    options = ("-v", "some:/vol", "-v", "/dev/zero:/zero")
    done = cli("run", *options, "--name", "cc", "box", "sh", "-c", script, ok=1)
    assert done.out.split() == ["/dev/zero", "/zero"]
    assert done.err.count("Permission denied") == 2
    assert done.err.count("Operation not permitted") == 2
    with cli.begun("run", *options, "--name", "dd", "box", "sh", "-c", "echo; sleep 99") as first:
        done = cli("exec", "dd", "sh", "-c", script, ok=1)
        assert done.out.split() == ["/dev/zero", "/zero"]
        assert done.err.count("Operation not permitted") == 2
        cli("rm", "-f", "dd")
        assert first.wait(timeout=10) == 137
    reset(cli.store)


@ONE
def test_a_command_of_an_image_cannot_be_a_runtime_option(cli: Cli, tmp_path: Path) -> None:
    load(cli, tmp_path, entry("bin/-x", data=b"#!/bin/sh\necho dash\n", mode=0o755))
    assert cli("run", "--rm", "--entrypoint", "-x", "box").out == "dash\n"


# --- a runtime of one's own ---------------------------------------------------------------------


def test_a_bundle_runs_with_runc_itself(tmp_path: Path) -> None:
    require("runc")
    cli = Cli(str(tmp_path / "store"))
    load(cli, tmp_path)
    script = "id -u; hostname; touch /vol/new; exit 4"
    cli("create", "--name", "cc", "-h", "named", "-v", "vol:/vol", "box", "sh", "-c", script)
    place = str(tmp_path / "bundle")
    assert "is not mounted" in cli("container", "bundle", "cc", place, ok=3).err
    cli("mount", "cc")
    assert cli("container", "bundle", "cc", place).out == f"{place}\n"
    assert "there is a bundle" in cli("container", "bundle", "cc", place, ok=4).err
    words = ["runc", "--root", str(tmp_path / "state"), "run", "--bundle", place, "tests-bundle"]
    done = subprocess.run(words, capture_output=True, check=False, text=True)
    assert (done.stdout, done.returncode) == ("0\nnamed\n", 4), done
    cli("umount", "cc")
    assert cli("run", "--rm", "-v", "vol:/v", "box", "ls", "/v").out == "new\n"
    reset(cli.store)


def test_a_trial_that_was_disturbed_says_nothing_about_the_next(tmp_path: Path) -> None:
    cli = Cli(str(tmp_path / "store"))
    load(cli, tmp_path)
    require("runc")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    failing = tmp_path / "failing"
    runc = tmp_path / "runc"
    runc.write_text(f'#!/bin/sh\n[ ! -e {failing} ] || exit 9\nPATH={path} exec runc "$@"\n')
    runc.chmod(0o755)
    failing.touch()
    options = ("run", "--rm", "--runtime", str(runc), "box", "echo", "it")
    assert "it ends with 9" in cli(*options, ok=125).err
    failing.unlink()
    assert cli(*options).out == "it\n"
    reset(cli.store)


def test_a_runtime_that_does_not_work_is_named_or_passed_over(tmp_path: Path) -> None:
    cli = Cli(str(tmp_path / "store"))
    load(cli, tmp_path)
    broken = tmp_path / "runc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    done = cli("run", "--rm", "--runtime", str(broken), "box", "true", ok=125)
    assert f"{broken} does not work here" in done.err
    assert (
        "there is no runtime 'nothing'"
        in cli("run", "--rm", "--runtime", "nothing", "box", "true", ok=125).err
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert cli("run", "--rm", "box", "echo", "it", env={**os.environ, "PATH": path}).out == "it\n"
    assert cli.containers() == {}
    reset(cli.store)

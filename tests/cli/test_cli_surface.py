"""The words of the command line: help, version, usage errors, what is not here. No store needed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import overlayctl
from overlayctl import cli

GROUPS = {
    "image": "load import save ls inspect history rm tag mount unmount exists",
    "layer": "ls inspect path files cat verify detach",
    "container": "create commit ls inspect mount unmount export rm exists",
    "volume": "create ls inspect rm prune exists",
    "system": "check info prune reset",
}
_SHORT = (
    "load import save images inspect history rmi tag create commit ps rm export mount umount mounts"
)
SHORT = _SHORT.split()
COMMANDS: list[tuple[str, ...]] = [
    (group, verb) for group, verbs in GROUPS.items() for verb in verbs.split()
]
COMMANDS += [(word,) for word in SHORT]
_ELSEWHERE = "pull push build start stop logs"
ELSEWHERE = _ELSEWHERE.split()


def overlayctl_(*args: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "overlayctl", *args],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **more},
    )


@pytest.fixture
def nowhere(tmp_path: Path) -> str:
    return str(tmp_path / "no store")


@pytest.mark.parametrize("flag", ["--version", "-v"])
def test_version(flag: str) -> None:
    done = overlayctl_(flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"overlayctl {overlayctl.__version__}\n"


def test_help_lists_every_command() -> None:
    plain = overlayctl_()
    assert plain.returncode == 0
    assert plain.stdout == overlayctl_("--help").stdout == overlayctl_("help").stdout
    listed = {line.split()[0] for line in plain.stdout.splitlines() if line.startswith("  ")}
    assert listed.issuperset([*GROUPS, *SHORT])
    assert "OverlayFS" in plain.stdout
    assert "Exit status" in plain.stdout


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--help"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"Usage: overlayctl {' '.join(words)} ")
    assert "--json" in said.out
    brief = cli.main([*words, "-h"])
    assert brief == (2 if words in {("create",), ("container", "create")} else 0)


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["image", "nonsense"],
        ["images", "--nonsense"],
        ["create"],
        ["rmi"],
        ["tag", "only-one"],
        ["image", "load", "a", "-i", "b"],
        ["import", "a", "--whiteouts=aufs"],
        ["mount", "a", "b", "-o", "exec"],
        ["inspect", "a", "--type", "layer"],
        ["volume", "ls", "--filter", "size=3"],
        ["volume", "create", "-d", "nfs"],
        ["volume", "create", "-o", "type=nfs"],
        ["layer", "detach"],
        ["layer", "detach", "a:1", "--all"],
        ["create", "--label", "=x", "a"],
        ["images", "--lock-timeout", "soon"],
        ["images", "--lock-timeout", "nan"],
    ],
    ids=" ".join,
)
def test_usage_errors_name_the_next_step(args: list[str], nowhere: str) -> None:
    done = overlayctl_("--root", nowhere, *args)
    assert (done.returncode, done.stdout) == (2, "")
    first, second = done.stderr.splitlines()
    assert first.startswith("overlayctl: ")
    assert second.startswith("hint: ")


def test_a_typing_error_is_understood() -> None:
    assert "did you mean image or images?" in overlayctl_("imagse").stderr
    assert "did you mean history" in overlayctl_("image", "histroy").stderr


@pytest.mark.parametrize("word", ELSEWHERE)
def test_what_is_not_here_names_what_to_use(word: str) -> None:
    done = overlayctl_(word, "-it", "busybox")
    assert (done.returncode, done.stdout) == (2, "")
    assert word in done.stderr
    assert "hint: use instead: " in done.stderr
    assert word not in overlayctl_("--help").stdout.split()


@pytest.mark.parametrize("verb", ["run", "create", "exec"])
@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--pull", "skopeo"),
        ("--dns", "none or host"),
        ("--shm-size", "--tmpfs /dev/shm"),
        ("--volumes-from", "{{json .Mounts}}"),
        ("--privileged", "chroot"),
    ],
)
def test_dockers_options_that_are_none_here_say_what_to_use_and_guess_nothing(
    verb: str, option: str, instead: str
) -> None:
    done = overlayctl_(verb, option, "x", "y")
    assert done.returncode == (2 if verb == "create" else 125)
    assert done.stderr.startswith(f"overlayctl: No such option: {option}\nhint: ")
    assert instead in done.stderr


@pytest.mark.parametrize("verb", ["run", "create"])
def test_a_call_that_is_off_names_the_help_of_its_command(verb: str) -> None:
    assert f"hint: overlayctl {verb} --help" in overlayctl_(verb, "-h").stderr


@pytest.mark.parametrize("noun", ["", "container", "image", "layer", "system", "volume"])
def test_a_list_of_commands_is_not_cut(noun: str) -> None:
    shown = overlayctl_(*noun.split(), "--help", COLUMNS="80").stdout
    assert "..." not in shown.split("Commands:")[1]
    assert max(map(len, shown.splitlines())) <= 80


def test_pull_names_skopeo() -> None:
    assert "skopeo copy docker://IMAGE docker-archive:" in overlayctl_("pull", "busybox").stderr


def test_errors_are_json_where_json_is_asked_for(nowhere: str) -> None:
    for args in (["create", "--json"], ["images", "--json", "--nonsense"], ["--json", "rmi"]):
        done = overlayctl_(*args)
        told = json.loads(done.stderr)
        assert set(told) == {"code", "exit", "message", "hint", "details"}
        assert (told["code"], told["exit"], done.returncode) == ("usage", 2, 2)
    missing = overlayctl_("image", "inspect", "a", "--json", "--root", nowhere)
    assert json.loads(missing.stderr)["code"] == "not-found"
    assert missing.returncode == 3


def test_lists_without_a_store_are_empty(nowhere: str) -> None:
    for args in (["images"], ["ps"], ["mounts"], ["layer", "ls"]):
        assert overlayctl_(*args, "--json", "--root", nowhere).stdout == "[]\n"
        table = overlayctl_(*args, OVERLAYCTL_ROOT=nowhere)
        assert (table.returncode, len(table.stdout.splitlines())) == (0, 1)
        assert nowhere in table.stderr
    assert overlayctl_("image", "exists", "a", "--root", nowhere).returncode == 1
    assert not Path(nowhere).exists()


def test_the_flag_beats_the_environment(nowhere: str) -> None:
    done = overlayctl_("--root", nowhere, "images", OVERLAYCTL_ROOT="/elsewhere")
    assert nowhere in done.stderr
    assert "/elsewhere" not in done.stderr


def test_not_root_is_told_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("OVERLAYCTL_ROOT", raising=False)
    assert cli.main(["images", "a b"]) == 5
    said = capsys.readouterr().err
    assert "CAP_SYS_ADMIN" in said
    assert "hint: sudo overlayctl images 'a b'" in said
    assert cli.main(["--version"]) == 0
    assert cli.main(["images", "--help"]) == 0


def test_a_reader_that_leaves_is_no_error(nowhere: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "overlayctl", "--root", nowhere, "images", "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
    assert b"Broken" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_unwind(number: signal.Signals, nowhere: str, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    child = subprocess.Popen(
        [sys.executable, "-m", "overlayctl", "--root", nowhere, "load", str(fifo)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 20
    while not Path(nowhere, "ingest").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    child.send_signal(number)
    _, said = child.communicate(timeout=20)
    assert child.returncode == 128 + number
    assert b"Traceback" not in said
    assert os.listdir(Path(nowhere, "ingest")) == []


@pytest.mark.parametrize("command", [["--version"], ["images"], ["ps"]])
def test_the_common_commands_load_little(command: list[str], nowhere: str) -> None:
    code = (
        "import sys; from overlayctl.cli import main; status = main(sys.argv[1:]);"
        "print(' '.join(sys.modules), file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OVERLAYCTL_ROOT": nowhere},
    )
    loaded = {name.split(".")[0] for name in done.stderr.splitlines()[-1].split()}
    assert not loaded & {"rich", "click", "pyroute2", "asyncio", "dataclasses", "isal"}
    assert command != ["--version"] or "typer" not in loaded

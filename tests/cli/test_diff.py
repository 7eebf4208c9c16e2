"""``container diff``: how the list is printed, and what state a container may be in."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.archives import docker_archive
from tests.cli.conftest import Shell
from tests.layer.tars import directory, entry, symlink, tar
from tests.oracles import command
from tests.rootmount import require

CONF = b"one\ntwo\nthree\n"
LAYERS = [
    tar(
        directory("./"), directory("etc", mode=0o755), entry("etc/conf", data=CONF, mode=0o644),
        entry("etc/end", data=b"no newline"), directory("srv"), entry("srv/a", data=b"a" * 1000),
        entry("srv/b", data=b"b" * 500), symlink("link", "etc"), entry("raw", data=b"\0\1"),
        directory("gone"), entry("gone/file", data=b"gone\n"), entry("same"),
    ),
    tar(directory("opq"), entry("opq/old", data=b"old\n")),
]  # fmt: skip


@pytest.fixture
def run(store: str, tmp_path: Path) -> Shell:
    """A store with a mounted container ``cc`` in which something was written."""
    run = Shell(store)
    run("load", docker_archive(tmp_path / "a.tar", LAYERS))
    run("create", "--name", "cc", "demo")
    merged = run.path("mount", "cc")
    (merged / "etc/conf").write_bytes(b"one\n2\nthree\n")
    (merged / "etc/end").write_bytes(b"a newline\n")
    (merged / "etc/new").write_bytes(b"new\n" * 3)
    os.link(merged / "etc/new", merged / "etc/too")
    (merged / "raw").write_bytes(b"\0\2\3")
    shutil.rmtree(merged / "srv")
    (merged / "link").unlink()
    (merged / "link").symlink_to("srv")
    for name in ("gone", "opq"):
        shutil.rmtree(merged / name)
        (merged / name).mkdir()
    return run


LISTED = """\
C /etc
C /etc/conf
C /etc/end
A /etc/new
A /etc/too
C /gone
D /gone/file
C /link
C /opq
D /opq/old
C /raw
D /srv
"""


def test_it_is_the_list_of_docker_whatever_state_it_is_in(run: Shell) -> None:
    assert run("diff", "cc").out == LISTED
    assert run("container", "diff", "cc").out == LISTED
    run("umount", "cc")
    assert run("diff", "cc").out == LISTED
    run("layer", "detach", "--all")
    assert run("diff", "cc").out == LISTED
    assert not os.listdir(os.path.join(run.store, "attached"))


def test_a_container_in_which_nothing_was_written(run: Shell) -> None:
    run("create", "--name", "idle", "demo")
    assert run("diff", "idle").out == ""
    assert json.loads(run("diff", "--json", "idle").out) == []


def test_sizes_are_what_is_gained(run: Shell) -> None:
    lines = run("diff", "--size", "cc").out.splitlines()
    assert {line.split()[2]: line.split()[:2] for line in lines} == {
        "/etc": ["C", "-"], "/etc/conf": ["C", "-2B"], "/etc/end": ["C", "0B"],
        "/etc/new": ["A", "+12B"], "/etc/too": ["A", "+12B"], "/gone": ["C", "-"],
        "/gone/file": ["D", "-5B"], "/link": ["C", "-"], "/opq": ["C", "-"],
        "/opq/old": ["D", "-4B"], "/raw": ["C", "+1B"], "/srv": ["D", "-1.5kB"],
    }  # fmt: skip
    assert len({line.index("/") for line in lines}) == 1


def test_the_sum_counts_a_link_once_and_no_parents(run: Shell) -> None:
    counts = [line.split() for line in run("diff", "--stat", "cc").out.splitlines()[1:]]
    assert counts == [
        ["added", "2", "0", "0", "+12B"],
        ["changed", "3", "0", "1", "-1B"],
        ["deleted", "2", "1", "0", "-1.51kB"],
    ]
    told = json.loads(run("diff", "--stat", "--json", "cc").out)
    assert told["Deleted"] == {"Files": 2, "Directories": 1, "Others": 0, "Bytes": -1509}


def test_less_is_printed_when_asked(run: Shell) -> None:
    paths = [line[2:] for line in LISTED.splitlines()]
    assert run("diff", "--name-only", "cc").out.splitlines() == paths
    parents = {"/etc", "/gone", "/opq"}
    no_parents = run("diff", "--no-parents", "--name-only", "cc").out.splitlines()
    assert no_parents == [path for path in paths if path not in parents]
    assert run("diff", "-0", "cc").out == LISTED.replace("\n", "\0")
    assert run("diff", "-0", "--name-only", "cc").out == "".join(p + "\0" for p in paths)


def test_the_document_says_what_it_was_and_is(run: Shell) -> None:
    found = {change["Path"]: change for change in json.loads(run("diff", "--json", "cc").out)}
    assert list(found) == [line[2:] for line in LISTED.splitlines()]
    conf = found["/etc/conf"]
    file = {"Type": "file", "Mode": "0644", "Uid": 0, "Gid": 0}
    assert conf["Before"] == {**file, "Size": 14}
    assert conf["After"] == {**file, "Size": 12}
    assert (conf["Kind"], conf["Changed"], conf["Parent"]) == ("C", ["size", "time"], False)
    assert (found["/etc"]["Parent"], found["/etc"]["Changed"]) == (True, [])
    assert found["/etc/too"]["LinkOf"] == "/etc/new"
    assert found["/srv"]["After"] is None
    assert (found["/srv"]["Before"]["Type"], found["/srv"]["Before"]["Size"]) == ("directory", 1500)


def test_no_name_steers_the_terminal(run: Shell) -> None:
    merged = run.path("mount", "cc")
    name = b"\x1b[31m\n\xff"
    (merged / os.fsdecode(name)).touch()
    run("umount", "cc")
    assert "A /\\x1b[31m\\x0a\\xff\n" in run("diff", "cc").out
    assert "A /" + os.fsdecode(name) in run("diff", "-0", "cc").out.split("\0")
    found = json.loads(run("diff", "--json", "cc").out)[0]
    assert base64.b64decode(found["PathBase64"]) == b"/" + name


# --- one file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["etc/conf", "etc/end", "etc/new", "gone/file"])
def test_the_lines_of_a_file_can_be_applied(run: Shell, tmp_path: Path, name: str) -> None:
    """GNU patch makes the new file of the old one."""
    require("patch")
    (tmp_path / "tree/etc").mkdir(parents=True)
    (tmp_path / "tree/gone").mkdir()
    old = {"etc/conf": CONF, "etc/end": b"no newline", "gone/file": b"gone\n"}
    if name in old:
        (tmp_path / "tree" / name).write_bytes(old[name])
    told = run("diff", "cc", "--content", "/" + name).out
    (tmp_path / "patch").write_text(told)
    command.output("patch", "-p1", "-d", tmp_path / "tree", "-i", tmp_path / "patch")
    merged = run.path("mount", "cc")
    assert (merged / name).exists() == (tmp_path / "tree" / name).exists()
    if (merged / name).exists():
        assert (merged / name).read_bytes() == (tmp_path / "tree" / name).read_bytes()
    run("umount", "cc")
    assert run("diff", "cc", "--content", name).out == told


def test_content_of_other_kinds(run: Shell) -> None:
    assert run("diff", "cc", "--content", "/same").out == ""
    assert run("diff", "cc", "--content", "raw").out == (
        "Binary file /raw differs: 2 bytes before, 3 after\n"
    )
    link = run("diff", "cc", "--content", "/link").out
    assert "-etc\n\\ No newline at end of file\n+srv\n" in link
    assert run("diff", "cc", "--content", "/opq/old").out.splitlines()[-1] == "-old"
    srv = run("diff", "cc", "--content", "/srv/a").out.splitlines()
    assert srv[:2] == ["--- a/srv/a", "+++ /dev/null"]
    told = json.loads(run("diff", "cc", "--json", "--content", "/etc/conf").out)
    assert (told["Binary"], told["Before"]["Size"], told["After"]["Size"]) == (False, 14, 12)
    assert "-two\n+2\n" in told["Diff"]
    assert json.loads(run("diff", "cc", "--json", "--content", "/raw").out)["Diff"] is None


def test_no_content_is_a_sentence(run: Shell) -> None:
    assert "neither the image nor" in run("diff", "cc", "--content", "/no/such", ok=3).err
    # Through no symlink: what it leads to would be somebody else's.
    assert "symlinks on the way" in run("diff", "cc", "--content", "link/conf", ok=3).err
    assert "is a directory" in run("diff", "cc", "--content", "/etc", ok=1).err
    assert "'/' is a directory" in run("diff", "cc", "--content", "/", ok=1).err
    assert "neither the image nor" in run("diff", "cc", "--content", "x" * 300, ok=3).err
    merged = run.path("mount", "cc")
    os.mkfifo(merged / "etc/fifo")
    with (merged / "etc/long").open("wb") as file:
        file.truncate(1 << 40)
    assert "is a fifo" in run("diff", "cc", "--content", "/etc/fifo", ok=1).err
    assert "files of up to" in run("diff", "cc", "--content", "/etc/long", ok=1).err


# --- what is in the way -------------------------------------------------------------------------


def test_nobody_is_waited_for(run: Shell) -> None:
    """A process lives in it, another command reads it: the list comes at once."""
    merged = run.path("mount", "cc")
    program = [sys.executable, "-c", "input()"]
    with subprocess.Popen(program, cwd=merged, stdin=subprocess.PIPE) as process:
        done = run("diff", "--lock-timeout", "0", "cc")
        process.communicate(b"\n")
    assert done.out == LISTED


def test_a_lost_record_of_layers_is_said(run: Shell) -> None:
    run("umount", "cc")
    (container,) = os.listdir(os.path.join(run.store, "snapshots"))
    os.unlink(os.path.join(run.store, "snapshots", container, "snapshot.json"))
    done = run("diff", "cc", ok=6, sound=False)
    assert "which layers container cc lies on is lost" in done.err
    assert "overlayctl system check --repair" in done.err


def test_what_another_programs_overlay_wrote_is_refused(run: Shell) -> None:
    run("umount", "cc")
    (container,) = os.listdir(os.path.join(run.store, "snapshots"))
    upper = Path(run.store, "snapshots", container, "upper")
    (upper / "moved").mkdir()
    os.setxattr(upper / "moved", "trusted.overlay.redirect", b"/etc")
    done = run("diff", "cc", ok=1)
    assert "the directory 'moved' was renamed" in done.err
    assert "copy what is seen there" in done.err


@pytest.mark.parametrize(
    "words", [["--content", "x", "--stat"], ["--stat", "-0"], ["--content", "x", "--size"]]
)
def test_options_that_contradict_each_other(run: Shell, words: list[str]) -> None:
    assert "hint: " in run("diff", "cc", *words, ok=2).err

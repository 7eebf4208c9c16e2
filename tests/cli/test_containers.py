"""``ps``, ``rename``, ``container prune``, names, labels and filters, through commands."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from overlayctl.engine import Engine
from tests.archives import docker_archive
from tests.cli.conftest import Shell
from tests.cli.test_in_use import elsewhere, process
from tests.layer.tars import directory, entry, tar

LAYERS = [
    tar(directory("etc"), entry("etc/conf", data=b"c" * 1000)),
    tar(entry("big", data=b"b" * 100_000)),
]
CONFIG = {
    "Cmd": ["/bin/sh"],
    "Entrypoint": ["/init", "--"],
    "Env": ["PATH=/bin", "A=image"],
    "Labels": {"from": "image", "both": "image"},
    "User": "nobody",
    "WorkingDir": "/srv",
}


@pytest.fixture
def run(store: str, tmp_path: Path) -> Shell:
    run = Shell(store)
    run("load", docker_archive(tmp_path / "a.tar", LAYERS, config=CONFIG))
    return run


def rows(run: Shell, *options: str) -> list[str]:
    """The names that a list shows, in its order."""
    return run("ps", "--format", "{{.Names}}", *options).out.split()


def inspected(run: Shell, name: str, *options: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(run("container", "inspect", *options, name).out)[0]
    return found


def test_what_is_asked_for_comes_before_what_the_image_says(run: Shell) -> None:
    run("create", "--name", "plain", "demo")
    run(
        "create", "--name", "own", "-e", "A=mine", "-e", "B=2", "-w", "/", "-u", "0", "-h", "box",
        "-l", "both=mine", "--read-only", "--network", "host", "-it", "demo", "ls", "-l",
    )  # fmt: skip
    run("create", "--name", "entry", "--entrypoint", "/own", "demo")
    run("create", "--name", "bare", "--entrypoint", "", "demo", "ls")
    plain, own = inspected(run, "plain"), inspected(run, "own")
    assert plain["Config"] == {
        "Hostname": str(plain["Id"])[:12],
        "User": "nobody",
        "Tty": False,
        "OpenStdin": False,
        "Env": ["PATH=/bin", "A=image"],
        "Cmd": ["/bin/sh"],
        "Image": "docker.io/library/demo:latest",
        "WorkingDir": "/srv",
        "Entrypoint": ["/init", "--"],
        "Labels": {"from": "image", "both": "image"},
    }
    assert own["Config"] == {
        "Hostname": "box",
        "User": "0",
        "Tty": True,
        "OpenStdin": True,
        "Env": ["PATH=/bin", "A=mine", "B=2"],
        "Cmd": ["ls", "-l"],
        "Image": "docker.io/library/demo:latest",
        "WorkingDir": "/",
        "Entrypoint": ["/init", "--"],
        "Labels": {"from": "image", "both": "mine"},
    }
    assert own["HostConfig"] == {
        "NetworkMode": "host",
        "AutoRemove": False,
        "ReadonlyRootfs": True,
    }
    assert (own["Path"], own["Args"]) == ("/init", ["--", "ls", "-l"])
    # Another entrypoint leaves the image's command out.
    assert [inspected(run, name)["Path"] for name in ("entry", "bare")] == ["/own", "ls"]
    assert inspected(run, "entry")["Args"] == []


def test_variables_of_files_and_of_the_caller(
    run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERE", "caller's")
    monkeypatch.delenv("NOWHERE", raising=False)
    file = tmp_path / "env"
    file.write_text("# no\n\nA=file\nHERE\n  B = spaced\nE=\n".replace("B = ", "B="))
    run("create", "--name", "cc", "--env-file", file, "-e", "A=last", "-e", "NOWHERE", "demo")
    config = inspected(run, "cc")["Config"]
    assert isinstance(config, dict)
    assert config["Env"] == ["PATH=/bin", "A=last", "HERE=caller's", "B=spaced", "E="]
    file.write_text("A B=1\n")
    assert "space" in run("create", "--env-file", file, "demo", ok=2).err
    assert "No such file" in run("create", "--env-file", tmp_path / "x", "demo", ok=3).err


@pytest.mark.parametrize(
    ("option", "value"),
    [("-h", "a b"), ("-h", "a" * 65), ("--network", "bridge"), ("-w", "here"), ("-e", "=1")],
)
def test_what_cannot_be_is_refused_by_name(run: Shell, option: str, value: str) -> None:
    done = run("create", option, value, "demo", ok=2)
    assert repr(value) in done.err
    assert "hint: " in done.err
    assert rows(run, "-a") == []


def test_a_container_that_would_go_at_once_is_not_made(run: Shell) -> None:
    assert "run --rm" in run("create", "--rm", "demo", ok=2).err
    assert rows(run, "-a") == []


def test_a_name_is_made_up_and_given_to_nobody_else(run: Shell) -> None:
    for _ in range(30):
        run("create", "demo", sound=False)
    made = rows(run, "-a")
    assert len(set(made)) == 30
    assert all("_" in name for name in made)


def test_rename(run: Shell, store: str) -> None:
    identifier = run("create", "--name", "one", "demo").out.strip()
    run("create", "--name", "other", "demo")
    run("rename", "one", "two")
    assert rows(run, "-a") == ["other", "two"] or rows(run, "-a") == ["two", "other"]
    assert inspected(run, "two")["Id"] == identifier
    assert "there is no container 'one'" in run("container", "inspect", "one", ok=3).err
    assert "taken" in run("rename", "two", "other", ok=4).err
    assert "already" in run("rename", "two", "two", ok=4).err
    assert "valid" in run("rename", "two", "a/b", ok=2).err
    # Its first name is free for another, and both are found by theirs.
    second = run("create", "--name", "one", "demo").out.strip()
    assert (inspected(run, "one")["Id"], inspected(run, "two")["Id"]) == (second, identifier)
    run("rm", "two")
    assert sorted(os.listdir(Path(store, "containers/names"))) == ["one", "other"]


def test_ps_lists_what_is_mounted_and_the_sizes_are_docker_s(run: Shell) -> None:
    run("create", "--name", "cc", "demo")
    run("create", "--name", "idle", "demo")
    assert (rows(run), sorted(rows(run, "-a"))) == ([], ["cc", "idle"])
    merged = run.path("mount", "cc")
    with (merged / "etc/conf").open("a") as file:
        file.write("1111\n")
    os.link(merged / "etc/conf", merged / "etc/again")
    assert rows(run) == ["cc"]
    table = run("ps", "-s").out.splitlines()
    assert table[0].split()[-1] == "SIZE"
    assert table[1].endswith("  1kB (virtual 102kB)")
    assert run("ps", "--format", "{{.Size}}").out == "1kB (virtual 102kB)\n"
    found = inspected(run, "cc", "--size")
    assert (found["SizeRw"], found["SizeRootFs"]) == (1005, 102_005)
    assert json.loads(run("ps", "-as", "--json").out)[0]["SizeRw"] in {0, 1005}
    run("umount", "cc")
    assert rows(run) == []


def test_a_container_with_a_process_is_running(run: Shell, store: str) -> None:
    identifier = run("create", "--name", "cc", "demo").out.strip()
    with Engine.open(store).store.running(identifier):
        assert rows(run) == ["cc"]
        state = inspected(run, "cc")["State"]
        assert isinstance(state, dict)
        assert (state["Status"], state["Running"]) == ("running", True)
        assert str(os.getpid()) in state["Runners"][0]
        assert rows(run, "--filter", "status=running") == ["cc"]
        assert "is in use by process" in run("rm", "cc", ok=4).err
        assert run("container", "prune", "-f").out == ""
    assert rows(run) == []
    run("rm", "cc")


def test_filters(run: Shell) -> None:
    first = run("create", "--name", "web1", "-l", "tier=front", "-l", "a", "demo").out.strip()
    time.sleep(1.1)
    run("create", "--name", "web2", "-l", "tier=back", "demo")

    def found(*filters: str) -> list[str]:
        return sorted(rows(run, "-a", *(f"--filter={text}" for text in filters)))

    both = ["web1", "web2"]
    assert found("name=web") == found("name=^web.$") == found("ancestor=demo") == both
    assert found("name=web1", "name=web2") == both
    assert found("label=tier=front") == found("label=tier", "label=a") == ["web1"]
    assert found(f"id={first[:6]}") == found("before=web2") == ["web1"]
    assert found("since=web1") == ["web2"]
    assert found("status=mounted") == found("ancestor=nothing") == found("until=24h") == []
    assert found("until=2100-01-01", "status=created") == both
    assert found("until=4102444800", "until=0.001s") == both
    assert found("until=1.5h") == found("until=1700000000") == []
    odd = ("until=99999999999999h", f"until={'9' * 400}", "until=0001-01-01T00:00:00+23:00")
    for wrong in ("size=1", "name", "name=[", "status=odd", "until=soon", *odd):
        assert "hint: " in run("ps", "-a", "--filter", wrong, ok=2).err
    assert "there is no container" in run("ps", "--filter", "before=none", ok=3).err


def test_image_filters(run: Shell, tmp_path: Path) -> None:
    run("load", docker_archive(tmp_path / "b.tar", LAYERS[:1], tags=()))

    def found(*filters: str) -> list[str]:
        wanted = (f"--filter={text}" for text in filters)
        return run("images", "--format", "{{.Repository}}", *wanted).out.split()

    assert found("dangling=true") == ["<none>"]
    assert found("dangling=false") == found("label=from=image") == found("reference=d*") == ["demo"]
    # Whatever zone and precision a config has it in.
    for number, created in enumerate(("09:00:00.5Z", "11:00:00+02:00", "08:59:59.999999999Z")):
        place, tags = tmp_path / f"{number}.tar", (f"t{number}:1",)
        run("load", docker_archive(place, LAYERS[:1], tags=tags, created=f"2020-01-01T{created}"))
    assert found("before=t0:1") == ["t1", "t2"]
    assert found("since=t1:1", "until=2020-01-02") == ["t0"]
    assert found("reference=demo:latest") == ["demo"]
    assert found("reference=x*") == []
    assert "neither" in run("images", "-f", "dangling=maybe", ok=2).err


def test_prune_takes_what_nobody_uses(run: Shell) -> None:
    for name in ("idle", "here", "there", "kept"):
        run("create", "--name", name, *(["-l", "keep"] if name == "kept" else []), "demo")
    merged = run.path("mount", "idle")
    (merged / "written").write_bytes(b"w" * 5000)
    run("umount", "idle")
    run("mount", "here")
    assert "nobody is here to ask" in run("container", "prune", ok=2).err
    assert "Would be deleted: kept" in run("container", "prune", "-n", "--filter", "label=keep").out
    mounting = f"{sys.executable} -m overlayctl --root {run.store} mount there"
    with process(*elsewhere(mounting)):
        done = run("container", "prune", "-f", "--filter", "label=keep")
        assert [line.split()[:2] for line in done.out.splitlines()] == [["Deleted:", "kept"]]
        done = run("container", "prune", "--yes", "--json")
        assert json.loads(done.out)["Size"] == 5000
        assert sorted(rows(run, "-a")) == ["here", "there"]


def test_an_image_is_not_taken_from_its_containers(run: Shell, store: str) -> None:
    image = run("images", "-q").out.strip()
    idle = run("create", "--name", "idle", "demo").out.strip()
    busy = run("create", "--name", "busy", "demo").out.strip()
    with Engine.open(store).store.running(busy):
        for name in ("demo", image):
            refused = run("rmi", name, ok=4).err
            assert "running container busy" in refused
            assert "container idle" in refused
            assert "overlayctl rm -f busy" in refused
            assert "overlayctl rm idle" in refused
        # By its id not even by force; a name is only untied, and both go on.
        assert "container idle" not in run("rmi", "-f", image, ok=4).err
        assert "Untagged: demo:latest" in run("rmi", "-f", "demo").out
    assert run("images", "-q").out.strip() == image
    assert run("rmi", image, ok=4).err.count("container ") == 2
    run("rm", idle, busy)
    assert "Deleted: " in run("rmi", image).out

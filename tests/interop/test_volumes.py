"""Volumes against docker's: the same words, the same mounts, the same content at first use."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.archives import docker_archive
from tests.cli.conftest import Shell
from tests.cli.test_volumes import prepared
from tests.interop.views import TIME
from tests.layer.tars import directory, entry, hardlink, symlink, tar
from tests.oracles import trees
from tests.oracles.command import CommandError
from tests.oracles.peers import Dockerd

BOTH = [
    *("data:/data", "data:/data:ro", "data:/data:rw,nocopy", "data:/data:z,ro", "data://b"),
    *("data:/a/../b//c/.", "/data", "/data/", "/host/dir:/x", "//host/./b/../dir/:/x"),
    *("/host/dir:/x:ro,rslave,Z", "/host/dir:/x:cached", "./sub:/x", ".:/x", "../y:/x"),
    *(".hidden:/x", "/host/dir:/x:rshared", "data:/x:consistent", "/host/dir:/proc-x/proc"),
]
NEITHER = [
    *("", ":/x", "data:", "data:x", "data:/x:", "/x:ro", "/x:ro,nocopy", "data:/", "data:/x/.."),
    *("a:b:/x:ro", "/a:b:/x:ro:z", "data:/x:no", "data:/x:ro,rw", "data:/x:ro,ro", "data:/x:,ro"),
    *("/host/dir:/x:z,Z", "/host/dir:/x:shared,rslave", "/host/dir:/x:nocopy", "data:/x:rshared"),
    *("-ab:/x", "sub/dir:/x", "~/dir:/x", "d\xe4ta:/x", "data:/x:RO", "data:/x: ro", " data:/x"),
]
ONLY_DOCKER_AT_FIRST = ["data", ":", "/..", "data:/proc/sys/kernel", "a:/x"]
"""Its runtime refuses most of them at the start, or they make a volume at a path like ``a:/x``."""

BOTH_MOUNTS = [
    *("source=data,target=/x", "type=volume,src=data,dst=/x,ro", "type=volume,target=/x"),
    *("TYPE=Volume,Source=data,Destination=/x", "src=data,dst=/x,readonly=false"),
    *("src=data,dst=/x,volume-nocopy", "type=bind,source=/host/dir,target=/x"),
    *('type=bind,"source=/host/,:i",target=/x', "type=bind,source=./sub,target=/x"),
    "type=bind,source=/host/dir,target=/x,ro=1,bind-propagation=rslave,consistency=cached",
    *("type=tmpfs,target=/x", "type=tmpfs,target=/x,tmpfs-size=1.5m,tmpfs-mode=1770,ro"),
]
NEITHER_MOUNTS = [
    *("", "source=data", "type=volume,source=data,target=x", "type=npipe,target=/x"),
    *("target=/x,size=3", "target=/x,source", "target=/x,readonly=maybe", "target=/x,readonly"),
    *("target=/x,source=./data", "target=/x,tmpfs-size=3m", "target=/x,bind-propagation=shared"),
    *("type=bind,target=/x", "type=bind,source=h,target=/x", 'target="/x'),
    *("type=bind,source=/host/dir,target=/x,volume-nocopy", "source=data,target=/"),
    "type=bind,source=/host/dir,target=/x,bind-propagation=all",
    *("type=tmpfs,source=data,target=/x", "type=tmpfs,target=/x,tmpfs-size=much"),
    *("type=tmpfs,target=/x,tmpfs-mode=9", "type=bind,source=/host/none,target=/x"),
]

LAYER = tar(
    directory("./"),
    directory("data", mode=0o1750, uid=7, gid=8),
    entry("data/file", data=b"image", mode=0o4640, uid=9, xattrs={"user.a": "b"}),
    hardlink("data/same", "data/file", mode=0o4640, uid=9, xattrs={"user.a": "b"}),
    symlink("data/link", "/etc/passwd"),
    directory("data/sub", mode=0o2775, gid=5),
    entry("data/sub/file", data=b"sub" * 50_000),
    entry("data/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    entry("data/fifo", tarfile.FIFOTYPE, mode=0o600),
    directory("own", mode=0o700, uid=5, gid=6),
    directory("srv"),
    entry("srv/here", data=b"srv"),
    symlink("absolute", "/srv"),
    symlink("out", "../../../../srv"),
)


@pytest.fixture
def run(run: Shell, dockerd: Dockerd, tmp_path: Path) -> Shell:
    path = docker_archive(tmp_path / "a.tar", [LAYER], tags=("volumes:1",))
    run("load", path)
    dockerd.load(path)
    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("host/dir", "host/,:i", "here/sub"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def theirs(dockerd: Dockerd, option: str) -> list[Any] | None:
    """What docker makes of an option; None where it refuses."""
    try:
        container = dockerd.docker("create", option, "volumes:1", "true")
    except CommandError:
        return None
    mounts = json.loads(dockerd.docker("inspect", "--format", "{{json .Mounts}}", container))
    dockerd.docker("rm", "--volumes", container)
    return _compared(mounts)


def ours(run: Shell, option: str) -> list[Any] | None:
    """What overlayctl makes of it."""
    done = run._run(("create", "--name", "cc", option, "volumes:1", "true"), "")
    if done.status:
        assert done.status in {2, 3}, done
        return None
    mounts = json.loads(run("inspect", "-f", "{{json .Mounts}}", "cc", sound=False).out)
    run("rm", "-v", "cc", sound=False)
    return _compared(mounts)


def _compared(mounts: list[Any]) -> list[Any]:
    found = []
    for one in mounts:
        volume = one["Type"] == "volume"
        source = one["Name"] if volume else one.get("Source", "")
        anonymous = volume and len(source) == 64
        # Docker 20.10 leaves the default unsaid where --mount says nothing, newer ones do not.
        propagation = one.get("Propagation", "").replace("rprivate", "")
        found.append(
            (one["Type"], not anonymous and source, one["Destination"], one["RW"], propagation)
        )
    return found


def test_the_same_words_mean_the_same(dockerd: Dockerd, run: Shell, here: Path) -> None:
    cases = [(f"--volume={text}", True) for text in BOTH]
    cases += [(f"--volume={text}", False) for text in NEITHER]
    cases += [(f"--mount={text}", True) for text in BOTH_MOUNTS]
    cases += [(f"--mount={text}", False) for text in NEITHER_MOUNTS]
    for text, accepted in cases:
        option = text.replace("/host/", f"{here}/host/")
        found = ours(run, option)
        assert found == theirs(dockerd, option), option
        assert (found is not None) == accepted, option
    for text in ONLY_DOCKER_AT_FIRST:
        assert ours(run, f"--volume={text}") is None
        assert theirs(dockerd, f"--volume={text}") is not None
    assert run.findings() == ""


@pytest.mark.parametrize("target", ["/data", "/own", "/absolute", "/out", "/data/sub", "/new/dir"])
def test_the_same_content_at_first_use(
    dockerd: Dockerd, run: Shell, target: str, request: pytest.FixtureRequest
) -> None:
    name = f"first{request.node.callspec.indices['target']}"
    container = dockerd.docker("create", "--volume", f"{name}:{target}", "volumes:1", "true")
    place = Path(dockerd.docker("volume", "inspect", "--format", "{{.Mountpoint}}", name))
    run("create", "--name", "cc", "-v", f"{name}:{target}", "volumes:1")
    with prepared(run, "cc") as (_, bound):
        inside = trees.snapshot(bound[0].source)
        # Docker puts names into directories that have got their times.
        directories = [name for name, one in inside.items() if one.type == "directory"]
        times = dict.fromkeys(directories, TIME)
        found = trees.snapshot(place)
        assert trees.differences(found, inside, ignore_fields_of=times) == []
        # A second one finds what is there, and adds nothing.
        (place / "more").touch()
        Path(bound[0].source, "more").touch()
    dockerd.docker("create", "--name", name, "--volume", f"{name}:/srv", "volumes:1", "true")
    run("create", "--name", "other", "-v", f"{name}:/srv", "volumes:1")
    with prepared(run, "other") as (_, bound):
        assert sorted(os.listdir(place)) == sorted(os.listdir(bound[0].source))
    dockerd.docker("rm", container, name)
    dockerd.docker("volume", "rm", name)

"""``cp`` against ``docker cp``: the same words in the same trees, and what is there afterwards."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.archives import docker_archive
from tests.cli.conftest import Shell
from tests.layer.tars import directory, entry, hardlink, symlink, tar
from tests.oracles import trees
from tests.oracles.peers import Dockerd

# C: is a directory of the container that this case has for itself, and where it is run another.
OUT = (
    "C:file new",
    "C:file new/",
    "C:file nodir/new",
    "C:file e",
    "C:file e/",
    "C:file e/.",
    "C:file f",
    "C:file f/",
    "C:file lf",
    "C:file ld",
    "C:file fresh",
    "C:file dang",
    "C:file/ new",
    "C:file/. new",
    "C:dir new",
    "C:dir new/",
    "C:dir/ new",
    "C:dir/. new",
    "C:dir nodir/new",
    "C:dir e",
    "C:dir/ e",
    "C:dir/. e",
    "C:dir/. d",
    "C:dir d",
    "C:dir clash",
    "C:dir clash2",
    "C:dir f",
    "C:dir f/",
    "C:dir ld",
    "C:dir/sub/.. e",
    "C:dir/sub/../. e",
    "C:todir new",
    "C:todir/ new",
    "C:todir/ e",
    "C:todir/. e",
    "C:todir/file new",
    "C:tofile new",
    "C:tofile/ new",
    "C:dangling new",
    "C:dangling/ new",
    "C:absdir/ new",
    "C:up/file new",
    "-L C:tofile new",
    "-L C:tofile e",
    "-L C:todir new",
    "-L C:todir e",
    "-L C:dangling new",
    "-L C:dir e",
    "-a C:dir/. e",
    "-q C:fifo e",
    "C:nothing e",
)
IN = (
    "f C:new",
    "f C:new/",
    "f C:nodir/new",
    "f C:dir",
    "f C:dir/",
    "f C:dir/.",
    "f C:file",
    "f C:file/",
    "f C:file/x",
    "f C:todir",
    "f C:tofile",
    "f C:absdir",
    "f C:up/in",
    "f C:dangling",
    "f C:fresh",
    "f/ C:new",
    "./f C:new",
    "lf C:new",
    "lf C:dir",
    "lf/ C:new",
    "ld C:new",
    "ld/ C:dir",
    "ld/. C:dir",
    "dang C:new",
    "d C:new",
    "d C:new/",
    "d C:nodir/new",
    "d/ C:new",
    "d/. C:new",
    "d C:dir",
    "d/. C:dir",
    "d/. C:todir/",
    "d C:file",
    "d C:file/",
    "d C:clash",
    "d/. C:clash2",
    "-L lf C:new",
    "-L lf C:dir",
    "-L ld C:dir",
    "-L dang C:new",
    "-a d C:dir",
    "nothing C:new",
    "fifo C:new",
)
OTHER = ("f new", "C:file C:new", "- -", "f Nobody:/new", "Nobody:/file new")
# Docker makes these in every container.
DOCKERS = (".dockerenv", "dev", "etc", "proc", "sys")


class Both(NamedTuple):
    """The same words to both; a place on the host and one in the container for each case."""

    docker: Dockerd
    container: str
    ours: Shell
    place: Path

    def status(self, which: str, case: str, number: int) -> int:
        """The exit status in the directory ``which``/``number``."""
        there = self.place / which / str(number)
        there.mkdir(parents=True)
        host(there)
        name = self.container if which == "docker" else "cc"
        words = [
            f"{name}:/{number}/{word[2:]}" if word.startswith("C:") else word
            for word in case.split(" ")
        ]
        if which == "ours":
            before = os.getcwd()
            os.chdir(there)
            try:
                return self.ours._run(("cp", *words), "").status
            finally:
                os.chdir(before)
        env = {**os.environ, "DOCKER_HOST": self.docker.host, "DOCKER_CONFIG": str(self.place)}
        return subprocess.run(
            ["docker", "cp", *words], cwd=there, env=env, capture_output=True, check=False
        ).returncode


def host(place: Path) -> None:
    """What lies on the host."""
    for name, content in (("f", "F"), ("clash2", "C")):
        (place / name).write_text(content)
    os.chown(place / "f", 1000, 1001)
    os.chmod(place / "f", 0o640)
    (place / "d/sub").mkdir(parents=True)
    (place / "d/x").write_text("X")
    (place / "d/sub/y").write_text("Y")
    (place / "d/link").symlink_to("x")
    os.chown(place / "d/sub", 7, 8)
    os.chmod(place / "d", 0o700)
    (place / "e").mkdir()
    (place / "clash/dir").mkdir(parents=True)
    (place / "clash/dir/file").mkdir()
    for name, target in (("lf", "f"), ("ld", "d"), ("dang", "no/where"), ("fresh", "e/made")):
        (place / name).symlink_to(target)
    os.mkfifo(place / "fifo", 0o604)
    for path in sorted(place.rglob("*"), reverse=True):
        os.utime(path, (10, 10), follow_symlinks=False)


def image() -> bytes:
    """What lies in the container, once for each case."""
    entries = [directory("./")]
    for number in range(len(OUT) + len(IN)):
        at = f"{number}/"
        entries += [
            directory(at),
            entry(at + "file", data=b"file", uid=5, gid=6, mode=0o755, mtime=20),
            directory(at + "dir", mode=0o751, uid=7, gid=8, mtime=20),
            entry(at + "dir/file", data=b"inner", mtime=20),
            directory(at + "dir/sub", mode=0o711, mtime=20),
            entry(at + "dir/sub/x", data=b"deep", mtime=20),
            hardlink(at + "dir/hard", at + "dir/file", mtime=20),
            symlink(at + "dir/link", "/etc/passwd"),
            symlink(at + "todir", "dir"),
            symlink(at + "tofile", "file"),
            symlink(at + "absdir", f"/{number}/dir"),
            symlink(at + "up", f"../../../../../../{number}/dir"),
            symlink(at + "dangling", "nowhere/x"),
            symlink(at + "fresh", "dir/made"),
            entry(at + "fifo", type=b"6", mode=0o604, mtime=20),
            directory(at + "clash", mtime=20),
            directory(at + "clash/d", mtime=20),
            entry(at + "clash/d/sub", data=b"a file", mtime=20),
            directory(at + "clash2", mtime=20),
            directory(at + "clash2/x", mtime=20),
        ]
    return tar(*entries)


@pytest.fixture
def both(tmp_path: Path, dockerd: Dockerd, run: Shell) -> Iterator[Both]:
    layer = image()
    (tmp_path / "layer.tar").write_bytes(layer)
    dockerd.import_rootfs(tmp_path / "layer.tar", "copies:1")
    container = dockerd.docker("create", "copies:1", "x")
    run("load", docker_archive(tmp_path / "a.tar", [layer]))
    run("create", "--name", "cc", "demo")
    try:
        yield Both(dockerd, container, run, tmp_path)
    finally:
        dockerd.docker("rm", "-f", container)
        dockerd.docker("rmi", "copies:1")


def shapes(data: bytes) -> dict[str, tuple[Any, ...]]:
    """A container's tree; of times what was not just now."""
    found: dict[str, tuple[Any, ...]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for one in archive:
            name = clean(one.name)
            if name not in {"", "."} and name.partition("/")[0] not in DOCKERS:
                content = archive.extractfile(one).read() if one.isreg() else b""  # type: ignore[union-attr]
                time = one.mtime if one.mtime < 1_000_000 else "now"
                kind = b"0" if one.islnk() else one.type
                if one.islnk():
                    content = found[clean(one.linkname)][5]
                target = one.linkname if one.issym() else ""
                found[name] = (
                    kind,
                    stat.S_IMODE(one.mode),
                    one.uid,
                    one.gid,
                    time,
                    content,
                    target,
                )
    return found


def clean(name: str) -> str:
    return name.removeprefix("./").rstrip("/")


def on_host(place: Path) -> dict[str, tuple[Any, ...]]:
    """A directory of the host in the same way."""
    found = {}
    for path, one in trees.snapshot(place).items():
        seconds = one.mtime_ns // 10**9
        name = os.fsdecode(path) if path else "."
        mode = 0o777 if one.type == "symlink" else one.mode
        time = seconds if seconds < 1_000_000 else "now"
        found[name] = (
            one.type, mode, one.uid, one.gid, time, one.sha256, one.target, one.link_group,
        )  # fmt: skip
    return found


def test_what_docker_does_is_done(both: Both) -> None:
    cases = (*OUT, *IN)
    told, failed = [], set()
    for number, case in enumerate(cases):
        statuses = [both.status(which, case, number) for which in ("docker", "ours")]
        if bool(statuses[0]) != bool(statuses[1]):
            told.append(f"{case}: exit {statuses[0]} there, {statuses[1]} here")
        if statuses[0]:
            # What was done until then is not the same.
            failed.add(number)
            continue
        here, there = (on_host(both.place / which / str(number)) for which in ("ours", "docker"))
        told += [f"{case}: {one}" for one in unequal(there, here)]
    exported = both.place / "exported.tar"
    both.docker.docker("export", "-o", exported, both.container)
    there = shapes(exported.read_bytes())
    both.ours("export", "-o", exported, "cc")
    here = shapes(exported.read_bytes())
    for one in unequal(there, here):
        number = int(one.replace(":", "/").partition("/")[0])
        if number not in failed:
            told.append(f"{cases[number]}: {one}")
    assert told == []
    assert both.ours("mounts").out.count("\n") <= 1


def unequal(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {there.get(name)} there, {here.get(name)} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]


def test_what_docker_refuses(both: Both) -> None:
    for number, case in enumerate(OTHER):
        assert both.status("docker", case, number), case
        assert both.status("ours", case, number), case


def test_tars_of_both_have_the_same_names(both: Both, tmp_path: Path) -> None:
    for path in ("0/dir", "0/dir/", "0/dir/.", "0/file", "0/todir", "0/todir/", "0/up/file"):
        there, here = tmp_path / "there", tmp_path / "here"
        env = {**os.environ, "DOCKER_HOST": both.docker.host, "DOCKER_CONFIG": str(both.place)}
        with there.open("wb") as out:
            words = ["docker", "cp", f"{both.container}:/{path}", "-"]
            subprocess.run(words, stdout=out, env=env, check=True)
        here.write_bytes(os.fsencode(both.ours("cp", f"cc:/{path}", "-").out))
        assert named(there) == named(here)


def named(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return sorted(map(clean, archive.getnames()))


def test_what_is_ours_alone(both: Both, tmp_path: Path) -> None:
    """Out of a container, -a keeps the owners; without it nothing runs as somebody else.

    And a link that leads out of what is copied is no reason to refuse it.
    """
    assert both.status("docker", "C:. new", 0) == 1
    assert both.status("ours", "C:. new", 0) == 0
    assert (both.place / "ours/0/new/up").is_symlink()
    both.ours("cp", "-a", "cc:/0/file", tmp_path / "kept")
    assert (tmp_path / "kept").stat().st_uid == 5
    (tmp_path / "suid").touch()
    os.chown(tmp_path / "suid", 5, 6)
    os.chmod(tmp_path / "suid", 0o6755)
    both.ours("cp", tmp_path / "suid", "cc:/0/suid")
    both.ours("cp", "cc:/0/suid", tmp_path / "mine")
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o755
    both.ours("cp", "-a", "cc:/0/suid", tmp_path / "theirs")
    assert stat.S_IMODE((tmp_path / "theirs").stat().st_mode) == 0o6755

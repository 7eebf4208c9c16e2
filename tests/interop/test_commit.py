"""``commit`` against ``docker commit``: the same changes give the same change set in the layer.

What is in ours beside is stated: the entry of the root, times below a second, and xattrs (docker
20.10 keeps the capability alone).
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from tests import changes
from tests.cli.conftest import Shell, reset
from tests.oracles.peers import RUN_OPTIONS, Dockerd

# Holes are written: a gigabyte for the one, a hundred megabytes for the other.
CASES = tuple(case for case in changes.CASES if case.name not in {"sparse", "zero-size-to-sparse"})
OPAQUE = ".wh..wh..opq"

Kind = Literal["file", "directory", "symlink", "char", "block", "fifo", "whiteout"]
_KINDS: dict[bytes, Kind] = {
    tarfile.REGTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "symlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.FIFOTYPE: "fifo",
}


class Change(NamedTuple):
    """What a layer's tar says of a path; of whiteouts the name alone counts."""

    kind: Kind
    mode: int = 0
    owner: tuple[int, int] = (0, 0)
    seconds: int = 0
    target: str = ""
    device: tuple[int, int] = (0, 0)
    sha256: str = ""
    opaque: bool = False
    links: tuple[str, ...] = ()
    """All names of the file, itself too, if it has several."""


def change_set(archive: Path) -> dict[str, Change]:
    """The last layer of a saved image, read by Python's tarfile."""
    with tarfile.open(archive) as outer:
        (listed,) = json.load(outer.extractfile("manifest.json") or pytest.fail("no manifest"))
        layer = outer.extractfile(listed["Layers"][-1])
        assert layer
        with tarfile.open(fileobj=layer, errors="surrogateescape") as tar:
            return _read(tar)


def _read(tar: tarfile.TarFile) -> dict[str, Change]:
    found: dict[str, Change] = {}
    first: dict[str, str] = {}
    for member in tar:
        name = member.name.removeprefix("./").rstrip("/")
        above, _, base = name.rpartition("/")
        if base == OPAQUE:
            found[above] = found[above]._replace(opaque=True)
        elif base.startswith(".wh."):
            found[f"{above}/{base[4:]}".lstrip("/")] = Change("whiteout")
        elif member.islnk():
            first[name] = member.linkname.removeprefix("./")
        elif name != ".":
            found[name] = _change(tar, member)
    names: dict[str, list[str]] = {}
    for name, target in first.items():
        names.setdefault(target, [target]).append(name)
    for target, group in names.items():
        whole = found[target]._replace(links=tuple(sorted(group)))
        found.update(dict.fromkeys(group, whole))
    return found


def _change(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Change:
    kind = _KINDS[tarfile.REGTYPE if member.isreg() else member.type]
    digest = ""
    if content := tar.extractfile(member) if member.isreg() else None:
        digest = hashlib.sha256(content.read()).hexdigest()
    return Change(
        kind,
        member.mode & 0o7777,
        (member.uid, member.gid),
        int(member.mtime // 1),
        member.linkname if member.issym() else "",
        (member.devmajor, member.devminor) if kind in {"char", "block"} else (0, 0),
        digest,
    )


@pytest.fixture(scope="module")
def image(dockerd: Dockerd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = changes.build(tmp_path_factory.mktemp("image"), CASES)
    dockerd.load(path)
    return path


@pytest.fixture(scope="module")
def theirs(dockerd: Dockerd, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What docker saves of a container that has done it all."""
    script = changes.everything(CASES)
    container = dockerd.docker("create", *RUN_OPTIONS, changes.NAME, "/bin/sh", "-c", script)
    dockerd.docker("start", "--attach", container)
    committed = dockerd.docker("commit", container)
    path = tmp_path_factory.mktemp("theirs") / "theirs.tar"
    dockerd.save(committed, path)
    dockerd.docker("rm", container)
    dockerd.docker("rmi", committed)
    return path


@pytest.fixture(scope="module")
def ours(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What overlayctl saves of one."""
    place = tmp_path_factory.mktemp("ours")
    run = Shell(str(place / "store"))
    try:
        run("load", image)
        run("create", "--name", "cc", changes.NAME)
        changes.run(run.path("mount", "cc"), CASES)
        run("unmount", "cc")
        run("save", "-o", place / "ours.tar", run("commit", "cc").out.strip())
    finally:
        reset(run.store)
    return place / "ours.tar"


@pytest.fixture(scope="module")
def both(theirs: Path, ours: Path) -> tuple[dict[str, Change], dict[str, Change]]:
    return change_set(theirs), change_set(ours)


def of(case: changes.Case, found: dict[str, Change]) -> dict[str, Change]:
    start = case.name + "/"
    return {name: change for name, change in found.items() if (name + "/").startswith(start)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_changes(
    case: changes.Case, both: tuple[dict[str, Change], dict[str, Change]]
) -> None:
    theirs, ours = (of(case, found) for found in both)
    assert without_now(ours) == without_now(theirs)


def without_now(found: dict[str, Change]) -> dict[str, Change]:
    """Times are compared where a script set them: the two containers lived at other times."""
    return {
        name: change if change.seconds < 1_500_000_000 else change._replace(seconds=0)
        for name, change in found.items()
    }


def test_nothing_else_is_in_them(both: tuple[dict[str, Change], dict[str, Change]]) -> None:
    for found in both:
        known = set().union(*(of(case, found) for case in CASES))
        assert set(found) - known == set()

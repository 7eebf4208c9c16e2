"""``import --whiteouts=overlay``: tars of upper directories become the layers they stand for."""

from __future__ import annotations

import gzip
import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Shell
from tests.cli.test_commit import change, loaded
from tests.layer.tars import directory, entry, tar
from tests.oracles import command, trees
from tests.rootmount import require

OPAQUE = {"trusted.overlay.opaque": "y"}


def null(name: str, **fields: Any) -> bytes:
    return entry(name, tarfile.CHRTYPE, devmajor=0, devminor=0, mode=0, **fields)


def files(run: Shell, layer: str) -> list[str]:
    return [" ".join(line.split()[5:]) for line in run("layer", "files", layer).out.splitlines()]


def test_an_upper_that_tar_has_packed(run: Shell, tmp_path: Path) -> None:
    """The image looks as the container does, and its layer is the one that commit makes."""
    require("tar")
    loaded(run, tmp_path)
    change(run)
    image, container = json.loads(run("inspect", "demo", "cc").out)
    base = Path(run.store, "layers", image["RootFS"]["Layers"][0][7:], "layer.erofs")
    assert base.exists()
    upper = container["GraphDriver"]["Data"]["UpperDir"]
    words = ("--xattrs", "--xattrs-include=*", "--acls", "--sort=name", "--format=pax")
    command.output("tar", *words, "-C", upper, "-cf", tmp_path / "upper.tar", ".")
    run("save", "-o", tmp_path / "demo.out", "demo")
    with tarfile.open(tmp_path / "demo.out") as archive:
        (listed,) = json.load(archive.extractfile("manifest.json") or pytest.fail("none"))
        content = archive.extractfile(listed["Layers"][0])
        assert content
        (tmp_path / "base.tar").write_bytes(content.read())
    for codec in ("none", "gzip", "pipe"):
        source: Path | str = tmp_path / "upper.tar"
        if codec == "gzip":
            source = tmp_path / "upper.tar.gz"
            source.write_bytes(gzip.compress((tmp_path / "upper.tar").read_bytes()))
        importing = ("import", "--whiteouts=overlay", "--quiet", str(tmp_path / "base.tar"))
        if codec == "pipe":
            with (tmp_path / "upper.tar").open("rb") as packed:
                program = [sys.executable, "-m", "overlayctl", "--root", run.store]
                with subprocess.Popen(["cat"], stdin=packed, stdout=subprocess.PIPE) as cat:
                    subprocess.run([*program, *importing, "-", f"raw:{codec}"],
                                   stdin=cat.stdout, check=True)  # fmt: skip
        else:
            run(*importing, source, f"raw:{codec}")
        assert os.listdir(Path(run.store, "ingest")) == []
    found = {json.loads(run("inspect", f"raw:{codec}").out)[0]["RootFS"]["Layers"][1]
             for codec in ("none", "gzip", "pipe")}  # fmt: skip
    assert len(found) == 1
    theirs = trees.snapshot(run.path("mount", "cc"))
    ours = trees.snapshot(run.path("image", "mount", "raw:none"))
    # GNU tar writes the ACL its own way, too, and drops the name of a user that is not there.
    assert trees.differences(theirs, ours) == []
    run("umount", "cc")
    run("umount", "raw:none")
    run("commit", "cc", "made")
    assert files(run, "raw:none:2") == files(run, "made:2")


def test_what_becomes_what(run: Shell, tmp_path: Path) -> None:
    base = tar(directory("./"), directory("d/"), entry("d/old"), entry("a"), entry("b"))
    upper = tar(
        directory("./", xattrs={"trusted.overlay.impure": "y", **OPAQUE}),
        null("./gone", mtime=5),
        entry("./too", tarfile.LNKTYPE, linkname="./gone"),
        directory("./d", xattrs={**OPAQUE, "trusted.overlay.origin": "x", "user.kept": "1"}),
        entry("./d/nested", xattrs={"trusted.overlay.overlay.opaque": "y"}),
        entry("./empty", xattrs={"trusted.overlay.whiteout": ""}),
        entry("./.wh.file", data=b"pretends"),
        entry("./full", data=b"1234"),
        entry("./chr", tarfile.CHRTYPE, devmajor=1, devminor=3),
    )
    (tmp_path / "base.tar").write_bytes(base)
    (tmp_path / "upper.tar").write_bytes(upper)
    paths = (tmp_path / "base.tar", tmp_path / "upper.tar")
    done = run("import", "--whiteouts=overlay", *paths, "t:1")
    assert "'.wh.file': left out" in done.err
    shown = files(run, "t:1:2")
    assert [name.partition(" ")[0] for name in shown] == [
        ".", "chr", "d", "d/nested", "empty", "full", "gone", "too",
    ]  # fmt: skip
    assert [name.partition(" ")[0] for name in shown if "whiteout" in name] == [
        "empty", "gone", "too",
    ]  # fmt: skip
    view = run.path("image", "mount", "t:1")
    assert sorted(os.listdir(view)) == ["a", "b", "chr", "d", "full"]
    assert os.listdir(view / "d") == ["nested"]
    assert os.getxattr(view / "d", "user.kept") == b"1"
    assert os.listxattr(view / "d/nested") == ["trusted.overlay.opaque"]
    assert stat.S_ISCHR((view / "chr").lstat().st_mode)
    run("umount", "t:1")


def test_refusals(run: Shell, tmp_path: Path) -> None:
    def imported(data: bytes, ok: int, *words: str) -> str:
        (tmp_path / "upper.tar").write_bytes(data)
        said = run("import", *words, tmp_path / "upper.tar", ok=ok).err
        assert os.listdir(Path(run.store, "ingest")) == []
        return said

    raw = "--whiteouts=overlay"
    assert "overlayctl import --whiteouts=overlay" in imported(tar(null("x")), 1)
    for name in ("redirect", "metacopy"):
        moved = tar(directory("d/", xattrs={f"trusted.overlay.{name}": "/e"}))
        assert "another program mounted it" in imported(moved, 1, raw)
    imported(tar(entry("x", data=b"1" * 5000))[:3000], 1, raw)
    assert "no end marker" in imported(entry("x", data=b"1" * 512), 0, raw)
    imported(b"no tar" * 1000, 1, raw)
    imported(tar(null("x")), 2, "--whiteouts=aufs")


def test_a_sparse_member_is_written_whole(run: Shell, tmp_path: Path) -> None:
    require("tar")
    (tmp_path / "u").mkdir()
    with (tmp_path / "u/holes").open("wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(b"middle")
    command.output(
        "tar", "--sparse", "--format=pax", "-C", tmp_path / "u", "-cf", tmp_path / "u.tar", "."
    )
    assert (tmp_path / "u.tar").stat().st_size < 1 << 20
    run("import", "--whiteouts=overlay", tmp_path / "u.tar", "t:1")
    view = run.path("image", "mount", "t:1")
    assert (view / "holes").read_bytes() == (tmp_path / "u/holes").read_bytes()
    run("umount", "t:1")

"""``system prune``: what nobody uses goes, what somebody uses stays, and who decides is asked."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from overlayctl.engine import Engine
from overlayctl.store import layers
from tests.archives import diff_id, docker_archive
from tests.cli.conftest import Shell
from tests.layer.tars import entry, tar
from tests.store import stores


def layer(name: str) -> bytes:
    return tar(entry(name, data=name.encode() * 3000))


def load(run: Shell, tmp_path: Path, letters: str, tag: str | None = None) -> None:
    tags = (tag,) if tag else ()
    run("load", docker_archive(tmp_path / "a.tar", [layer(x) for x in letters], tags=tags))


def stored(run: Shell) -> set[str]:
    """The letters of the stored layers."""
    names = {diff_id(layer(x)).removeprefix("sha256:"): x for x in "abcdef"}
    return {names[name] for name in layers.listed(Engine.open(run.store).layout)}


def orphan(run: Shell, letter: str) -> str:
    """A layer that a killed load left, attached."""
    engine = Engine.open(run.store)
    (name,) = stores.add_layers(engine.layout, layer(letter)).names
    return engine.layer_path(name)


def blocks(run: Shell) -> int:
    """The bytes that layer files and staging take."""
    files = [path for place in ("layers", "ingest") for path in Path(run.store, place).rglob("*")]
    return sum(path.lstat().st_blocks * 512 for path in files if not path.is_dir())


def test_what_nobody_uses_goes_and_the_rest_stays(run: Shell, tmp_path: Path) -> None:
    load(run, tmp_path, "ab", "used:1")
    run("create", "--name", "box", "used:1")
    load(run, tmp_path, "ac", "used:1")  # so ab has no name any more
    load(run, tmp_path, "ad")
    load(run, tmp_path, "ae")
    mounted = run("images", "-q", "--no-trunc").out.split()
    mounted = [image for image in mounted if "e" in _letters(run, image)]
    view = run.path("image", "mount", *mounted)
    path = orphan(run, "f")
    left = Path(run.store, "ingest", "left")
    left.mkdir()
    (left / "half").write_bytes(bytes(100_000))

    shown = run("system", "prune", "-n", sound=False)
    assert (stored(run), left.exists()) == (set("abcdef"), True)
    before = blocks(run)
    refused = run("system", "prune", ok=2, sound=False)
    assert "--yes" in refused.err
    done = run("--json", "system", "prune", "-f")
    told = _json(done.out)
    assert told["Freed"] == before - blocks(run) > 100_000
    assert shown.out.count("Would be deleted: image ") == len(told["Images"]) == 1
    assert shown.out.count("Would be deleted: layer ") == len(told["Layers"]) == 2
    assert shown.out.count("Would be deleted: staging left\n") == len(told["Staging"]) == 1
    assert (stored(run), left.exists(), os.path.lexists(path)) == (set("abce"), False, False)
    assert (view / "e").exists()

    told = _json(run("--json", "system", "prune", "-af").out)
    assert [image["RepoTags"] for image in told["Images"]] == [["used:1"]]
    assert stored(run) == set("abe")
    run("umount", view)
    assert (run.path("mount", "box") / "b").exists()
    assert stored(run) == set("abe")
    run("system", "prune", "--all", "--yes")
    assert stored(run) == set("ab")
    run("rm", "-f", "box")
    run("system", "prune", "-f")
    assert stored(run) == set()
    assert run("system", "prune", "-f").err == "freed 0B\n"


def _letters(run: Shell, image: str) -> set[str]:
    found = _json(run("inspect", image).out)[0]["RootFS"]["Layers"]
    return {x for x in "abcdef" if diff_id(layer(x)) in found}


def _json(text: str) -> Any:
    return json.loads(text)


@pytest.mark.parametrize(("answer", "left"), [("yes", "b"), ("no", "ab"), ("", "ab")])
def test_on_a_terminal_it_asks(run: Shell, tmp_path: Path, answer: str, left: str) -> None:
    load(run, tmp_path, "a")
    load(run, tmp_path, "b", "b:1")
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode() + b"\n")
    done = subprocess.run(
        [sys.executable, "-m", "overlayctl", "--root", run.store, "system", "prune"],
        stdin=theirs,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    os.close(ours)
    os.close(theirs)
    assert f"layer {diff_id(layer('a')).removeprefix('sha256:')} would go" in done.stderr
    assert ("Deleted: image" in done.stdout) == (answer == "yes")
    assert done.returncode == (0 if answer == "yes" else 1)
    assert stored(run) == set(left)


def test_only_what_was_shown_goes(run: Shell, tmp_path: Path) -> None:
    load(run, tmp_path, "a")
    engine = Engine.open(run.store)
    shown = engine.prune(everything=True, dry_run=True)
    load(run, tmp_path, "b")
    load(run, tmp_path, "ac", "c:1")
    done = engine.prune(everything=True, dry_run=False, agreed=shown)
    assert (done.images, done.layers) == (shown.images, ())
    assert stored(run) == set("abc")
    assert run.findings() == ""


def test_a_layer_that_somebody_works_in_stays_with_its_image(run: Shell, tmp_path: Path) -> None:
    load(run, tmp_path, "ab")
    load(run, tmp_path, "c")
    path = run.path("layer", "path", diff_id(layer("a")))
    lost = orphan(run, "d")
    with open(os.path.join(path, "a")), open(os.path.join(lost, "d")):
        done = run("system", "prune", "-f", sound=False)
        assert done.err.count(f"process {os.getpid()}") == 2
        assert stored(run) == set("abd")
        assert run.findings().startswith("layer-orphan: ")
    run("system", "prune", "-f")
    assert stored(run) == set()


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ("tags/*", "{"),
        ("images/*/image.json", "{"),
        ("snapshots/*/snapshot.json", "{"),
        ("containers/*.json", '{"version": 9}'),
    ],
)
def test_while_a_record_cannot_be_read_only_staging_goes(
    run: Shell, tmp_path: Path, record: str, text: str
) -> None:
    load(run, tmp_path, "a", "a:1")
    run("create", "--name", "box", "a:1")
    (path,) = Path(run.store).glob(record)
    load(run, tmp_path, "b")
    os.mkdir(f"{run.store}/ingest/left")
    whole = path.read_bytes()
    path.write_text(text)
    done = run("system", "prune", "-af", sound=False)
    assert "cannot be read" in done.err
    assert done.out == "Deleted: staging left\n"
    assert stored(run) == set("ab")
    path.write_bytes(whole)
    run("system", "prune", "-af")
    assert stored(run) == set("a")


@pytest.mark.parametrize("left", ["{", None])
def test_a_container_whose_record_is_lost_keeps_its_image(
    run: Shell, tmp_path: Path, left: str | None
) -> None:
    load(run, tmp_path, "ab", "ab:1")
    run("create", "--name", "box", "ab:1")
    (run.path("mount", "box") / "written").write_text("mine")
    run("umount", "box")
    load(run, tmp_path, "ac", "ac:1")
    (record,) = Path(run.store, "containers").glob("*.json")
    record.unlink()
    if left is not None:
        record.write_text(left)
    run("system", "prune", "-af", sound=False)
    assert stored(run) == set("ab")
    run("image", "exists", "ab:1", sound=False)
    run("rm", record.stem, sound=False)
    run("system", "prune", "-af")
    assert stored(run) == set()

"""Images in the shapes of many tools, loaded; and the names that they are given."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.archives import config, descriptor, diff_id, docker_archive, index, layout, manifest
from tests.cli.conftest import Shell
from tests.layer.tars import directory, entry, tar
from tests.oracles.layers import differences
from tests.writers import WRITERS, Written

LAYER = tar(entry("hello", data=b"hello\n"))


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_what_other_tools_write(
    write: Callable[[Path], Written], run: Shell, tmp_path: Path
) -> None:
    written = write(tmp_path)
    loaded = run("load", "--platform", f"linux/{written.platform}", written.path)
    listed = json.loads(run("images", "--json").out)
    assert len(listed) == len(written.images)
    names = [f"Loaded image: {name}" for name in written.names]
    assert loaded.out.splitlines() == (names or [f"Loaded image ID: {listed[0]['Id']}"])
    for number, layers in enumerate(written.images):
        reference = written.names[number] if written.names else listed[0]["Id"]
        (image,) = json.loads(run("image", "inspect", reference).out)
        assert image["Architecture"] == written.platform
        assert [layer["DiffID"] for layer in image["Layers"]] == [diff_id(x) for x in layers]
        for layer, data in zip(image["Layers"], layers, strict=True):
            path = tmp_path / "layer.tar"
            path.write_bytes(data)
            assert differences(path, layer["DiffPath"]) == []
        run("layer", "verify", f"{reference}:1")
    run("system", "check", "--deep")


def test_parents_that_kaniko_leaves_out_look_like_those_below(run: Shell, tmp_path: Path) -> None:
    run("load", WRITERS[0](tmp_path).path)
    for number in (1, 2, 3):
        info = (run.path("layer", "path", f"demo:kaniko:{number}") / "etc").stat()
        assert (info.st_mode & 0o7777, info.st_uid, info.st_gid) == (0o750, 5, 6)


def test_bazel_images_share_their_layer(run: Shell, tmp_path: Path) -> None:
    (written,) = (write(tmp_path) for write in WRITERS if write.__name__ == "bazel")
    run("load", written.path)
    assert len(json.loads(run("layer", "ls", "--json").out)) == 3


@pytest.mark.parametrize("wanted", ["arm64", "linux/aarch64", "linux/arm64/v8"])
def test_a_platform_has_several_spellings(wanted: str, run: Shell, tmp_path: Path) -> None:
    conf = config(LAYER, arch="arm64")
    listed = json.dumps([{"Config": "c", "RepoTags": ["demo:1"], "Layers": ["l"]}]).encode()
    archive = tmp_path / "a.tar"
    archive.write_bytes(
        tar(entry("manifest.json", data=listed), entry("c", data=conf), entry("l", data=LAYER))
    )
    refused = run("load", archive, "--platform", "linux/arm64/v7", ok=3).err
    assert "has no image for linux/arm64/v7: it has linux/arm64" in refused
    assert run("load", archive, "--platform", wanted).out == "Loaded image: demo:1\n"


def test_a_tar_that_begins_like_something_else(run: Shell, tmp_path: Path) -> None:
    layers = [tar(entry(name, data=b"1")) for name in ("hsqs", "LZIP", "{}", "PK\x03\x04")]
    run("load", docker_archive(tmp_path / "a.tar", layers))


@pytest.mark.parametrize(
    ("system", "arch", "note"),
    [
        ("linux", "s390x", ""),
        ("linux", "wasm", ""),
        ("windows", "amd64", "note: the image is for windows: its files can be looked at here"),
    ],
)
def test_images_for_other_machines(
    system: str, arch: str, note: str, run: Shell, tmp_path: Path
) -> None:
    layer = tar(
        directory("Files"),
        entry("Files/a.dll", data=b"1", pax={"MSWINDOWS.fileattr": "32"}),
        directory("Hives"),
        entry("Files/.wh.b.dll"),
    )
    conf = config(layer, arch=arch, system=system)
    body = manifest(conf, layer)
    run(
        "load",
        layout(tmp_path / "layout", index(descriptor(body, "")), body, conf, layer),
        "-t",
        "w",
    )
    told = run("load", tmp_path / "layout").err
    assert told.startswith(note) if note else told == ""
    (image,) = json.loads(run("image", "inspect", "w").out)
    assert (image["Os"], image["Architecture"]) == (system, arch)
    assert sorted(os.listdir(run.path("layer", "path", "w:1") / "Files")) == ["a.dll", "b.dll"]
    assert run("layer", "cat", "w:1", "Files/a.dll").out == "1"
    run("layer", "verify", "w:1")
    run("system", "check", "--deep")


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "shown", "note"),
    [
        (("demo:1",), ["demo:1"], ""),
        (("demo",), ["demo:latest"], ""),
        (("docker.io/library/demo:1",), ["demo:1"], ""),
        (("index.docker.io/library/demo:1",), ["demo:1"], ""),
        (("docker.io/me/demo:1", "me/demo:1"), ["me/demo:1"], ""),
        (("localhost/toy:3",), ["localhost/toy:3"], ""),
        (("localhost:5000/a/b:1", "a:2"), ["a:2", "localhost:5000/a/b:1"], ""),
        ((), [], ""),
        (("Upper:1", "good:1"), ["good:1"], "the name 'Upper:1' is left out"),
        (("demo@sha256:" + "0" * 64,), [], "it holds a digest"),
    ],
)
def test_names_in_docker_archives(
    tags: tuple[str, ...], shown: list[str], note: str, run: Shell, tmp_path: Path
) -> None:
    told = run("load", docker_archive(tmp_path / "a.tar", [LAYER], tags=tags))
    assert (note in told.err) if note else (told.err == "")
    _expect_names(run, shown)


@pytest.mark.parametrize(
    ("ref_name", "containerd", "shown", "note"),
    [
        ("localhost/toy:3", None, ["localhost/toy:3"], ""),
        ("docker.io/library/toy:1", None, ["toy:1"], ""),
        ("toy:1", None, ["toy:1"], ""),
        ("me/toy", None, ["me/toy:latest"], ""),
        ("1", "docker.io/library/toy:1", ["toy:1"], ""),
        ("latest", "localhost/toy:latest", ["localhost/toy:latest"], ""),
        ("1.0", None, [], "'1.0' is only a tag and names no image: overlayctl tag ID NAME does"),
        ("latest", None, [], "'latest' is only a tag"),
        (None, None, [], ""),
        ("a b", None, [], "'a b' is only a tag"),
        ("a/B:1", None, [], "the name 'a/B:1' is left out"),
    ],
)
def test_names_in_layouts(
    ref_name: str | None,
    containerd: str | None,
    shown: list[str],
    note: str,
    run: Shell,
    tmp_path: Path,
) -> None:
    notes = {
        "org.opencontainers.image.ref.name": ref_name,
        "io.containerd.image.name": containerd,
    }
    conf = config(LAYER)
    body = manifest(conf, LAYER)
    top = index(
        descriptor(body, "", annotations={key: value for key, value in notes.items() if value})
    )
    path = layout(tmp_path / "layout", top, body, conf, LAYER)
    told = run("load", path)
    assert (note in told.err) if note else (told.err == "")
    _expect_names(run, shown)
    run("load", path, "--tag", "mine")
    _expect_names(run, sorted([*shown, "mine:latest"]))


def _expect_names(run: Shell, names: list[str]) -> None:
    (image,) = json.loads(run("images", "--json").out)
    assert image["RepoTags"] == names
    lines = run("images", "--format", "{{.Repository}}:{{.Tag}}").out.split()
    assert sorted(lines) == (names or ["<none>:<none>"])

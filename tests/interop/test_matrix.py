"""What other tools write loads as what it is; docs/interop.md is the list of what is tried here.

``OVERLAYCTL_WRITE_DOCS=1`` writes the page anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from overlayctl.formats import read_images
from overlayctl.layer.archive import codec, head
from overlayctl.layer.compression import Source
from tests.cli.conftest import Shell
from tests.formats.test_images import opened
from tests.interop.views import TIME, view_of
from tests.interop.writers import DIR, DOCKER, HYBRID, OCI, OCI_TAR, WAYS, Way, Writers
from tests.oracles import command, trees

PAGE = Path(__file__).parents[2] / "docs" / "interop.md"

_TOP = """\
# Images of other tools

Each command below writes the same small image, and `overlayctl load OUT` loads it: under the id and
with the diff_ids that skopeo reads in `OUT`, under the names in the last column, and with a merged
view that is equal to what umoci unpacks. `tests/interop` runs the commands and compares; this page
is its list of them (`OVERLAYCTL_WRITE_DOCS=1` writes it anew).

`image.tar` is what docker saved, under two names; `ID` is the image's id. `by-buildah` has a last
layer that buildah committed, `bundle` one that umoci finds the changes for. `layers` is how they
are compressed inside.

"""
_HEAD = ("written by", "form", "layers", "image id", "loads as")
_END = """
An image's id is the digest of its config. Whoever makes an OCI image of a docker image writes
another config, so the id is another, too; the diff_ids stay.

What `docker export` writes is no image, which is said: `overlayctl import FILE NAME` makes one of
it. A manifest of docker's schema 1 (`skopeo copy --format v2s1`) is refused.

Docker's own directories on overlay2 are equal to the diff paths here, layer by layer, and what
`docker export`, `podman image mount` and `ctr images mount` show is equal to the merged view. What
differs is said there:

| | |
| --- | --- |
| the root | the others ignore its entry in a layer: its time is the load's, podman's is 0555 |
| whiteouts | docker's have the time of the load, here they have that of their entry |
| times before 1970 | the others make them 1970 |
| `trusted.overlay.origin` | empty here, where overlayfs wants one; in docker's the kernel's |
| a parent that a layer does not name | docker makes it 0755, root's; here it is as it is below |
| a hard link whose entry has another mode or owner | docker takes them; here the file's stay |
"""


class Config(NamedTuple):
    """What skopeo finds an image's config to be."""

    image_id: str
    diff_ids: list[str]


@pytest.mark.parametrize("way", WAYS, ids=[way.command for way in WAYS])
def test_what_is_written_loads(
    way: Way, writers: Writers, tree: dict[bytes, trees.Entry], run: Shell, tmp_path: Path
) -> None:
    written = writers.write(way.command, tmp_path / "out")
    assert form(written) == way.form
    assert codecs(written, tmp_path) == {way.codec}
    # Skopeo does not read every archive that is compressed as a whole.
    config = skopeo_reads(writers.archive if way.outside else written)
    loaded = run("load", written)
    names = [line.removeprefix("Loaded image: ") for line in loaded.out.splitlines()]
    if not way.names:
        assert names == [f"Loaded image ID: {config.image_id}"]
        assert run("images", "--format", "{{.Repository}}:{{.Tag}}").out == "<none>:<none>\n"
    else:
        assert sorted(names) == sorted(way.names)
    assert notes(loaded.err) == ([way.note] if way.note else [])
    (found,) = json.loads(run("inspect", config.image_id).out)
    assert found["RootFS"]["Layers"] == config.diff_ids
    assert (config.image_id == writers.docker_id) is way.same_id
    # Umoci, which made the tree, gives the root the time of what it wrote there last.
    times = dict.fromkeys((b"", *way.unnamed), TIME)
    seen = view_of(run, config.image_id)
    assert trees.differences(tree, seen, ignore_fields_of=times) == []


def test_the_page_lists_what_is_tried() -> None:
    rows = [_HEAD, ("---",) * len(_HEAD), *(row(way) for way in WAYS)]
    page = _TOP + "".join(f"| {' | '.join(cells)} |\n" for cells in rows) + _END
    if os.environ.get("OVERLAYCTL_WRITE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "OVERLAYCTL_WRITE_DOCS=1 writes docs/interop.md anew"


@pytest.mark.parametrize(
    ("writer", "name"),
    [
        ("docker save interop:four", "interop:four"),
        ("podman save interop:four", "localhost/interop:four"),
        ("podman save --format oci-archive interop:four", "localhost/interop:four"),
        ("skopeo copy docker-archive:image.tar:interop:four docker-archive:OUT:a:1", "a:1"),
    ],
)
def test_a_pipe_from_the_writer(writer: str, name: str, writers: Writers, run: Shell) -> None:
    load = [sys.executable, "-m", "overlayctl", "--root", run.store, "load"]
    with writers.start(writer) as source:
        done = subprocess.run(
            load, stdin=source.stdout, capture_output=True, text=True, check=False
        )
    assert source.returncode == 0
    assert (done.returncode, notes(done.stderr)) == (0, [])
    assert done.stdout == f"Loaded image: {name}\n"


def notes(said: str) -> list[str]:
    """What a load said, but for what it counted in the layers (``3 x setuid file``)."""
    every = [line.removeprefix("note: ") for line in said.splitlines()]
    return [note for note in every if not re.match("[0-9]+ x ", note)]


def row(way: Way) -> tuple[str, ...]:
    """The cells of the page for ``way``."""
    names = ", ".join(f"`{name}`" for name in way.names) or "`<none>`"
    if way.note:
        names += "; told: " + way.note
    return f"`{way.command}`", way.form, way.codec, "docker's" if way.same_id else "its own", names


def test_a_manifest_of_schema_1_is_refused(writers: Writers, run: Shell, tmp_path: Path) -> None:
    line = "skopeo copy --format v2s1 docker-archive:image.tar:interop:four dir:OUT"
    refused = run("load", writers.write(line, tmp_path / "out"), ok=1)
    assert "docker's schema 1" in refused.err


def skopeo_reads(written: Path) -> Config:
    """The image's id and its layers, according to skopeo."""
    transport = {DIR: "dir", OCI: "oci", OCI_TAR: "oci-archive"}.get(
        form(written), "docker-archive"
    )
    inspect = ("skopeo", "--insecure-policy", "inspect", "--raw", "--config")
    config = command.output(*inspect, f"{transport}:{written}").encode()
    digest = hashlib.sha256(config).hexdigest()
    return Config(f"sha256:{digest}", json.loads(config)["rootfs"]["diff_ids"])


def codecs(written: Path, tmp_path: Path) -> set[str]:
    """How the layers at ``written`` are compressed."""
    outer = outside(written)
    if outer != "none":
        with (tmp_path / "plain").open("wb") as plain:
            subprocess.run([outer, "-dc", written], stdout=plain, check=True)
        written = tmp_path / "plain"
    with opened(written) as archive:
        (image,) = read_images(archive)
        sources = [layer.source for layer in image.layers]
        return {codec(head(source)) for source in sources if isinstance(source, Source)}


def outside(written: Path) -> str:
    """How an archive as a whole is compressed."""
    if written.is_dir():
        return "none"
    with written.open("rb") as file:
        return codec(file.read(16))


def form(written: Path) -> str:
    """What kind of image lies at ``written``, in the page's words."""
    with opened(written) as archive:
        listed = archive.exists("manifest.json")
        layout = archive.exists("oci-layout")
        versioned = archive.exists("version") and listed
    if versioned and written.is_dir():
        return DIR
    if layout:
        return OCI if written.is_dir() else HYBRID if listed else OCI_TAR
    outer = outside(written)
    return DOCKER + (f", {outer}" if outer != "none" else "")

"""An image that was committed and saved here, in others' hands; and theirs, saved unchanged."""

from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from overlayctl.names import stored
from tests.cli.conftest import Shell, reset
from tests.interop import small
from tests.interop.peers import Containerd, Podman
from tests.interop.test_docker import PUT_BY_DOCKER, as_exported, docker_export
from tests.interop.views import TIME, Tree, before_1970, view_of
from tests.oracles import command, merged, trees
from tests.oracles.peers import Dockerd
from tests.rootmount import require

NAME = "interop:made"
WHOLE = f"docker.io/library/{NAME}"
RUN = ("run", "--rm", "--network", "none", "--security-opt", "seccomp=unconfined")
SKOPEO = ("skopeo", "--insecure-policy", "copy", "--quiet")
ONE_OF_ALL = f"{small.LAYER_4}\nchmod 600 /data/one; echo '#!/bin/sh' > /data/run\n"


class Made(NamedTuple):
    """An image that was committed here."""

    run: Shell
    id: str
    config: bytes
    diff_ids: list[str]
    tree: Tree

    def save(self, place: Path, form: str, codec: str = "none") -> Path:
        """The image, written in that way."""
        out = place / f"{form}.{codec}"
        self.run("save", "--format", form, "--compress", codec, "-o", out, NAME)
        return out


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """What was done in the container is what other tools do in their tests."""
    place = str(tmp_path_factory.mktemp("made") / "store")
    run = Shell(place)
    try:
        run("load", base)
        run("create", "--name", "cc", "-e", "FROM=here", small.BASE, "sh", "-c", "cat /etc/conf")
        root = run.path("mount", "cc")
        command.output("chroot", root, "/bin/sh", "-ec", ONE_OF_ALL)
        run("commit", "-c", "LABEL by=overlayctl", "cc", NAME)
        run("umount", "cc")
        (image,) = json.loads(run("inspect", NAME).out)
        config = Path(place, "images", image["Id"].removeprefix("sha256:"), "config.json")
        tree = before_1970(view_of(run, NAME))
        # Each test has a mount namespace of its own.
        run("umount", NAME)
        run("layer", "detach", "--all")
        yield Made(run, image["Id"], config.read_bytes(), image["RootFS"]["Layers"], tree)
    finally:
        reset(place)


@pytest.mark.parametrize("codec", ["none", "gzip"])
def test_docker_runs_it(made: Made, dockerd: Dockerd, tmp_path: Path, codec: str) -> None:
    dockerd.load(made.save(tmp_path, "docker-archive", codec))
    try:
        assert dockerd.docker("inspect", "--format", "{{.Id}}", NAME) == made.id
        assert dockerd.docker(*RUN, NAME) == "one\nchanged"
        assert dockerd.docker(*RUN, NAME, "sh", "-c", "echo $FROM") == "here"
        exported = trees.snapshot(docker_export(dockerd, NAME, tmp_path))
    finally:
        dockerd.docker("rmi", NAME)
    problems = trees.differences(
        as_exported(made.tree),
        exported,
        ignore_paths=PUT_BY_DOCKER,
        ignore_fields_of={b"": TIME, b"etc": TIME},
    )
    assert problems == []


@pytest.mark.parametrize(
    ("form", "codec"),
    [("docker-archive", "none"), ("oci-archive", "none"), ("oci-archive", "zstd")],
)
def test_podman_runs_it(made: Made, podman: Podman, tmp_path: Path, form: str, codec: str) -> None:
    podman.podman("load", "--quiet", "--input", made.save(tmp_path, form, codec))
    try:
        assert podman.podman("inspect", "--format", "{{.Id}}", NAME) == made.id.split(":")[1]
        assert podman.podman(*RUN, NAME) == "one\nchanged"
        theirs = trees.snapshot(podman.podman("image", "mount", NAME))
        podman.podman("image", "umount", NAME)
    finally:
        podman.podman("rmi", "--force", NAME)
    # Podman ignores the entry of the root in a layer.
    of_root = {b"": (*TIME, "mode")}
    assert trees.differences(made.tree, theirs, ignore_fields_of=of_root) == []


@pytest.mark.parametrize(
    ("form", "codec"),
    [("docker-archive", "none"), ("oci-archive", "gzip"), ("oci-archive", "zstd")],
)
def test_containerd_imports_it(
    made: Made, containerd: Containerd, tmp_path: Path, form: str, codec: str
) -> None:
    containerd.ctr("images", "import", made.save(tmp_path, form, codec))
    place = tmp_path / "mounted"
    place.mkdir()
    try:
        assert WHOLE in containerd.ctr("images", "ls", "--quiet").split()
        containerd.ctr("images", "mount", WHOLE, place)
        theirs = trees.snapshot(place)
    finally:
        containerd.ctr("images", "unmount", "--rm", place)
        containerd.ctr("images", "rm", "--sync", WHOLE)
    assert trees.differences(made.tree, theirs, ignore_fields_of={b"": TIME}) == []


@pytest.mark.parametrize("tool", ["docker", "podman", "ctr"])
def test_several_images_in_one_archive(
    made: Made, request: pytest.FixtureRequest, tmp_path: Path, tool: str
) -> None:
    """Each with its names."""
    out = tmp_path / "both"
    made.run("tag", NAME, "registry.test:5000/team/made:1")
    made.run("save", "-o", out, NAME, "registry.test:5000/team/made:1", small.BASE)
    made.run("rmi", "registry.test:5000/team/made:1")
    names = {NAME, "registry.test:5000/team/made:1", small.BASE}
    if tool == "docker":
        dockerd: Dockerd = request.getfixturevalue("dockerd")
        said = dockerd.docker("load", "--input", out)
        assert {line.removeprefix("Loaded image: ") for line in said.splitlines()} == names
        dockerd.docker("rmi", *names - {small.BASE})
    elif tool == "podman":
        podman: Podman = request.getfixturevalue("podman")
        said = podman.podman("load", "--quiet", "--input", out)
        loaded = {line.removeprefix("Loaded image: ") for line in said.splitlines()}
        assert loaded == set(map(stored, names))
        podman.podman("rmi", "--force", *loaded - {f"docker.io/{small.BASE}"})
    else:
        containerd: Containerd = request.getfixturevalue("containerd")
        containerd.ctr("images", "import", out)
        there = set(containerd.ctr("images", "ls", "--quiet").split())
        assert {stored(name) for name in names} <= there
        containerd.ctr("images", "rm", "--sync", *map(stored, names))


@pytest.mark.parametrize("codec", ["none", "gzip", "zstd"])
@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci-dir"])
def test_skopeo_copies_it(made: Made, tmp_path: Path, form: str, codec: str) -> None:
    """By name, and as it is; its config says the same as ours, to the byte."""
    require("skopeo")
    written = made.save(tmp_path, form, codec)
    kind = {"oci-dir": "oci"}.get(form, form)
    name = WHOLE if kind != "docker-archive" else NAME
    inspect = ("skopeo", "--insecure-policy", "inspect", "--raw", "--config")
    assert command.output(*inspect, f"{kind}:{written}:{name}").encode() == made.config
    command.output(*SKOPEO, f"{kind}:{written}:{name}", f"dir:{tmp_path}/dir")
    other = Shell(str(tmp_path / "store"))
    try:
        other("load", tmp_path / "dir")
        (image,) = json.loads(other("images", "--json").out)
        # Skopeo writes the manifest that belongs to the form, and never another config.
        assert image["Id"] == made.id
    finally:
        reset(other.store)


@pytest.mark.parametrize("codec", ["none", "gzip"])
def test_umoci_unpacks_it(made: Made, tmp_path: Path, codec: str) -> None:
    require("umoci")
    layout = made.save(tmp_path, "oci-dir", codec)
    command.output("umoci", "unpack", "--image", f"{layout}:{WHOLE}", tmp_path / "bundle")
    theirs = trees.snapshot(tmp_path / "bundle/rootfs")
    # Umoci gives the root the time of what it wrote there last.
    assert trees.differences(made.tree, theirs, ignore_fields_of={b"": TIME}) == []
    runtime = json.loads((tmp_path / "bundle/config.json").read_text())
    assert runtime["process"]["args"] == ["sh", "-c", "cat /etc/conf"]


def test_what_docker_saved_is_saved_as_it_was(path: Path, run: Shell, tmp_path: Path) -> None:
    run("load", path)
    names = [one["Id"] for one in json.loads(run("images", "--json").out)]
    run("save", "-o", tmp_path / "out", *names)
    theirs, ours = saved(merged.plain(path, tmp_path)), saved(tmp_path / "out")
    assert ours == theirs


def saved(path: Path) -> list[tuple[str, list[str]]]:
    """The digests of each image's config and uncompressed layers, read by tarfile."""
    with tarfile.open(path) as archive:
        listed = json.loads(content(archive, "manifest.json"))
        return sorted(
            (
                sha256(content(archive, one["Config"])),
                [sha256(uncompressed(content(archive, layer))) for layer in one["Layers"]],
            )
            for one in listed
        )


def content(archive: tarfile.TarFile, name: str) -> bytes:
    # Older dockers save a layer once, and link to it.
    member = archive.getmember(name)
    while member.issym():
        parts: list[str] = []
        for part in f"{name.rpartition('/')[0]}/{member.linkname}".split("/"):
            parts = parts[:-1] if part == ".." else [*parts, part]
        name = "/".join(parts)
        member = archive.getmember(name)
    file = archive.extractfile(member)
    assert file
    return file.read()


def uncompressed(data: bytes) -> bytes:
    return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_config_is_what_docker_makes_of_it(
    base: Path, dockerd: Dockerd, run: Shell, tmp_path: Path
) -> None:
    """Of a container with everything that can be said of one, and changes at the commit."""
    words = [
        *[
            "-e",
            "A=1",
            "-e",
            "PATH=/bin",
            "-u",
            "5:6",
            "-w",
            "/srv",
            "--entrypoint",
            "/bin/sh",
            "-l",
        ],
        "l=two words",
    ]
    script = ("-c", "true")
    lines = ('ENV B="2 3" C=$A', "EXPOSE 80 90/udp", "VOLUME /v", 'CMD ["x"]', "LABEL k=v l=three")
    said = ["-m", "the message", "-a", "Jo <jo@doe.org>"]
    said += [word for line in lines for word in ("-c", line)]
    dockerd.load(base)
    container = dockerd.docker("create", *words, small.BASE, *script)
    theirs = dockerd.docker("commit", *said, container)
    dockerd.docker("rm", container)
    dockerd.save(theirs, tmp_path / "theirs.tar")
    dockerd.docker("rmi", theirs)
    run("load", base)
    run("create", "--name", "cc", *words, small.BASE, *script)
    ours = run("commit", *said, "cc").out.strip()
    run("save", "-o", tmp_path / "ours.tar", ours)
    one, other = as_said(tmp_path / "theirs.tar"), as_said(tmp_path / "ours.tar")
    assert one == other


# Docker's record of its container, which OCI's config has not.
_DOCKERS = {"container", "container_config", "docker_version"}
_OF_A_PROCESS = {"Hostname", "Domainname", "AttachStdin", "AttachStdout", "AttachStderr", "Tty",
                 "OpenStdin", "StdinOnce", "Image"}  # fmt: skip


def as_said(path: Path) -> dict[str, Any]:
    """An image's config without times, what is empty, and what docker alone says."""
    with tarfile.open(path) as archive:
        (listed,) = json.loads(content(archive, "manifest.json"))
        config: dict[str, Any] = json.loads(content(archive, listed["Config"]))
    inner = {k: v for k, v in config["config"].items() if v and k not in _OF_A_PROCESS}
    inner["Env"] = sorted(inner["Env"])
    history = [{k: v for k, v in row.items() if k != "created"} for row in config["history"]]
    outer = {k: v for k, v in config.items() if k not in _DOCKERS and k != "created"}
    return {**outer, "config": inner, "history": history}

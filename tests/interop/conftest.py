"""One small image and the programs that write it, made once a session."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Shell, reset
from tests.interop import small
from tests.interop.peers import Containerd, Podman
from tests.interop.writers import Writers
from tests.oracles import merged, trees
from tests.oracles.peers import Dockerd
from tests.rootmount import require

IMAGES = (
    "image.tar",
    "fanal/alpine-310.tar.gz",
    "misc/busybox-2018.tar",
    "dive/test-docker-image.tar",
    "dive/test-kaniko-image.tar",
    pytest.param("debian", marks=pytest.mark.long),
)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Shell]:
    """Commands on a store of the test's own."""
    place = str(tmp_path / "store")
    yield Shell(place)
    reset(place)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the session's image and stores are."""
    directory = tmp_path_factory.mktemp("interop")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def dockerd(place: Path) -> Iterator[Dockerd]:
    """A docker daemon that has the image."""
    require("dockerd", "docker", "runc", "busybox")
    with Dockerd(place) as daemon:
        small.build(daemon, place)
        yield daemon


@pytest.fixture(scope="session")
def archive(dockerd: Dockerd, place: Path) -> Path:
    """The image, saved by docker with both its names."""
    path = place / "image.tar"
    dockerd.docker("save", "--output", path, small.NAME, small.OTHER_NAME)
    return path


@pytest.fixture(scope="session")
def base(dockerd: Dockerd, place: Path) -> Path:
    """The image without its last layer, saved by docker."""
    path = place / "base.tar"
    dockerd.save(small.BASE, path)
    return path


@pytest.fixture(scope="session")
def podman(archive: Path, base: Path, place: Path) -> Podman:
    """Podman and buildah with the image, and another whose last layer is buildah's own."""
    require("podman", "buildah", "runc")
    home = place / "podman"
    home.mkdir()
    podman = Podman(home)
    for path in (archive, base):
        podman.podman("load", "--quiet", "--input", path)
    podman.commit_layer(small.BASE, small.LAYER_4, small.BUILDAH_NAME)
    return podman


@pytest.fixture(scope="session")
def containerd(archive: Path, place: Path) -> Iterator[Containerd]:
    """A containerd that has the image."""
    require("containerd", "ctr", "runc")
    home = place / "containerd"
    home.mkdir()
    with Containerd(home) as daemon:
        daemon.ctr("images", "import", archive)
        yield daemon


@pytest.fixture(scope="session")
def tree(archive: Path, place: Path) -> dict[bytes, trees.Entry]:
    """What the image looks like, its layers put together by umoci."""
    require("umoci", "skopeo")
    unpacked = merged.umoci_unpack(archive, place / "unpacked", tag=small.NAME)
    return trees.snapshot(unpacked)


@pytest.fixture(params=IMAGES)
def path(request: pytest.FixtureRequest) -> Path:
    """A docker-archive: the small image, Debian, or one that somebody else made."""
    match request.param:
        case "image.tar":
            found: Path = request.getfixturevalue("archive")
        case "debian":
            found = request.getfixturevalue("debian_image").docker_archive
        case name:
            found = request.getfixturevalue("image")(name)
    return found


@pytest.fixture
def writers(request: pytest.FixtureRequest) -> Writers:
    """Runs the commands that write the image."""
    return Writers(request)

"""A pytest plugin: what takes long to make is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.oracles import debian, peers
from tests.rootmount import require


@pytest.fixture(scope="session")
def kept() -> Path:
    """Where images that take long to build are kept between runs."""
    place = Path(os.environ.get("XDG_CACHE_HOME", "/var/tmp")) / "overlayctl-tests"
    place.mkdir(parents=True, exist_ok=True)
    return place


@pytest.fixture(scope="session")
def debian_image(kept: Path) -> debian.DebianImage:
    """A real Debian of four layers, built the first time."""
    require("dockerd", "docker", "skopeo", "umoci", "mmdebstrap", "zstd")
    found = debian.find(kept)
    if found is None:
        with peers.Dockerd() as dockerd:
            found = debian.build(kept, dockerd)
    return found

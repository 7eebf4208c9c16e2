"""Every way in which a tool here writes an image, as the command that a person types."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from tests.interop import small
from tests.interop.peers import Containerd, Podman
from tests.oracles import command
from tests.oracles.peers import Dockerd
from tests.rootmount import require

Codec = Literal["none", "gzip", "zstd"]

BOTH = (small.NAME, small.OTHER_NAME)
LOCAL = (f"localhost/{small.NAME}",)
BUILDAH = (small.BUILDAH_NAME,)


class Way(NamedTuple):
    """A command that writes the image, and what has to come of it.

    In the command ``image.tar`` is what docker has saved, ``ID`` the image's id there, ``OUT`` what
    the command writes.
    """

    command: str
    form: str
    codec: Codec
    """How the layers are compressed inside."""
    names: tuple[str, ...] = ()
    """The references that the loaded image has, as a person sees them."""
    note: str = ""
    """What a load says beside."""
    unnamed: tuple[bytes, ...] = ()
    """Directories that a layer holds something of and not themselves: their time is not kept."""

    @property
    def same_id(self) -> bool:
        """Whether the image has the id that docker gave it: another config has another."""
        made = "by-buildah" in self.command or "bundle" in self.command
        converted = self.form in (OCI, OCI_TAR) or "--format oci" in self.command
        return not made and not converted

    @property
    def outside(self) -> bool:
        """Whether a whole archive is compressed."""
        return " < " in self.command


DOCKER = "docker-archive"
OCI = "OCI layout"
OCI_TAR = "OCI layout, tar"
HYBRID = "OCI layout and docker-archive, tar"
DIR = "dir"
_BARE = "'four' is only a tag and names no image: overlayctl tag ID NAME does"

WAYS = (
    Way(
        "docker save -o OUT interop:four registry.test:5000/team/interop:four",
        DOCKER, "none", BOTH,
    ),
    Way("docker save -o OUT interop:four", DOCKER, "none", BOTH[:1]),
    Way("docker save -o OUT ID", DOCKER, "none"),
    Way("gzip < image.tar > OUT", f"{DOCKER}, gzip", "none", BOTH),
    Way("zstd < image.tar > OUT", f"{DOCKER}, zstd", "none", BOTH),
    Way("xz -1 < image.tar > OUT", f"{DOCKER}, xz", "none", BOTH),
    Way("bzip2 < image.tar > OUT", f"{DOCKER}, bzip2", "none", BOTH),
    Way("podman save --format docker-archive -o OUT interop:four", DOCKER, "none", LOCAL),
    Way("podman save --format oci-archive -o OUT interop:four", OCI_TAR, "gzip", LOCAL),
    Way("podman save --format oci-dir -o OUT interop:four", OCI, "gzip", LOCAL),
    Way("podman save --format docker-dir -o OUT interop:four", DIR, "none"),
    Way(
        "buildah push interop:four docker-archive:OUT:interop:four",
        DOCKER, "none", BOTH[:1] + LOCAL,
    ),
    Way("buildah push interop:four oci-archive:OUT:interop:four", OCI_TAR, "gzip", BOTH[:1]),
    Way("buildah push interop:four oci:OUT:four", OCI, "gzip", (), _BARE),
    Way("buildah push interop:four dir:OUT", DIR, "gzip"),
    Way(
        "buildah push by-buildah:four docker-archive:OUT:localhost/by-buildah:four",
        DOCKER, "none", BUILDAH,
    ),
    Way(
        "buildah push by-buildah:four oci-archive:OUT:localhost/by-buildah:four",
        OCI_TAR, "gzip", BUILDAH,
    ),
    Way("skopeo copy docker-archive:image.tar:interop:four docker-archive:OUT", DOCKER, "none"),
    Way(
        "skopeo copy docker-archive:image.tar:interop:four docker-archive:OUT:interop:four",
        DOCKER, "none", BOTH[:1],
    ),
    Way("skopeo copy docker-archive:image.tar:interop:four oci:OUT", OCI, "gzip"),
    Way("skopeo copy docker-archive:image.tar:interop:four oci:OUT:four", OCI, "gzip", (), _BARE),
    Way(
        "skopeo copy docker-archive:image.tar:interop:four "
        "oci:OUT:registry.test:5000/team/interop:four",
        OCI, "gzip", BOTH[1:],
    ),
    Way(
        "skopeo copy --dest-compress-format zstd docker-archive:image.tar:interop:four oci:OUT",
        OCI, "zstd",
    ),
    Way(
        "skopeo copy --dest-oci-accept-uncompressed-layers docker-archive:image.tar:interop:four "
        "oci:OUT",
        OCI, "none",
    ),
    Way(
        "skopeo copy docker-archive:image.tar:interop:four oci-archive:OUT:interop:four",
        OCI_TAR, "gzip", BOTH[:1],
    ),
    Way(
        "skopeo copy --dest-compress-format zstd docker-archive:image.tar:interop:four "
        "oci-archive:OUT:docker.io/library/interop:four",
        OCI_TAR, "zstd", BOTH[:1],
    ),
    Way("skopeo copy docker-archive:image.tar:interop:four dir:OUT", DIR, "none"),
    Way("skopeo copy --dest-compress docker-archive:image.tar:interop:four dir:OUT", DIR, "gzip"),
    Way(
        "skopeo copy --format oci --dest-compress --dest-compress-format zstd "
        "docker-archive:image.tar:interop:four dir:OUT",
        DIR, "zstd",
    ),
    # Umoci leaves out a directory whose own attributes are the same as before.
    Way(
        "umoci repack --image OUT:four bundle",
        OCI, "gzip", (), _BARE, (b"srv/opaque",),
    ),
    Way("ctr images export OUT docker.io/library/interop:four", HYBRID, "none", BOTH[:1]),
    Way(
        "ctr images export OUT docker.io/library/interop:four registry.test:5000/team/interop:four",
        HYBRID, "none", BOTH,
    ),
)  # fmt: skip


class Writers:
    """Runs the commands of ``WAYS``. Each program comes to life when it is first needed."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request

    @property
    def docker_id(self) -> str:
        """The id that docker has given the image."""
        return self._dockerd().docker("inspect", "--format", "{{.Id}}", small.NAME)

    @property
    def archive(self) -> Path:
        """What docker has saved."""
        path: Path = self._request.getfixturevalue("archive")
        return path

    def write(self, line: str, out: Path) -> Path:
        """Run a command that writes to ``out``, and return that."""
        if line.startswith("umoci repack"):
            self._unpack(out)
        argv, env = self._command(line, out)
        command.output(*argv, env=env, cwd=out.parent)
        return out

    def start(self, line: str) -> subprocess.Popen[bytes]:
        """Start a command that writes the image to a pipe, its stdout."""
        argv, env = self._command(line, Path("/dev/stdout"))
        return subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, **env})

    def _command(self, line: str, out: Path) -> tuple[list[command.Argument], dict[str, str]]:
        """The real words of a command, and what to add to the environment."""
        places = {"OUT": str(out), "image.tar": str(self.archive), "ID": self.docker_id}
        if " < " in line:
            require(line.split(maxsplit=1)[0])
            shell = " ".join(places.get(word, word) for word in line.split())
            return ["/bin/sh", "-ec", shell], {}
        tool, *words = [
            ":".join(places.get(part, part) for part in word.split(":")) for word in line.split()
        ]
        require(tool)
        match tool:
            case "docker":
                env = {"DOCKER_HOST": self._dockerd().host, "DOCKER_CONTEXT": ""}
                return ["docker", *words], env
            case "podman" | "buildah":
                podman: Podman = self._request.getfixturevalue("podman")
                return podman.argv(tool, words[0], "--quiet", *words[1:]), podman.env
            case "ctr":
                containerd: Containerd = self._request.getfixturevalue("containerd")
                return containerd.argv(*words), {}
            case "skopeo":
                # A fresh machine has no containers-policy.json(5).
                return [tool, "--insecure-policy", words[0], "--quiet", *words[1:]], {}
            case _:
                return [tool, *words], {}

    def _unpack(self, out: Path) -> None:
        """Let umoci unpack the base and run the last layer's script in there."""
        require("umoci", "skopeo")
        base = self._request.getfixturevalue("base")
        copy = ("skopeo", "--insecure-policy", "copy", "--quiet")
        command.output(*copy, f"docker-archive:{base}", f"oci:{out}:four")
        bundle = out.with_name("bundle")
        command.output("umoci", "unpack", "--image", f"{out}:four", bundle)
        command.output("chroot", bundle / "rootfs", "/bin/sh", "-ec", small.LAYER_4)

    def _dockerd(self) -> Dockerd:
        dockerd: Dockerd = self._request.getfixturevalue("dockerd")
        return dockerd

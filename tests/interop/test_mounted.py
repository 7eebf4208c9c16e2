"""The merged view against what podman and containerd mount of the same image."""

from __future__ import annotations

from pathlib import Path

from overlayctl import names
from tests.cli.conftest import Shell
from tests.interop.peers import Containerd, Podman
from tests.interop.views import TIME, before_1970, loaded, view_of
from tests.oracles import merged, trees

# Both ignore the entry of the root in a layer; podman's roots are 0555.
OF_ROOT: dict[bytes, tuple[trees.Field, ...]] = {b"": TIME}
OF_PODMANS_ROOT: dict[bytes, tuple[trees.Field, ...]] = {b"": (*TIME, "mode")}


def test_podman(path: Path, podman: Podman, run: Shell, tmp_path: Path) -> None:
    image = loaded(run, path)
    podman.podman("load", "--quiet", "--input", merged.plain(path, tmp_path))
    mounted = podman.podman("image", "mount", image["Id"])
    try:
        theirs = trees.snapshot(mounted)
    finally:
        podman.podman("image", "umount", image["Id"])
    ours = before_1970(view_of(run, image["Id"]))
    assert trees.differences(ours, theirs, ignore_fields_of=OF_PODMANS_ROOT) == []


def test_containerd(path: Path, containerd: Containerd, run: Shell, tmp_path: Path) -> None:
    image = loaded(run, path)
    containerd.ctr("images", "import", merged.plain(path, tmp_path))
    place = tmp_path / "mounted"
    place.mkdir()
    containerd.ctr("images", "mount", names.stored(image["RepoTags"][0]), place)
    try:
        theirs = trees.snapshot(place)
    finally:
        containerd.ctr("images", "unmount", "--rm", place)
    ours = before_1970(view_of(run, image["Id"]))
    assert trees.differences(ours, theirs, ignore_fields_of=OF_ROOT) == []

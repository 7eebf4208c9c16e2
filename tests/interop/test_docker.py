"""Each layer and each merged view against docker's own, on its overlay2, and against umoci's."""

from __future__ import annotations

import json
from pathlib import Path

from tests.archives import docker_archive
from tests.cli.conftest import Shell
from tests.interop.views import OWN, TIME, Tree, before_1970, loaded, view_of
from tests.layer.tars import directory, entry, hardlink, tar
from tests.oracles import gnutar, merged, trees
from tests.oracles.peers import Dockerd
from tests.rootmount import missing

# The kernel's notes in a directory that was a mount's upper: docker mounts a top layer to save it.
OF_AN_UPPER = (b"trusted.overlay.origin", b"trusted.overlay.impure", b"trusted.overlay.uuid")

# What docker puts into every container, an exported one included.
PUT_BY_DOCKER = frozenset(
    (
        *(b".dockerenv", b"dev", b"dev/console", b"dev/pts", b"dev/shm", b"proc", b"sys"),
        *(b"etc/hostname", b"etc/hosts", b"etc/mtab", b"etc/resolv.conf"),
    )
)


def test_each_layer_and_the_whole(path: Path, dockerd: Dockerd, run: Shell, tmp_path: Path) -> None:
    dockerd.load(path)
    image = loaded(run, path)
    places = overlay2(dockerd, image["Id"])
    for place, layer in zip(places, image["Layers"], strict=True):
        theirs = trees.snapshot(place, ignore=OF_AN_UPPER)
        ours = trees.snapshot(layer["DiffPath"], ignore=OWN)
        # The time of a whiteout: docker's is that of the load. And it ignores the entry
        # of the root in a layer.
        times = dict.fromkeys((b"", *filter(lambda name: is_whiteout(ours[name]), ours)), TIME)
        assert trees.differences(before_1970(ours), theirs, ignore_fields_of=times) == [], place
    view = view_of(run, image["Id"])
    unpacked = trees.snapshot(merged.umoci_unpack(path, tmp_path / "umoci"))
    # Umoci gives the root the time of what it wrote there last.
    assert trees.differences(view, unpacked, ignore_fields_of={b"": TIME}) == []
    exported = trees.snapshot(docker_export(dockerd, image["Id"], tmp_path))
    problems = trees.differences(
        as_exported(before_1970(view)),
        exported,
        ignore_paths=PUT_BY_DOCKER,
        # Docker's own files are put there; the root comes without times.
        ignore_fields_of={b"": TIME, b"etc": TIME},
    )
    assert problems == []


def test_parents_that_a_layer_does_not_name(dockerd: Dockerd, run: Shell, tmp_path: Path) -> None:
    """Docker lets such a directory be root's and 0755, overlayctl and umoci as it is below."""
    below = tar(directory("d/", mode=0o700, uid=5, gid=6, mtime=7), entry("d/gone"))
    above = tar(entry("d/new", mtime=8), entry("d/.wh.gone"), entry("only/here", mtime=9))
    path = docker_archive(tmp_path / "unnamed.tar", [below, above], tags=("unnamed:1",))
    dockerd.load(path)
    image = loaded(run, path)
    theirs = trees.snapshot(overlay2(dockerd, image["Id"])[1], ignore=OF_AN_UPPER)
    ours = trees.snapshot(image["Layers"][1]["DiffPath"], ignore=OWN)
    assert theirs[b"d"][1:4] == (0o755, 0, 0)
    assert ours[b"d"][1:4] == (0o700, 5, 6)
    times = dict.fromkeys((b"", b"only", b"d/gone"), TIME)
    problems = trees.differences(ours, theirs, ignore_paths=(b"d",), ignore_fields_of=times)
    assert problems == []
    unpacked = trees.snapshot(merged.umoci_unpack(path, tmp_path / "umoci"))
    times = dict.fromkeys((b"", b"d", b"only"), TIME)
    view = view_of(run, image["Id"])
    assert trees.differences(view, unpacked, ignore_fields_of=times) == []


def test_a_hard_link_whose_header_differs(dockerd: Dockerd, run: Shell, tmp_path: Path) -> None:
    """Docker gives the file what the link's entry says, overlayctl and umoci keep the file's own.

    GNU tar does so, too; whoever writes a tar of a tree gives both entries the same.
    """
    below = tar(
        directory("./"),
        entry("file", data=b"1", mode=0o755, mtime=5),
        hardlink("link", "file", mode=0o640, uid=9, mtime=6),
    )
    path = docker_archive(tmp_path / "link.tar", [below], tags=("link:1",))
    dockerd.load(path)
    image = loaded(run, path)
    theirs = trees.snapshot(overlay2(dockerd, image["Id"])[0])
    ours = trees.snapshot(image["Layers"][0]["DiffPath"])
    assert theirs[b"link"][1:4] == (0o640, 9, 0)
    assert ours[b"link"][1:4] == (0o755, 0, 0)
    unpacked = trees.snapshot(merged.umoci_unpack(path, tmp_path / "umoci"))
    assert trees.differences(ours, unpacked, ignore_fields_of={b"": TIME}) == []


def test_an_exported_container_is_imported(
    dockerd: Dockerd, archive: Path, run: Shell, tmp_path: Path
) -> None:
    container = dockerd.docker("create", "interop:four")
    dockerd.docker("export", "--output", tmp_path / "export.tar", container)
    dockerd.docker("rm", container)
    refused = run("load", tmp_path / "export.tar", ok=1)
    assert f"overlayctl import {tmp_path}/export.tar NAME" in refused.err
    ours = run("import", tmp_path / "export.tar", "exported:1").out.strip()
    theirs = dockerd.import_rootfs(tmp_path / "export.tar", "exported:1")
    (image,) = json.loads(run("inspect", ours).out)
    assert image["RootFS"]["Layers"] == json.loads(
        dockerd.docker("inspect", "--format", "{{json .RootFS.Layers}}", theirs)
    )
    assert image["RepoTags"] == ["exported:1"]


def overlay2(dockerd: Dockerd, image: str) -> list[Path]:
    """Where docker has the layers of an image, bottom to top."""
    if dockerd.docker("info", "--format", "{{.Driver}}") != "overlay2":
        missing("docker's overlay2")
    data = json.loads(dockerd.docker("inspect", "--format", "{{json .GraphDriver.Data}}", image))
    lower = data.get("LowerDir", "").split(":")
    return [Path(place) for place in (*reversed(lower), data["UpperDir"]) if place]


def docker_export(dockerd: Dockerd, image: str, tmp_path: Path) -> Path:
    """A container's tree as ``docker export`` writes it, unpacked by GNU tar."""
    container = dockerd.docker("create", image, "/bin/sh")
    dockerd.docker("export", "--output", tmp_path / "export.tar", container)
    dockerd.docker("rm", container)
    gnutar.apply_layer(tmp_path / "export.tar", tmp_path / "exported")
    return tmp_path / "exported"


def is_whiteout(entry: trees.Entry) -> bool:
    """Whether overlayfs takes it for one."""
    return entry.type == "char" and entry.rdev == (0, 0)


def as_exported(tree: Tree) -> Tree:
    """``tree`` with what ``docker export`` keeps of it.

    Of xattrs that is the capability, of times whole seconds, and of sockets nothing.
    """
    kept = {}
    for path, found in tree.items():
        if found.type == "socket":
            continue
        kept[path] = found._replace(
            mtime_ns=found.mtime_ns // 10**9 * 10**9,
            xattrs={k: v for k, v in found.xattrs.items() if k == b"security.capability"},
        )
    return kept

"""What the commands answer: words, JSON and exit statuses, on real mounts."""

from __future__ import annotations

import bz2
import filecmp
import gzip
import json
import lzma
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overlayctl.kernel import mounttable
from tests import kernel_has
from tests.archives import diff_id, docker_archive, zstd
from tests.cli.conftest import Shell, reset
from tests.layer.tars import directory, entry, symlink, tar
from tests.rootmount import require

LAYERS = [
    tar(directory("./"), directory("etc"), entry("etc/conf", data=b"one\n"), entry("etc/old")),
    tar(entry("etc/second", data=b"two\n")),
    tar(entry("etc/.wh.old")),
]
ODD = b"a b:c,d\\e\nf\xff"


CODECS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstd,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}


def told(run: Shell, *arguments: str | Path) -> Any:
    return json.loads(run("--json", *arguments).out)


@pytest.fixture
def demo(run: Shell, tmp_path: Path) -> str:
    """The id of a loaded image."""
    run("load", docker_archive(tmp_path / "a.tar", LAYERS))
    return str(told(run, "images")[0]["Id"])


def test_load_and_the_lists_in_json(run: Shell, tmp_path: Path) -> None:
    archive = docker_archive(tmp_path / "a.tar", LAYERS, tags=("demo:1", "reg.example/x/y:2"))
    loaded = run("load", "-i", archive)
    assert loaded.out == "Loaded image: demo:1\nLoaded image: reg.example/x/y:2\n"
    assert told(run, "load", archive)[0]["NewLayers"] == 0
    (image,) = told(run, "images")
    assert image["RepoTags"] == ["demo:1", "reg.example/x/y:2"]
    assert (image["Layers"], image["Containers"]) == (3, 0)
    made = told(run, "create", "--name", "cc", "demo:1", "sh")
    assert told(run, "ps") == []
    assert [(c["Id"], c["Mounted"]) for c in told(run, "ps", "-a")] == [(made["Id"], False)]
    merged = run.path("mount", "cc")
    assert [(c["Id"], c["Mounted"]) for c in told(run, "ps")] == [(made["Id"], True)]
    (container,) = told(run, "inspect", "cc")
    data = container["GraphDriver"]["Data"]
    assert data["MergedDir"] == str(merged)
    assert container["Id"] == made["Id"]
    mounted = mounttable.at(str(merged))
    assert mounted is not None
    # What was given to mount(2) is a number in the mount table.
    if kernel_has.rung() != "mount":
        assert list(mounted.option("lowerdir+")) == data["LowerDir"].split(":")
        assert list(mounted.option("upperdir")) == [data["UpperDir"]]
        assert list(mounted.option("workdir")) == [data["WorkDir"]]
    assert [view["MountPoint"] for view in told(run, "mounts")] == [str(merged)]
    run("umount", "cc")
    assert told(run, "mounts") == told(run, "ps") == []
    # One line for each tag, as docker does.
    assert run("images", "-q").out.split() == [image["Id"].removeprefix("sha256:")[:12]] * 2


def test_diff_paths_are_there_also_after_a_detach(run: Shell, demo: str) -> None:
    for _ in range(2):
        (image,) = told(run, "image", "inspect", "demo")
        assert image["Id"] == demo
        paths = [layer["DiffPath"] for layer in image["Layers"]]
        assert [layer["DiffID"] for layer in image["Layers"]] == [diff_id(x) for x in LAYERS]
        assert image["GraphDriver"]["Data"]["LowerDir"].split(":") == paths[::-1]
        assert all(os.listdir(path) == ["etc"] for path in paths)
        assert [run.path("layer", "path", f"demo:{n}") for n in (1, 2, 3)] == [*map(Path, paths)]
        run("layer", "detach", "--all")
        assert not any(os.path.exists(path) for path in paths)


def test_what_was_written_is_there_after_the_next_mount(run: Shell, store: str, demo: str) -> None:
    made = told(run, "create", "--name", "cc", "demo")["Id"]
    merged = run.path("mount", "cc")
    shutil.rmtree(merged / "etc")
    (merged / "etc").mkdir()
    (merged / "etc/mine").write_text("x")
    run("umount", "cc")
    upper = Path(store, "snapshots", made, "upper")
    assert os.getxattr(upper / "etc", "trusted.overlay.opaque") == b"y"
    # What a crash leaves in an old work directory is no hindrance: each mount has its own.
    os.makedirs(Path(store, "snapshots", made, "work.1/work/a/b/c/d"), exist_ok=True)
    merged = run.path("mount", "cc")
    assert os.listdir(merged / "etc") == ["mine"]
    assert len([n for n in os.listdir(upper.parent) if n.startswith("work.")]) == 1
    run("umount", "cc")
    assert sorted(os.listdir(run.path("image", "mount", "demo") / "etc")) == ["conf", "second"]
    run("umount", "demo")


def test_rmi_names_every_holder(run: Shell, demo: str, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    run("create", "--name", "cc", "demo")
    run("image", "mount", "demo", tmp_path / "mnt")
    refused = json.loads(run("rmi", "demo", "--json", ok=4).err)
    holders = {(h["kind"], h["name"]) for h in refused["details"]["holders"]}
    assert holders == {("container", "cc"), ("mount", str(tmp_path / "mnt"))}
    run("umount", tmp_path / "mnt")
    assert "container cc" in run("rmi", demo, ok=4).err
    run("rm", "cc")
    assert demo in run("rmi", demo).out
    assert told(run, "images") == told(run, "layer", "ls") == []


def test_load_and_rmi_in_the_words_of_docker(run: Shell, tmp_path: Path) -> None:
    """Without a name the id is told; what goes is told line by line, the names first."""
    loaded = run("load", docker_archive(tmp_path / "a.tar", LAYERS, tags=()))
    image = told(run, "images")[0]["Id"]
    assert loaded.out == f"Loaded image ID: {image}\n"
    loaded = run("load", docker_archive(tmp_path / "a.tar", LAYERS, tags=("demo:1",)))
    assert loaded.out == "Loaded image: demo:1\n"
    layers = [f"Deleted: {diff_id(layer)}" for layer in LAYERS]
    untagged, first, *rest = run("rmi", "demo:1").out.splitlines()
    assert (untagged, first) == ("Untagged: demo:1", f"Deleted: {image}")
    assert sorted(rest) == sorted(layers)


def test_an_image_with_two_tags_by_its_id(run: Shell, demo: str) -> None:
    run("tag", "demo", "other:1")
    refused = run("rmi", demo, ok=4)
    assert "demo:latest" in refused.err
    assert "other:1" in refused.err
    assert run("rmi", "demo").out == "Untagged: demo:latest\n"
    assert told(run, "images")[0]["RepoTags"] == ["other:1"]


def test_a_tag_that_moves_is_told(run: Shell, demo: str, tmp_path: Path) -> None:
    moved = run("load", docker_archive(tmp_path / "b.tar", LAYERS[:1]))
    assert f"demo:latest was {demo.removeprefix('sha256:')[:12]} before" in moved.err
    assert sorted(map(len, (i["RepoTags"] for i in told(run, "images")))) == [0, 1]
    run("rmi", demo)


def test_a_shared_layer_stays_with_the_other_image(run: Shell, demo: str, tmp_path: Path) -> None:
    run("load", docker_archive(tmp_path / "b.tar", LAYERS[:1], tags=("base:1",)))
    run("rmi", "demo")
    assert [row["DiffID"] for row in told(run, "layer", "ls")] == [diff_id(LAYERS[0])]
    assert os.listdir(run.path("image", "mount", "base:1")) == ["etc"]
    run("umount", "base:1")


def test_six_hundred_times_the_same_layer(run: Shell, tmp_path: Path) -> None:
    """The limit of the kernel is for layers, and these are one."""
    run("load", docker_archive(tmp_path / "a.tar", [LAYERS[0], *[tar()] * 600]))
    assert sorted(os.listdir(run.path("image", "mount", "demo") / "etc")) == ["conf", "old"]
    run("umount", "demo")


def test_more_layers_than_a_mount_takes(run: Shell, tmp_path: Path) -> None:
    layers = [tar(directory("./"), entry(f"f{number}")) for number in range(501)]
    run("load", docker_archive(tmp_path / "a.tar", layers))
    refused = run("image", "mount", "demo", ok=5)
    assert "500" in refused.err
    assert "501" in refused.err
    assert told(run, "mounts") == []
    assert len(told(run, "inspect", "demo")[0]["Layers"]) == 501


def test_a_store_and_names_with_odd_bytes(odd_run: Shell, tmp_path: Path) -> None:
    odd = os.fsdecode(ODD)
    layer = tar(directory("./"), directory(odd), entry(f"{odd}/{odd}", data=b"1"), entry("x"))
    archive = docker_archive(tmp_path / "a.tar", [layer, tar(symlink("l", odd))])
    named = Path(shutil.move(archive, os.path.join(tmp_path, odd + ".tar")))
    odd_run("load", named)
    assert os.listdir(os.fsencode(odd_run.path("layer", "path", "demo:2"))) == [b"l"]
    odd_run("create", "--name", "cc", "demo")
    merged = odd_run.path("mount", "cc")
    assert sorted(os.listdir(os.fsencode(merged))) == [ODD, b"l", b"x"]
    assert (merged / "l" / odd).read_bytes() == b"1"
    (merged / odd / odd).write_bytes(b"2")
    (merged / odd / "more").write_bytes(b"3")
    assert odd_run("layer", "cat", "demo:1", f"{odd}/{odd}").out == "1"
    listed = odd_run("layer", "files", "demo:1").out
    assert odd not in listed
    assert len(listed.splitlines()) == 4
    (container,) = told(odd_run, "inspect", "cc")
    assert told(odd_run, "mounts")[0]["Id"] == container["Id"]
    mnt = Path(tmp_path, odd, "mnt")
    mnt.mkdir()
    odd_run("image", "mount", "demo", mnt)
    assert (mnt / odd / odd).read_bytes() == b"1"
    odd_run("rmi", "demo", ok=4)
    odd_run("umount", mnt)
    odd_run("umount", "cc")
    odd_run("rm", "cc")
    odd_run("rmi", "demo")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("damage", ["cut", "magic", "middle"])
def test_a_damaged_compressed_archive_leaves_nothing(
    run: Shell, store: str, tmp_path: Path, codec: str, damage: str
) -> None:
    plain = docker_archive(tmp_path / "a.tar", [tar(entry("r", data=os.urandom(50_000)))])
    whole = CODECS[codec](plain.read_bytes())
    half = len(whole) // 2
    plain.write_bytes(
        {
            "cut": whole[:half],
            "magic": whole[:6] + b"\xa5" * 2000,
            "middle": whole[:half] + bytes(64) + whole[half + 64 :],
        }[damage]
    )
    failed = run("load", plain, ok=1)
    assert failed.err.startswith("overlayctl: ")
    assert failed.out == ""
    for place in ("layers", "images", "tags", "ingest"):
        assert os.listdir(os.path.join(store, place)) == []


@pytest.mark.parametrize("codec", CODECS)
def test_a_compressed_layer_is_the_same_layer(run: Shell, tmp_path: Path, codec: str) -> None:
    stored = [CODECS[codec](layer) for layer in LAYERS]
    run("load", docker_archive(tmp_path / "a.tar", LAYERS, stored=stored))
    run("load", docker_archive(tmp_path / "b.tar", LAYERS, tags=("plain:1",)))
    assert len(told(run, "images")) == 1


def test_an_imported_tar_without_its_end_is_told(run: Shell, tmp_path: Path) -> None:
    """There is no digest to compare it with: it may have been cut between two entries."""
    whole = tar(directory("etc"), entry("etc/conf", data=b"one"))
    path = tmp_path / "layer.tar"
    path.write_bytes(whole)
    assert "end" not in run("import", path, "whole:1").err
    path.write_bytes(whole[:-1024])
    assert "layer 1 has no end marker" in run("import", path, "cut:1").err


def test_the_wrong_digest_is_named(run: Shell, store: str, tmp_path: Path) -> None:
    wrong = diff_id(b"")
    ids = [diff_id(LAYERS[0]), wrong, diff_id(LAYERS[2])]
    failed = run("load", docker_archive(tmp_path / "a.tar", LAYERS, diff_ids=ids), ok=1)
    assert wrong in failed.err
    assert diff_id(LAYERS[1]) in failed.err
    assert os.listdir(os.path.join(store, "layers")) == []
    assert os.listdir(os.path.join(store, "ingest")) == []


def test_two_stores_hold_the_same_bytes(run: Shell, store: str, tmp_path: Path) -> None:
    second = Shell(str(tmp_path / "second"))
    stored = [gzip.compress(layer) for layer in LAYERS]
    run("load", docker_archive(tmp_path / "a.tar", LAYERS))
    second("load", docker_archive(tmp_path / "b.tar", LAYERS, stored=stored))
    listed = sorted(os.listdir(os.path.join(store, "layers")))
    assert listed == sorted(os.listdir(os.path.join(second.store, "layers")))
    for name in listed:
        one, two = (os.path.join(s, "layers", name, "layer.erofs") for s in (store, second.store))
        assert filecmp.cmp(one, two, shallow=False)
    reset(second.store)


def test_damage_names_every_image_that_it_harms(run: Shell, demo: str, tmp_path: Path) -> None:
    run("load", docker_archive(tmp_path / "b.tar", LAYERS[:1], tags=("base:1",)))
    base = told(run, "inspect", "base:1")[0]
    file = Path(base["Layers"][0]["File"])
    before = file.read_bytes()
    file.write_bytes(before[:5000] + bytes([before[5000] ^ 1]) + before[5001:])
    (found,) = json.loads(run("system", "check", "--json", ok=6, sound=False).out)
    assert "tar of layer " + file.parent.name[:12] in found["Message"]
    ids = sorted(f"image {i.removeprefix('sha256:')}" for i in (demo, base["Id"]))
    assert sorted(found["Users"]) == ids
    file.write_bytes(before)


def test_busybox_runs_in_the_merged_root(run: Shell, tmp_path: Path) -> None:
    require("busybox", "chroot")
    busybox = Path(shutil.which("busybox") or "").read_bytes()
    layers = [
        tar(directory("./"), directory("bin"), entry("bin/busybox", data=busybox, mode=0o755)),
        tar(symlink("bin/sh", "busybox"), directory("etc"), entry("etc/conf", data=b"one\n")),
    ]
    run("load", docker_archive(tmp_path / "a.tar", layers))
    run("create", "--name", "cc", "demo")
    merged = run.path("mount", "cc")
    script = "/bin/busybox id -u; /bin/busybox cat /etc/conf; echo two >> /etc/conf"
    done = subprocess.run(
        ["chroot", merged, "/bin/sh", "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\none\n", "")
    assert (merged / "etc/conf").read_text() == "one\ntwo\n"
    layer = run.path("layer", "path", "demo:1")
    with pytest.raises(PermissionError):
        subprocess.run([layer / "bin/busybox", "true"], check=False)
    run("umount", "cc")


def test_exit_statuses(run: Shell, demo: str) -> None:
    for command in (
        ["inspect", "no"], ["image", "inspect", "no"], ["history", "no"], ["rmi", "no"],
        ["tag", "no", "other"], ["mount", "no"], ["umount", "no"], ["create", "no"], ["rm", "no"],
        ["container", "inspect", "no"], ["layer", "path", "no:1"], ["layer", "path", "demo:4"],
        ["layer", "path", "demo:0"], ["layer", "cat", "demo:1", "no"], ["umount", "demo"],
        ["load", "/no/such/file"], ["image", "mount", "demo", "/no/such/directory"],
    ):  # fmt: skip
        failed = run(*command, ok=3)
        assert failed.err.startswith("overlayctl: "), command
    for command in (["create"], ["tag", "demo", "Bad:Name"], ["create", "--name", "/", "demo"]):
        run(*command, ok=2)
    run("create", "--name", "cc", "demo")
    run("create", "--name", "cc", "demo", ok=4)
    run("mount", "cc")
    run("rm", "cc", ok=4)
    run("rm", "-f", "cc")
    run("container", "exists", "cc", ok=1)

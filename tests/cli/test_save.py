"""Images out of the store: what is in the archive, and that it is what came in."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pty
import resource
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests import archives, filesystems
from tests.archives import docker_archive, zstd
from tests.cli.conftest import Shell, reset
from tests.layer.tars import directory, entry, tar

# One tar ends without an end marker, one with more than there has to be: neither is changed.
BASE = tar(directory("./"), entry("shared", data=b"0" * 3000))
MORE = tar(entry("a", data=b"1"), entry("b", data=os.urandom(2 << 20))) + bytes(10240)
CUT = entry("c", data=b"3" * 512)
REFERENCE = "org.opencontainers.image.ref.name"


@pytest.fixture
def two(run: Shell, tmp_path: Path) -> Shell:
    """A store with two images that share a layer, one of them with two names."""
    run("load", docker_archive(tmp_path / "one.tar", [BASE, MORE], tags=("one:1", "one:2")))
    run("load", docker_archive(tmp_path / "two.tar", [BASE, CUT], tags=("host.test:5/two:1",)))
    return run


def files(data: bytes) -> dict[str, bytes]:
    """The files of an archive; no name comes twice."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            if member.isfile():
                content = archive.extractfile(member)
                assert content
                assert member.name not in found
                found[member.name] = content.read()
    return found


def saved(run: Shell, place: Path, *words: str) -> dict[str, bytes]:
    run("save", "-o", place / "out", *words)
    return files((place / "out").read_bytes())


def configs(run: Shell) -> dict[str, bytes]:
    """The config of each image, by its id."""
    place = Path(run.store, "images")
    return {name: (place / name / "config.json").read_bytes() for name in os.listdir(place)}


@pytest.mark.parametrize("codec", ["none", "gzip", "zstd"])
@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci-dir"])
def test_what_came_in_goes_out(two: Shell, tmp_path: Path, form: str, codec: str) -> None:
    names = ("one:1", "host.test:5/two:1", "one:2")
    out = tmp_path / "out"
    done = two("save", "--format", form, "--compress", codec, "--json", "-o", out, *names)
    told = json.loads(done.out)
    assert [one["RepoTags"] for one in told["Images"]] == [["one:1", "one:2"], [names[1]]]
    if form == "oci-dir":
        found = {
            str(path.relative_to(out)): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file()
        }
    else:
        found = files(out.read_bytes())
    blobs = {name: data for name, data in found.items() if name.startswith("blobs/sha256/")}
    for name, data in blobs.items():
        assert hashlib.sha256(data).hexdigest() == name.removeprefix("blobs/sha256/")
    for name, config in configs(two).items():
        assert blobs[f"blobs/sha256/{name}"] == config
    # Three layers, two configs, two manifests.
    assert len(blobs) == 7
    unpacked = [data for data in blobs.values() if data in (BASE, MORE, CUT)]
    assert len(unpacked) == (3 if codec == "none" else 0)
    assert ("manifest.json" in found) == (form == "docker-archive")
    index = json.loads(found["index.json"])
    assert [one["annotations"][REFERENCE] for one in index["manifests"]] == [
        "docker.io/library/one:1", "docker.io/library/one:2", "host.test:5/two:1",
    ]  # fmt: skip
    for one in index["manifests"]:
        manifest = json.loads(blobs["blobs/sha256/" + one["digest"][7:]])
        suffix = "" if codec == "none" else f"+{codec}"
        for layer in manifest["layers"]:
            assert layer["mediaType"] == f"application/vnd.oci.image.layer.v1.tar{suffix}"
            assert layer["size"] == len(blobs["blobs/sha256/" + layer["digest"][7:]])
    other = Shell(str(tmp_path / "other"))
    try:
        other("load", out)
        assert configs(other) == configs(two)
        for kind in ("layers", "tags"):
            assert {*os.listdir(Path(other.store, kind))} == {*os.listdir(Path(two.store, kind))}
    finally:
        reset(other.store)


def test_docker_finds_its_files(two: Shell, tmp_path: Path) -> None:
    found = saved(two, tmp_path, "one:1", "host.test:5/two:1")
    manifest = json.loads(found["manifest.json"])
    assert [one["RepoTags"] for one in manifest] == [
        ["docker.io/library/one:1"], ["host.test:5/two:1"],
    ]  # fmt: skip
    assert [found[path] for path in manifest[0]["Layers"]] == [BASE, MORE]
    assert hashlib.sha256(found[manifest[0]["Config"]]).hexdigest() in configs(two)
    top = hashlib.sha256(MORE).hexdigest()
    assert json.loads(found["repositories"])["docker.io/library/one"] == {"1": top}


def test_which_names_come_along(two: Shell, tmp_path: Path) -> None:
    """As docker has it: a name alone means all its tags, an id no name."""

    def tags(*words: str) -> list[Any]:
        manifest = json.loads(saved(two, tmp_path, *words)["manifest.json"])
        return [one["RepoTags"] for one in manifest]

    image = json.loads(two("inspect", "one:1").out)[0]["Id"]
    one, two_ = "docker.io/library/one:1", "docker.io/library/one:2"
    assert tags("one") == [[one, two_]]
    assert tags("docker.io/library/one:2") == [[two_]]
    assert tags("host.test:5/two") == [["host.test:5/two:1"]]
    assert tags(image) == tags(image[7:19]) == [None]
    assert tags(image, "one:2") == [[two_]]
    found = saved(two, tmp_path, image)
    assert "annotations" not in json.loads(found["index.json"])["manifests"][0]
    assert "repositories" not in found


def test_the_same_images_give_the_same_bytes(two: Shell, tmp_path: Path) -> None:
    for codec in ("none", "gzip", "zstd"):
        two("save", "--compress", codec, "-o", tmp_path / "1", "one")
        two("save", "--compress", codec, "-o", tmp_path / "2", "one")
        assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_manifest_that_still_is_right_stays(run: Shell, tmp_path: Path) -> None:
    """Its annotations are nobody else's to know; of other blobs it would be wrong."""
    config = archives.config(BASE)
    manifest = archives.manifest(config, BASE, annotations={"org.test": "kept"})
    described = archives.descriptor(manifest, archives.OCI + "manifest.v1+json")
    described["annotations"] = {REFERENCE: "docker.io/library/kept:1"}
    layout = archives.layout(tmp_path / "in", archives.index(described), config, manifest, BASE)
    run("load", layout)
    found = saved(run, tmp_path, "kept:1")
    digest = hashlib.sha256(manifest).hexdigest()
    assert found[f"blobs/sha256/{digest}"] == manifest
    found = saved(run, tmp_path, "--compress", "gzip", "kept:1")
    assert f"blobs/sha256/{digest}" not in found


def test_a_compressed_manifest_is_made_anew(run: Shell, tmp_path: Path) -> None:
    config = archives.config(BASE)
    stored = gzip.compress(BASE, mtime=0)
    kind = archives.OCI + "layer.v1.tar+gzip"
    manifest = archives.manifest(config, stored, kind=kind)
    described = archives.descriptor(manifest, archives.OCI + "manifest.v1+json")
    layout = archives.layout(tmp_path / "in", archives.index(described), config, manifest, stored)
    image = run("load", "--tag", "t:1", layout).out
    assert image
    found = saved(run, tmp_path, "t:1")
    (one,) = json.loads(found["index.json"])["manifests"]
    (layer,) = json.loads(found["blobs/sha256/" + one["digest"][7:]])["layers"]
    assert found["blobs/sha256/" + layer["digest"][7:]] == BASE


@pytest.mark.parametrize("codec", ["none", "gzip"])
def test_a_damaged_layer(two: Shell, tmp_path: Path, codec: str) -> None:
    (name,) = (name for name in os.listdir(Path(two.store, "layers"))
               if name == hashlib.sha256(MORE).hexdigest())  # fmt: skip
    layer = Path(two.store, "layers", name, "layer.erofs")
    layer.chmod(0o600)
    with layer.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"damage")
    words = ("--compress", codec, "one:1")
    done = two("save", "-o", tmp_path / "out", *words, ok=6, sound=False)
    assert f"the layer {name[:12]} is not what it was" in done.err
    done = two("save", "-o", tmp_path / "dir", "--format", "oci-dir", *words, ok=6, sound=False)
    assert sorted(os.listdir(tmp_path)) == ["one.tar", "store", "two.tar"]
    # A stream shows it by the status, and to who reads it by its end.
    shown = os.fsencode(two("save", *words, ok=6, sound=False).out)
    if codec == "none":
        with pytest.raises(tarfile.ReadError):
            files(shown)
    else:
        assert shown == b""
    two("load", tmp_path / "one.tar")
    two("save", "-o", tmp_path / "out", *words)


def test_a_damaged_config(two: Shell, tmp_path: Path) -> None:
    image = json.loads(two("inspect", "one:1").out)[0]["Id"][7:]
    config = Path(two.store, "images", image, "config.json")
    config.write_bytes(config.read_bytes().replace(b"amd64", b"arm64"))
    done = two("save", "-o", tmp_path / "out", "one:1", ok=6, sound=False)
    assert "the config of image" in done.err


def test_what_is_removed_meanwhile_is_saved_all_the_same(two: Shell) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "overlayctl", "--root", two.store, "save", "one:1"],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        start = process.stdout.read(1000)
        two("rmi", "one:1", "one:2")
        assert len(os.listdir(Path(two.store, "layers"))) == 2
        found = files(start + process.stdout.read())
    assert process.returncode == 0
    assert MORE in found.values()


def test_more_layers_than_files_may_be_open(run: Shell, tmp_path: Path) -> None:
    layers = [tar(entry(f"f{number}")) for number in range(80)]
    run("load", docker_archive(tmp_path / "many.tar", layers, tags=("many:1",)))

    def save(hard: int) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "overlayctl", "--root", run.store, "save", "many:1"],
            capture_output=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (50, hard)),
        )

    done = save(200)
    assert done.returncode == 0
    assert len(files(done.stdout)) == 4 + 82
    refused = save(50)
    assert refused.returncode == 5
    assert b"ulimit -n" in refused.stderr


def test_a_full_disk_and_a_reader_that_leaves(two: Shell, tmp_path: Path) -> None:
    with filesystems.mounted("tmpfs", tmp_path, size=1 << 20) as small:
        for form in ("docker-archive", "oci-dir"):
            done = two("save", "--format", form, "-o", small / "out", "one:1", ok=1)
            assert "cannot write to" in done.err
            assert "No space left" in done.err
            assert os.listdir(small) == []
    program = f"{sys.executable} -m overlayctl --root {two.store} save one:1"
    line = f"{program} | head -c 1; exit ${{PIPESTATUS[0]}}"
    done_ = subprocess.run(["bash", "-c", line], capture_output=True, check=False)
    assert (done_.returncode, done_.stdout, done_.stderr) == (141, b"b", b"")


def test_it_reads_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    with filesystems.mounted("ext4", tmp_path) as disk:
        run = Shell(str(disk / "store"))
        run("load", docker_archive(tmp_path / "one.tar", [BASE, MORE], tags=("one:1",)))
        run("layer", "detach", "--all")
        filled = filesystems.fill_bytes(disk)
        assert MORE in saved(run, tmp_path, "one").values()
        filled.empty()
        filesystems.remount(disk, "ro")
        assert saved(run, tmp_path, "--compress", "zstd", "one")["oci-layout"]
        filesystems.remount(disk, "rw")
        reset(run.store)


def test_refusals(two: Shell, tmp_path: Path) -> None:
    assert "there is no image 'no'" in two("save", "-o", tmp_path / "x", "no", ok=3).err
    done = two("save", "-o", tmp_path / "x", "--format", "tar", "one", ok=2)
    assert "docker-archive" in done.err
    assert "a directory is no stream" in two("save", "--format", "oci-dir", "one", ok=2).err
    done = two("save", "--format", "oci-dir", "-o", tmp_path, "one", ok=4)
    assert "is not empty" in done.err
    (tmp_path / "file").touch()
    two("save", "--format", "oci-dir", "-o", tmp_path / "file", "one", ok=4)
    two("save", "--format", "oci-dir", "-o", tmp_path / "no/dir", "one", ok=3)
    for place in (tmp_path / ("x" * 300), Path("/proc/x"), Path("")):
        for form in ("docker-archive", "oci-dir"):
            words = ("save", "--format", form, "-o", "" if place == Path() else place, "one")
            done = two._run(words, "")
            assert done.status in (1, 2, 3)
            assert "hint: " in done.err
            assert "Errno" not in done.err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty").chmod(0o751)
    two("save", "--format", "oci-dir", "-o", tmp_path / "empty", "one")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o751
    assert (tmp_path / "empty/oci-layout").exists()
    assert not (tmp_path / "x").exists()


def test_a_terminal_is_no_place_for_a_tar(two: Shell) -> None:
    main, terminal = pty.openpty()
    try:
        done = two("save", "-o", os.ttyname(terminal), "one", ok=2)
        assert "nothing for a terminal" in done.err
    finally:
        os.close(main)
        os.close(terminal)


def test_zstd_reads_back_with_its_own_tool(two: Shell, tmp_path: Path) -> None:
    found = saved(two, tmp_path, "--compress", "zstd", "one:1")
    plain = [
        subprocess.run(["zstd", "-dqc"], input=data, capture_output=True, check=True).stdout
        for data in found.values()
        if data.startswith(zstd(b"")[:4])
    ]
    assert sorted(plain) == sorted([BASE, MORE])

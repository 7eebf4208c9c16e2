"""What is no image, or one that cannot be loaded: called by its name, with what to type instead."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.archives import (
    OCI,
    config,
    descriptor,
    diff_id,
    docker_archive,
    index,
    layout,
    manifest,
)
from tests.cli.conftest import Shell
from tests.layer.tars import directory, entry, tar
from tests.rootmount import require

LAYER = tar(directory("etc"), entry("etc/conf", data=b"one\n"))
DOCKER = "application/vnd.docker."


def refused(run: Shell, *arguments: str | Path) -> tuple[str, str]:
    """The message and the hint of a command that must leave an empty store."""
    error = json.loads(run("--json", *arguments, ok=1).err)
    assert error["code"] == "bad-archive"
    for place in ("layers", "images", "tags", "ingest"):
        path = os.path.join(run.store, place)
        assert not os.path.exists(path) or os.listdir(path) == []
    return error["message"], error["hint"]


def skopeo_copy(*arguments: str) -> None:
    require("skopeo")
    subprocess.run(["skopeo", "copy", "--quiet", *arguments], check=True)


def one_layer(
    place: Path, blob: bytes, kind: str, *, tar_of: bytes = LAYER, there: bool = True, **more: Any
) -> Path:
    """A layout of one image with one layer."""
    conf = config(tar_of)
    body = manifest(conf, layers=[descriptor(blob, kind, **more)])
    blobs = [body, conf, *([blob] if there else [])]
    return layout(place / "layout", index(descriptor(body, OCI + "manifest.v1+json")), *blobs)


# --- layers ---------------------------------------------------------------------------------


@pytest.fixture
def vendor(tmp_path: Path) -> Iterator[str]:
    """The URL of a server that hands out the layer."""
    place = tmp_path / "vendor"
    place.mkdir()
    (place / "layer.tar").write_bytes(LAYER)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(place))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/layer.tar"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "kind",
    [
        DOCKER + "image.rootfs.foreign.diff.tar",
        OCI + "layer.nondistributable.v1.tar",
    ],
)
def test_a_foreign_layer_is_fetched_as_the_hint_says(
    kind: str, vendor: str, run: Shell, tmp_path: Path
) -> None:
    require("curl")
    path = one_layer(tmp_path, LAYER, kind, there=False, urls=["ftp://old", vendor])
    message, hint = refused(run, "load", path)
    assert f"the layer {diff_id(LAYER)} is not in {path}: it is a foreign layer" in message
    fetch, load = hint.split("; ")
    subprocess.run(["curl", "-sS", *shlex.split(fetch)[1:]], check=True)
    assert "Loaded image ID" in run(*shlex.split(load)[1:]).out


def test_a_foreign_layer_of_a_tar_that_names_no_server(run: Shell, tmp_path: Path) -> None:
    path = one_layer(tmp_path, LAYER, OCI + "layer.nondistributable.v1.tar", there=False)
    archive = tmp_path / "archive.tar"
    subprocess.run(["tar", "-C", path, "-cf", archive, "."], check=True)
    message, hint = refused(run, "load", archive)
    assert "it is a foreign layer" in message
    place = f"LAYOUT/blobs/sha256/{hashlib.sha256(LAYER).hexdigest()}"
    assert hint == f"unpack it to LAYOUT/; put it at {place}; overlayctl load LAYOUT"


def test_a_foreign_layer_that_docker_left_out(run: Shell, tmp_path: Path) -> None:
    """Since docker 25 an archive is a layout, too, and only that tells why the layer is missing."""
    url = "https://example.com/a layer"
    kind = DOCKER + "image.rootfs.foreign.diff.tar.gzip"
    path = one_layer(tmp_path, LAYER, kind, there=False, urls=[url])
    blobs = "blobs/sha256/"
    names = [blobs + diff_id(data).removeprefix("sha256:") for data in (config(LAYER), LAYER)]
    entries = [{"Config": names[0], "RepoTags": ["demo:1"], "Layers": names[1:]}]
    (path / "manifest.json").write_text(json.dumps(entries))
    message, hint = refused(run, "load", path)
    assert "it is a foreign layer" in message
    assert hint.startswith(f"curl -Lo {path}/{names[1]} '{url}'; ")
    (path / names[1]).write_bytes(LAYER)
    assert run("load", path).out == "Loaded image: demo:1\n"


def test_a_refusal_is_safe_on_a_terminal(run: Shell, tmp_path: Path) -> None:
    """What an archive says in a refusal, its hint included, is safe to look at."""
    urls = ["https://example.com/\x1b[31m\u202e'; reboot #"]
    kind = OCI + "layer.nondistributable.v1.tar"
    told = run("load", one_layer(tmp_path, LAYER, kind, there=False, urls=urls), ok=1).err
    assert "reboot" in told
    assert not {"\x1b", "\u202e"} & set(told)


@pytest.mark.parametrize(
    "kind",
    [
        OCI + "layer.v1.tar+gzip+encrypted",
        OCI + "layer.v1.tar+encrypted",
        DOCKER + "image.rootfs.diff.tar.gzip+enc",
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_an_encrypted_layer(kind: str, there: bool, run: Shell, tmp_path: Path) -> None:  # noqa: FBT001 - a parameter
    path = one_layer(tmp_path, os.urandom(2000), kind, there=there)
    message, hint = refused(run, "load", path)
    assert message.endswith("is encrypted")
    assert hint == f"decrypt the image: skopeo copy --decryption-key KEY oci:{path} oci:DIR"


@pytest.mark.parametrize("form", ["oci", "oci-archive"])
def test_an_encrypted_image_is_decrypted_as_the_hint_says(
    form: str, run: Shell, tmp_path: Path
) -> None:
    require("openssl")
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    subprocess.run(["openssl", "genrsa", "-out", private, "2048"], check=True, capture_output=True)
    subprocess.run(["openssl", "rsa", "-in", private, "-pubout", "-out", public], check=True,
                   capture_output=True)  # fmt: skip
    plain = f"docker-archive:{docker_archive(tmp_path / 'a.tar', [LAYER])}"
    hidden = f"{tmp_path}/hidden"
    skopeo_copy("--encryption-key", f"jwe:{public}", plain, f"{form}:{hidden}")
    message, hint = refused(run, "load", hidden)
    assert message.endswith("is encrypted")
    command = hint.removeprefix("decrypt the image: skopeo copy ").replace("KEY", str(private))
    command = command.replace("oci:DIR", f"oci:{tmp_path}/shown:demo:1")
    skopeo_copy(*shlex.split(command))
    assert run("load", tmp_path / "shown").out == "Loaded image: demo:1\n"


def erofs(place: Path) -> bytes:
    require("mkfs.erofs")
    (place / "tree/etc").mkdir(parents=True)
    (place / "tree/etc/conf").write_text("one\n")
    subprocess.run(["mkfs.erofs", place / "e.img", place / "tree"], check=True, capture_output=True)
    return (place / "e.img").read_bytes()


def ext4(place: Path) -> bytes:
    require("mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", place / "x.img", "1M"], check=True)
    return (place / "x.img").read_bytes()


def lz4(data: bytes) -> bytes:
    require("lz4")
    return subprocess.run(["lz4", "-c"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    ("name", "kind", "words", "command"),
    [
        ("lz4", "layer.v1.tar+lz4", "lz4 data", "lz4 -dc"),
        ("lzip", "layer.v1.tar+lzip", "lzip data", "lzip -dc"),
        ("compress", "layer.v1.tar+gzip", "compress (.Z) data", "zcat"),
        ("squashfs", "layer.v1.squashfs", "a squashfs image", "unsquashfs"),
        ("erofs", "layer.v1.erofs", "an EROFS image", "mount -o ro,loop"),
        ("ext4", "layer.v1.tar", "an ext4 image", "mount -o ro,loop"),
        ("zip", "layer.v1.tar", "a zip archive", "bsdtar"),
        ("json", "layer.v1.tar", "a JSON text", "a layer is a tar"),
        ("text", "layer.v1.tar", "a text", "a layer is a tar"),
        ("deb", "layer.v1.tar", "a Debian package", "dpkg-deb --fsys-tarfile"),
    ],
)
def test_a_layer_that_is_no_tar(
    name: str, kind: str, words: str, command: str, run: Shell, tmp_path: Path
) -> None:
    made = {
        "lz4": lambda: lz4(LAYER),
        "erofs": lambda: erofs(tmp_path),
        "ext4": lambda: ext4(tmp_path),
    }
    starts = {
        "lzip": b"LZIP\1\x14", "compress": b"\x1f\x9d\x90", "squashfs": b"hsqs",
        "zip": b"PK\x03\x04", "json": b'{"a": 1}', "deb": b"!<arch>\ndebian-binary   ",
    }  # fmt: skip
    if name == "text":
        blob = "FROM debian\n# d\u00e9j\u00e0 vu\n".encode() * 100
    else:
        blob = made[name]() if name in made else starts[name] + os.urandom(3000)
    (tmp_path / "plain").write_bytes(blob)
    for arguments in (
        ("load", one_layer(tmp_path, blob, OCI + kind)),
        ("load", docker_archive(tmp_path / "a.tar", [LAYER], stored=[blob])),
        ("import", tmp_path / "plain", "name:1"),
    ):
        message, hint = refused(run, *arguments)
        assert f"is no layer: it is {words}" in message
        assert hint.startswith(command)


@pytest.mark.parametrize("make", [lambda _: lz4(LAYER), erofs], ids=["lz4", "erofs"])
def test_the_way_to_a_tar_is_one(make: Callable[[Path], bytes], run: Shell, tmp_path: Path) -> None:
    layer, place = tmp_path / "LAYER", tmp_path / "DIR"
    layer.write_bytes(make(tmp_path))
    place.mkdir()
    _, hint = refused(run, "import", layer, "name:1")
    convert, _, load = hint.partition("; then overlayctl ")
    subprocess.run(["bash", "-c", convert], cwd=tmp_path, check=True)
    if os.path.ismount(place):
        subprocess.run(["umount", place], check=True)
    assert load == "import LAYER.tar... NAME:TAG"
    run("import", tmp_path / "LAYER.tar", "name:1")
    assert run("layer", "cat", "name:1:1", "etc/conf").out == "one\n"


@pytest.mark.parametrize("kind", [OCI + "layer.v1.tar+br", OCI + "layer.nydus.blob.v1"])
def test_only_the_media_type_tells(kind: str, run: Shell, tmp_path: Path) -> None:
    message, hint = refused(run, "load", one_layer(tmp_path, b"\x8b" * 900, kind))
    assert message.endswith(f"is no tar, its media type is {kind!r}")
    assert "overlayctl import" in hint


# --- what is no image -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "words", "hint"),
    [
        (
            {"mediaType": "application/vnd.cncf.helm.config.v1+json"},
            "",
            "a Helm chart",
            "helm pull",
        ),
        ({}, "application/vnd.dev.cosign.simplesigning.v1+json", "a signature", "save the image"),
        ({}, "application/vnd.in-toto+json", "an attestation", "save the image itself"),
        ({}, "application/spdx+json", "an attestation", "save the image itself"),
        ({}, "application/vnd.wasm.content.layer.v1+wasm", "a WebAssembly module", "wasmtime"),
        (
            {"mediaType": "application/vnd.wasm.config.v0+json"},
            "application/wasm",
            "a WebAssembly module",
            "wasmtime",
        ),
        ({"mediaType": DOCKER + "plugin.v1+json"}, "", "a plugin", "docker plugin install"),
        (
            {"mediaType": "application/vnd.oci.empty.v1+json"},
            "application/x-model",
            "an artifact (application/x-model)",
            "other artifacts",
        ),
    ],
)
def test_an_artifact(
    changes: dict[str, str], kind: str, words: str, hint: str, run: Shell, tmp_path: Path
) -> None:
    blob = b'{"critical": {}}'
    conf = config(blob)
    described = descriptor(conf, OCI + "config.v1+json") | changes
    body = manifest(conf, blob, kind=kind or "application/x-model", config=described)
    path = layout(tmp_path / "layout", index(descriptor(body, "")), body, conf, blob)
    said = refused(run, "load", path)
    assert f"{path} holds no image: the manifest {diff_id(body)} is {words}" in said[0]
    assert hint in said[1]


@pytest.mark.parametrize(
    ("fields", "words", "hint"),
    [
        (
            {"schemaVersion": 1, "name": "demo", "fsLayers": [], "history": []},
            "has docker's schema 1",
            "skopeo copy docker://NAME docker-archive:FILE",
        ),
        ({"schemaVersion": 2, "config": None, "layers": []}, "is no image manifest", "container"),
        ({"schemaVersion": 2, "layers": []}, "is no image manifest", "container images"),
        ({}, "is no image manifest (of an unknown type)", "container images"),
    ],
)
def test_a_manifest_of_another_kind(
    fields: dict[str, object], words: str, hint: str, run: Shell, tmp_path: Path
) -> None:
    body = json.dumps(fields).encode()
    path = layout(tmp_path / "layout", index(descriptor(body, "")), body)
    message, told = refused(run, "load", path)
    assert words in message
    assert hint in told


@pytest.mark.parametrize("conf", [b"null", b"{}", b'{"rootfs": null}', b"[]", b""])
def test_a_config_that_is_none(conf: bytes, run: Shell, tmp_path: Path) -> None:
    body = manifest(conf, LAYER)
    path = layout(tmp_path / "layout", index(descriptor(body, "")), body, conf, LAYER)
    listed = json.dumps([{"Config": "c.json", "Layers": ["l"]}]).encode()
    archive = tmp_path / "a.tar"
    archive.write_bytes(
        tar(entry("manifest.json", data=listed), entry("c.json", data=conf), entry("l", data=LAYER))
    )
    for given in (path, archive):
        message, hint = refused(run, "load", given)
        assert message.startswith("the config ")
        assert "save" in hint


def test_digests_that_are_not_sha256(run: Shell, tmp_path: Path) -> None:
    digest = "sha512:" + hashlib.sha512(LAYER).hexdigest()
    conf = config(LAYER)
    body = manifest(conf, layers=[descriptor(LAYER, OCI + "layer.v1.tar") | {"digest": digest}])
    path = layout(tmp_path / "layout", index(descriptor(body, "")), body, conf)
    blob = path / "blobs/sha512" / digest.removeprefix("sha512:")
    blob.parent.mkdir()
    blob.write_bytes(LAYER)
    message, hint = refused(run, "load", path)
    assert message == f"{digest} is a sha512 digest, only sha256 ones are supported"
    assert "overlayctl import LAYER.tar" in hint
    run("import", blob, "demo:1")


@pytest.mark.parametrize(
    ("names", "words", "hint"),
    [
        ((), "is no OCI layout: it holds nothing", "an OCI layout has oci-layout"),
        (("b", "a\udcff", "c", "d", "e"), "holds 'a\\udcff', 'b', 'c', 'd', ...", "an OCI layout"),
        (("bin", "etc", "usr"), "holds 'bin', 'etc', 'usr'", "| overlayctl import - NAME"),
    ],
)
def test_a_directory_that_is_no_layout(
    names: tuple[str, ...], words: str, hint: str, run: Shell, tmp_path: Path
) -> None:
    place = tmp_path / "given"
    place.mkdir()
    for name in names:
        (place / name).mkdir()
    message, told = refused(run, "load", place)
    assert words in message
    assert hint in told


@pytest.mark.parametrize(("make", "words"), [(erofs, "an EROFS"), (ext4, "an ext4")])
def test_a_disk_image_begins_as_an_empty_tar_does(
    make: Callable[[Path], bytes], words: str, run: Shell, tmp_path: Path
) -> None:
    (tmp_path / "given").write_bytes(make(tmp_path))
    message, hint = refused(run, "load", tmp_path / "given")
    assert f"it is {words} image" in message
    assert f"mount -o ro,loop {tmp_path}/given DIR && tar -C DIR -cf {tmp_path}/given.tar" in hint


def test_an_empty_tar(run: Shell, tmp_path: Path) -> None:
    (tmp_path / "given").write_bytes(tar())
    assert "it is an empty tar" in refused(run, "load", tmp_path / "given")[0]


def test_a_layout_one_directory_down(run: Shell, tmp_path: Path) -> None:
    one_layer(tmp_path, LAYER, OCI + "layer.v1.tar")
    archive = tmp_path / "with 'quotes'.tar"
    subprocess.run(["tar", "-C", tmp_path, "-cf", archive, "layout"], check=True)
    message, hint = refused(run, "load", archive)
    assert message == f"{archive} has its layout one directory down, in layout"
    unpack, load = hint.split("; overlayctl ")
    inside = tmp_path / "inside"
    inside.mkdir()
    subprocess.run(["bash", "-c", unpack], cwd=inside, check=True)
    run(*shlex.split(load)[:-1], inside / "layout")

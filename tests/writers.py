"""Archives in the shapes that other tools give them, each with that tool's oddities.

Made here because not every machine has the tools or the images that they wrote.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.archives import OCI, config, descriptor, index, layout, manifest, zstd
from tests.layer.tars import directory, entry, hardlink, symlink, tar

Layers = tuple[bytes, ...]
_DOCKER = "application/vnd.docker."
_NAME = "io.containerd.image.name"
_TAG = "org.opencontainers.image.ref.name"
_GZIP = OCI + "layer.v1.tar+gzip"


class Written(NamedTuple):
    """An archive, the layers of each image in it, and the names that it gives them."""

    path: Path
    images: tuple[Layers, ...]
    names: tuple[str, ...] = ()
    platform: str = "amd64"


def hexed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _archive(path: Path, *entries: bytes) -> Path:
    path.write_bytes(tar(*entries))
    return path


# --- docker archives ------------------------------------------------------------------------


def _of_go(path: Path, layers: Layers, tag: str) -> Path:
    """What go-containerregistry writes: no directories, no ``repositories``, packed layers."""
    conf = config(*layers)
    packed = [gzip.compress(layer, mtime=0) for layer in layers]
    names = [f"{hexed(blob)}.tar.gz" for blob in packed]
    listed = [{"Config": f"sha256:{hexed(conf)}", "RepoTags": [tag], "Layers": names}]
    return _archive(
        path,
        entry(f"sha256:{hexed(conf)}", data=conf),
        *(entry(name, data=blob) for name, blob in dict(zip(names, packed, strict=True)).items()),
        entry("manifest.json", data=_json(listed)),
    )


def kaniko(place: Path) -> Written:
    """Every layer starts with ``/``; nothing names the parents of what comes then."""
    layers = (
        tar(
            directory("/", mtime=7),
            directory("etc/", mode=0o750, uid=5, gid=6, mtime=8),
            entry("etc/conf", data=b"one\n", mtime=9),
            hardlink("etc/same", "etc/conf"),
        ),
        tar(directory("/", mtime=10), entry("etc/new", data=b"two\n", mtime=11)),
        tar(directory("/", mtime=12), entry("etc/.wh.conf", mtime=13)),
    )
    return Written(_of_go(place / "kaniko.tar", layers, "demo:kaniko"), (layers,), ("demo:kaniko",))


def ko(place: Path) -> Written:
    """All times are zero, and the same layer may come twice."""
    data = tar(directory("/var/run/ko"), symlink("/var/run/ko/HEAD", "../x"))
    layers = (data, tar(directory("/ko-app"), entry("/ko-app/app", data=b"ELF", mode=0o555)), data)
    name = f"ko.local/app-{'0' * 32}:latest"
    return Written(_of_go(place / "ko.tar", layers, name), (layers,), (name,))


def _of_jib() -> Layers:
    """Every parent is named, every time is the first second of the epoch."""
    return tuple(
        tar(
            directory("app", mtime=1),
            directory(f"app/{part}", mtime=1),
            entry(f"app/{part}/{name}", data=name.encode(), mode=0o644, mtime=1),
        )
        for part, name in (("libs", "a.jar"), ("resources", "x.properties"), ("classes", "M.class"))
    )


def jib(place: Path) -> Written:
    """The config is called ``config.json``, and comes after the layers."""
    layers = _of_jib()
    packed = {f"{hexed(layer)}.tar.gz": gzip.compress(layer, mtime=0) for layer in layers}
    listed = [{"Config": "config.json", "RepoTags": ["gcr.io/p/app:1"], "Layers": list(packed)}]
    path = _archive(
        place / "jib.tar",
        *(entry(name, data=blob, mtime=1) for name, blob in packed.items()),
        entry("config.json", data=config(*layers), mtime=1),
        entry("manifest.json", data=_json(listed), mtime=1),
    )
    return Written(path, (layers,), ("gcr.io/p/app:1",))


def bazel(place: Path) -> Written:
    """Two images of one archive share a layer by a symlink; one layer is an empty tar."""
    shared = tar(directory("./"), directory("./usr"), entry("./usr/base", data=b"1"))
    other = tar(entry("./usr/other", data=b"2"))
    ids = ["1" * 64, "2" * 64, "3" * 64, "4" * 64]
    small, large = config(shared), config(shared, tar(), other)
    listed: list[dict[str, Any]] = [
        {
            "Config": f"{hexed(small)}.json",
            "RepoTags": ["bazel/pkg:small"],
            "Layers": [f"{ids[0]}/layer.tar"],
        },
        {
            "Config": f"{hexed(large)}.json",
            "RepoTags": ["bazel/pkg:large"],
            "Layers": [f"{name}/layer.tar" for name in ids[1:]],
            "Parent": f"sha256:{hexed(small)}",
        },
    ]
    path = _archive(
        place / "bazel.tar",
        entry(f"{hexed(large)}.json", data=large),
        entry(f"{ids[0]}/VERSION", data=b"1.0"),
        symlink(f"{ids[1]}/layer.tar", f"../{ids[0]}/layer.tar"),
        entry(f"{ids[0]}/layer.tar", data=shared),
        entry(f"{ids[2]}/layer.tar", data=tar()),
        entry(f"{ids[3]}/layer.tar", data=other),
        entry(f"{hexed(small)}.json", data=small),
        entry("repositories", data=b"{}"),
        entry("manifest.json", data=_json(listed)),
    )
    names = ("bazel/pkg:small", "bazel/pkg:large")
    return Written(path, ((shared,), (shared, tar(), other)), names)


def _of_docker_25(path: Path, tags: list[str] | None, *, indexed: bool) -> Written:
    layer = tar(directory("etc"), entry("etc/conf", data=b"one\n"))
    conf = config(layer)
    body = manifest(conf, layer)
    blobs = [layer, conf, body]
    tag = (tags or [""])[0]
    notes = {_NAME: f"docker.io/library/{tag}", _TAG: tag.rpartition(":")[2]}
    described = descriptor(body, OCI + "manifest.v1+json", annotations=notes)
    listed = {
        "Config": f"blobs/sha256/{hexed(conf)}",
        "RepoTags": tags,
        "Layers": [f"blobs/sha256/{hexed(layer)}"],
        "LayerSources": {f"sha256:{hexed(layer)}": descriptor(layer, OCI + "layer.v1.tar")},
    }
    _archive(
        path,
        directory("blobs"),
        directory("blobs/sha256"),
        *(entry(f"blobs/sha256/{hexed(blob)}", data=blob) for blob in blobs),
        entry("index.json", data=_json({**index(), "manifests": [described] if indexed else None})),
        entry("manifest.json", data=_json([listed])),
        entry("oci-layout", data=b'{"imageLayoutVersion":"1.0.0"}'),
    )
    return Written(path, ((layer,),), tuple(tags or ()))


def docker_25_by_name(place: Path) -> Written:
    """Both formats in one tar."""
    return _of_docker_25(place / "docker25.tar", ["demo:25"], indexed=True)


def docker_25_by_id(place: Path) -> Written:
    """The index lists ``null`` when the image was saved by its id."""
    return _of_docker_25(place / "docker25.tar", None, indexed=False)


# --- OCI layouts ----------------------------------------------------------------------------


def _layout(
    place: Path,
    layers: Layers,
    pack: Callable[[bytes], bytes] = gzip.compress,
    kind: str = _GZIP,
    manifest_kind: str = OCI + "manifest.v1+json",
    name: str = "",
) -> Path:
    conf, blobs = config(*layers), [pack(layer) for layer in layers]
    body = manifest(conf, *blobs, kind=kind)
    described = descriptor(body, manifest_kind)
    if name:
        described["annotations"] = {_TAG: name}
    return layout(place / "layout", index(described), body, conf, *blobs)


_PLAIN = (tar(directory("a"), entry("a/b", data=b"1")), tar(entry("a/.wh.b"), entry("a/c")))


def jib_oci(place: Path) -> Written:
    """A tar of a layout, whose entries have no directories; the reference is the whole one."""
    root = _layout(place, _of_jib(), name="gcr.io/p/app:1")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    entries = (
        entry(str(path.relative_to(root)), data=path.read_bytes(), mtime=1) for path in files
    )
    return Written(_archive(place / "jib-oci.tar", *entries), (_of_jib(),), ("gcr.io/p/app:1",))


def docker_types(place: Path) -> Written:
    """Docker's media types (schema 2) in a layout, as some registries' mirrors write."""
    conf, blobs = config(*_PLAIN), [gzip.compress(layer) for layer in _PLAIN]
    body = manifest(
        conf,
        *blobs,
        kind=_DOCKER + "image.rootfs.diff.tar.gzip",
        config=descriptor(conf, _DOCKER + "container.image.v1+json"),
        mediaType=_DOCKER + "distribution.manifest.v2+json",
    )
    top = index(descriptor(body, _DOCKER + "distribution.manifest.v2+json"))
    return Written(layout(place / "layout", top, body, conf, *blobs), (_PLAIN,))


def packed_by_zstd(place: Path) -> Written:
    return Written(_layout(place, _PLAIN, zstd, OCI + "layer.v1.tar+zstd"), (_PLAIN,))


def wrong_types(place: Path) -> Written:
    """Plain layers that are said to be packed, in a manifest that is said to be an index."""
    return Written(_layout(place, _PLAIN, bytes, _GZIP, OCI + "index.v1+json"), (_PLAIN,))


def no_types(place: Path) -> Written:
    kind = "application/octet-stream"
    return Written(_layout(place, _PLAIN, zstd, kind, ""), (_PLAIN,))


def foreign_but_there(place: Path) -> Written:
    """A foreign layer whose blob somebody has put into the layout."""
    kind = _DOCKER + "image.rootfs.foreign.diff.tar.gzip"
    return Written(_layout(place, _PLAIN, gzip.compress, kind), (_PLAIN,))


def unreferenced_blobs(place: Path) -> Written:
    path = _layout(place, _PLAIN, name="localhost/demo:3")
    for blob in (b"no JSON", b"{}", tar(entry("x"))):
        (path / "blobs/sha256" / hexed(blob)).write_bytes(blob)
    return Written(path, (_PLAIN,), ("localhost/demo:3",))


def nested_index(place: Path) -> Written:
    """Two platforms in an inner index, with attestations; only arm64 has all its blobs."""
    conf = {arch: config(*_PLAIN, arch=arch) for arch in ("amd64", "arm64")}
    body = {arch: manifest(conf[arch], *_PLAIN) for arch in conf}
    attests = {"vnd.docker.reference.type": "attestation-manifest"}
    inner = _json(
        index(
            *(
                descriptor(body[arch], "", platform={"os": "linux", "architecture": arch})
                for arch in body
            ),
            descriptor(b"gone", "", annotations=attests, platform={"os": "unknown"}),
        )
    )
    notes = {_NAME: "docker.io/library/demo:1", _TAG: "1"}
    top = index(descriptor(inner, OCI + "index.v1+json", annotations=notes))
    path = layout(place / "layout", top, inner, body["arm64"], conf["arm64"], *_PLAIN)
    return Written(path, (_PLAIN,), ("demo:1",), "arm64")


def beside_an_attestation(place: Path) -> Written:
    """Nothing but the type of its layers tells that the second manifest is no image."""
    statement = b'{"_type": "https://in-toto.io/Statement/v0.1"}'
    conf, other = config(*_PLAIN), config(statement)
    body = manifest(conf, *_PLAIN)
    attests = manifest(other, statement, kind="application/vnd.in-toto+json")
    top = index(descriptor(body, ""), descriptor(attests, ""))
    return Written(
        layout(place / "layout", top, body, conf, *_PLAIN, attests, other, statement), (_PLAIN,)
    )


# --- layers ---------------------------------------------------------------------------------


def without_end(place: Path) -> Written:
    """A layer of umoci ends with the last byte of the last file: no padding, no zero blocks."""
    layers = (_PLAIN[0], entry("new", data=b"abc")[:515])
    return Written(_layout(place, layers, name="t"), (layers,))


def estargz(place: Path) -> Written:
    """A gzip member for every entry, a table of contents as the last entry, and a footer."""
    toc = _json({"version": 1, "entries": []})
    entries = [
        directory("a"),
        entry("a/b", data=b"1" * 5000),
        entry(".no.prefetch.landmark", data=b"\x0f"),
        entry("stargz.index.json", data=toc),
        tar(),
    ]
    members = [gzip.compress(one, mtime=0) for one in entries]
    extra = b"SG" + struct.pack("<H", 22) + b"%016x" % sum(map(len, members[:3])) + b"STARGZ"
    footer = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", len(extra)) + extra
    footer += b"\x01\0\0\xff\xff" + bytes(8)
    layers = (b"".join(entries),)
    return Written(_layout(place, layers, lambda _: b"".join(members) + footer), (layers,))


def zstd_chunked(place: Path) -> Written:
    """A zstd frame for every chunk, then the manifest and a footer as skippable frames."""

    def skipped(data: bytes) -> bytes:
        return b"\x50\x2a\x4d\x18" + struct.pack("<I", len(data)) + data

    entries = [directory("a"), entry("a/b", data=b"1" * 5000), tar()]
    layers = (b"".join(entries),)
    packed = b"".join(map(zstd, entries))
    packed += skipped(zstd(b"{}")) + skipped(struct.pack("<7Q", *[0] * 6, 0x6E556C496E554725))
    return Written(_layout(place, layers, lambda _: packed, OCI + "layer.v1.tar+zstd"), (layers,))


WRITERS: tuple[Callable[[Path], Written], ...] = (
    kaniko, ko, jib, bazel, docker_25_by_name, docker_25_by_id, jib_oci, docker_types,
    packed_by_zstd, wrong_types, no_types, foreign_but_there, unreferenced_blobs, nested_index,
    beside_an_attestation, without_end, estargz, zstd_chunked,
)  # fmt: skip

"""The lesson in one run: how images are stored as layers, and what a container adds.

Builds a small real image, then uses the command line as a person would. Every step is
asserted; nothing outside a temporary directory and this process's own mount namespace
is touched.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from overlayctl.kernel import libc

IMAGE = "demo:latest"
CONFIG = "etc/nginx/nginx.conf"


def main() -> int:
    """Run the demonstration; 0 if every step held."""
    if os.geteuid() != 0:
        print("the demo mounts filesystems: run it as root, sudo make demo", file=sys.stderr)
        return 5
    # What is mounted here is seen by nobody else, and goes with this process.
    libc.unshare(libc.CLONE_NEWNS)
    libc.make_private("/")
    place = Path(tempfile.mkdtemp(prefix="overlayctl-demo-"))
    try:
        _demonstrate(place)
    finally:
        store = place / "store"
        if store.exists():
            _run(store, "system", "reset", "-f", shown=False)
        shutil.rmtree(place)
    print("\neverything held; nothing is left")
    return 0


def _demonstrate(place: Path) -> None:
    store = place / "store"
    archive = place / "demo.tar"
    _build(archive)

    _say("an image of four layers, as docker save writes it, is loaded")
    assert f"Loaded image: {IMAGE}" in _run(store, "load", "-i", str(archive))

    _say("each layer has a path of its own, bottom to top")
    paths = [Path(_run(store, "layer", "path", f"{IMAGE}:{n}").strip()) for n in (1, 2, 3, 4)]
    assert all(path.is_dir() for path in paths)
    lower = paths[1] / CONFIG
    layer_file = Path(
        json.loads(_run(store, "inspect", IMAGE, shown=False))[0]["Layers"][1]["File"]
    )
    before = _digest(layer_file)

    _say("the layer's file is the tar itself, from byte 4096 on, and a filesystem at once")
    layer = json.loads(_run(store, "layer", "inspect", f"{IMAGE}:2", "--json", shown=False))
    layer = layer[0] if isinstance(layer, list) else layer
    with layer_file.open("rb") as file:
        file.seek(4096)
        tar = file.read(layer["TarSize"])
    print(f"  sha256 of those {len(tar)} bytes: {hashlib.sha256(tar).hexdigest()}")
    print(f"  the diff_id in the image config:  {layer['DiffID'].removeprefix('sha256:')}")
    assert hashlib.sha256(tar).hexdigest() == layer["DiffID"].removeprefix("sha256:")

    _say("a container is the image and a writable layer; mounted, it is one tree")
    identifier = _run(store, "create", "--name", "c1", IMAGE).strip()
    merged = Path(_run(store, "mount", "c1").strip())
    upper = store / "snapshots" / identifier / "upper"
    assert list(upper.iterdir()) == []

    _say(f"one line more in {CONFIG}: the kernel copies the file up")
    with (merged / CONFIG).open("a") as file:
        file.write("1111\n")
    print(f"  upper: {upper / CONFIG}")
    assert (upper / CONFIG).read_text().endswith("1111\n")
    assert not lower.read_text().endswith("1111\n")
    assert _digest(layer_file) == before
    print("  the lower file and the layer's hash are what they were")

    _say("a deleted file becomes a whiteout: a character device 0:0")
    (merged / "usr/share/doc/demo/README").unlink()
    whiteout = (upper / "usr/share/doc/demo/README").lstat()
    print(f"  {stat.filemode(whiteout.st_mode)} {os.major(whiteout.st_rdev)}:"
          f"{os.minor(whiteout.st_rdev)} {upper / 'usr/share/doc/demo/README'}")  # fmt: skip
    assert stat.S_ISCHR(whiteout.st_mode)
    assert whiteout.st_rdev == 0
    assert (paths[2] / "usr/share/doc/demo/README").exists()

    _say("a second container sees neither")
    _run(store, "create", "--name", "c2", IMAGE)
    other = Path(_run(store, "mount", "c2").strip())
    assert not (other / CONFIG).read_text().endswith("1111\n")
    assert (other / "usr/share/doc/demo/README").exists()

    _say("an image that is needed stays")
    _run(store, "rmi", IMAGE, status=4)

    _say("down again, in the order it went up")
    for name in ("c1", "c2"):
        _run(store, "umount", name)
        _run(store, "rm", name)
    _run(store, "rmi", IMAGE)
    _run(store, "system", "check")
    assert list((store / "layers").iterdir()) == []


def _run(store: Path, *arguments: str, status: int = 0, shown: bool = True) -> str:
    """Run overlayctl; what it printed. Its exit status must be ``status``."""
    if shown:
        print("$ overlayctl " + " ".join(arguments))
    done = subprocess.run(
        [sys.executable, "-m", "overlayctl", "--root", str(store), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if shown:
        print("".join(f"  {line}\n" for line in (done.stdout + done.stderr).splitlines()), end="")
    assert done.returncode == status, done.stderr
    return done.stdout


def _say(what: str) -> None:
    print(f"\n# {what}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(archive: Path) -> None:
    """A docker archive of four layers: programs, a configuration, a document, a deletion."""
    busybox = Path("/bin/busybox")
    programs = [("bin/busybox", busybox)] if busybox.exists() else [("bin/sh", Path("/bin/sh"))]
    layers = [
        _layer(
            *(_file(name, path.read_bytes(), 0o755) for name, path in programs),
            _file("etc/motd", b"welcome\n"),
            _file("tmp/left-over", b"x\n"),
        ),
        _layer(_file(CONFIG, b"worker_processes 1;\n")),
        _layer(_file("usr/share/doc/demo/README", b"read me\n")),
        _layer(_file("tmp/.wh.left-over", b"")),
    ]
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {
                "type": "layers",
                "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers],
            },
            "history": [
                {"created_by": line}
                for line in ("ADD programs /", "COPY nginx.conf", "COPY README", "RUN rm")
            ],
        }
    ).encode()
    names = [f"layer{number}.tar" for number in range(1, 5)]
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": names}]
    with tarfile.open(archive, "w") as out:
        for name, data in (
            ("manifest.json", json.dumps(manifest).encode()),
            ("config.json", config),
            *zip(names, layers, strict=True),
        ):
            info, content = _file(name, data)
            out.addfile(info, content)


def _layer(*files: tuple[tarfile.TarInfo, io.BytesIO]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for info, content in files:
            archive.addfile(info, content)
    return out.getvalue()


def _file(name: str, data: bytes, mode: int = 0o644) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = mode
    return info, io.BytesIO(data)


if __name__ == "__main__":
    sys.exit(main())

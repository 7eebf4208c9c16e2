"""The lesson in one run: how images are stored as layers, and what a container adds.

    scripts/demo.py                  the demonstration (root)
    scripts/demo.py --build FILE     only write the image that it uses, as docker save would

Builds a small real image, then uses the command line as a person would. Every step is
checked; nothing outside a temporary directory and this process's own mount namespace
is touched.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from overlayctl.kernel import libc

IMAGE = "demo:latest"
CONFIG = "etc/nginx/nginx.conf"
README = "usr/share/doc/demo/README"
LEFT_OVER = "tmp/left-over"
LINE = "# written in the container\n"
APPLETS = ("sh", "ls", "cat", "echo", "rm", "stat")
GOARCH = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


class Failed(Exception):
    """A step did not hold."""


def main(arguments: list[str]) -> int:
    """Run the demonstration; 0 if every step held."""
    if arguments[:1] == ["--build"] and len(arguments) == 2:
        _build(Path(arguments[1]))
        return 0
    if arguments:
        print("usage: demo.py [--build FILE]", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        again = shlex.join(["sudo", sys.executable, os.path.abspath(__file__)])
        print(f"The demo mounts filesystems, which needs root: {again}", file=sys.stderr)
        return 5
    try:
        # What is mounted here is seen by nobody else, and goes with this process.
        libc.unshare(libc.CLONE_NEWNS)
        libc.make_private("/")
    except OSError as error:
        print(f"note: no mount namespace of its own ({error.strerror})", file=sys.stderr)
    place = Path(os.path.realpath(tempfile.mkdtemp(prefix="overlayctl-demo-")))
    try:
        Demo(place).run()
    except Failed as failed:
        print(f"\nthe demo failed: {failed}", file=sys.stderr)
        return 1
    finally:
        _clean(place)
    print("\neverything held; nothing is left")
    return 0


class Demo:
    """One run, in one directory."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store = place / "store"
        self.step = 0

    def run(self) -> None:
        """All steps. Raises Failed."""
        archive = self.place / "demo.tar"
        programs = _build(archive)
        print(f"Every command below is run with --root {self.store}")

        self.say("Load an image of four layers, as docker save writes it")
        self.holds(f"Loaded image: {IMAGE}" in self.overlayctl("load", "-i", str(archive)))

        self.say("Each layer has a path of its own; here they are, bottom to top")
        shown = self.overlayctl(
            "image", "inspect", "--format", "{{range .Layers}}{{println .DiffPath}}{{end}}", IMAGE
        )
        diffs = [Path(line) for line in shown.split()]
        self.holds(len(diffs) == 4)
        self.holds(all(path.is_dir() for path in diffs))
        second = self.overlayctl("layer", "path", f"{IMAGE}:2").strip()
        self.holds(Path(second) == diffs[1])
        whiteout = diffs[3] / LEFT_OVER
        print("  the fourth layer only deletes a file of the first; a deletion is a whiteout:")
        self.holds(_whiteout(whiteout))
        self.holds((diffs[0] / LEFT_OVER).is_file())

        self.say("The layer's file is its tar, from byte 4096 on, and a filesystem at once")
        layer = json.loads(self.overlayctl("layer", "inspect", f"{IMAGE}:2", shown=False))[0]
        stored = Path(layer["File"])
        command = f"tail -c +4097 {shlex.quote(str(stored))} | head -c {layer['TarSize']}"
        print(f"$ {command} | sha256sum")
        tar = stored.read_bytes()[4096 : 4096 + layer["TarSize"]]
        print(f"  {hashlib.sha256(tar).hexdigest()}")
        print(f"  {layer['DiffID'].removeprefix('sha256:')}  (the image config's diff_id)")
        self.holds(f"sha256:{hashlib.sha256(tar).hexdigest()}" == layer["DiffID"])
        before = _digest(stored)

        self.say("A container is the image and a writable layer; mounted, it is one tree")
        self.overlayctl("container", "create", "--name", "c1", IMAGE)
        merged = Path(self.overlayctl("container", "mount", "c1").strip())
        upper = Path(
            self.overlayctl("inspect", "--format", "{{.GraphDriver.Data.UpperDir}}", "c1").strip()
        )
        self.holds(os.path.ismount(merged))
        self.holds(not any(upper.iterdir()))
        self.holds((merged / CONFIG).is_file() and (merged / README).is_file())
        self.holds(not os.path.lexists(merged / LEFT_OVER))
        if "bin/busybox" in programs:
            print(f"$ chroot {merged} /bin/ls /etc")
            listed = _output("chroot", str(merged), "/bin/ls", "/etc")
            print(f"  {' '.join(listed.split())}   (printed by the image's own program)")
            self.holds("nginx" in listed.split())

        self.say(f"Append a line to /{CONFIG}: the kernel copies the file up")
        with (merged / CONFIG).open("a") as file:
            file.write(LINE)
        for what, directory, changed in (
            ("merged", merged, True), ("upper", upper, True), ("lower", diffs[1], False),
        ):  # fmt: skip
            text = (directory / CONFIG).read_text()
            print(f"  {what:6} {directory / CONFIG}: {len(text.splitlines())} lines")
            self.holds(text.endswith(LINE) is changed)
        print(f"  sha256 of the layer's file before: {before}")
        print(f"  sha256 of the layer's file now:    {_digest(stored)}")
        self.holds(_digest(stored) == before)

        self.say(f"Delete /{README}: a whiteout in upper, a character device 0:0")
        (merged / README).unlink()
        self.holds(_whiteout(upper / README))
        self.holds(not os.path.lexists(merged / README))
        self.holds((diffs[2] / README).is_file())

        self.say("A second container of the same image sees neither")
        self.overlayctl("container", "create", "--name", "c2", IMAGE)
        other = Path(self.overlayctl("container", "mount", "c2").strip())
        self.holds(not (other / CONFIG).read_text().endswith(LINE))
        self.holds((other / README).is_file())
        print(f"  {other / CONFIG} ends as the image has it, and {README} is there")

        self.say("An image that is needed is not removed; who needs it is named")
        refusal = self.overlayctl("rmi", IMAGE, status=4)
        self.holds("container c1" in refusal and "container c2" in refusal)

        self.say("Unmount and remove the containers, then the image goes, and its layers")
        for name in ("c1", "c2"):
            self.overlayctl("container", "unmount", name)
            self.overlayctl("container", "rm", name)
        self.holds(not upper.exists())
        self.overlayctl("rmi", IMAGE)
        self.holds(not any((self.store / "layers").iterdir()))
        self.overlayctl("system", "check")

        self.say("Reset the store")
        self.overlayctl("system", "reset", "--force")
        self.holds(not _mounted(self.place))

    def say(self, what: str) -> None:
        """Begin the next step."""
        self.step += 1
        print(f"\n{self.step}. {what}")

    def holds(self, condition: bool) -> None:  # noqa: FBT001
        """Raise Failed, with the line that asked, unless so. Unlike assert, -O leaves it."""
        if not condition:
            line = sys._getframe(1).f_lineno  # noqa: SLF001
            raise Failed(f"step {self.step}, {os.path.basename(__file__)} line {line}")

    def overlayctl(self, *arguments: str, status: int = 0, shown: bool = True) -> str:
        """Run the command; what it printed (of a refusal: its words). Raises Failed."""
        if shown:
            print(f"$ overlayctl {shlex.join(arguments)}")
        done = _overlayctl(self.store, *arguments)
        if shown:
            lines = (done.stdout + done.stderr).splitlines()
            print("".join(f"  {line}\n" for line in lines), end="")
        if done.returncode != status:
            raise Failed(
                f"step {self.step}: overlayctl {shlex.join(arguments)}: exit status"
                f" {done.returncode}, not {status}\n{done.stderr}"
            )
        if shown and status:
            print(f"  (exit status {status})")
        return done.stderr if status else done.stdout


def _overlayctl(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "overlayctl", "--root", str(store), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _clean(place: Path) -> None:
    """Remove everything, but never below something that is still a mount."""
    if (place / "store" / "overlayctl.json").exists():
        _overlayctl(place / "store", "system", "reset", "--force")
    if left := _mounted(place):
        print("still mounted, left alone: " + " ".join(left), file=sys.stderr)
        return
    shutil.rmtree(place)


def _mounted(place: Path) -> list[str]:
    """The mountpoints of this namespace below a directory."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        points = [line.split(" ")[4] for line in table]
    return [point for point in points if point.startswith(f"{place}/")]


def _whiteout(path: Path) -> bool:
    """Whether that is one; shown as ls and stat would."""
    found = path.lstat()
    device = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    print(f"  {stat.filemode(found.st_mode)} {device} {path}")
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the image --------------------------------------------------------------------------------


def _build(archive: Path) -> list[str]:
    """Write a docker archive: programs, a configuration, a document, a deletion.

    The result names the programs. Times and owners are 0, so that the same files give the
    same image.
    """
    programs = _programs()
    links = APPLETS if "bin/busybox" in programs else ()
    layers = [
        _layer(
            *(_file(name, path.read_bytes(), 0o755) for name, path in programs.items()),
            *(_link(f"bin/{name}", "busybox") for name in links),
            _file("etc/motd", b"welcome\n"),
            _file(LEFT_OVER, b"of the build\n"),
        ),
        _layer(_file(CONFIG, b"worker_processes 1;\nevents { worker_connections 64; }\n")),
        _layer(_file(README, b"read me\n")),
        _layer(_file("tmp/.wh.left-over", b"")),
    ]
    config = json.dumps(
        {
            "architecture": GOARCH.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {
                "type": "layers",
                "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers],
            },
            "history": [
                {"created_by": line}
                for line in ("ADD programs /", "COPY nginx.conf", "COPY README", "RUN rm left-over")
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
    return list(programs)


def _programs() -> dict[str, Path]:
    """A statically linked busybox, which runs alone; else some files of this host."""
    for found in ("/bin/busybox", shutil.which("busybox")):
        if found and os.path.isfile(found) and _is_static(Path(found)):
            return {"bin/busybox": Path(found)}
    return {f"bin/{name}": Path("/bin", name) for name in ("sh", "cat", "ls")}


def _is_static(path: Path) -> bool:
    """Whether an ELF program asks for no interpreter (elf(5): no PT_INTERP, 3)."""
    data = path.read_bytes()
    if data[:4] != b"\x7fELF":
        return False
    order = "<" if data[5] == 1 else ">"
    wide = data[4] == 2
    offset = struct.unpack_from(order + ("Q" if wide else "I"), data, 32 if wide else 28)[0]
    size, count = struct.unpack_from(f"{order}HH", data, 54 if wide else 42)
    headers = range(offset, offset + size * count, size)
    return all(struct.unpack_from(f"{order}I", data, at)[0] != 3 for at in headers)


_Entry = tuple[tarfile.TarInfo, io.BytesIO | None]


def _layer(*entries: _Entry) -> bytes:
    """A layer tar; the directories above each entry come first."""
    out = io.BytesIO()
    made: set[str] = set()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for info, content in entries:
            for parent in [*Path(info.name).parents][-2::-1]:
                if str(parent) not in made:
                    made.add(str(parent))
                    archive.addfile(_directory(str(parent)))
            archive.addfile(info, content)
    return out.getvalue()


def _directory(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    info.mode = 0o1777 if name == "tmp" else 0o755
    return info


def _file(name: str, data: bytes, mode: int = 0o644) -> _Entry:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = mode
    return info, io.BytesIO(data)


def _link(name: str, target: str) -> _Entry:
    info = tarfile.TarInfo(name)
    info.type = tarfile.SYMTYPE
    info.linkname = target
    info.mode = 0o777
    return info, None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

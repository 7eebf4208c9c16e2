"""An image of one static program that is every command: what runs in containers of the tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.archives import docker_archive
from tests.layer.tars import directory, entry, symlink, tar
from tests.rootmount import missing

APPLETS = (
    "cat", "cmp", "dd", "echo", "env", "grep", "head", "hostname", "id", "kill", "ls", "mkdir",
    "mkfifo", "mount", "printf", "ps", "pwd", "rm", "sh", "sleep", "stat", "stty", "sync", "test",
    "touch", "true", "tty", "umount", "wc",
)  # fmt: skip
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nweb:x:33:44::/srv:/bin/sh\n"
GROUP = b"root:x:0:\nweb:x:44:\nmore:x:55:web,other\nlast:x:66:\n"


def program() -> bytes:
    """The program itself."""
    found = shutil.which("busybox")
    if found is None or b"/ld-" in Path(found).read_bytes():
        missing("a static busybox")
    return Path(found).read_bytes()


def archive(path: Path, *more: bytes, bare: bool = False, **config: Any) -> Path:
    """An image ``box`` with ``more`` entries; ``bare`` has nothing but the program.

    ``config`` is the image's.
    """
    parts = [directory("./"), directory("bin/"), entry("bin/busybox", data=program(), mode=0o755)]
    if not bare:
        parts += [directory(f"{name}/") for name in ("etc", "root", "srv", "proc", "sys", "dev")]
        parts += [
            directory("tmp/", mode=0o1777),
            entry("etc/passwd", data=PASSWD, mode=0o644),
            entry("etc/group", data=GROUP, mode=0o644),
            entry("bin/data", data=b"no program", mode=0o644),
            entry("bin/broken", data=b"no program", mode=0o755),
        ]
    parts += [symlink(f"bin/{name}", "busybox") for name in APPLETS]
    said = {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin", "KEPT=image"], **config}
    return docker_archive(path, [tar(*parts, *more)], tags=("box:latest",), config=said)

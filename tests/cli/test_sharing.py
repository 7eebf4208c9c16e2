"""Two containers of one image share its bytes, on the disk and in memory (measured)."""

from __future__ import annotations

import os
from pathlib import Path

from tests.archives import docker_archive
from tests.cli.conftest import Shell
from tests.layer.tars import entry, tar

SIZE = 8 << 20


def used(place: str) -> int:
    """The bytes that everything below takes as blocks, directories aside."""
    seen = {}
    for above, _, names in os.walk(place):
        for name in names:
            info = os.lstat(os.path.join(above, name))
            seen[info.st_dev, info.st_ino] = info.st_blocks * 512
    return sum(seen.values())


def from_disk() -> int:
    """The bytes that this process has had read from disks (proc_pid_io(5))."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes:")).split()[1])


def test_two_containers_share_the_image_on_the_disk_and_in_memory(
    run: Shell, store: str, tmp_path: Path
) -> None:
    data = os.urandom(SIZE)
    run("load", docker_archive(tmp_path / "a.tar", [tar(entry("big", data=data))]))
    file = run.path("layer", "inspect", "-f", "{{.File}}", "demo:1")
    run("create", "--name", "c1", "demo")
    alone = used(store)
    run("create", "--name", "c2", "demo")
    # Records and nothing of the image.
    assert used(store) - alone < 64 << 10
    seen = [run.path("mount", name) / "big" for name in ("c1", "c2")]
    for path in (*seen, file):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    before = from_disk()
    assert seen[0].read_bytes() == data
    first = from_disk()
    assert seen[1].read_bytes() == data
    second = from_disk()
    # What the first container read is in the page cache, and it is the second's, too.
    assert first - before >= SIZE
    assert second == first
    # Where one of them writes, only its own layer grows.
    with seen[0].open("ab") as big:
        big.write(b"1111")
    assert seen[1].stat().st_size == SIZE
    run("umount", "c1", "c2")
    assert SIZE < used(os.path.join(store, "snapshots")) < 2 * SIZE

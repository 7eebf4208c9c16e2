"""Machines with other kernels: Debian's own, in QEMU without KVM, on this machine's files.

    kernel = debian_kernel(cache, "6.12")
    done = run(kernel, ["uname", "-a"], place=tmp_path / "vm", directory=tmp_path, seconds=60)

The guest sees this machine's root through virtiofs, read-only, below an overlay whose upper
is in memory: so it has every program and library that is here, and nothing to install. Its
one disk, an empty ext4 of its own, is at ``/mnt``.
"""

from __future__ import annotations

import lzma
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.oracles.cache import making
from tests.oracles.command import output
from tests.rootmount import missing, require

MODULES = ("virtio_pci", "virtio_blk", "virtiofs", "overlay", "erofs", "loop", "xfs", "btrfs")
"""What Debian's cloud kernels have as modules, and the guest loads before all else."""

RESULT = "/mnt/result"
"""The file whose bytes come back from the guest."""

_VIRTIOFSD = ("/usr/lib/qemu", "/usr/libexec", "/usr/lib")

_INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
for module in /modules/*; do $b insmod $module; done
$b mount -t virtiofs -o ro host /host
$b mount -t tmpfs tmpfs /memory
$b mkdir /memory/upper /memory/work
$b mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work root /root
for kind in proc sysfs devtmpfs; do
    place=${kind%fs}; $b mount -t $kind $kind /root/${place%tmp}
done
$b mount -t ext4 /root/dev/vda /root/mnt
$b mount -t tmpfs -o mode=755 run /root/run
$b cp /inside /root/run/inside
exec $b switch_root /root /bin/sh /run/inside
"""

_INSIDE = """\
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
ip link set lo up
cd {directory}
{environment} {command}
echo "status $?" >/mnt/status
cat {result} >>/mnt/status
stty -F /dev/ttyS1 raw
cat /mnt/status >/dev/ttyS1
umount /mnt
echo o >/proc/sysrq-trigger
sleep 60
"""


class Kernel(NamedTuple):
    """A kernel, and the contents of its modules in the order in which they have to be loaded."""

    release: str
    image: Path
    modules: tuple[bytes, ...]


class Done(NamedTuple):
    """How a command ended in the guest, what it left in ``RESULT``, what the console showed."""

    status: int
    result: bytes
    console: str
    seconds: float


def debian_kernel(cache: Path, series: str) -> Kernel:
    """Debian's newest kernel of that series (``6.12``) for virtual machines, kept in ``cache``."""
    require("apt-get", "apt-cache", "dpkg-deb")
    name = _newest(series)
    kept = cache / name
    with making(kept) as staging:
        if staging is not None:
            # Not installed: the machine keeps the kernel that it has.
            output("apt-get", "-o", "APT::Sandbox::User=root", "download", name, cwd=staging)
            (archive,) = staging.glob("*.deb")
            output("dpkg-deb", "--extract", archive, staging)
            archive.unlink()
    (release,) = os.listdir(kept / "lib" / "modules")
    modules = _in_order(kept / "lib" / "modules" / release)
    return Kernel(release, kept / "boot" / f"vmlinuz-{release}", tuple(modules))


def _newest(series: str) -> str:
    pattern = rf"linux-image-{re.escape(series)}\.[^ ]*-cloud-amd64"
    listed = output("apt-cache", "search", "--names-only", f"^{pattern}$")
    names = [line.split()[0] for line in listed.splitlines()]
    if not names:
        missing(f"a package of Linux {series}")
    return max(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _in_order(directory: Path) -> list[bytes]:
    """The contents of ``MODULES`` and of what they need, which comes before them."""
    files = {_name(path.name): path for path in directory.glob("kernel/**/*.ko*")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        # What is no file is built in.
        if name in ordered or name not in files:
            return
        data = files[name].read_bytes()
        if files[name].suffix == ".xz":
            data = lzma.decompress(data)
        # The section .modinfo holds strings that end with a NUL.
        _, found, rest = data.partition(b"\0depends=")
        assert found, files[name]
        for needed in rest.partition(b"\0")[0].decode().split(","):
            add(_name(needed))
        ordered[name] = data

    for name in MODULES:
        add(name)
    return list(ordered.values())


def _name(file: str) -> str:
    return file.partition(".")[0].replace("-", "_")


def run(
    kernel: Kernel,
    command: Sequence[str],
    *,
    place: Path,
    directory: Path,
    seconds: float,
    disk: Path | None = None,
) -> Done:
    """Run ``command`` in ``directory`` on a machine with that kernel; all else is in ``place``.

    What is in the directory ``disk`` is on the guest's disk. The machine is gone afterwards.
    If it takes longer than ``seconds`` the test fails.
    """
    require("qemu-system-x86_64", "mkfs.ext4", "busybox")
    place.mkdir()
    _initramfs(kernel, command, directory, place)
    image = place / "disk"
    with image.open("wb") as file:
        file.truncate(16 << 30)
    content = ("-d", disk) if disk else ()
    output("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1", *content, image)
    begin = time.monotonic()
    with _this_machines_root(place) as socket:
        try:
            subprocess.run(
                [
                    "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2",
                    "-m", "3G", "-object", "memory-backend-memfd,id=memory,size=3G,share=on",
                    "-numa", "node,memdev=memory",
                    "-nodefaults", "-display", "none", "-no-reboot",
                    "-kernel", kernel.image, "-initrd", place / "initramfs",
                    "-append", "console=ttyS0 panic=-1 quiet",
                    "-serial", f"file:{place}/console", "-serial", f"file:{place}/answer",
                    "-drive", f"file={image},format=raw,if=virtio,cache=unsafe",
                    "-chardev", f"socket,id=host,path={socket}",
                    "-device", "vhost-user-fs-pci,chardev=host,tag=host",
                ],
                timeout=seconds, check=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            pytest.fail(f"more than {seconds:.0f} s:\n{_console(place)}", pytrace=False)
        finally:
            image.unlink()
    taken = time.monotonic() - begin
    head, _, result = (place / "answer").read_bytes().partition(b"\n")
    if not head.startswith(b"status "):
        pytest.fail(f"the machine stopped early:\n{_console(place)}", pytrace=False)
    return Done(int(head.split()[1]), result, _console(place), taken)


def _console(place: Path) -> str:
    return (place / "console").read_text(errors="replace")


@contextmanager
def _this_machines_root(place: Path) -> Iterator[Path]:
    """The socket of a server of this machine's files; it ends with its only client."""
    found = shutil.which("virtiofsd", path=os.pathsep.join(_VIRTIOFSD))
    if found is None:
        missing("virtiofsd")
    socket = place / "socket"
    with (place / "virtiofsd.log").open("wb") as log:
        server = subprocess.Popen(
            [found, f"--socket-path={socket}", "-o", "source=/,cache=always,sandbox=chroot"],
            stdout=log,
            stderr=log,
        )
    try:
        while not socket.exists():
            assert server.poll() is None, (place / "virtiofsd.log").read_text()
            time.sleep(0.02)
        yield socket
    finally:
        server.terminate()
        server.wait()


def _initramfs(kernel: Kernel, command: Sequence[str], directory: Path, place: Path) -> None:
    tree = place / "tree"
    for name in ("bin", "modules", "proc", "host", "memory", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copy(str(shutil.which("busybox")), tree / "bin" / "busybox")
    for number, module in enumerate(kernel.modules):
        (tree / "modules" / f"{number:03}.ko").write_bytes(module)
    (tree / "init").write_text(_INIT)
    (tree / "init").chmod(0o755)
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "TMPDIR": "/mnt",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    (tree / "inside").write_text(
        _INSIDE.format(
            directory=shlex.quote(str(directory)),
            environment=" ".join(f"{name}={value}" for name, value in environment.items()),
            command=shlex.join(command),
            result=RESULT,
        )
    )
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    with (place / "initramfs").open("wb") as out:
        subprocess.run(
            ["busybox", "cpio", "-o", "-H", "newc"],
            cwd=tree, input=names.encode(), stdout=out, stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip

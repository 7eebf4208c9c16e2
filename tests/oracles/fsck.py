"""``fsck.erofs`` of erofs-utils 1.8, from a chroot of Debian 13.

Debian 12 has 1.5, which cannot read filesystems with 512-byte blocks, and a layer is one.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from . import cache, command

SUITE = "trixie"
# Unpacked, not installed: a program and its libraries need no configured system around them.
# base-files brings the links that make /lib64 a part of /usr.
_PACKAGES = ("base-files", "erofs-utils")
_IMAGE = "mnt/image"

# The file appears in the chroot in a mount namespace that ends with the command: no mount is left
# behind, two at once do not meet, and the file may be on any filesystem.
_RUN = 'mount --bind "$1" "$2/$3"; root=$2; shift 3; exec chroot "$root" "$@"'


class Fsck:
    """The chroot, made below ``directory`` unless it is there: 3 seconds, 20 MB."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / f"erofs-utils-{SUITE}"
        with cache.making(self.root) as staging:
            if staging is not None:
                _build(staging)

    def __call__(self, image: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Check one EROFS file; what a nonzero ``returncode`` means is in stderr.

        ``--extract`` among the options also reads every byte that the filesystem refers to.
        """
        return self.run("fsck.erofs", *options, f"/{_IMAGE}", image=image)

    def dump(self, image: Path, *options: str) -> str:
        """What dump.erofs prints about one EROFS file."""
        done = self.run("dump.erofs", *options, f"/{_IMAGE}", image=image)
        if done.returncode != 0:
            raise command.CommandError(
                ("dump.erofs", *options, image), done.returncode, done.stderr
            )
        return done.stdout

    def run(self, *argv: str, image: Path) -> subprocess.CompletedProcess[str]:
        """Run a program of the chroot that sees ``image`` as ``/mnt/image``."""
        private = ("unshare", "--mount", "--propagation", "private", "/bin/sh", "-ec", _RUN, "sh")
        return subprocess.run(
            [*private, str(image), str(self.root), _IMAGE, *argv],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )


def _build(root: Path) -> None:
    include = f"--include={','.join(_PACKAGES)}"
    command.output("mmdebstrap", "--mode=root", "--variant=extract", include, SUITE, root)
    (root / _IMAGE).parent.mkdir(exist_ok=True)
    (root / _IMAGE).touch()

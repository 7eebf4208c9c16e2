"""A small image with everything in it that a layer format gets wrong, and its last layer's recipe.

Docker makes the image: the root layer is a tar that it keeps byte for byte, three commits follow.
What the last one does, other tools do as well on the first three layers, so that a layer written
by each of them can be compared: times are set to the second, for that is what all of them keep.
"""

from __future__ import annotations

import shutil
import struct
import tarfile
from pathlib import Path
from typing import Any

from tests.layer.tars import directory, entry, symlink, tar
from tests.oracles.peers import Dockerd
from tests.rootmount import missing

BASE = "interop/small:three"
NAME = "interop:four"
OTHER_NAME = "registry.test:5000/team/interop:four"
BUILDAH_NAME = "localhost/by-buildah:four"

TIME = 1_234_567_890
_LONG = "long-" + "n" * 110
# <linux/capability.h>: revision 2, effective; cap_net_raw is 13.
_CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
_APPLETS = ("cat", "chmod", "chown", "ln", "mkdir", "mkfifo", "mv", "printf", "rm", "sh", "touch")

LAYER_2 = f"""
rm /etc/gone /odd/a-b
rm -r /srv/tree
rm -r /srv/opaque && mkdir -m 750 /srv/opaque && echo new > /srv/opaque/new
rm -r /srv/recreated
echo two > /data/two && ln /data/two /data/zwei && ln -s two /data/link
printf x > /odd/{_LONG}.2
chmod 4711 /data/two
touch -h -d @{TIME} /etc /odd /srv /srv/opaque /srv/opaque/new /data /data/two /data/link
touch -d @{TIME} /odd/{_LONG}.2
"""

LAYER_3 = f"""
mkdir /srv/recreated && echo again > /srv/recreated/again
rm /srv/file && mkdir /srv/file && echo f > /srv/file/f
rm -r /srv/directory && echo file > /srv/directory
ln /data/one /data/eins
chown 33:44 /data/two
mkfifo -m 600 /data/pipe
touch -h -d @{TIME} /srv /srv/recreated /srv/recreated/again /srv/file /srv/file/f /srv/directory
touch -d @{TIME} /data /data/pipe
"""

LAYER_4 = f"""
echo changed >> /etc/conf
rm /data/link /srv/opaque/new
rm -r /srv/recreated && mkdir /srv/recreated && echo third > /srv/recreated/third
rm -r /srv/replaced && mkdir -m 2775 /srv/replaced && echo r > /srv/replaced/new
mv /usr/bin/ping /usr/bin/pong
cat /etc/conf > /usr/bin/su && chmod 6755 /usr/bin/su
printf 1 > "/odd/$(printf '\\377\\376').new"
printf 2 > /odd/gr\u00fc\u00dfe && printf 3 > /odd/{_LONG}
ln -s /nowhere /data/dangling && chown -h 5:6 /data/dangling
echo h > /data/h1 && ln /data/h1 /srv/h2
touch -h -d @{TIME} /etc /etc/conf /data/dangling /data/h1 /data /odd /usr/bin /usr/bin/su
touch -d @{TIME} /srv /srv/opaque /srv/recreated /srv/recreated/third
touch -d @{TIME} /srv/replaced /srv/replaced/new
touch -d @{TIME} "/odd/$(printf '\\377\\376').new" /odd/gr\u00fc\u00dfe /odd/{_LONG}
"""


def root_tar(path: Path) -> Path:
    """Write the root layer to ``path``."""
    busybox = shutil.which("busybox")
    if busybox is None or b"/ld-" in Path(busybox).read_bytes():
        missing("a static busybox")
    parents = ("", "bin", "data", "etc", "odd", "srv", "usr", "usr/bin")
    lower = ("opaque", "recreated", "replaced", "tree", "tree/deep", "directory")
    path.write_bytes(
        tar(
            *(_dir(f"./{name}") for name in parents),
            *(_dir(f"srv/{name}") for name in lower),
            _dir("tmp", mode=0o1777),
            _file("bin/busybox", Path(busybox).read_bytes(), mode=0o755),
            *(_link(f"bin/{name}", "bin/busybox", mode=0o755) for name in _APPLETS),
            _file("etc/conf", b"one\n"),
            _file("etc/gone"),
            _file("usr/bin/su", b"su\n", mode=0o4755),
            _file("usr/bin/ping", b"ping\n", mode=0o755, xattrs={"security.capability": _cap()}),
            _file("data/noted", b"n\n", xattrs={"user.note": "kept"}, mtime=TIME + 0.25),
            _file("data/one", b"1\n", uid=1234, gid=4_000_000_000),
            _link("data/uno", "data/one", mode=0o644, uid=1234, gid=4_000_000_000),
            symlink("data/absolute", "/etc/conf", mtime=TIME),
            _file("odd/a-b"),
            _file("odd/a b\n\\"),
            _file("odd/\u00e9t\u00e9"),
            _file("odd/latin-\udce9"),
            _file(f"odd/{_LONG}.1"),
            *(_file(f"srv/{directory}/old") for directory in lower),
            _file("srv/opaque/new", b"old\n"),
            _file("srv/file"),
            entry("srv/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666, mtime=TIME),
        )
    )
    return path


def _cap() -> str:
    return _CAPABILITY.decode("utf-8", "surrogateescape")


def _dir(name: str, mode: int = 0o755) -> bytes:
    return directory(name + "/", mode=mode, mtime=TIME)


def _file(name: str, data: bytes = b"", **fields: Any) -> bytes:
    return entry(name, data=data, **{"mode": 0o644, "mtime": TIME, **fields})


def _link(name: str, target: str, **fields: Any) -> bytes:
    # Docker and containerd set mode, owner and time from the hard link's own entry.
    return entry(name, tarfile.LNKTYPE, linkname=target, mtime=TIME, **fields)


def build(dockerd: Dockerd, place: Path) -> None:
    """Make the image ``NAME`` in ``dockerd``, and ``BASE``, the same without its last layer."""
    dockerd.import_rootfs(root_tar(place / "root.tar"), "interop/small:one")
    dockerd.commit_layer("interop/small:one", LAYER_2, "interop/small:two")
    dockerd.commit_layer("interop/small:two", LAYER_3, BASE)
    dockerd.commit_layer(BASE, LAYER_4, NAME, ['CMD ["/bin/sh"]'])
    dockerd.docker("tag", NAME, OTHER_NAME)

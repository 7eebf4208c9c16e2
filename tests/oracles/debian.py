"""A real Debian image of four layers, made on the spot.

About 600 MB and 17,600 entries: mmdebstrap makes the root layer, docker three more on top, with
everything in them that people's images have and that a layer format gets wrong: whiteouts, opaque
directories, hard links, file capabilities, setuid, device nodes, names that are no text. The same
image then comes in several wrappings.

The result is kept: a second call with the same directory and recipe only looks.
"""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import cache, command
from .peers import Dockerd

SUITE = "bookworm"
VARIANT = "buildd"
PACKAGES = ("attr", "git", "libcap2-bin", "nginx-light", "python3")
REFERENCE = "overlayctl.test/debian:four"
TAG = "four"

# What docker's commit would drop goes into the root layer, whose tar is kept byte for byte: user
# xattrs, times with nanoseconds, a time before 1970 with a fraction.
PREPARE_ROOT = """
set -e
cd "$1"
setfattr -n user.overlayctl.note -v 'kept by the tar' etc/debian_version
setfattr -n user.mime_type -v text/plain usr/share/doc/git/README.md
setfattr -n user.dir -v 'on a directory' srv
setcap cap_net_raw+ep usr/bin/nice
mkdir -p srv/old 'srv/with space' && echo old > srv/old/file
touch -d '1960-02-03 04:05:06.789012345 UTC' srv/old/file
touch -d '2001-02-03 04:05:06.000000007 UTC' srv/old
echo one > srv/one && ln srv/one srv/uno && ln srv/one 'srv/with space/ein'
chown 1234:4321 srv/one
chmod 1777 'srv/with space'
rm -rf var/cache/apt/archives/*.deb var/cache/apt/*.bin
"""

# A program with its data: many small files, some big ones, hard links, odd names.
LAYER_2 = r"""
umask 022
mkdir -p /opt/app
cp -a /usr/share/doc/git /opt/app/doc
cp -a /usr/lib/python3.11/email /usr/lib/python3.11/json /opt/app/
cp -a --link /opt/app/json /opt/app/json.linked
python3 - <<'END'
import os, random
make = random.Random(2)
os.makedirs(b"/opt/app/data")
for number in range(12):
    with open(b"/opt/app/data/%02d.bin" % number, "wb") as file:
        file.write(make.randbytes(4_000_000 + 7 * number))
for size in (0, 1, 511, 512, 513, 4095, 4096, 4097):
    with open(b"/opt/app/data/size-%d" % size, "wb") as file:
        file.write(make.randbytes(size))
os.makedirs(b"/opt/odd")
odd = [b"a b", b"a:b", b"a,b", b"a\\b", b"a\nb", b"a\\054b", b"-n", b"n" * 250]
for name in (*odd, b"\xff\xfe", "h\u00e9llo".encode()):
    with open(b"/opt/odd/" + name, "wb") as file:
        file.write(name)
deep = b"/opt/odd" + b"/deep" * 60
os.makedirs(deep)
os.symlink(b"../" * 60 + b"a b", deep + b"/link")
os.symlink(b"x" * 300, b"/opt/odd/long target")
os.makedirs(b"/opt/many")
for number in range(600):
    os.symlink(b"../app/data/00.bin", b"/opt/many/%04d" % number)
END
truncate -s 8M /opt/app/data/sparse && printf end >> /opt/app/data/sparse
mkdir -m 700 /opt/app/cache && echo 1 > /opt/app/cache/one && echo 2 > /opt/app/cache/two
mkdir -p /opt/app/cache/deeper && echo 3 > /opt/app/cache/deeper/three
mkdir -p /opt/app/swap.dir && echo s > /opt/app/swap.dir/s && echo f > /opt/app/swap.file
"""

# What changes a lower layer in every way there is.
LAYER_3 = r"""
umask 022
rm /usr/share/doc/git/README.md /opt/app/data/11.bin '/opt/odd/a b' /opt/odd/$(printf '\377\376')
rm -r /usr/share/doc/git/RelNotes /opt/app/doc/contrib
rm -rf /opt/app/cache && mkdir -m 750 /opt/app/cache && echo new > /opt/app/cache/two
rm -rf /opt/app/swap.dir && echo now a file > /opt/app/swap.dir
rm /opt/app/swap.file && mkdir /opt/app/swap.file && echo x > /opt/app/swap.file/x
rm -rf /opt/many && ln -s app /opt/many
cd /usr/local/bin
cp /usr/bin/id id-suid && chmod 4755 id-suid
cp /usr/bin/id id-sgid && chgrp 42 id-sgid && chmod 2755 id-sgid
cp /bin/cat cat-caps && setcap cap_dac_read_search,cap_chown+ep cat-caps
echo secret > /root/secret && chmod 600 /root/secret
ln /opt/app/data/size-513 /opt/app/data/size-513.again && ln /opt/app/data/size-513 /opt/odd/linked
ln -s /nowhere /opt/app/dangling && ln /opt/app/dangling /opt/app/dangling.again
echo more >> /opt/app/json/__init__.py
mkdir -p /opt/nodes && cd /opt/nodes
mknod null c 1 3 && mknod -m 640 disk b 8 1 && mkfifo -m 600 pipe && chown 7:8 disk
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("/opt/nodes/socket")'
chmod 2775 /opt/app && chown 33:33 /opt/app/data
mkdir -m 1777 /opt/sticky
chown -h 5:6 /opt/app/dangling
chown 65534:65534 /opt/odd/a:b && chown 4000000000:4000000001 /opt/odd/a,b
touch -d '2010-11-12 13:14:15.161718192 UTC' /opt/odd/a:b /opt/sticky
touch -d '1969-12-31 23:59:58 UTC' /opt/odd/-n
"""

# A person's last edits.
LAYER_4 = r"""
echo '# overlayctl test' >> /etc/nginx/nginx.conf
sed -i 's/listen 80 /listen 8080 /' /etc/nginx/sites-available/default
rm /etc/nginx/sites-enabled/default
ln -s ../sites-available/default /etc/nginx/sites-enabled/site
echo '<h1>four layers</h1>' > /var/www/html/index.html
echo back > /usr/share/doc/git/README.md
chmod 700 /srv/old
"""

LAYERS = (LAYER_2, LAYER_3, LAYER_4)
CHANGES = (
    'ENTRYPOINT ["/usr/sbin/nginx"]',
    'CMD ["-g", "daemon off;"]',
    "ENV LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "WORKDIR /srv",
    "EXPOSE 8080",
    "LABEL org.example.title=overlayctl-test",
)


class DebianImage(NamedTuple):
    """One image (same config, same layers) in the wrappings that people have it in."""

    reference: str
    docker_archive: Path
    """``docker save`` of docker 20.10."""
    oci_gzip: Path
    """An OCI layout directory with gzip layers."""
    oci_zstd: Path
    """An OCI layout directory with zstd layers."""
    oci_zstd_tar: Path
    """The same as one tar file."""


def find(directory: Path) -> DebianImage | None:
    """Return the image that :func:`build` has made below ``directory``, if it has."""
    home = _home(directory)
    return _image(home) if home.is_dir() else None


def build(directory: Path, dockerd: Dockerd) -> DebianImage:
    """Make the image below ``directory``, unless it is there.

    Making it takes one to two minutes, and 3 GB while it lasts; 1.3 GB stay.
    """
    home = _home(directory)
    with cache.making(home) as staging:
        if staging is not None:
            _build(staging, dockerd)
    return _image(home)


def _home(directory: Path) -> Path:
    recipe = (SUITE, VARIANT, *PACKAGES, REFERENCE, PREPARE_ROOT, *LAYERS, *CHANGES)
    return directory / f"debian-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}"


def _image(home: Path) -> DebianImage:
    return DebianImage(
        reference=REFERENCE,
        docker_archive=home / "docker-archive.tar",
        oci_gzip=home / "oci-gzip",
        oci_zstd=home / "oci-zstd",
        oci_zstd_tar=home / "oci-zstd.tar",
    )


def _build(staging: Path, dockerd: Dockerd) -> None:
    rootfs = staging / "rootfs.tar"
    _root_layer(staging / "rootfs", rootfs)
    step = REFERENCE.partition(":")[0]
    refs = [f"{step}:{number}" for number in range(1, len(LAYERS) + 1)] + [REFERENCE]
    dockerd.import_rootfs(rootfs, refs[0])
    rootfs.unlink()
    for below, script, ref in zip(refs, LAYERS, refs[1:], strict=False):
        dockerd.commit_layer(below, script, ref, CHANGES if ref == REFERENCE else ())
    archive = staging / "docker-archive.tar"
    dockerd.save(REFERENCE, archive)
    dockerd.docker("image", "rm", "--force", *refs)
    with ThreadPoolExecutor() as pool:
        gzip = pool.submit(_to_oci, archive, staging / "oci-gzip", "gzip")
        zstd = pool.submit(_to_oci, archive, staging / "oci-zstd", "zstd")
        gzip.result()
        zstd.result()
    command.output(
        "tar",
        "--create",
        "--file",
        staging / "oci-zstd.tar",
        "--directory",
        staging / "oci-zstd",
        ".",
    )


def _root_layer(rootfs: Path, tar: Path) -> None:
    """Make Debian, and a PAX tar of it: mmdebstrap's has no user xattrs and no nanoseconds."""
    include = f"--include={','.join(PACKAGES)}"
    command.output("mmdebstrap", "--mode=root", f"--variant={VARIANT}", include, SUITE, rootfs)
    command.output("/bin/sh", "-c", PREPARE_ROOT, "sh", rootfs)
    options = ("--numeric-owner", "--xattrs", "--xattrs-include=*", "--sort=name", "--format=posix")
    command.output("tar", "--create", *options, "--file", tar, "--directory", rootfs, ".")
    shutil.rmtree(rootfs)


def _to_oci(archive: Path, layout: Path, compression: str) -> None:
    source = f"docker-archive:{archive}"
    formats = ("--dest-compress-format", compression)
    policy = "--insecure-policy"  # a fresh machine has no containers-policy.json(5)
    command.output("skopeo", policy, "copy", "--quiet", *formats, source, f"oci:{layout}:{TAG}")

"""A layer unpacked is the layer mounted, and a filesystem that cannot hold it says so by name.

Runs last: every small layer that another test of the session wrote is one of the inputs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from overlayctl import formats
from overlayctl.errors import HostCannot, OverlayctlError
from overlayctl.layer import archive
from overlayctl.layer.index import Index
from tests import both_ways, filesystems
from tests.archives import content
from tests.layer.tars import directory, entry, hardlink, symlink, tar
from tests.layer.test_tree import build

CAPABILITY = "\x01\x00\x00\x02\x00\x04\x00\x00" + "\x00" * 12
ACL = bytes.fromhex("02000000 01000600ffffffff 04000400ffffffff 10000600ffffffff 20000400ffffffff")
TEXT = ("utf-8", "surrogateescape")


def everything() -> bytes:
    return tar(
        directory("./", mode=0o711, mtime=5, xattrs={"user.root": "1"}),
        entry("file", data=b"x" * 5000, mode=0o640, uid=7, gid=70000, mtime=1234567890),
        entry("suid", data=b"s", mode=0o4755, xattrs={"security.capability": CAPABILITY}),
        entry("acl", data=b"a", mode=0o664, xattrs={"system.posix_acl_access": ACL.decode(*TEXT)}),
        directory("inherits", mode=0o2775, xattrs={"system.posix_acl_default": ACL.decode(*TEXT)}),
        entry("inherits/not", data=b"1", mode=0o600),
        directory("inherits/deeper", mode=0o700),
        directory("sticky", mode=0o1777, mtime=0),
        entry("sticky/hidden", data=b""),
        hardlink("sticky/one", "file"),
        hardlink("two", "file"),
        symlink("link", "nowhere", uid=3, mtime=77, xattrs={"trusted.link": "1"}),
        hardlink("same-link", "link"),
        entry("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        entry("dev/big", tarfile.BLKTYPE, devmajor=511, devminor=262143),
        entry("dev/pipe", tarfile.FIFOTYPE),
        entry("early", pax={"mtime": "-3.000000001"}),
        entry("gone/.wh.file"),
        directory("opaque"),
        entry("opaque/.wh..wh..opq"),
        entry("overlay", xattrs={"trusted.overlay.redirect": "/etc"}),
        entry(os.fsdecode(b"n\xff\n:,\\") + "/x", data=b"odd"),
        directory("read-only", mode=0),
        entry("read-only/inside", data=b"1", mode=0),
    )


def layer(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "layer.erofs"
    build(path, data).close()
    return path


def test_everything_on_the_disk_that_the_store_is_on(tmp_path: Path) -> None:
    file = layer(tmp_path, everything())
    tree = both_ways.unpacked(file, tmp_path / "tree")
    with both_ways.mounted(file, tmp_path / "mnt") as mount:
        assert both_ways.differences(mount, tree) == []
        assert os.stat(tree / "file").st_nlink == os.stat(mount / "file").st_nlink == 3


@pytest.mark.parametrize("form", ["posix", "gnu"])
def test_holes_stay_holes(tmp_path: Path, form: str) -> None:
    place = tmp_path / "sparse"
    place.mkdir()
    with (place / "s").open("wb") as file:
        file.truncate(200 << 20)
        for at in (0, 100 << 20, (200 << 20) - 3):
            file.seek(at)
            file.write(b"end")
    with (place / "hole").open("wb") as file:
        file.truncate(10 << 20)
    (place / "full").write_bytes(b"f" * 70000)
    command = ["tar", "-C", str(place), f"--format={form}", "--sparse", "-cf", "-", "."]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    made = layer(tmp_path, data)
    tree = both_ways.unpacked(made, tmp_path / "tree")
    with both_ways.mounted(made, tmp_path / "mnt") as mount:
        assert both_ways.differences(mount, tree) == []
    with Index.open(made) as index:
        for name in ("s", "hole", "full"):
            node = index.lookup(name.encode())
            assert node is not None
            assert both_ways.extents(tree / name) == list(index.extents(node))
    assert (tree / "s").stat().st_blocks * 512 < 1 << 20
    assert (tree / "hole").stat().st_blocks == 0


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "tmpfs"])
def test_everything_on_other_filesystems(tmp_path: Path, kind: str) -> None:
    file = layer(tmp_path, everything())
    with filesystems.mounted(kind, tmp_path, name="disk") as disk:
        tree = both_ways.unpacked(file, disk / "tree")
        with both_ways.mounted(file, tmp_path / "mnt") as mount:
            assert both_ways.differences(mount, tree) == []


EARLY = entry("sub/early", mtime=-(2**40))
LARGE = entry("sub/x", xattrs={"user.x": "v" * 30_000})
MALFORMED = entry("sub/acl", xattrs={"system.posix_acl_access": "not an ACL"})
LONG = symlink("sub/link", "t" * 1025)
DEVICE = entry("sub/dev", tarfile.BLKTYPE, devmajor=4095, devminor=1048575)
CANNOT = {
    "ext4": {"time": EARLY, "xattr": LARGE, "ACL": MALFORMED},
    "xfs": {"time": EARLY, "symlink": LONG, "device": DEVICE, "ACL": MALFORMED},
    "btrfs": {"xattr": LARGE, "ACL": MALFORMED},
    "tmpfs": {"ACL": MALFORMED},
}


@pytest.mark.parametrize("kind", CANNOT)
def test_what_a_filesystem_cannot_hold_is_named(tmp_path: Path, kind: str) -> None:
    with filesystems.mounted(kind, tmp_path, name="disk") as disk:
        for number, (what, one) in enumerate(CANNOT[kind].items()):
            made = layer(tmp_path, tar(one))
            with pytest.raises(HostCannot, match="'sub/") as refused:
                both_ways.unpacked(made, disk / str(number))
            assert "system info" in refused.value.hint, what
        # What one cannot hold, another does.
        if kind == "tmpfs":
            for number, one in enumerate((EARLY, LARGE, LONG, DEVICE)):
                both_ways.unpacked(layer(tmp_path, tar(one)), disk / f"held-{number}")


def test_more_links_than_ext4_counts_are_named(tmp_path: Path) -> None:
    links = (hardlink(f"d/{n}", "file") for n in range(65_000))
    made = layer(tmp_path, tar(entry("file"), *links))
    with pytest.raises(HostCannot, match="Too many links"):
        both_ways.unpacked(made, tmp_path / "tree")


def test_layers_of_other_tools_images(tmp_path: Path, images: Path, written_layers: Path) -> None:
    """Kept for the comparison below; what is refused at loading has tests elsewhere."""
    count = 0
    for path in sorted(images.rglob("*")):
        if path.is_file() and path.stat().st_size < 64 << 20:
            with TemporaryDirectory(dir=tmp_path) as place:
                count += _write_layers(path, Path(place))
    assert count > 50
    assert written_layers.is_dir()


def _write_layers(path: Path, place: Path) -> int:
    count = 0
    try:
        with archive.open_archive(str(path), lambda: str(place)) as opened:
            for found in formats.read_images(opened, platform=None):
                for one in found.layers:
                    build(place / "layer", content(one.source)).close()
                    count += 1
    except OverlayctlError:
        pass
    return count


def test_every_layer_that_this_session_wrote(tmp_path: Path, written_layers: Path) -> None:
    layer(tmp_path, everything())
    # A tmpfs holds more than ext4, and forgets it faster.
    place = tmp_path / "tmpfs"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    compared = 0
    refused: list[str] = []
    for number, file in enumerate(sorted(written_layers.iterdir())):
        try:
            tree = both_ways.unpacked(file, place / str(number))
        except HostCannot as error:
            refused.append(str(error))
            continue
        with both_ways.mounted(file, tmp_path / "mnt") as mount:
            assert both_ways.differences(mount, tree) == [], file
        compared += 1
        shutil.rmtree(tree)
    subprocess.run(["umount", place], check=True)
    # Malformed ACLs and capabilities, which setxattr(2) takes nowhere: nothing else is refused.
    reasons = ("sub/acl", "ACL", "Invalid argument")
    assert [text for text in refused if not any(reason in text for reason in reasons)] == []
    print(f"{compared} layers compared, {len(refused)} refused")
    assert compared > len(refused)

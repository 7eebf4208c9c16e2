"""What a layer's tree has to be, told by GNU tar and a second reading of the OCI rules.

GNU tar unpacks the layer into a plain directory; the whiteout files that it leaves there become
what overlayfs understands. Python's tarfile says which names the archive holds. Neither shares a
line with the program under test.

Not decided here, because GNU tar does something else than the engines do: a name below an absolute
symlink of the same layer, a parent that is a file, a non-empty directory replaced by a file, hard
links into lower layers. GNU tar fails on all of them, and so does :func:`apply_layer`.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from . import command

_PREFIX = b".wh."
_AUFS = b".wh..wh."
_OPAQUE_MARKER = b".wh..wh..opq"
_OPAQUE = b"trusted.overlay.opaque"
_OVERLAY = b"trusted.overlay."
_PAX_OVERLAY = "SCHILY.xattr.trusted.overlay."
_EXTRACT = (
    "--extract",
    "--numeric-owner",
    "--same-permissions",
    "--same-owner",
    "--delay-directory-restore",
    "--xattrs",
    "--xattrs-include=*",
    "--xattrs-exclude=security.selinux",
)

Path = str | bytes | os.PathLike[str]


class Applied(NamedTuple):
    """What the tree alone does not tell."""

    implied: frozenset[bytes]
    """Directories that no entry of the tar names (perhaps ``b""``, the root): 0755, root, no xattrs
    here. In an image they look like the directory that they cover."""


class _Listing(NamedTuple):
    directories: set[bytes]
    markers: list[bytes]
    """Names that begin with ``.wh.``."""
    steered: list[bytes]
    """Entries that carry ``trusted.overlay.*``."""


def apply_layer(tar: Path, dest: Path) -> Applied:
    """Make ``dest`` the directory that the uncompressed layer ``tar`` stands for.

    ``dest`` is made if need be, and has to be on a filesystem with xattrs and device nodes (ext4,
    xfs, btrfs). Whiteouts are character devices 0:0 with the owner and time of their
    entries, opaque directories carry ``trusted.overlay.opaque=y``. ``trusted.overlay.*`` that comes
    in the tar is escaped, as in an overlay's upper directory that holds another one
    (``trusted.overlay.overlay.*``). ``security.selinux`` is left out.
    """
    root = os.fsencode(dest)
    os.makedirs(root, exist_ok=True)
    with _padded(tar) as whole:
        command.output("tar", *_EXTRACT, "--directory", root, "--file", whole)
        listing = _list(whole, root)
    tree = _Tree(root, listing)
    tree.escape()
    tree.apply_markers()
    return Applied(tree.settle_implied())


@contextmanager
def _padded(tar: Path) -> Iterator[Path]:
    """The tar with the zeros that its end implies: umoci writes them not, GNU tar wants them."""
    size = os.stat(tar).st_size
    if size and size % 512 == 0:
        yield tar
        return
    with tempfile.NamedTemporaryFile() as copy, open(tar, "rb") as file:
        shutil.copyfileobj(file, copy)
        copy.write(bytes(-size % 512 + 1024))
        copy.flush()
        yield copy.name


def _list(tar: Path, root: bytes) -> _Listing:
    """Read the archive's names, each by the place where it went in ``root``."""
    real_root = os.path.realpath(root)
    parents: dict[bytes, bytes] = {b"": b""}
    listing = _Listing(set(), [], [])
    with tarfile.open(tar, "r:", encoding="utf-8", errors="surrogateescape") as archive:
        for member in archive:
            name = os.fsencode(member.name)
            path = b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))
            parent, _, base = path.rpartition(b"/")
            if parent not in parents:
                # `bin/sh` is in `usr/bin` where the layer has a symlink `bin`.
                real = os.path.realpath(os.path.join(real_root, parent))
                parents[parent] = os.path.relpath(real, real_root) if real != real_root else b""
            path = os.path.join(parents[parent], base)
            if base.startswith(_PREFIX):
                listing.markers.append(path)
            elif member.isdir():
                listing.directories.add(path)
            if any(key.startswith(_PAX_OVERLAY) for key in member.pax_headers):
                listing.steered.append(path)
    return listing


class _Tree:
    """The unpacked directory, whiteout files still in it."""

    def __init__(self, root: bytes, listing: _Listing) -> None:
        self.root = root
        self.listing = listing
        self.marker_times: dict[bytes, int] = {}

    def at(self, path: bytes) -> bytes:
        return os.path.join(self.root, path) if path else self.root

    def escape(self) -> None:
        """Keep an archive from telling the kernel how to overlay it."""
        for path in set(self.listing.steered):
            place = self.at(path)
            names = os.listxattr(place, follow_symlinks=False)
            values = {
                name: os.getxattr(place, name, follow_symlinks=False)
                for name in map(os.fsencode, names)
                if name.startswith(_OVERLAY)
            }
            for name in values:
                os.removexattr(place, name, follow_symlinks=False)
            for name, value in values.items():
                escaped = _OVERLAY + b"overlay." + name.removeprefix(_OVERLAY)
                os.setxattr(place, escaped, value, follow_symlinks=False)

    def apply_markers(self) -> None:
        """Turn ``.wh.`` files into whiteouts and opaque marks (OCI image-spec, layer.md).

        A marker says something about lower layers only: one beside a file of the name that it
        hides does nothing, one beside a directory makes that directory opaque.
        """
        opaque: set[bytes] = set()
        whiteouts: dict[bytes, os.stat_result] = {}
        times: dict[bytes, int] = {}
        for path in dict.fromkeys(self.listing.markers):
            parent, _, base = path.rpartition(b"/")
            if not os.path.lexists(self.at(path)):
                continue  # inside a directory .wh..wh.plnk that has gone
            times.setdefault(parent, os.lstat(self.at(parent)).st_mtime_ns)
            info = os.lstat(self.at(path))
            self.marker_times[path] = info.st_mtime_ns
            if stat.S_ISDIR(info.st_mode):
                shutil.rmtree(self.at(path))
            else:
                os.unlink(self.at(path))
            if base == _OPAQUE_MARKER:
                opaque.add(parent)
            elif not base.startswith(_AUFS):
                hidden = os.path.join(parent, base.removeprefix(_PREFIX))
                whiteouts[hidden] = info
        for path in whiteouts:
            if os.path.isdir(self.at(path)) and not os.path.islink(self.at(path)):
                opaque.add(path)
        for path in opaque:
            os.setxattr(self.at(path), _OPAQUE, b"y")
        for path, info in whiteouts.items():
            if path.rpartition(b"/")[0] not in opaque and not os.path.lexists(self.at(path)):
                place = self.at(path)
                os.mknod(place, stat.S_IFCHR, os.makedev(0, 0))
                os.chown(place, info.st_uid, info.st_gid)
                os.utime(place, ns=(info.st_mtime_ns, info.st_mtime_ns))
        for path, time in times.items():
            os.utime(self.at(path), ns=(time, time))

    def settle_implied(self) -> frozenset[bytes]:
        """Give directories that the tar does not name the attributes that everybody can agree on.

        Their time is that of the newest direct child that has one of its own, else of the newest
        entry anywhere below, else (nothing is there but markers) of the newest marker.
        """
        implied: set[bytes] = set()
        direct: dict[bytes, list[int]] = {}
        below: dict[bytes, list[int]] = {}
        for found, directories, others in os.walk(self.root):
            parent = os.path.relpath(found, self.root) if found != self.root else b""
            if parent not in self.listing.directories:
                implied.add(parent)
            for name in (*directories, *others):
                path = os.path.join(parent, name)
                info = os.lstat(self.at(path))
                if stat.S_ISDIR(info.st_mode) and path not in self.listing.directories:
                    continue
                direct.setdefault(parent, []).append(info.st_mtime_ns)
                for above in _ancestors(path):
                    below.setdefault(above, []).append(info.st_mtime_ns)
        markers: dict[bytes, list[int]] = {}
        for path, time in self.marker_times.items():
            for above in _ancestors(path):
                markers.setdefault(above, []).append(time)
        for path in implied:
            place = self.at(path)
            os.chmod(place, 0o755)
            os.chown(place, 0, 0)
            time = max(direct.get(path) or below.get(path) or markers.get(path) or [0])
            os.utime(place, ns=(time, time))
        return frozenset(implied)


def _ancestors(path: bytes) -> Iterator[bytes]:
    while path:
        path = path.rpartition(b"/")[0]
        yield path

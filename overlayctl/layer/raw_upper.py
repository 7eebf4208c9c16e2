"""The tar of a raw upper directory as the tar of a layer.

Whoever packs an upper directory packs what the kernel keeps there: a whiteout as a character
device 0:0, an opaque directory with its xattr (Documentation/filesystems/overlayfs.rst,
"whiteouts and opaque directories"). A layer's tar has marks for both (OCI image-spec, layer.md).
Members are written anew, each as plain as it can be; the content of files stays what it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from overlayctl.layer.attributes import check_complete
from overlayctl.layer.compression import PIECE, Source
from overlayctl.layer.header import END, header, padding
from overlayctl.layer.tar import Member, TarReader
from overlayctl.layer.tar_writer import NAMED_AS_WHITEOUT
from overlayctl.whiteout import OPAQUE_MARKER, OPAQUE_XATTR, PREFIX, WHITEOUT_XATTR, unescape

NO_END = "the tar may have been cut: it has no end marker"


class RawUpper:
    """The layer's tar that the tar in ``source`` stands for.

    Iterate once for its bytes. Then ``notes`` maps a kind of remark to the paths it is about.
    Raises BadTar, and BadInput for what means nothing without the layers below.
    """

    def __init__(self, source: Source) -> None:
        self.notes: dict[str, list[bytes]] = {}
        self._source = source
        self._whiteouts: set[bytes] = set()

    def __iter__(self) -> Iterator[bytes]:
        reader = TarReader(self._source.fd, self._source.offset, self._source.size)
        for member in reader:
            yield from self._entry(member)
        if not reader.end_marker:
            self.notes.setdefault(NO_END, []).append(b"")
        yield END

    def _entry(self, member: Member) -> Iterator[bytes]:
        path = _path(member.name)
        above, slash, name = path.rpartition(b"/")
        if any(part.startswith(PREFIX) for part in path.split(b"/")):
            self.notes.setdefault(NAMED_AS_WHITEOUT, []).append(path)
            return
        device = member.type == b"3" and member.major == member.minor == 0
        marked = member.type == b"0" and not member.size and WHITEOUT_XATTR in member.xattrs
        # The kernel shares one inode between many whiteouts, and tar calls them hard links.
        linked = member.type == b"1" and _path(member.linkname) in self._whiteouts
        if device or marked or linked:
            self._whiteouts.add(path)
            yield header(_mark(above + slash + PREFIX + name, member))
            return
        check_complete(path, member.xattrs)
        carried = {
            carried: value
            for stored, value in member.xattrs.items()
            if (carried := unescape(stored)) is not None
        }
        # What is written sparsely docker and podman cannot save again.
        yield header(member._replace(xattrs=carried, extents=None))
        if member.type == b"0":
            yield from self._content(member)
            yield padding(member.size)
        # On the root of an upper directory the kernel ignores the mark.
        if member.type == b"5" and path and member.xattrs.get(OPAQUE_XATTR) == b"y":
            yield header(_mark(path + b"/" + OPAQUE_MARKER, member))

    def _content(self, member: Member) -> Iterator[bytes]:
        """The bytes of a file, its holes too."""
        extents = ((0, member.size),) if member.extents is None else member.extents
        at, written = self._source.offset + member.data, 0
        for offset, length in (*extents, (member.size, 0)):
            for hole in range(written, offset, PIECE):
                yield bytes(min(PIECE, offset - hole))
            written = offset + length
            end = at + length
            while at < end and (piece := os.pread(self._source.fd, min(PIECE, end - at), at)):
                yield piece
                at += len(piece)


def _path(name: bytes) -> bytes:
    return b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))


def _mark(name: bytes, of: Member) -> Member:
    """A deletion marker, with the owner and the time of what it stands for."""
    return Member(name, b"0", 0o600, of.uid, of.gid, 0, of.mtime, of.mtime_ns)

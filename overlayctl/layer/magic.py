"""What bytes are that should be a tar and are none: words for messages, and the way to a tar.

Only what people do store as layers, or take for one, is known here.
"""

from __future__ import annotations

from typing import NamedTuple

from overlayctl.errors import BadTar
from overlayctl.layer.fields import check_sum

HEAD = 2048
"""So many first bytes are enough."""
_BLOCK = 512


class Foreign(NamedTuple):
    """Something that is no tar; ``to_tar`` is the command that makes one of LAYER, or empty."""

    words: str
    to_tar: str


_MOUNTED = "mount -o ro,loop LAYER DIR && tar -C DIR -cf LAYER.tar ."
_MAGIC = (
    (0, b"\x04\x22\x4d\x18", Foreign("lz4 data", "lz4 -dc LAYER > LAYER.tar")),
    (0, b"\x02\x21\x4c\x18", Foreign("lz4 data", "lz4 -dc LAYER > LAYER.tar")),
    (0, b"LZIP", Foreign("lzip data", "lzip -dc LAYER > LAYER.tar")),
    (0, b"\x89LZO\0\r\n\x1a\n", Foreign("lzop data", "lzop -dc LAYER > LAYER.tar")),
    (0, b"\x1f\x9d", Foreign("compress (.Z) data", "zcat < LAYER > LAYER.tar")),
    (0, b"\x5d\0\0", Foreign("lzma data", "xz --format=lzma -dc LAYER > LAYER.tar")),
    (
        0,
        b"hsqs",
        Foreign(
            "a squashfs image", "unsquashfs -d DIR LAYER && tar -C DIR -cf LAYER.tar ."
        ),
    ),
    (1024, b"\xe2\xe1\xf5\xe0", Foreign("an EROFS image", _MOUNTED)),
    (1080, b"\x53\xef", Foreign("an ext4 image", _MOUNTED)),
    (0, b"PK\x03\x04", Foreign("a zip archive", "bsdtar -cf LAYER.tar @LAYER")),
    (0, b"7z\xbc\xaf\x27\x1c", Foreign("a 7z archive", "bsdtar -cf LAYER.tar @LAYER")),
    (
        0,
        b"!<arch>\ndebian-binary",
        Foreign("a Debian package", "dpkg-deb --fsys-tarfile LAYER > LAYER.tar"),
    ),
    (0, b"\xed\xab\xee\xdb", Foreign("an RPM package", "bsdtar -cf LAYER.tar @LAYER")),
    (0, b"070701", Foreign("a cpio archive", "bsdtar -cf LAYER.tar @LAYER")),
    (0, b"QFI\xfb", Foreign("a qcow2 disk image", "")),
    (0, b"\x7fELF", Foreign("a program", "")),
    (0, b"\0asm", Foreign("a WebAssembly module", "")),
    (0, b"{", Foreign("a JSON text", "")),
    (0, b"<", Foreign("an HTML or XML text", "")),
)  # fmt: skip
_TEXT = Foreign("a text", "")


def foreign(head: bytes) -> Foreign | None:
    """What begins with ``head`` (HEAD bytes of it); None for a tar and for what is not known."""
    if is_header(head[:_BLOCK]):
        return None
    known = next((kind for at, magic, kind in _MAGIC if head[at:].startswith(magic)), None)
    return known or (_TEXT if _is_text(head) else None)


def is_tar(head: bytes) -> bool:
    """Whether ``head`` begins a tar: a header with the right sum, or the zeros of its end."""
    if is_header(head[:_BLOCK]):
        return True
    # A filesystem leaves its first kilobyte to the boot loader.
    return not head[:_BLOCK].strip(b"\0") and foreign(head) is None


def is_header(block: bytes) -> bool:
    """Whether ``block`` is the header of an entry, by its sum."""
    if len(block) < _BLOCK:
        return False
    try:
        check_sum(block, block[148:156], 0)
    except BadTar:
        return False
    # A block of zeros has no sum either.
    return block[148:156].strip(b" \0") != b""


def _is_text(head: bytes) -> bool:
    """Whether ``head``, which may end inside a character, holds lines of UTF-8 and nothing else."""
    text = head.decode("utf-8", "ignore")
    whole = len(head) - len(text.encode()) < 4
    return whole and text != "" and all(c.isprintable() or c in "\n\r\t\f" for c in text)

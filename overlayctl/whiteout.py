"""Deletion markers and overlay's own xattrs, between the tar's way and the kernel's.

OCI image-spec, layer.md ("Whiteouts"); Documentation/filesystems/overlayfs.rst
("whiteouts and opaque directories", "Nesting overlayfs mounts").

Laws: ``unescape(escape(x)) == x`` for every xattr name, and ``escape`` never
returns a name that the kernel's overlay would act on.
"""

from __future__ import annotations

PREFIX = b".wh."
OPAQUE_MARKER = b".wh..wh..opq"
AUFS_PREFIX = b".wh..wh."

OPAQUE_XATTR = b"trusted.overlay.opaque"
ORIGIN_XATTR = b"trusted.overlay.origin"
WHITEOUT_XATTR = b"trusted.overlay.whiteout"
"""On an empty file: the other form of a whiteout, where no device can be made (Linux 6.7)."""

OVERLAY = b"trusted.overlay."
_ESCAPED = b"trusted.overlay.overlay."


def escape(name: bytes) -> bytes:
    """The xattr name under which a layer stores ``name``: one that steers no kernel.

    The kernel shows ``trusted.overlay.overlay.X`` as ``trusted.overlay.X`` through an
    overlay, so what the tar said is what a process in the merged view reads.
    """
    if name.startswith(OVERLAY):
        return _ESCAPED + name[len(OVERLAY) :]
    return name


def unescape(name: bytes) -> bytes | None:
    """The xattr name a tar would carry for a stored ``name``; None for overlay's own marks."""
    if name.startswith(_ESCAPED):
        return OVERLAY + name[len(_ESCAPED) :]
    if name.startswith(OVERLAY):
        return None
    return name

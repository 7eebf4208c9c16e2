"""ACLs as a filesystem gives them back: not always the bytes that it was given.

acl(5); struct posix_acl_xattr_header and _entry: a version, then tag, permissions and id of each.
"""

from __future__ import annotations

import struct

_ACCESS = b"system.posix_acl_access"
_DEFAULT = b"system.posix_acl_default"
_VERSION = (2).to_bytes(4, "little")
_ENTRY = struct.Struct("<HHI")
_NAMED = (0x02, 0x08)
_BASIC = {0x01, 0x04, 0x20}
_NO_ID = 0xFFFF_FFFF


def kept(name: bytes, value: bytes) -> bytes | None:
    """The value that an xattr has once it is set; None where the kernel keeps none.

    The ids of entries that name nobody mean nothing, and are lost. An access ACL of owner, group
    and others alone says what the mode says, and the kernel keeps the mode.
    """
    if name not in (_ACCESS, _DEFAULT) or value[:4] != _VERSION or len(value) % _ENTRY.size != 4:
        return value
    entries = list(_ENTRY.iter_unpack(value[4:]))
    if name == _ACCESS and {tag for tag, _, _ in entries} <= _BASIC:
        return None
    return _VERSION + b"".join(
        _ENTRY.pack(tag, allowed, who if tag in _NAMED else _NO_ID) for tag, allowed, who in entries
    )

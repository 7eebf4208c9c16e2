"""Tars for tests: made by Python's tarfile, by GNU tar, and block by block."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from overlayctl.layer.tar import Member, TarReader

END = bytes(1024)


def entry(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any) -> bytes:
    """One entry in PAX form, its extended headers included."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    info.pax_headers = dict(fields.pop("pax", {}))
    for key, value in fields.pop("xattrs", {}).items():
        info.pax_headers[f"SCHILY.xattr.{key}"] = value
    for field, value in fields.items():
        setattr(info, field, value)
    head = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    return head + data + bytes(-len(data) % 512)


def directory(name: str, **fields: Any) -> bytes:
    return entry(name, tarfile.DIRTYPE, **{"mode": 0o755, **fields})


def symlink(name: str, target: str, **fields: Any) -> bytes:
    return entry(name, tarfile.SYMTYPE, linkname=target, **fields)


def hardlink(name: str, target: str, **fields: Any) -> bytes:
    return entry(name, tarfile.LNKTYPE, linkname=target, **fields)


def tar(*entries: bytes) -> bytes:
    return b"".join(entries) + END


def members(data: bytes, tmp_path: Path) -> list[Member]:
    """What our parser makes of ``data``."""
    path = tmp_path / "members.tar"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(TarReader(fd, 0, len(data)))
    finally:
        os.close(fd)


def python_members(data: bytes) -> Iterable[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data), errorlevel=2) as archive:
        yield from archive

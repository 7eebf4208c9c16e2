"""Lists what an image's layers hold. Written from docs/store-format.md and nothing else."""

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ACL = b"system.posix_acl_"
PREFIXES = [b"", b"user.", ACL + b"access", ACL + b"default", b"trusted.", b"", b"security."]
TYPES = {8: "file", 4: "directory", 10: "symlink", 2: "char", 6: "block", 1: "fifo"}


def layers(root: str, reference: str) -> list[str]:
    """The layer files of an image, bottom to top."""
    marker = json.loads(Path(f"{root}/overlayctl.json").read_bytes())
    if (marker["version"], marker["format"], marker["incompatible"]) != (1, 1, ["erofs-tar-1"]):
        raise ValueError(marker)
    name = re.sub(r"[^A-Za-z0-9._-]", lambda match: f"%{ord(match[0]):02X}", reference)
    if len(name) > 200:
        name = name[:100] + "%" + hashlib.sha256(reference.encode()).hexdigest()
    image = Path(f"{root}/tags/{name}").read_text().splitlines()[0].removeprefix("sha256:")
    record = json.loads(Path(f"{root}/images/{image}/image.json").read_bytes())
    if record["version"] != 1:
        raise ValueError(record)
    return [newest(f"{root}/layers/{layer['name']}") for layer in record["layers"]]


def newest(directory: str) -> str:
    found = [re.fullmatch(r"layer(?:-([1-9]\d*))?\.erofs", name) for name in os.listdir(directory)]
    return f"{directory}/{max((int(match[1] or 1), match[0]) for match in found if match)[1]}"


class Layer:
    def __init__(self, path: str) -> None:
        self.data = Path(path).read_bytes()
        self.header = json.loads(self.data[:992].rstrip(b"\0"))
        good = hashlib.sha256(self.data[:992]).digest() == self.data[992:1024]
        if not good or self.header["format"] != 1 or self.take("I", 1024)[0] != 0xE0F5E1E2:
            raise ValueError(path)
        self.root, self.inodes = self.take("H", 1024 + 14)[0], self.take("I", 1024 + 40)[0] * 512

    def take(self, form: str, at: int) -> tuple[Any, ...]:
        return struct.unpack_from("<" + form, self.data, at)

    def inode(self, nid: int) -> SimpleNamespace:
        at = self.inodes + nid * 32
        form, count, mode, _, size, start, _, uid, gid, seconds, ns = self.take("4HQ4IqI", at)
        xattrs, end, place = {}, at + 64 + (8 + 4 * count if count else 0), at + 64 + 12
        while place < end:
            length, prefix, taken = self.take("BBH", place)
            name, value = self.take(f"{length}s{taken}s", place + 4)
            xattrs[PREFIXES[prefix] + name] = value
            place += (4 + length + taken + 3) & ~3
        kind = TYPES[mode >> 12]
        device = (start >> 8 & 0xFFF, start & 0xFF | start >> 12 & 0xFFF00)
        return SimpleNamespace(
            nid=nid, type=kind, mode=mode & 0o7777, uid=uid, gid=gid, xattrs=xattrs, size=size,
            mtime_ns=seconds * 10**9 + ns, device=device if kind in ("char", "block") else None,
            opaque=xattrs.get(b"trusted.overlay.opaque") == b"y", sha256=None, form=form >> 1,
            whiteout=kind == "char" and device == (0, 0), start=start, tail=end,
        )  # fmt: skip

    def content(self, of: SimpleNamespace) -> Iterator[bytes]:
        if of.form == 4:
            chunk = 512 << of.start
            for number, at in enumerate(range(0, of.size, chunk)):
                (block,), length = self.take("I", of.tail + 4 * number), min(chunk, of.size - at)
                hole = block == 0xFFFFFFFF
                yield bytes(length) if hole else self.data[block * 512 : block * 512 + length]
        elif of.size:
            plain = of.size if of.form == 0 else (of.size - 1) // 512 * 512
            yield self.data[of.start * 512 : of.start * 512 + plain]
            yield self.data[of.tail : of.tail + of.size - plain]

    def files(self) -> Iterator[tuple[bytes, SimpleNamespace]]:
        """Every path, the root (empty) first, with what is there."""
        pending = [(b"", self.inode(self.root))]
        while pending:
            path, found = pending.pop()
            if found.type == "file":
                digest = hashlib.sha256()
                for piece in self.content(found):
                    digest.update(piece)
                found.sha256 = digest.hexdigest()
            content = b"" if found.type == "file" else b"".join(self.content(found))
            found.target = content if found.type == "symlink" else None
            yield path, found
            for at in range(0, len(content) if found.type == "directory" else 0, 512):
                block = content[at : at + 512]
                entries = list(struct.iter_unpack("<QHBB", block[: block[8] | block[9] << 8]))
                ends = [*(entry[1] for entry in entries[1:]), len(block)]
                for (nid, begin, _, _), end in zip(entries, ends, strict=True):
                    name = block[begin:end].split(b"\0")[0]
                    if name not in (b".", b".."):
                        pending.append((os.path.join(path, name), self.inode(nid)))

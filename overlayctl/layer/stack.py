"""The layers below, as one: what a path looks like there, and the facts a layer keeps of it.

A layer stands alone but for two things that its tar leaves to what lies below: how an
implied directory looks, and the file behind a hard link into a lower layer. The answers
are the layer's *inherited facts*: JSON inside layer.erofs, and a part of its identity.
"""

from __future__ import annotations

import base64
import hashlib
import json
import stat
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.digest import DiffID, hex_of
from overlayctl.errors import LimitExceeded
from overlayctl.layer.attributes import Inherited, Wants
from overlayctl.layer.fields import shown
from overlayctl.whiteout import unescape

if TYPE_CHECKING:
    from overlayctl.layer.index import Index, Node

_CHUNK = 1 << 20
_HOLES_FREE = 1 << 30
_HOLES_RATIO = 16


class _Content(NamedTuple):
    """The bytes of a file of one layer."""

    layer: Index
    node: Node

    def read(self, offset: int, length: int) -> bytes:
        return self.layer.read(self.node, offset, length)

    def stored(self) -> int:
        return sum(length for _, length in self.layer.extents(self.node))


class Shown(NamedTuple):
    """What merged layers show at one path.

    ``parts`` are its node and, for a directory, those that it is merged with, topmost first;
    each with its layer. There is at least one.
    """

    parts: tuple[tuple[Index, Node], ...]

    @property
    def layer(self) -> Index:
        """The layer that the node is of."""
        return self.parts[0][0]

    @property
    def node(self) -> Node:
        """What is seen: type, attributes, content."""
        return self.parts[0][1]

    @property
    def is_directory(self) -> bool:
        """Whether it can hold anything."""
        return stat.S_ISDIR(self.node.mode)

    def child(self, name: bytes) -> Shown | None:
        """What a directory shows under ``name``: None where nothing is, or a whiteout says so."""
        parts: list[tuple[Index, Node]] = []
        for index, node in self.parts:
            found = index.child(node, name)
            if found is None:
                continue
            if index.is_whiteout(found):
                break
            if not stat.S_ISDIR(found.mode):
                # Below a directory it is hidden, else it hides what is below.
                if not parts:
                    parts.append((index, found))
                break
            parts.append((index, found))
            if index.is_opaque(found):
                break
        return Shown(tuple(parts)) if parts else None

    def names(self) -> list[bytes]:
        """What a directory holds, in byte order; nothing for anything else."""
        topmost: dict[bytes, bool] = {}
        for index, node in self.parts:
            for name, child in index.list(node):
                topmost.setdefault(name, not index.is_whiteout(child))
        return sorted(name for name, is_there in topmost.items() if is_there)

    def size(self) -> int:
        """The bytes of the file, or of all files below the directory; each inode counts once."""
        total = 0
        seen: set[tuple[int, int]] = set()
        pending = [self]
        while pending:
            shown = pending.pop()
            inode = (id(shown.layer), shown.node.nid)
            if stat.S_ISREG(shown.node.mode) and inode not in seen:
                total += shown.node.size
                seen.add(inode)
            children = map(shown.child, shown.names())
            pending.extend(child for child in children if child is not None)
        return total


class Stack:
    """Layers merged as overlayfs merges them; ``indexes`` are topmost first."""

    def __init__(self, indexes: Sequence[Index]) -> None:
        self._indexes = indexes

    def root(self) -> Shown | None:
        """The merged root; None where there are no layers.

        A root that is opaque is the last one that takes part.
        """
        parts = []
        for index in self._indexes:
            parts.append((index, index.root))
            if index.is_opaque(index.root):
                break
        return Shown(tuple(parts)) if parts else None

    def find(self, path: bytes) -> tuple[int, Node] | None:
        """The layer (by position, topmost 0) and node that the merged view shows at ``path``.

        None where nothing is, or where a whiteout, an opaque directory or a file hides it.
        """
        names = path.split(b"/") if path else []
        for position, index in enumerate(self._indexes):
            at = index.root
            node: Node | None = at
            covered = index.is_opaque(index.root)
            for depth, name in enumerate(names):
                node = index.child(at, name)
                if node is None:
                    break
                at = node
                last = depth == len(names) - 1
                if index.is_whiteout(node) or not (last or stat.S_ISDIR(node.mode)):
                    return None
                if not last:
                    covered = covered or index.is_opaque(node)
            if node is not None:
                return position, node
            if covered:
                return None
        return None

    def inherited(self, path: bytes) -> Inherited | None:
        """What the merged view shows at ``path``, without overlay's own marks."""
        found = self.find(path)
        if found is None:
            return None
        index, node = self._indexes[found[0]], found[1]
        return Inherited(
            mode=node.mode,
            uid=node.uid,
            gid=node.gid,
            mtime=node.mtime,
            mtime_ns=node.mtime_ns,
            size=node.size,
            rdev=node.rdev,
            xattrs={
                name: value
                for name, value in index.xattrs(node).items()
                if unescape(name) is not None
            },
            target=index.target(node) if stat.S_ISLNK(node.mode) else b"",
            content=_Content(index, node) if stat.S_ISREG(node.mode) else None,
        )


class Inheritance(NamedTuple):
    """What a layer takes from those below it: the answers, and the facts as they are stored.

    The facts are JSON, or nothing where all is as it would be anyway.
    """

    below: Mapping[bytes, Inherited]
    facts: bytes

    def name(self, diff_id: DiffID) -> str:
        """The layer's name: its tar's digest, and 16 hex digits for the facts if there are any."""
        return hex_of(diff_id) + facts_suffix(self.facts)


def inherit(wants: Wants, stack: Stack) -> Inheritance:
    """Ask the layers below for everything that ``wants`` names."""
    below = {}
    links = frozenset(wants.links)
    for path in (*wants.directories, *wants.links):
        found = stack.inherited(path)
        if found is not None:
            below[path] = found
            if path in links:
                _check_holes(path, found)
    return Inheritance(below, _facts(wants, below))


def _check_holes(path: bytes, found: Inherited) -> None:
    """A hard link brings a lower file's content, read whole: not a terabyte of holes."""
    stored = found.content.stored() if found.content is not None else 0
    if found.size > _HOLES_FREE + _HOLES_RATIO * stored:
        raise LimitExceeded(
            f"a hard link to {shown(path)} of a lower layer, which says {found.size} bytes and "
            f"holds {stored}: such a file is linked within its own layer only"
        )


def _facts(wants: Wants, below: Mapping[bytes, Inherited]) -> bytes:
    entries = []
    for path in wants.directories:
        it = below.get(path)
        if it is None or not stat.S_ISDIR(it.mode) or _is_default(it):
            continue
        entries.append({"path": _text(path), **_attributes(it)})
    for path in wants.links:
        it = below.get(path)
        if it is None:
            continue
        entries.append(
            {
                "link": _text(path),
                **_attributes(it),
                "mtime": [it.mtime, it.mtime_ns],
                "size": it.size,
                "rdev": it.rdev,
                "sha256": _sha256(it),
            }
        )
    if not entries:
        return b""
    return json.dumps(entries, sort_keys=True, indent=1).encode() + b"\n"


def facts_suffix(facts: bytes) -> str:
    """What the facts add to a layer's directory name: nothing, or ``-`` and 16 hex digits."""
    return "-" + hashlib.sha256(facts).hexdigest()[:16] if facts else ""


def _is_default(it: Inherited) -> bool:
    return it.mode == stat.S_IFDIR | 0o755 and it.uid == it.gid == 0 and not it.xattrs


def _attributes(it: Inherited) -> dict[str, object]:
    return {
        "mode": oct(it.mode),
        "uid": it.uid,
        "gid": it.gid,
        "xattrs": {_text(name): base64.b64encode(v).decode() for name, v in it.xattrs.items()},
    }


def _sha256(it: Inherited) -> str:
    digest = hashlib.sha256(it.target)
    if it.content is not None:
        for offset in range(0, it.size, _CHUNK):
            digest.update(it.content.read(offset, min(_CHUNK, it.size - offset)))
    return digest.hexdigest()


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")

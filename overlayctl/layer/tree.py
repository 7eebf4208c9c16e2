"""The rules that turn the entries of one tar into one layer's tree.

``Tree.add`` takes the members in the tar's order; ``wants`` says what only the layers
below can tell; ``finish`` takes the answers and makes the tree final. Columns are packed
arrays, a node is their index, and the root is node 0.

OCI image-spec layer.md ("Applying Changesets"); what it leaves open is decided as the
engines do it: a parent that is a symlink of this layer is followed inside the layer, a
parent that is something else becomes a directory, a parent that no entry mentions is
*implied* and looks like the directory it will cover.
"""

from __future__ import annotations

import stat
from array import array
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, overload

from overlayctl.errors import BadTar, LimitExceeded
from overlayctl.layer.attributes import Wants, check_owner, device_number, stored_xattrs
from overlayctl.layer.fields import shown
from overlayctl.layer.format import NAME_MAX, TARGET_MAX
from overlayctl.whiteout import (
    AUFS_PREFIX,
    OPAQUE_MARKER,
    OPAQUE_XATTR,
    ORIGIN_XATTR,
    PREFIX,
)

if TYPE_CHECKING:
    from overlayctl.layer.attributes import Borrowed, Inherited
    from overlayctl.layer.tar import Extent, Member, Xattrs

PATH_MAX = 4096
_PATH_HINT = "the kernel opens no longer one: move what lies there further up"
_SYMLINKS_FOLLOWED = 40

_FORMATS = {
    b"0": stat.S_IFREG,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}


class Tree:
    """One layer's tree. ``notes`` maps a kind of remark to the paths it is about."""

    def __init__(self) -> None:
        self.mode = array("I")
        self.uid = array("I")
        self.gid = array("I")
        self.mtime = array("q")
        self.mtime_ns = array("I")
        self.size = array("q")
        self.data = array("q")
        self.rdev = array("I")
        self.nlink = array("I")
        self.parent = array("q")
        self.xattrs: dict[int, Xattrs] = {}
        self.target: dict[int, bytes] = {}
        self.extents: dict[int, tuple[Extent, ...]] = {}
        self.dirty: set[int] = set()
        self.borrowed: dict[int, Borrowed] = {}
        self.children: dict[int, dict[bytes, int]] = {}
        self.notes: dict[str, list[bytes]] = {}
        self._implied: dict[int, tuple[int, int]] = {}
        self._opaque: set[int] = set()
        self._replaced: set[int] = set()
        self._whiteouts: dict[int, dict[bytes, int]] = {}
        self._lower_links: dict[bytes, int] = {}
        self._parents: dict[bytes, int] = {}
        self._length = {0: -1}
        self._directory(0, b"", (0, 0))

    # -- entries, in the tar's order -------------------------------------------------

    def add(self, member: Member) -> None:
        """Apply one entry. Raises BadTar or LimitExceeded naming it."""
        prefix, base = self._split(member)
        if not base:
            self._set_root(member)
            return
        parent = self._parents.get(prefix)
        if parent is None:
            parent = self._parents[prefix] = self._descend(prefix, member)
        if base.startswith(PREFIX):
            self._mark(parent, base, member)
        elif member.type == b"1":
            self._link(parent, base, member)
        else:
            self._place(parent, base, member)

    def _split(self, member: Member) -> tuple[bytes, bytes]:
        """The parent's spelling and the last name; an empty name is the root."""
        name = member.name
        if not name or b"\0" in name:
            raise BadTar("an entry without a usable name", offset=member.offset)
        if len(name) > PATH_MAX:
            raise LimitExceeded(
                f"the path {shown(name)} is longer than {PATH_MAX} bytes", hint=_PATH_HINT
            )
        if b".." in name and b".." in name.split(b"/"):
            raise self._outside(member)
        prefix, _, base = name.rstrip(b"/").rpartition(b"/")
        while base == b".":
            prefix, _, base = prefix.rstrip(b"/").rpartition(b"/")
        # What a whiteout hides may have the longest name of all.
        if len(base.removeprefix(PREFIX)) > NAME_MAX:
            raise LimitExceeded(f"the name {shown(base)} is longer than {NAME_MAX} bytes")
        return prefix, base

    @staticmethod
    def _outside(member: Member) -> BadTar:
        return BadTar(
            f"entry {shown(member.name)} contains '..': a layer may not point outside itself",
            hint="the tar is hostile or broken; nothing was stored",
            offset=member.offset,
        )

    def _set_root(self, member: Member) -> None:
        if member.type != b"5":
            raise BadTar("an entry would replace the root by something that is no directory")
        self._attributes(0, member)
        self._implied.pop(0, None)

    @overload
    def _descend(self, prefix: bytes, member: Member) -> int: ...
    @overload
    def _descend(self, prefix: bytes, member: None) -> int | None: ...
    def _descend(self, prefix: bytes, member: Member | None) -> int | None:
        """The directory that ``prefix`` names, symlinks followed inside the layer.

        What is not there is made for ``member``; without one the answer is None.
        """
        node = 0
        names = prefix.split(b"/")[::-1]
        followed = 0
        while names:
            name = names.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                # Only a symlink's target brings these here; an entry's own are refused first.
                node = self.parent[node]
                continue
            child = self.children[node].get(name)
            if child is not None and stat.S_ISLNK(self.mode[child]):
                followed += 1
                if followed > _SYMLINKS_FOLLOWED:
                    if member is None:
                        return None
                    raise BadTar(f"entry {shown(member.name)} lies below a loop of symlinks")
                target = self.target[child]
                names += target.split(b"/")[::-1]
                node = 0 if target.startswith(b"/") else node
                continue
            if child is None or not stat.S_ISDIR(self.mode[child]):
                if member is None:
                    return None
                child = self._make_parent(node, name, member)
            node = child
        return node

    def _make_parent(self, parent: int, name: bytes, member: Member) -> int:
        if name.startswith(PREFIX):
            raise BadTar(f"entry {shown(member.name)} lies below a whiteout")
        if len(name) > NAME_MAX:
            raise LimitExceeded(f"the name {shown(name)} is longer than {NAME_MAX} bytes")
        siblings = self.children[parent]
        self._forget(siblings.get(name))
        siblings[name] = self._directory(parent, name, (member.mtime, member.mtime_ns))
        return siblings[name]

    def _directory(self, parent: int, name: bytes, time: tuple[int, int]) -> int:
        """A new implied directory; ``time`` serves if nothing below it has one.

        Symlinks of the layer can lead deeper than any name in the tar is long.
        """
        length = self._length[parent] + 1 + len(name)
        if length >= PATH_MAX:
            raise LimitExceeded(
                f"a path to {shown(name)} is longer than {PATH_MAX} bytes", hint=_PATH_HINT
            )
        node = self._node(stat.S_IFDIR | 0o755, 0, 0, *time)
        self._length[node] = length
        self.parent[node] = parent
        self.children[node] = {}
        self._implied[node] = time
        return node

    def _node(self, mode: int, uid: int, gid: int, mtime: int, mtime_ns: int) -> int:
        node = len(self.mode)
        self.mode.append(mode)
        self.uid.append(uid)
        self.gid.append(gid)
        self.mtime.append(mtime)
        self.mtime_ns.append(mtime_ns)
        self.size.append(0)
        self.data.append(-1)
        self.rdev.append(0)
        self.nlink.append(0)
        self.parent.append(0)
        return node

    def _mark(self, parent: int, base: bytes, member: Member) -> None:
        """A deletion marker, which is no entry of its own."""
        if base == OPAQUE_MARKER:
            self._opaque.add(parent)
            return
        if base.startswith(AUFS_PREFIX):
            self._note("aufs metadata ignored", member.name)
            return
        name = base[len(PREFIX) :]
        if name in (b"", b".", b".."):
            raise BadTar(f"entry {shown(member.name)} only pretends to be a whiteout")
        check_owner(member)
        node = self._node(stat.S_IFCHR, member.uid, member.gid, member.mtime, member.mtime_ns)
        self._whiteouts.setdefault(parent, {})[name] = node

    def _link(self, parent: int, base: bytes, member: Member) -> None:
        """A hard link: to an earlier entry, else to whatever the layers below have there."""
        link = member.linkname
        if not link or b"\0" in link or b".." in link.split(b"/"):
            raise self._outside(member._replace(name=link or member.name))
        path = b"/".join(part for part in link.split(b"/") if part not in (b"", b"."))
        target = self._find(path)
        if target is None:
            target = self._lower_links.get(path)
        if target is None:
            target = self._node(stat.S_IFREG, 0, 0, 0, 0)
            self._lower_links[path] = target
        if stat.S_ISDIR(self.mode[target]):
            raise BadTar(
                f"entry {shown(member.name)} is a hard link to the directory {shown(link)}"
            )
        siblings = self.children[parent]
        if siblings.get(base) != target:
            self._forget(siblings.get(base))
            siblings[base] = target

    def _find(self, path: bytes) -> int | None:
        """The node at ``path``, which itself is not followed if it is a symlink."""
        prefix, _, base = path.rpartition(b"/")
        parent = self._descend(prefix, None)
        if parent is None or not base:
            return parent
        return self.children[parent].get(base)

    def _place(self, parent: int, base: bytes, member: Member) -> None:
        siblings = self.children[parent]
        there = siblings.get(base)
        kind = member.type
        if there is not None:
            if there not in self._implied:
                self._note("duplicate entry", member.name)
            if kind == b"5" and stat.S_ISDIR(self.mode[there]):
                self._attributes(there, member)
                self._implied.pop(there, None)
                return
            self._forget(there)
        if kind == b"5":
            node = self._directory(parent, base, (0, 0))
            del self._implied[node]
        else:
            node = self._node(_FORMATS[kind], 0, 0, 0, 0)
        siblings[base] = node
        self._attributes(node, member)
        if kind == b"0":
            self.size[node] = member.size
            if member.size:
                self.data[node] = member.data
            if member.extents is not None:
                self.extents[node] = member.extents
            elif member.dirty_tail:
                self.dirty.add(node)
        elif kind == b"2":
            self._symlink(node, member)
        elif kind in b"34":
            self.rdev[node] = device_number(member)
            self._note("device", member.name)

    def _symlink(self, node: int, member: Member) -> None:
        target = member.linkname
        if not target or b"\0" in target:
            raise BadTar(f"the symlink {shown(member.name)} has no usable target")
        if len(target) > TARGET_MAX:
            raise LimitExceeded(
                f"the symlink {shown(member.name)} has a target of more than {TARGET_MAX} bytes"
            )
        self.target[node] = target
        self.size[node] = len(target)
        # A symlink's permissions mean nothing and read as 0777 everywhere.
        self.mode[node] = stat.S_IFLNK | 0o777

    def _attributes(self, node: int, member: Member) -> None:
        check_owner(member)
        self.mode[node] = stat.S_IFMT(self.mode[node]) | member.mode
        self.uid[node] = member.uid
        self.gid[node] = member.gid
        self.mtime[node] = member.mtime
        self.mtime_ns[node] = member.mtime_ns
        self.xattrs.pop(node, None)
        if member.xattrs:
            kept = stored_xattrs(member, self._note)
            if kept:
                self.xattrs[node] = kept
        if member.mode & stat.S_ISUID and member.type == b"0":
            self._note("setuid file", member.name)

    def _forget(self, node: int | None) -> None:
        """``node`` loses a name. Cached parents may have gone through it."""
        if node is not None and not stat.S_ISREG(self.mode[node]):
            self._parents.clear()

    def _note(self, kind: str, path: bytes) -> None:
        self.notes.setdefault(kind, []).append(path)

    # -- what the layers below add ---------------------------------------------------

    def wants(self) -> Wants:
        """What ``finish`` has to be told: implied directories, and links into lower layers."""
        directories = []
        for path, node, hidden in self._directories():
            if node in self._implied and not hidden:
                directories.append(path)
        return Wants(tuple(directories), tuple(sorted(self._lower_links)))

    def _directories(self) -> Iterator[tuple[bytes, int, bool]]:
        """Each directory: path, node, and whether this layer hides what lies below it.

        Parents come first, siblings in byte order.
        """
        pending: list[tuple[bytes, int, bool]] = [(b"", 0, False)]
        while pending:
            path, node, hidden = pending.pop()
            yield path, node, hidden
            below = hidden or node in self._opaque
            gone = self._whiteouts.get(node, {})
            start = path + b"/" if path else b""
            pending += [
                (start + name, child, below or name in gone)
                for name, child in sorted(self.children[node].items(), reverse=True)
                if child in self.children
            ]

    def symlinks(self) -> Iterator[bytes]:
        """The path of every symlink. A directory of a layer above may mask one."""
        for path, node, _ in self._directories():
            start = path + b"/" if path else b""
            for name, child in self.children[node].items():
                if stat.S_ISLNK(self.mode[child]):
                    yield start + name

    def directories(self) -> Iterator[bytes]:
        """The path of every directory."""
        return (path for path, _, _ in self._directories())

    def finish(self, below: Mapping[bytes, Inherited]) -> None:
        """Make the tree final. ``below`` answers ``wants``; what it lacks is not there.

        Raises BadTar for a hard link whose target is nowhere.
        """
        order = list(self._directories())
        for path, node in sorted(self._lower_links.items()):
            self._borrow(path, node, below.get(path))
        for path, node, hidden in order:
            if node in self._implied:
                self._inherit(path, node, None if hidden else below.get(path))
        for _, node, _ in order:
            self._settle_whiteouts(node)
        self._date_implied([node for _, node, _ in reversed(order)])
        for _, node, _ in order:
            names = self.children[node]
            for child in names.values():
                self.nlink[child] += 1
            self.nlink[node] += 1 + sum(child in self.children for child in names.values())
        self.nlink[0] += 1

    def _borrow(self, path: bytes, node: int, found: Inherited | None) -> None:
        if found is None or stat.S_ISDIR(found.mode):
            raise BadTar(
                f"a hard link points to {shown(path)}, which is neither in this layer "
                "nor a file of the layers below",
                hint="load the whole image, or import the layers below first",
            )
        self._take(node, found)
        self.size[node] = found.size
        self.rdev[node] = found.rdev
        if stat.S_ISLNK(found.mode):
            self.target[node] = found.target
        elif found.content is not None and found.size:
            self.borrowed[node] = found.content

    def _inherit(self, path: bytes, node: int, found: Inherited | None) -> None:
        if path:
            self._note("implied parent", path)
        if found is not None and stat.S_ISDIR(found.mode):
            self._take(node, found)

    def _take(self, node: int, found: Inherited) -> None:
        self.mode[node] = found.mode
        self.uid[node] = found.uid
        self.gid[node] = found.gid
        self.mtime[node] = found.mtime
        self.mtime_ns[node] = found.mtime_ns
        if found.xattrs:
            self.xattrs[node] = dict(found.xattrs)

    def _date_implied(self, children_first: list[int]) -> None:
        """An implied directory is as old as its newest direct child, else as its newest entry."""
        newest: dict[int, tuple[int, int]] = {}
        for node in children_first:
            own = []
            below = []
            for child in self.children[node].values():
                if child not in self._implied:
                    own.append((self.mtime[child], self.mtime_ns[child]))
                if child in newest:
                    below.append(newest[child])
            if node in self._implied:
                time = max(own or below or [self._implied[node]])
                self.mtime[node], self.mtime_ns[node] = time
            # A directory that only markers imply has a time, but nothing that its parents count.
            if own or below:
                newest[node] = max(own + below)

    def _settle_whiteouts(self, node: int) -> None:
        """Whiteouts become children, or the opaque mark of the directory that took their place."""
        opaque = node in self._opaque or node in self._replaced
        if opaque:
            self.xattrs.setdefault(node, {})[OPAQUE_XATTR] = b"y"
        names = self.children[node]
        left = False
        for name, whiteout in self._whiteouts.pop(node, {}).items():
            child = names.get(name)
            if child in self.children:
                self._replaced.add(child)
            elif child is None and not opaque:
                # In an opaque directory readdir would list it and stat deny it.
                names[name] = whiteout
                left = True
        if left:
            # Without an origin the kernel shows whiteouts of a directory that lies over nothing.
            self.xattrs.setdefault(node, {})[ORIGIN_XATTR] = b""

"""Open what holds an image: a tar, a compressed tar, a stream of one, or a directory.

What comes out is always the same: names, and the bytes behind a name as a ``Source``.
Nothing is extracted. Names resolve as in a file system whose root is the archive, so
neither a link nor ``..`` leads out of it. A directory is read through openat2(2) with
RESOLVE_BENEATH, which holds the same promise against a layout that changes meanwhile.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from overlayctl.errors import BadArchive, BadTar, HostCannot, LimitExceeded
from overlayctl.layer import compression, magic
from overlayctl.layer.compression import Expansion, Source, begun, chunks, codec, head
from overlayctl.layer.input import STDIN, Closing, open_file, what
from overlayctl.layer.stream import Candidate, Stream
from overlayctl.layer.tar import Limits, Member, TarReader

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "Archive",
    "Directory",
    "Expansion",
    "Source",
    "Tar",
    "chunks",
    "codec",
    "head",
    "open_archive",
]

READ_LIMIT = 4 << 20
_HOPS = 40
_DIRECTORY_NAMES = 10_000


class Archive(Protocol):
    """Names and the bytes behind them. Leaving the ``with`` closes the fds of all sources."""

    where: str
    """What messages call it: the path as it was given, or "standard input"."""

    @property
    def names(self) -> frozenset[str]:
        """The names in a tar; the top level of a directory. Bytes as os.fsdecode has them."""

    def source(self, name: str) -> Source | Candidate:
        """The regular file ``name``, of a stream perhaps as a layer that has passed.

        Raises BadArchive if there is none.
        """

    def read(self, name: str, limit: int = READ_LIMIT) -> bytes:
        """All bytes of ``name``. Raises BadArchive, LimitExceeded above ``limit`` bytes."""

    def exists(self, name: str) -> bool:
        """Whether ``name`` leads to a regular file."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class _File(NamedTuple):
    offset: int
    size: int


class _Symlink(NamedTuple):
    target: str


class _Other(NamedTuple):
    what: str


_Entry = _File | _Symlink | _Other
_Content = Callable[[int, int, str], Source | Candidate]
_DIRECTORY = _Other("a directory")
_SPARSE = _Other("stored as a sparse file")
_KINDS = {b"3": "a character device", b"4": "a block device", b"6": "a FIFO"}


class Tar(Closing):
    """A tar, in a seekable file or one that has passed. Made by ``open_archive``.

    ``content`` gives what its headers put at an offset, of a length, under a name.
    """

    def __init__(
        self,
        where: str,
        entries: dict[str, _Entry],
        content: _Content,
        owned: ExitStack,
    ) -> None:
        super().__init__(where, owned)
        self._entries = entries
        self._content = content

    @property
    def names(self) -> frozenset[str]:
        """Every name in the tar, without a leading ``./``."""
        return frozenset(self._entries)

    def source(self, name: str) -> Source | Candidate:
        """The file ``name``, links followed. Raises BadArchive."""
        entry = self._resolve(name)
        if not isinstance(entry, _File):
            raise BadArchive(
                f"{self.where} has no file {name!r}" + (f": it is {entry.what}" if entry else ""),
                hint="the archive is incomplete: save it again",
                name=name,
            )
        return self._content(entry.offset, entry.size, name)

    def read(self, name: str, limit: int = READ_LIMIT) -> bytes:
        """All bytes of ``name``. Raises BadArchive, LimitExceeded."""
        return _read(self.source(name), limit)

    def exists(self, name: str) -> bool:
        """Whether ``name`` leads to a regular file; a loop of links does not."""
        try:
            return isinstance(self._resolve(name), _File)
        except BadArchive:
            return False

    def _resolve(self, name: str) -> _File | _Other | None:
        todo = name.split("/")[::-1]
        done: list[str] = []
        hops = 0
        entry: _Entry | None = None
        while todo:
            part = todo.pop()
            if part in ("", "."):
                continue
            if part == "..":
                if not done:
                    raise BadArchive(f"{name!r} leads out of {self.where}", name=name)
                done.pop()
                continue
            done.append(part)
            entry = self._entries.get("/".join(done))
            if isinstance(entry, _Symlink):
                hops += 1
                if hops > _HOPS:
                    raise BadArchive(
                        f"{name!r} in {self.where} is a loop of symbolic links", name=name
                    )
                done = [] if entry.target.startswith("/") else done[:-1]
                todo.extend(entry.target.split("/")[::-1])
        entry = self._entries.get("/".join(done))
        # The loop ends behind the last symlink.
        return entry if not isinstance(entry, _Symlink) else None


def _scan(members: Iterable[Member]) -> dict[str, _Entry]:
    """The entries of an archive; of several with one name the last one counts."""
    entries: dict[str, _Entry] = {}
    for member in members:
        name = _normal(member.name)
        if name is None:
            continue
        entry: _Entry | None
        match member.type:
            case b"0":
                entry = _SPARSE if member.extents else _File(member.data, member.stored)
            case b"1":
                target = _normal(member.linkname)
                entry = entries.get(target) if target else None
                entry = entry or _Other(f"a hard link to {target!r}, which is not there")
            case b"2":
                entry = _Symlink(os.fsdecode(member.linkname))
            case b"5":
                entry = _DIRECTORY
            case kind:
                entry = _Other(_KINDS[kind])
        entries[name] = entry
    return entries


def _normal(name: bytes) -> str | None:
    """``name`` without ``.`` and empty parts; None for the root and for what lies outside."""
    parts = [part for part in os.fsdecode(name).split("/") if part not in ("", ".")]
    return None if not parts or ".." in parts else "/".join(parts)


class Directory(Closing):
    """A directory. Made by ``open_archive``; files are opened when they are asked for."""

    def __init__(self, fd: int, where: str, owned: ExitStack) -> None:
        super().__init__(where, owned)
        self._fd = fd
        self._sources: dict[tuple[int, int], int] = {}

    @property
    def names(self) -> frozenset[str]:
        """The names at its top level, 10,000 of them at most."""
        found: set[str] = set()
        with os.scandir(self._fd) as entries:
            for entry in entries:
                found.add(entry.name)
                if len(found) == _DIRECTORY_NAMES:
                    break
        return frozenset(found)

    def source(self, name: str) -> Source:
        """The file ``name``, kept open until the archive is closed. Raises BadArchive."""
        fd = self._open(name)
        info = os.fstat(fd)
        key = info.st_dev, info.st_ino
        if key in self._sources:
            os.close(fd)
            fd = self._sources[key]
        else:
            self._sources[key] = fd
            self._owned.callback(os.close, fd)
        return Source(fd, 0, info.st_size, name)

    def read(self, name: str, limit: int = READ_LIMIT) -> bytes:
        """All bytes of ``name``. Raises BadArchive, LimitExceeded."""
        fd = self._open(name)
        try:
            return _read(Source(fd, 0, os.fstat(fd).st_size, name), limit)
        finally:
            os.close(fd)

    def exists(self, name: str) -> bool:
        """Whether ``name`` leads to a regular file inside the directory."""
        try:
            os.close(self._open(name))
        except BadArchive:
            return False
        return True

    def _open(self, name: str) -> int:
        # A device may act on being opened, so what it is is asked of an O_PATH fd first.
        probe = self._openat2(name, os.O_PATH)
        try:
            self._expect_file(probe, name)
        finally:
            os.close(probe)
        fd = self._openat2(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            self._expect_file(fd, name)
        except BadArchive:
            os.close(fd)
            raise
        return fd

    def _expect_file(self, fd: int, name: str) -> None:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise BadArchive(f"{name!r} in {self.where} is {what(mode)}, no file", name=name)

    def _openat2(self, name: str, flags: int) -> int:
        from overlayctl.errors import KernelRefused
        from overlayctl.kernel import libc

        resolve = libc.RESOLVE_BENEATH | libc.RESOLVE_NO_MAGICLINKS
        try:
            return libc.openat2(self._fd, name, flags | os.O_CLOEXEC, 0, resolve)
        except (OSError, KernelRefused) as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ENAMETOOLONG):
                why = f"{self.where} has no file {name!r}"
            elif error.errno == errno.EXDEV:
                why = f"{name!r} leads out of {self.where}"
            elif error.errno == errno.ELOOP:
                why = f"{name!r} in {self.where} is a loop of symbolic links or a magic one"
            elif error.errno == errno.EMFILE:
                raise HostCannot(
                    f"{self.where} has more files than this process may open",
                    hint="raise the limit: ulimit -n 65536",
                ) from error
            else:
                raise
            raise BadArchive(why, hint="save or copy the image again", name=name) from error


def _read(source: Source | Candidate, limit: int) -> bytes:
    if source.size > limit:
        raise LimitExceeded(
            f"{source.name} has {source.size} bytes, the limit for it is {limit}",
            blob=source.name,
            limit=limit,
        )
    if isinstance(source, Candidate):
        raise BadArchive(
            f"{source.name} is a tar or compressed, not the text that it should be",
            hint="save the image again",
            blob=source.name,
        )
    return b"".join(bytes(piece) for piece in compression.stored(source))


def open_archive(
    path: str,
    place: Callable[[], str],
    limits: Limits | None = None,
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> Archive:
    """The archive at ``path``: a file, ``-`` for standard input, or a directory.

    What is compressed, and what cannot seek, is read to its end here and stored in the
    directory that ``place`` names; ``advance`` is told how many bytes are. Raises NotFound,
    BadArchive for what is no archive, BadTar for a damaged one, DiskFull.
    """
    with ExitStack() as opening:
        opened = open_file(path, opening, expand=True)
        where, source = opened.where, opened.source
        if opened.directory is not None:
            return Directory(opened.directory, where, opening.pop_all())
        if source:
            start = head(source, magic.HEAD)
            members: Iterable[Member] = TarReader(source.fd, source.offset, source.size, limits)
            content: _Content = partial(_part, source)
        else:
            pieces = opened.pieces or iter(())
            start = begun(pieces, magic.HEAD)
            stream = Stream(place, opening, advance)
            members, content = stream.members(chain((start,), pieces), limits), stream.content
        if not start:
            raise BadArchive(f"{where} is empty", hint="fetch or save it again")
        start = start[: magic.HEAD]
        try:
            entries = _scan(members)
        except BadTar as error:
            _refuse(start, where, error)
            raise
        if not entries:
            _refuse(start, where, None)
        return Tar(where, entries, content, opening.pop_all())


def _part(source: Source, offset: int, size: int, name: str) -> Source:
    return Source(source.fd, source.offset + offset, size, name)


def _refuse(start: bytes, where: str, error: BadTar | None) -> None:
    """Raise BadArchive if the first bytes already show that this never was a tar."""
    if error and (error.details.get("offset") != 0 or start[257:262] == b"ustar"):
        return
    compressed = codec(start)
    known = magic.foreign(start)
    hint = "give a file that docker save, podman save or skopeo copy has written"
    if compressed != "none":
        kind = f"{compressed} data inside another compression"
    elif known:
        kind = known.words
        if known.to_tar:
            # What came through a pipe has no name that a command could take.
            name = "FILE" if where == STDIN else shlex.quote(where)
            hint = "make a tar of it: " + known.to_tar.replace("LAYER", name)
    elif error:
        kind = "no tar"
    else:
        return
    raise BadArchive(f"{where} is no image archive: it is {kind}", hint=hint) from error

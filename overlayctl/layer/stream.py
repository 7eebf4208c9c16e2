"""A tar that comes once, through a pipe or out of a compression, stored as it passes.

Which of its members are layers is said by a manifest that may come last. So each that can be
one (a tar or compressed data, larger than SMALL) becomes a layer file in staging, ready but
for its index; the rest, a layer that is smaller included, goes to one file without a name.
What nobody asks for goes with the staging.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from overlayctl.digest import Digest
from overlayctl.errors import BadInput, BadTar, DigestMismatch
from overlayctl.kernel import disk
from overlayctl.layer import ingest, magic
from overlayctl.layer.compression import Buffer, Source, begun, codec, decompressed
from overlayctl.layer.format import FILE
from overlayctl.layer.tar import BLOCK, Limits, Member, TarReader

if TYPE_CHECKING:
    from contextlib import ExitStack
    from io import FileIO

    from overlayctl.layer.ingest import Received

SMALL = 64 << 10
_AHEAD = 4


class _Arrived(NamedTuple):
    received: Received
    blob: Digest


class _Ahead:
    """What one thread hands to another, a few pieces ahead of it.

    Its end never waits for room, and no lock is held in Python: a signal may raise in the thread
    that hands over, wherever that is, and the other one must still come to the end.
    """

    def __init__(self) -> None:
        self._pieces: SimpleQueue[Buffer | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(_AHEAD):
            self._room.put(None)

    def put(self, piece: Buffer) -> None:
        self._room.get()
        self._pieces.put(piece)

    def end(self) -> None:
        self._pieces.put(None)

    def __iter__(self) -> Iterator[Buffer]:
        while (piece := self._pieces.get()) is not None:
            self._room.put(None)
            yield piece


class Candidate:
    """What may be a layer: its tar as a layer file without an index, ``size`` bytes as it came."""

    def __init__(self, directory: str, size: int, name: str) -> None:
        self.size = size
        self.name = name
        self.arrival: Future[_Arrived] = Future()
        self._directory = directory
        self._taken = False

    def received(self, blob: Digest | None) -> Received:
        """What came. Raises what was wrong with it, DigestMismatch if it is not ``blob``."""
        arrived = self.arrival.result()
        if blob is not None and arrived.blob != blob:
            raise DigestMismatch(self.name, expected=blob, actual=arrived.blob)
        return arrived.received

    def take(self) -> tuple[FileIO, str]:
        """The file, opened, and for who asks first the directory it is in.

        The others must not change the file: it is a layer by then.
        """
        directory = "" if self._taken else self._directory
        self._taken = True
        fd = os.open(os.path.join(self._directory, FILE), os.O_RDWR | os.O_CLOEXEC)
        os.fchmod(fd, ingest.MODE)
        return os.fdopen(fd, "r+b", buffering=0), directory

    def receive(self, pieces: Iterable[Buffer], advance: Callable[[int], None]) -> None:
        """Store the tar in ``pieces``. Raises what is wrong with it."""
        self.arrival = Future()
        self.arrival.set_result(self._receive(iter(pieces), advance))

    def receive_from(self, ahead: _Ahead, advance: Callable[[int], None]) -> _Arrived:
        """The same for what another thread hands over, which is read to its end."""
        pieces = iter(ahead)
        try:
            return self._receive(pieces, advance)
        finally:
            # Whoever hands over waits for room.
            for _ in pieces:
                pass

    def _receive(self, pieces: Iterator[Buffer], advance: Callable[[int], None]) -> _Arrived:
        first = next(pieces, b"")
        kind = codec(bytes(first[:BLOCK]))
        digest = hashlib.sha256()

        def stored() -> Iterator[Buffer]:
            for piece in chain((first,), pieces):
                digest.update(piece)
                yield piece

        # Who may not pass over modes opens it once more, so it is read-only from then on.
        with ingest.new_file(self._directory, 0o600) as file:
            if kind == "none":
                tar: Iterator[Buffer] = chain((first,), pieces)
                received = ingest.receive(file.fileno(), tar, progress=advance)
                return _Arrived(received, Digest(received.diff_id))
            tar = decompressed(stored(), kind, self.name)
            received = ingest.receive(file.fileno(), tar, progress=advance)
        return _Arrived(received, Digest("sha256:" + digest.hexdigest()))


class Stream:
    """What has passed, by the offsets and lengths that its headers gave.

    ``place`` names the staging, ``advance`` is told the bytes of tar that were stored.
    """

    def __init__(
        self, place: Callable[[], str], owned: ExitStack, advance: Callable[[int], None]
    ) -> None:
        self._place = place
        self._owned = owned
        self._told = advance
        self._kept = -1
        self._end = 0
        self._found: dict[int, Candidate | int] = {}
        self._running: set[Future[_Arrived]] = set()

    def members(self, pieces: Iterator[Buffer], limits: Limits | None) -> Iterator[Member]:
        """The entries of the tar in ``pieces``, read to their end; as they come, all is stored.

        Raises BadTar, and what hinders storing; not what is wrong with a member.
        """
        with ingest.threads(self._told) as (pool, advance):
            yield from _Passing(pieces, partial(self._store, pool, advance), limits)
            for _ in pieces:
                pass
            self._wait(0)

    def content(self, offset: int, size: int, name: str) -> Source | Candidate:
        """The ``size`` bytes that were at ``offset``."""
        found = self._found[offset] if size else 0
        return Source(self._kept, found, size, name) if isinstance(found, int) else found

    def candidate(self, size: int, name: str) -> Candidate:
        """A new one, to be received."""
        directory = os.path.join(self._place(), "passed-" + secrets.token_hex(4))
        return Candidate(directory, size, name)

    def _store(
        self,
        pool: ThreadPoolExecutor,
        advance: ingest.Advance,
        name: str,
        offset: int,
        size: int,
        data: Iterator[Buffer],
    ) -> None:
        start = begun(data, BLOCK)
        pieces = chain((start,), data)
        if size > SMALL and (codec(start) != "none" or magic.is_header(start[:BLOCK])):
            found = self._found[offset] = self.candidate(size, name)
            self._hand_over(pool, advance, found, pieces)
        else:
            self._found[offset] = self._end
            self._keep(pieces)

    def _hand_over(
        self,
        pool: ThreadPoolExecutor,
        advance: ingest.Advance,
        candidate: Candidate,
        pieces: Iterable[Buffer],
    ) -> None:
        """Let a thread receive it, a few pieces behind."""
        self._wait(ingest.CORES)
        ahead = _Ahead()
        try:
            candidate.arrival = pool.submit(candidate.receive_from, ahead, advance)
            self._running.add(candidate.arrival)
            for piece in pieces:
                ahead.put(piece)
        finally:
            ahead.end()

    def _keep(self, pieces: Iterable[Buffer]) -> None:
        if self._kept < 0:
            self._kept = _unnamed_file(self._place())
            self._owned.callback(os.close, self._kept)
        for piece in pieces:
            disk.look(self._kept)
            view = memoryview(piece)
            while view:
                written = os.pwrite(self._kept, view, self._end)
                self._end += written
                view = view[written:]

    def _wait(self, running: int) -> None:
        """Until no more than so many are being received: each has some MiB in memory.

        Raises what keeps one from being stored; what is wrong with one may not matter.
        """
        while len(self._running) > running:
            done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
            for one in done:
                error = one.exception()
                if error is not None and not isinstance(error, BadInput):
                    raise error


class _Passing(TarReader):
    """The headers of a tar that comes in ``pieces``, and the data between them to ``store``."""

    def __init__(
        self,
        pieces: Iterator[Buffer],
        store: Callable[[str, int, int, Iterator[Buffer]], None],
        limits: Limits | None,
    ) -> None:
        super().__init__(-1, 0, 1 << 63, limits)
        self._pieces = pieces
        self._store = store
        self._rest = memoryview(b"")
        self._at = 0
        self._name = ""

    def _read(self, at: int, length: int) -> bytes:
        # Headers are read at rising offsets. What lies between them is a member, or padding.
        if at > self._at:
            data = self._next(at - self._at)
            self._store(self._name, self._at, at - self._at, data)
            if self._at < at:
                raise BadTar(
                    f"the archive is cut: {at - self._at} bytes of {self._name} are missing",
                    hint="the file is incomplete: fetch or save it again",
                    offset=self._at,
                )
        return b"".join(self._next(length))

    def _finish(
        self, header: Member, block: bytes, pax: dict[str, bytes], at: int
    ) -> tuple[Member, int, bytes]:
        self._name = os.fsdecode(header.name)
        return super()._finish(header, block, pax, at)

    def _next(self, count: int) -> Iterator[memoryview]:
        """The next ``count`` bytes in pieces, fewer at the end."""
        while count:
            if not self._rest:
                self._rest = memoryview(next(self._pieces, b""))
                if not self._rest:
                    return
            piece = self._rest[:count]
            self._rest = self._rest[len(piece) :]
            self._at += len(piece)
            count -= len(piece)
            yield piece


def _unnamed_file(place: str) -> int:
    try:
        return os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    # Most of FUSE, and overlays of older kernels.
    path = os.path.join(place, "kept-" + secrets.token_hex(4))
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    return fd

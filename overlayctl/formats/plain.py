"""Layer tars given by path: what ``import`` makes an image of."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING

from overlayctl.errors import BadArchive
from overlayctl.layer import magic
from overlayctl.layer.compression import codec, expect_tar, head
from overlayctl.layer.input import Closing, open_file
from overlayctl.layer.stream import Candidate, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from overlayctl.layer.compression import Source


class Plain(Closing):
    """Opened layer tars, bottom to top."""

    def __init__(self, sources: tuple[Source | Candidate, ...], owned: ExitStack) -> None:
        super().__init__("layer tars", owned)
        self.sources = sources


def open_layers(
    paths: Iterable[str],
    place: Callable[[], str],
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> Plain:
    """The tars at ``paths`` (``-`` is standard input), compressed or not, as they are.

    What cannot seek is stored in the directory that ``place`` names, as the layer it is to
    be. Raises NotFound, HostCannot, Usage, and BadArchive for a directory or an empty file.
    """
    sources: list[Source | Candidate] = []
    with ExitStack() as opening:
        stream = Stream(place, opening, advance)
        for path in paths:
            opened = open_file(path, opening, expand=False)
            where, source = opened.where, opened.source
            if opened.directory is not None:
                raise BadArchive(
                    f"{where} is a directory, import takes tars",
                    hint=f"tar -C {where} -c . | overlayctl import - NAME",
                )
            first = head(source) if source else next(opened.pieces or iter(()), b"")
            if not first:
                raise BadArchive(f"{where} is empty", hint="fetch or save it again")
            if source:
                sources.append(source)
            else:
                start = bytes(first[: magic.HEAD])
                if codec(start) == "none":
                    expect_tar(start, where)
                passed = stream.candidate(0, where)
                passed.receive(chain((first,), opened.pieces or ()), advance)
                passed.received(None)
                sources.append(passed)
        return Plain(tuple(sources), opening.pop_all())

"""Layer tars given by path: what ``import`` makes an image of."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from overlayctl.errors import BadArchive
from overlayctl.layer.input import Closing, open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from overlayctl.layer.compression import Source


class Plain(Closing):
    """Opened layer tars, bottom to top."""

    def __init__(self, sources: tuple[Source, ...], owned: ExitStack) -> None:
        super().__init__("layer tars", owned)
        self.sources = sources


def open_layers(paths: Iterable[str], spool: Callable[[], int]) -> Plain:
    """The tars at ``paths`` (``-`` is standard input), compressed or not, as they are.

    What cannot seek is first written to the fd that ``spool`` returns. Raises NotFound,
    HostCannot, Usage, and BadArchive for a directory or an empty file.
    """
    sources = []
    with ExitStack() as opening:
        for path in paths:
            opened = open_file(path, spool, opening, expand=False)
            where = opened.source.name
            if opened.directory:
                raise BadArchive(
                    f"{where} is a directory, import takes tars",
                    hint=f"tar -C {where} -c . | overlayctl import - NAME",
                )
            if not opened.source.size:
                raise BadArchive(f"{where} is empty", hint="fetch or save it again")
            sources.append(opened.source)
        return Plain(tuple(sources), opening.pop_all())

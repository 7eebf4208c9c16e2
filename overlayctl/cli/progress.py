"""What is seen of a long load: bytes, rate, layer n of m; on a terminal, and nowhere else."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import TextIO

from overlayctl.cli.table import size

_EVERY = 0.1
_BAR = 24


class Silent:
    """Shows nothing."""

    def start(self, total: int | None, layers: int) -> None:
        """Show nothing."""

    def advance(self, count: int) -> None:
        """Show nothing."""

    def layer_done(self, number: int) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""


class Bar:
    """One line on a terminal, redrawn at most ten times a second. Any thread may call it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._total: int | None = None
        self._layers = 0
        self._read = 0
        self._done = 0
        self._began = time.monotonic()
        self._shown = 0.0
        self._visible = False

    def start(self, total: int | None, layers: int) -> None:
        """Begin: the bytes to read, where they are known, and the number of layers."""
        with self._lock:
            self._total, self._layers = total, layers
            self._read = self._done = 0
            self._began = time.monotonic()

    def advance(self, count: int) -> None:
        """``count`` more bytes are read."""
        with self._lock:
            self._read += count
            self._draw(force=False)

    def layer_done(self, number: int) -> None:
        """One layer is finished; they need not finish in order, so they are counted."""
        del number
        with self._lock:
            self._done += 1
            self._draw(force=True)

    def close(self) -> None:
        """Take the line away."""
        with self._lock:
            if self._visible:
                self._write("\r\x1b[K")
                self._visible = False

    def _draw(self, *, force: bool) -> None:
        now = time.monotonic()
        if not force and now - self._shown < _EVERY:
            return
        self._shown, self._visible = now, True
        self._write(f"\r{self._text(now - self._began)[: self._columns() - 1]}\x1b[K")

    def _text(self, seconds: float) -> str:
        parts = []
        if self._total:
            share = min(self._read / self._total, 1.0)
            bar = ("#" * int(share * _BAR)).ljust(_BAR, "-")
            parts.append(f"[{bar}] {share:4.0%}  {size(self._read)} of {size(self._total)}")
        else:
            parts.append(size(self._read))
        if seconds > _EVERY:
            parts.append(f"{size(int(self._read / seconds))}/s")
        if self._layers:
            parts.append(f"layer {min(self._done + 1, self._layers)} of {self._layers}")
        return "  ".join(parts)

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _write(self, text: str) -> None:
        # A terminal that has gone is no reason to stop loading.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


def progress(*, quiet: bool = False) -> Bar | Silent:
    """A bar where somebody watches stderr, else its silent twin."""
    stream = sys.stderr
    plain = os.environ.get("TERM", "dumb") == "dumb"
    if quiet or plain or stream is None or not stream.isatty():
        return Silent()
    return Bar(stream)

"""How values look to people: docker's columns and units, and names no terminal trips over."""

from __future__ import annotations

import base64
import os
import time
import unicodedata
from collections.abc import Sequence
from datetime import datetime

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_SPANS = (
    (1, "second"),
    (60, "minute"),
    (3600, "hour"),
    (86_400, "day"),
    (604_800, "week"),
    (2_592_000, "month"),
    (31_536_000, "year"),
)
# Docker goes on to the larger unit only at the second of it.
_ENOUGH = {"second": 1, "minute": 1, "hour": 1, "day": 2, "week": 2, "month": 2, "year": 2}
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, three spaces apart, as docker prints them."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def size(count: float) -> str:
    """Bytes in docker's decimal units, four significant digits: ``1.12kB``, ``142MB``."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.4g}{_UNITS[unit]}" if unit else f"{count:.0f}B"


def ago(when: str) -> str:
    """How long ago an RFC 3339 time was, in docker's words; the text itself if it is none."""
    try:
        seconds = time.time() - datetime.fromisoformat(when).timestamp()
    except (ValueError, OverflowError):
        return when
    if seconds < 1:
        return "Less than a second ago"
    span, unit = max(
        ((span, unit) for span, unit in _SPANS if seconds >= span * _ENOUGH[unit]),
        key=lambda pair: pair[0],
    )
    count = int(seconds // span)
    if count == 1 and unit in ("minute", "hour"):
        return f"About {'an' if unit == 'hour' else 'a'} {unit} ago"
    return f"{count} {unit}{'s' if count != 1 else ''} ago"


def printable(name: str | bytes) -> str:
    """A name with everything that could steer a terminal shown as an escape."""
    raw = os.fsencode(name) if isinstance(name, str) else name
    return "".join(_visible(character) for character in raw.decode("utf-8", "surrogateescape"))


def _visible(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(character) not in _HIDDEN:
        return character
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def json_name(name: bytes) -> dict[str, str]:
    """A name for JSON: text, and base64 beside it where the bytes are not UTF-8."""
    try:
        return {"name": name.decode()}
    except UnicodeDecodeError:
        return {
            "name": name.decode(errors="replace"),
            "name_base64": base64.b64encode(name).decode(),
        }

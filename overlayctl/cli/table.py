"""How values look to people: docker's columns and units, and names no terminal trips over."""

from __future__ import annotations

import base64
import time
import unicodedata
from collections.abc import Sequence
from datetime import datetime

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_SPANS = (
    # Up to how many seconds, of what length, in what words.
    (60, 1, "second"),
    (3600, 60, "minute"),
    (48 * 3600, 3600, "hour"),
    (14 * 86_400, 86_400, "day"),
    (60 * 86_400, 7 * 86_400, "week"),
    (730 * 86_400, 30 * 86_400, "month"),
)
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, three spaces apart, as docker prints them.

    Rows may be shorter or longer than the headers: people write the templates they come from.
    """
    lines = [headers, *rows]
    columns = range(max(map(len, lines)))
    widths = [max(_width(line[c]) for line in lines if c < len(line)) for c in columns]
    return "\n".join(
        "   ".join(
            cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=False)
        ).rstrip(" ")
        for line in lines
    )


def _width(text: str) -> int:
    """How many cells of a terminal the text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def size(count: float) -> str:
    """Bytes in docker's decimal units, three significant digits: ``1.12kB``, ``142MB``."""
    unit = 0
    # What would be rounded to 1000 has the next unit.
    while count >= (999.5 if unit else 1000) and unit < len(_UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.3g}{_UNITS[unit]}" if unit else f"{count:.0f}B"


def ago(when: str) -> str:
    """How long ago an RFC 3339 time was, in docker's words; the text itself if it is none."""
    try:
        seconds = time.time() - datetime.fromisoformat(when).timestamp()
    except (ValueError, OverflowError):
        return when
    if seconds < 1:
        return "Less than a second ago"
    # Docker rounds hours, and counts what is longer in whole hours (go-units, HumanDuration).
    exact = seconds if seconds < 3600 else (seconds + 1800) // 3600 * 3600
    for limit, length, unit in _SPANS:
        if exact < limit:
            count = int(exact // length)
            if count == 1 and unit in ("minute", "hour"):
                return f"About {'an' if unit == 'hour' else 'a'} {unit} ago"
            return f"{count} {unit}{'s' if count != 1 else ''} ago"
    return f"{int(seconds // (365 * 86_400))} years ago"


def printable(name: str | bytes) -> str:
    r"""A name with everything that could steer a terminal shown as an escape.

    ``\xNN`` is a control character or a byte that is not UTF-8; other characters are
    ``\uNNNN`` or ``\UNNNNNNNN``. A second call changes nothing: backslashes stay as they are.
    """
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(character) not in _HIDDEN:
        return character
    # From 0x80 on \x is a byte, not a character.
    if code < 0x80:
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

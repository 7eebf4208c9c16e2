"""The functions of ``--format`` templates, and how Go shows a value.

Go's own (pkg.go.dev/text/template "Functions", pkg.go.dev/fmt) and those that docker adds
(docker/cli ``templates``), on plain JSON values.
"""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

_VERB = re.compile(r"%([-+ 0]*)(\d{0,3})(?:\.(\d{0,3}))?(.?)", re.DOTALL)
_SHORT = {"\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_SHORT |= {"\v": "\\v", "\\": "\\\\", '"': '\\"'}


class Unfit(Exception):
    """An argument that a function cannot take; the template says which function it was."""


def shown(value: object, nothing: str = "<no value>") -> str:
    """``value`` as Go prints it: ``true``, ``[a b]``, ``map[a:b]``, ``<no value>``."""
    match value:
        case None:
            return nothing
        case bool():
            return "true" if value else "false"
        case Mapping():
            pairs = sorted((str(key), item) for key, item in value.items())
            inside = (f"{key}:{shown(item, '<nil>')}" for key, item in pairs)
            return f"map[{' '.join(inside)}]"
        case list() | tuple():
            return f"[{' '.join(shown(item, '<nil>') for item in value)}]"
        case float() if value.is_integer() and abs(value) < 1e21:
            return str(int(value))
        case _:
            return str(value)


def _json(value: object) -> str:
    def plain(other: object) -> str:
        return os.fsdecode(other) if isinstance(other, bytes) else str(other)

    # ASCII, so that no label of an image steers the terminal.
    return json.dumps(value, separators=(",", ":"), default=plain)


def _len(value: object) -> int:
    match value:
        case None:
            return 0
        case str():
            return len(value.encode(errors="surrogatepass"))
        case Mapping() | list() | tuple():
            return len(value)
        case _:
            raise Unfit(f"{shown(value)} has no length")


def _index(value: object, *keys: object) -> object:
    for key in keys:
        match value:
            case Mapping():
                # What Go's map[string]string answers, which is what docker's labels are.
                value = value.get(key, "") if isinstance(key, str) else ""
            case list() | tuple():
                if not isinstance(key, int) or isinstance(key, bool):
                    raise Unfit(f"{shown(key)!r} is no number, and the value is a list")
                if not 0 <= key < len(value):
                    raise Unfit(f"{key} is out of range, there are {len(value)}")
                value = value[key]
            case None:
                value = ""
            case _:
                raise Unfit(f"{shown(value)[:40]!r} is neither a list nor a map")
    return value


def _slice(value: object, start: object = 0, end: object = None) -> object:
    if not isinstance(value, (str, list, tuple)):
        raise Unfit(f"{shown(value)[:40]!r} is neither a list nor text")
    end = len(value) if end is None else end
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= len(value)):
        raise Unfit(f"{shown(start)} to {shown(end)} is not within 0 to {len(value)}")
    return value[start:end]


def _join(values: object, separator: object) -> str:
    if not isinstance(values, (list, tuple, type(None))) or not isinstance(separator, str):
        raise Unfit("it takes a list and a separator")
    return separator.join(map(shown, values or ()))


def _split(text: object, separator: object) -> list[str]:
    return list(_text(text)) if separator == "" else _text(text).split(_text(separator))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Unfit(f"{shown(value)[:40]!r} is no text")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise Unfit(f"{shown(value)[:40]!r} is no whole number")
    return value


def _title(value: object) -> str:
    return re.sub(r"(?<!\w)\w", lambda found: found[0].upper(), _text(value))


def _truncate(text: object, length: object) -> str:
    return _text(text)[: max(_number(length), 0)]


def _pad(text: object, before: object, after: object) -> str:
    sides = [" " * min(max(_number(side), 0), 1000) for side in (before, after)]
    return sides[0] + _text(text) + sides[1] if text != "" else ""


def _print(*values: object) -> str:
    # Go's Sprint: a space only between two operands that are both no text.
    out = ""
    for number, value in enumerate(values):
        apart = number and not isinstance(value, str) and not isinstance(values[number - 1], str)
        out += (" " if apart else "") + shown(value, "<nil>")
    return out


def _quoted(text: str) -> str:
    def one(character: str) -> str:
        if character in _SHORT:
            return _SHORT[character]
        if character.isprintable():
            return character
        code = ord(character)
        width = "x02" if code < 0x80 else "u04" if code < 0x10000 else "U08"
        return f"\\{width[0]}{code:{width[1:]}x}"

    return '"' + "".join(map(one, text)) + '"'


def _printf(form: object, *values: object) -> str:
    rest = list(values)

    def one(found: re.Match[str]) -> str:
        flags, width, precision, verb = found.groups()
        if verb == "%":
            return "%"
        if verb not in tuple("sdqvtfx"):
            raise Unfit(f"{found[0]!r} is none of %s %d %q %v %t %f %x %%")
        if not rest:
            raise Unfit(f"nothing is left for {found[0]!r}")
        text = _formatted(rest.pop(0), verb, flags, precision)
        if "0" in flags and "-" not in flags and verb in "dfx":
            return text.zfill(int(width or 0))
        return text.ljust(int(width or 0)) if "-" in flags else text.rjust(int(width or 0))

    out = _VERB.sub(one, _text(form))
    if rest:
        raise Unfit(f"{shown(rest[0])!r} has no verb in {form!r}")
    return out


def _formatted(value: object, verb: str, flags: str, precision: str | None) -> str:
    match verb, value:
        case "d", _:
            return f"{_number(value):{'+' if '+' in flags else ''}d}"
        case "x", str():
            return value.encode(errors="surrogatepass").hex()
        case "x", _:
            return f"{_number(value):x}"
        case "f", int() | float() if not isinstance(value, bool):
            return f"{value:.{6 if precision is None else int(precision or 0)}f}"
        case "t", bool():
            return shown(value)
        case (("f" | "t"), _):
            raise Unfit(f"{shown(value)[:40]!r} does not fit %{verb}")
        case _:
            pass
    text = shown(value, "<nil>")
    text = text if precision is None or verb == "v" else text[: int(precision or 0)]
    return _quoted(text) if verb == "q" else text


def _eq(first: object, *others: object) -> bool:
    if not others:
        raise Unfit("it takes two values or more")
    return any(type(first) is type(other) and first == other for other in others)


def _compare(test: Callable[[Any, Any], Any]) -> Callable[[object, object], bool]:
    def compared(first: object, second: object) -> bool:
        if isinstance(first, str) and isinstance(second, str):
            return bool(test(first, second))
        return bool(test(_number(first), _number(second)))

    return compared


FUNCTIONS: Mapping[str, Callable[..., object]] = {
    "eq": _eq,
    "ge": _compare(operator.ge),
    "gt": _compare(operator.gt),
    "index": _index,
    "join": _join,
    "json": _json,
    "le": _compare(operator.le),
    "len": _len,
    "lower": lambda value: _text(value).lower(),
    "lt": _compare(operator.lt),
    "ne": lambda first, second: not _eq(first, second),
    "not": operator.not_,
    "pad": _pad,
    "print": _print,
    "printf": _printf,
    "println": lambda *values: " ".join(shown(value, "<nil>") for value in values) + "\n",
    "slice": _slice,
    "split": _split,
    "title": _title,
    "truncate": _truncate,
    "upper": lambda value: _text(value).upper(),
}
"""By name; each raises Unfit for what it cannot take."""

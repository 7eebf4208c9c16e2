"""The part of Go's templates that people use with docker's ``--format``, over plain values.

``{{.A.B}}``, ``{{json .A}}``, ``{{len .A}}``, ``{{index .A "key" 0}}``, ``{{join .A ","}}``,
``{{upper .A}}``, ``{{lower .A}}``, ``{{range .A}}…{{else}}…{{end}}``, the same with ``if``,
pipelines (``{{.A | json}}``), and ``{{-``/``-}}`` (Go's text/template). Nothing is
evaluated but look-ups in dictionaries and lists; an unknown field is an error.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from overlayctl.errors import Usage

_ACTION = re.compile(r"\{\{(- )?\s*(.*?)\s*( -)?\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')
_DEPTH = 50
_ESCAPES = {"\\t": "\t", "\\n": "\n"}


class _Text(NamedTuple):
    text: str


class _Print(NamedTuple):
    pipeline: str


class _Block(NamedTuple):
    kind: str
    pipeline: str
    body: list[_Part]
    otherwise: list[_Part]


_Part = _Text | _Print | _Block


def split_table(template: str) -> tuple[bool, str]:
    """Whether the template asks for a table, and the template without that word."""
    is_table = template.startswith("table ")
    return is_table, template.removeprefix("table ").strip() if is_table else template


def render(template: str, value: object) -> str:
    """``template`` filled in from ``value``. Raises Usage naming what is wrong."""
    for escape, character in _ESCAPES.items():
        template = template.replace(escape, character)
    parts, stop = _parse(_tokens(template), 0)
    if stop:
        raise Usage(f"the format has an {{{{{stop}}}}} without its beginning")
    return "".join(_run(parts, value))


def _tokens(template: str) -> Iterator[_Text | str]:
    """Text, and the inside of each action."""
    at = 0
    trim = False
    for match in _ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip() if trim else text
        yield _Text(text.rstrip() if match[1] else text)
        yield match[2]
        trim = bool(match[3])
        at = match.end()
    rest = template[at:].lstrip() if trim else template[at:]
    if "{{" in rest:
        raise Usage("the format has a '{{' without its '}}'")
    yield _Text(rest)


def _parse(tokens: Iterator[_Text | str], depth: int) -> tuple[list[_Part], str]:
    """The parts up to ``else``, ``end`` or the end, and which of them it was."""
    if depth > _DEPTH:
        raise Usage("the format is nested too deeply")
    parts: list[_Part] = []
    for token in tokens:
        if isinstance(token, _Text):
            parts.append(token)
        elif token in ("else", "end"):
            return parts, token
        elif token.split(" ", 1)[0] in ("range", "if"):
            kind, _, pipeline = token.partition(" ")
            body, stop = _parse(tokens, depth + 1)
            otherwise: list[_Part] = []
            if stop == "else":
                otherwise, stop = _parse(tokens, depth + 1)
            if stop != "end":
                raise Usage(f"the format has a {{{{{kind}}}}} without {{{{end}}}}")
            parts.append(_Block(kind, pipeline, body, otherwise))
        else:
            parts.append(_Print(token))
    return parts, ""


def _run(parts: list[_Part], value: object) -> Iterator[str]:
    for part in parts:
        if isinstance(part, _Text):
            yield part.text
        elif isinstance(part, _Print):
            yield _shown(_evaluate(part.pipeline, value))
        elif part.kind == "if":
            chosen = part.body if _evaluate(part.pipeline, value) else part.otherwise
            yield from _run(chosen, value)
        else:
            found = _evaluate(part.pipeline, value)
            items = list(found.values() if isinstance(found, Mapping) else found or ())
            for item in items:
                yield from _run(part.body, item)
            if not items:
                yield from _run(part.otherwise, value)


def _evaluate(pipeline: str, value: object) -> Any:
    result: Any = None
    for number, command in enumerate(pipeline.split("|")):
        words = _WORD.findall(command)
        if not words:
            raise Usage("the format has an empty action")
        arguments = [_term(word, value) for word in words[1:]] + ([result] if number else [])
        if words[0] in _FUNCTIONS:
            try:
                result = _FUNCTIONS[words[0]](*arguments)
            except (TypeError, KeyError, IndexError, AttributeError) as error:
                raise Usage(f"the format's {words[0]} does not fit its values: {error}") from error
        elif arguments:
            raise Usage(
                f"the format uses {words[0]!r}, which is no function here",
                hint=f"there are: {', '.join(sorted(_FUNCTIONS))}",
            )
        else:
            result = _term(words[0], value)
    return result


def _term(word: str, value: object) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    if word.isdigit():
        return int(word)
    if not word.startswith("."):
        raise Usage(f"the format has {word!r}, which is neither a field nor a value")
    for field in filter(None, word.split(".")):
        if not isinstance(value, Mapping) or field not in value:
            known = list(value) if isinstance(value, Mapping) else []
            close = difflib.get_close_matches(field, known, 3)
            raise Usage(
                f"there is no field .{field}",
                hint=f"did you mean .{' or .'.join(close)}?"
                if close
                else f"there are: {', '.join(map(str, known)) or 'none below this value'}",
            )
        value = value[field]
    return value


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = value[key]
    return value


def _shown(value: object) -> str:
    """A value as Go prints it."""
    match value:
        case None:
            return "<no value>"
        case bool():
            return str(value).lower()
        case Mapping():
            return (
                f"map[{' '.join(f'{key}:{_shown(item)}' for key, item in sorted(value.items()))}]"
            )
        case list() | tuple():
            return f"[{' '.join(map(_shown, value))}]"
        case _:
            return str(value)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "json": lambda value: json.dumps(value, separators=(",", ":")),
    "len": len,
    "index": _index,
    "join": lambda values, separator: separator.join(map(_shown, values)),
    "upper": lambda value: str(value).upper(),
    "lower": lambda value: str(value).lower(),
    "println": lambda *values: " ".join(map(_shown, values)) + "\n",
}

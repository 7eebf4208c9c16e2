"""The part of Go's templates that people use with docker's ``--format``, over plain values.

Fields (``{{.A.B}}``, ``{{$.A}}``, ``{{(index .L 0).B}}``), pipelines (``{{.A | json}}``),
``if``/``else if``, ``range`` (with ``$i, $v :=``), ``with``, variables, comments, the trim
markers ``{{-`` and ``-}}``, Go's functions and docker's (pkg.go.dev/text/template;
docker/cli ``templates``). Nothing is evaluated but look-ups in mappings and lists:
no attribute of an object is ever read.

Where docker knows structs, a mapping has whatever fields it has, and an unknown one is an
error. Only mappings whose keys are anybody's (labels) answer ``<no value>`` as Go's maps do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from overlayctl.cli.template_functions import FUNCTIONS, Unfit, shown
from overlayctl.errors import Usage

_STRING = r'"(?:[^"\\\n]|\\.)*"|`[^`]*`'
_ACTION = re.compile(rf"\{{\{{(-(?=\s))?((?:{_STRING}|[^\"`}}]|\}}(?!\}}))*+)\}}\}}", re.DOTALL)
_COMMENT = re.compile(r"\{\{(-\s)?\s*/\*.*?\*/\s*?(\s-)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    rf"(?P<string>{_STRING})|(?P<number>[+-]?\d+(?:\.\d+)?)(?![\w.])|(?P<set>:=)"
    r"|(?P<field>(?:\.[^\W\d]\w*)+)|(?P<dot>\.)(?![\w.])|(?P<variable>\$\w*)|(?P<word>[^\W\d]\w*)"
    r"|(?P<mark>[|(),])"
)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)")
_ESCAPED = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_ESCAPED |= {mark: mark for mark in "\\\"'"}
_CONSTANTS = {"true": True, "false": False, "nil": None}
_OPEN = frozenset({"Annotations", "ExposedPorts", "Labels", "Options", "Volumes"})
_DEPTH = 50
_HINT = "{{json .}} shows all there is; --json with jq does more"

_Scope = Mapping[str, object]
"""The variables; the dot is the one without a name and ``$`` the value of the whole."""


class _Token(NamedTuple):
    kind: str
    text: str
    glued: bool


class _Literal(NamedTuple):
    value: object


class _Chain(NamedTuple):
    start: _Expression
    fields: tuple[str, ...]


class _Variable(NamedTuple):
    name: str


class _Call(NamedTuple):
    function: str
    arguments: tuple[_Expression, ...]


_Expression = _Literal | _Chain | _Variable | _Call


class _Text(NamedTuple):
    text: str


class _Output(NamedTuple):
    """An action that prints, or that sets ``variable`` and prints nothing."""

    variable: str
    value: _Expression


class _Block(NamedTuple):
    kind: str
    variables: tuple[str, ...]
    value: _Expression
    body: list[_Part]
    otherwise: list[_Part]


_Part = _Text | _Output | _Block


def split_table(template: str) -> tuple[bool, str]:
    """Whether the template asks for a table, and the template without that word."""
    word, _, rest = template.partition(" ")
    return (True, rest.strip()) if word == "table" else (False, template)


def render(template: str, value: object) -> str:
    """``template`` filled in from ``value``. Raises Usage naming what is wrong."""
    parser = _Parser(template)
    parts, stop = parser.block(0)
    if stop is not None:
        raise _bad(f"has {{{{{' '.join(t.text for t in stop)}}}}} without a beginning")
    out: list[str] = []
    try:
        _run(parts, {"": value, "$": value}, out)
    except RecursionError as error:
        raise _bad("meets a value that is nested too deeply to be shown") from error
    return "".join(out)


def _bad(why: str, hint: str = _HINT) -> Usage:
    return Usage(f"the format {why}", hint=hint)


def _pieces(template: str) -> list[str | list[_Token]]:
    """Text, and the tokens of each action."""
    pieces: list[str | list[_Token]] = []
    at = 0
    trim = False
    while True:
        start = template.find("{{", at)
        text = template[at:] if start < 0 else template[at:start]
        text = text.lstrip() if trim else text
        found = None
        if start >= 0:
            found = _COMMENT.match(template, start) or _ACTION.match(template, start)
            if found is None:
                raise _bad(f"has an action without its '}}}}': {template[start : start + 40]!r}")
            text = text.rstrip() if found[1] else text
        # Docker's list commands take these two from a shell that does not expand them.
        pieces.append(text.replace("\\t", "\t").replace("\\n", "\n"))
        if found is None:
            return pieces
        at = found.end()
        if found.re is _COMMENT:
            trim = bool(found[2])
            continue
        inside = found[2]
        trim = re.search(r"\s-\Z", inside) is not None
        pieces.append(_tokens(inside[:-1] if trim else inside))


def _tokens(inside: str) -> list[_Token]:
    tokens: list[_Token] = []
    at = 0
    while at < len(inside):
        if inside[at].isspace():
            at += 1
            continue
        found = _TOKEN.match(inside, at)
        if found is None:
            raise _bad(f"has {inside[at : at + 40]!r}, which means nothing here")
        glued = bool(tokens) and not inside[at - 1].isspace()
        tokens.append(_Token(found.lastgroup or "", found[0], glued))
        at = found.end()
    if not tokens:
        raise _bad("has an empty action: {{}}", "name a field: {{.ID}}")
    return tokens


class _Parser:
    """From pieces to parts: blocks, then the pipelines inside their actions."""

    def __init__(self, template: str) -> None:
        self._rest = iter(_pieces(template))
        self._tokens: list[_Token] = []
        self._known = {"$"}

    def block(self, depth: int) -> tuple[list[_Part], list[_Token] | None]:
        """The parts up to ``else``, ``end`` or the template's end, and which of them it was."""
        if depth > _DEPTH:
            raise _bad(f"nests blocks more than {_DEPTH} deep")
        parts: list[_Part] = []
        for piece in self._rest:
            if isinstance(piece, str):
                parts.append(_Text(piece))
            elif piece[0].text in ("else", "end"):
                return parts, piece
            elif piece[0].text in ("if", "range", "with"):
                parts.append(self._opened(piece, depth))
            else:
                names, value = self._statement(piece)
                parts.append(_Output(names[0] if names else "", value))
        return parts, None

    def _opened(self, opening: list[_Token], depth: int) -> _Block:
        kind = opening[0].text
        outside = set(self._known)
        names, value = self._statement(opening[1:], ranges=kind == "range")
        body, stop = self.block(depth + 1)
        otherwise: list[_Part] = []
        words = [token.text for token in stop or ()]
        if stop and len(words) > 2 and words[0] == "else" and words[1] in ("if", "with"):
            # The inner block's end is the outer one's too.
            otherwise, words = [self._opened(stop[1:], depth + 1)], ["end"]
        elif words == ["else"]:
            otherwise, stop = self.block(depth + 1)
            words = [token.text for token in stop or ()]
        if words != ["end"]:
            raise _bad(f"has {{{{{kind}}}}} without {{{{end}}}}")
        self._known = outside
        return _Block(kind, names, value, body, otherwise)

    def _statement(
        self, tokens: list[_Token], *, ranges: bool = False
    ) -> tuple[tuple[str, ...], _Expression]:
        """A pipeline, and the variables that it sets."""
        names: tuple[str, ...] = ()
        kinds = [token.kind for token in tokens]
        if kinds[:2] == ["variable", "set"]:
            names = (tokens[0].text,)
        elif ranges and kinds[:4] == ["variable", "mark", "variable", "set"]:
            names = (tokens[0].text, tokens[2].text)
        self._tokens = tokens[len(names) * 2 :][::-1]
        value = self._pipeline(0)
        if self._tokens:
            raise _bad(f"has {self._tokens[-1].text!r} where nothing may follow")
        self._known.update(names)
        return names, value

    def _pipeline(self, depth: int) -> _Expression:
        if depth > _DEPTH:
            raise _bad(f"nests parentheses more than {_DEPTH} deep")
        value = self._command(depth, ())
        while self._tokens and self._tokens[-1].text == "|":
            self._tokens.pop()
            value = self._command(depth, (value,))
        return value

    def _command(self, depth: int, piped: tuple[_Expression, ...]) -> _Expression:
        first = self._tokens[-1] if self._tokens else _Token("", "", glued=False)
        calls = first.kind == "word" and first.text not in _CONSTANTS
        head: _Expression = _Literal(None)
        if calls:
            self._tokens.pop()
        else:
            head = self._operand(depth)
        arguments: list[_Expression] = []
        while self._tokens and self._tokens[-1].text not in ("|", ")"):
            arguments.append(self._operand(depth))
        if not calls and (arguments or piped):
            raise _bad(f"gives {first.text!r} arguments, but it is no function", _functions())
        return _Call(first.text, (*arguments, *piped)) if calls else head

    def _operand(self, depth: int) -> _Expression:
        token = self._tokens.pop() if self._tokens else _Token("", "", glued=False)
        value: _Expression
        match token.kind:
            case "field":
                return _Chain(_Variable(""), tuple(token.text[1:].split(".")))
            case "dot":
                return _Variable("")
            case "string":
                return _Literal(_unquoted(token.text))
            case "number":
                number = float(token.text) if "." in token.text else int(token.text[:400])
                return _Literal(number)
            case "word" if token.text in _CONSTANTS:
                return _Literal(_CONSTANTS[token.text])
            case "word":
                value = _Call(token.text, ())
            case "variable":
                if token.text not in self._known:
                    raise _bad(f"uses {token.text}, which it does not set")
                value = _Variable(token.text)
            case "mark" if token.text == "(":
                value = self._pipeline(depth + 1)
                if not self._tokens or self._tokens.pop().text != ")":
                    raise _bad("has '(' without ')'")
            case _:
                raise _bad(
                    f"has {token.text!r} where a value should be"
                    if token.text
                    else "lacks a value: an action or a pipe ends too early"
                )
        if self._tokens and self._tokens[-1].kind == "field" and self._tokens[-1].glued:
            return _Chain(value, tuple(self._tokens.pop().text[1:].split(".")))
        return value


def _unquoted(text: str) -> str:
    if text[0] == "`":
        return text[1:-1]

    def one(found: re.Match[str]) -> str:
        code = found[1]
        if code in _ESCAPED:
            return _ESCAPED[code]
        if len(code) == 1 or int(code[1:], 16) > 0x10FFFF:
            raise _bad(f"has {found[0]!r} in a string, which Go does not have")
        return chr(int(code[1:], 16))

    return _ESCAPE.sub(one, text[1:-1])


def _run(parts: Sequence[_Part], scope: _Scope, out: list[str]) -> None:
    for part in parts:
        match part:
            case _Text():
                out.append(part.text)
            case _Output():
                value = _value(part.value, scope)
                if part.variable:
                    scope = {**scope, part.variable: value}
                else:
                    out.append(shown(value))
            case _Block():
                _run_block(part, scope, out)


def _run_block(block: _Block, scope: _Scope, out: list[str]) -> None:
    value = _value(block.value, scope)
    if block.kind != "range":
        inner = {**scope, **dict.fromkeys(block.variables, value)}
        if block.kind == "with" and value:
            inner[""] = value
        _run(block.body if value else block.otherwise, inner, out)
        return
    pairs: list[tuple[object, object]]
    if isinstance(value, Mapping):
        pairs = sorted(value.items())
    elif value is None or isinstance(value, (list, tuple)):
        pairs = list(enumerate(value or ()))
    else:
        raise _bad(f"has a range over {shown(value)[:40]!r}, which is no list")
    for key, item in pairs:
        # One variable is the value, two are the key and the value.
        given = dict(zip(reversed(block.variables), (item, key), strict=False))
        _run(block.body, {**scope, **given, "": item}, out)
    if not pairs:
        _run(block.otherwise, scope, out)


def _value(expression: _Expression, scope: _Scope) -> object:
    match expression:
        case _Literal():
            return expression.value
        case _Variable():
            return scope[expression.name]
        case _Chain():
            return _fields(_value(expression.start, scope), expression.fields)
        case _Call(name, arguments):
            if name in ("and", "or") and arguments:
                # What decides ends it, so that {{if and .A .A.B}} never asks for .A.B in vain.
                value: object = None
                for argument in arguments:
                    value = _value(argument, scope)
                    if bool(value) == (name == "or"):
                        break
                return value
            if name not in FUNCTIONS:
                raise _bad(f"uses {name!r}, which is no function here", _functions(name))
            try:
                return FUNCTIONS[name](*(_value(argument, scope) for argument in arguments))
            except Unfit as error:
                raise _bad(f"cannot do {name}: {error}") from error
            except TypeError as error:
                raise _bad(f"gives {name} {len(arguments)} arguments, which do not fit") from error


def _fields(value: object, fields: Sequence[str]) -> object:
    came_by = ""
    for number, field in enumerate(fields):
        path = "." + ".".join(fields[: number + 1])
        if isinstance(value, Mapping):
            if field not in value and came_by not in _OPEN:
                raise _bad(f"asks for {path}, but there is no field {field}", _near(field, value))
            value = value.get(field)
        elif value is not None:
            what = "a list" if isinstance(value, (list, tuple)) else "a single value"
            raise _bad(
                f"asks for {path}, but .{came_by} is {what} without fields",
                "{{range}} walks a list, {{index .List 0}} takes from it",
            )
        came_by = field
    return value


def _near(field: str, fields: Mapping[str, object]) -> str:
    import difflib

    lower = {str(name).lower(): str(name) for name in fields}
    close = difflib.get_close_matches(field.lower(), lower, 3)
    if close:
        return f"did you mean {' or '.join(lower[name] for name in close)}?"
    return f"there are: {', '.join(map(str, fields)) or 'none'}"


def _functions(name: str = "") -> str:
    import difflib

    every = sorted({*FUNCTIONS, "and", "or"})
    return f"there are: {', '.join(difflib.get_close_matches(name, every, 3) or every)}"

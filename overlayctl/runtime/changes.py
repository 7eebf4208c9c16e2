"""Changes to an image's config in a Dockerfile's words, as ``docker commit -c`` takes them.

    CMD ["nginx", "-g", "daemon off;"]     CMD=nginx -g      ENV A=1 B="two words"
    ENTRYPOINT  USER  WORKDIR  EXPOSE  VOLUME  LABEL  ONBUILD  HEALTHCHECK  STOPSIGNAL

Dockerfile reference ("Parser directives", "Environment replacement", each instruction). As
docker does, words are expanded with the environment of the config, an ENTRYPOINT without a CMD
takes the old CMD away, and HEALTHCHECK changes only what it names. Unlike docker, an empty list
(``CMD []``) takes the value away, STOPSIGNAL is taken, and so is ``=`` behind the word.
"""

from __future__ import annotations

import json
import posixpath
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from overlayctl.errors import Usage
from overlayctl.names import near

Config = dict[str, Any]

_LINE = re.compile(r"\s*([A-Za-z]+)(?:\s*=|\s+|$)\s*(.*?)\s*", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?:(:?[-+])([^}]*))?\})")
_PORT = re.compile(r"(?:[^/\s]*:)?(\d{1,5})(?:-(\d{1,5}))?(?:/([A-Za-z]+))?", re.ASCII)
_DURATION = re.compile(r"(\d{1,12}(?:\.\d*)?)(ns|us|µs|ms|s|m|h)", re.ASCII)
_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9}
_UNITS["h"] = 3600 * 10**9
_NUMBER = re.compile(r"\d{1,19}", re.ASCII)
# Docker and podman read no config that says more.
_MOST = (1 << 63) - 1
_SHELL = ["/bin/sh", "-c"]
_TYPES: dict[str, type] = {
    **dict.fromkeys(("Cmd", "Entrypoint", "Env", "OnBuild", "Shell"), list),
    **dict.fromkeys(("ExposedPorts", "Healthcheck", "Labels", "Volumes"), dict),
    **dict.fromkeys(("StopSignal", "User", "WorkingDir"), str),
}
_TIMES = {
    "interval": "Interval",
    "timeout": "Timeout",
    "start-period": "StartPeriod",
    "start-interval": "StartInterval",
}


def changed(config: Mapping[str, Any], changes: Sequence[str]) -> Config:
    """The config (what an image config has under ``config``) with the changes, in their order.

    Raises Usage naming the change that is none.
    """
    result = sound(config)
    commanded = False
    for change in changes:
        line = _LINE.fullmatch(change)
        word = line[1].upper() if line else ""
        apply = _KNOWN.get(word)
        if line is None or apply is None:
            raise _refused(
                change,
                f"{word or 'nothing'} is no change",
                near(word, _KNOWN) or f"the changes are {', '.join(sorted(_KNOWN))}",
            )
        if not line[2]:
            raise _refused(change, f"{word} needs a value", f"{word} VALUE")
        try:
            apply(result, line[2])
        except ValueError as error:
            raise _refused(change, str(error), f"{word} as in a Dockerfile") from None
        commanded = commanded or word == "CMD"
        if word == "ENTRYPOINT" and not commanded and result["Entrypoint"]:
            result["Cmd"] = None
    return result


def sound(config: Mapping[str, Any]) -> Config:
    """The config without what is of another type than the image-spec's (config.md)."""
    return {
        key: value
        for key, value in config.items()
        if value is None or isinstance(value, _TYPES.get(key, object))
    }


def _refused(change: str, why: str, hint: str) -> Usage:
    return Usage(f"-c {change!r}: {why}", hint=hint, change=change)


def _json_words(text: str) -> list[str] | None:
    """The words of a JSON list; None where the text is none. Raises ValueError for others in it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, list):
        return None
    if not all(isinstance(word, str) for word in value):
        raise ValueError("a JSON list here holds strings only")
    return value


def _run_words(config: Config, text: str) -> list[str] | None:
    """What to execute: a JSON list as it is, else a line for the image's shell."""
    words = _json_words(text)
    if words is None:
        return [*(config.get("Shell") or _SHELL), text]
    return words or None


def _cmd(config: Config, text: str) -> None:
    config["Cmd"] = _run_words(config, text)


def _entrypoint(config: Config, text: str) -> None:
    config["Entrypoint"] = _run_words(config, text)


def environment(config: Mapping[str, Any]) -> dict[str, str]:
    """The variables of a config, by name, in their order."""
    listed = config.get("Env")
    pairs = [str(one).partition("=") for one in listed] if isinstance(listed, list) else []
    return {name: value for name, _, value in pairs}


def _env(config: Config, text: str) -> None:
    names = environment(config)
    new = _pairs(text, names)
    config["Env"] = [f"{name}={value}" for name, value in {**names, **new}.items()]


def _label(config: Config, text: str) -> None:
    labels = config.get("Labels") or {}
    config["Labels"] = {**labels, **_pairs(text, environment(config))}


def _user(config: Config, text: str) -> None:
    config["User"] = _one(config, text)


def _workdir(config: Config, text: str) -> None:
    joined = posixpath.join("/", config.get("WorkingDir") or "/", _one(config, text))
    config["WorkingDir"] = posixpath.normpath("/" + joined.lstrip("/"))


def _volume(config: Config, text: str) -> None:
    added = _several(config, text)
    if not all(added):
        raise ValueError("VOLUME needs a path")
    config["Volumes"] = {**(config.get("Volumes") or {}), **{path: {} for path in added}}


def _expose(config: Config, text: str) -> None:
    ports = dict(config.get("ExposedPorts") or {})
    for word in _several(config, text):
        found = _PORT.fullmatch(word)
        first = int(found[1]) if found else 0
        last = int(found[2]) if found and found[2] else first
        protocol = (found[3] or "tcp").lower() if found else ""
        if not 1 <= first <= last <= 65535 or protocol not in ("tcp", "udp", "sctp"):
            raise ValueError(f"{word!r} is no port: PORT[-PORT][/tcp|udp|sctp]")
        ports |= {f"{port}/{protocol}": {} for port in range(first, last + 1)}
    config["ExposedPorts"] = ports


def _onbuild(config: Config, text: str) -> None:
    first = text.split(maxsplit=1)[0].upper()
    if first in ("ONBUILD", "FROM", "MAINTAINER"):
        raise ValueError(f"{first} is not allowed as an ONBUILD trigger")
    config["OnBuild"] = [*(config.get("OnBuild") or ()), text]


def _stopsignal(config: Config, text: str) -> None:
    name = _one(config, text)
    known = {one.name for one in signal.Signals}
    number = name.isascii() and name.isdigit() and 1 <= int(name) <= 64
    plain = "SIG" + name.upper().removeprefix("SIG").partition("+")[0].partition("-")[0]
    if not number and plain not in known:
        raise ValueError(f"{name!r} is no signal")
    config["StopSignal"] = name


def _healthcheck(config: Config, text: str) -> None:
    check = dict(config.get("Healthcheck") or {})
    rest = text
    while rest.startswith("--"):
        flag, _, rest = rest.partition(" ")
        name, _, value = flag[2:].partition("=")
        rest = rest.lstrip()
        if name == "retries":
            number = int(value) if _NUMBER.fullmatch(value) else 0
            if not 1 <= number <= _MOST:
                raise ValueError("--retries must be at least 1, and a 64-bit number")
            check["Retries"] = number
        elif name in _TIMES:
            check[_TIMES[name]] = _duration(name, value)
        else:
            raise ValueError(f"HEALTHCHECK has no option --{name}")
    kind, _, command = rest.partition(" ")
    if kind.upper() == "NONE" and not command:
        check["Test"] = ["NONE"]
    elif kind.upper() == "CMD" and command.strip():
        words = _json_words(command)
        check["Test"] = ["CMD-SHELL", command.strip()] if words is None else ["CMD", *words]
    else:
        raise ValueError("HEALTHCHECK takes NONE, or CMD and a command")
    config["Healthcheck"] = check


def _duration(name: str, text: str) -> int:
    """Nanoseconds of Go's way to write a duration (1m30s)."""
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"--{name} is a duration: 30s, 1m30s")
    total = sum(round(float(number) * _UNITS[unit]) for number, unit in parts)
    if 0 < total < 10**6:
        raise ValueError(f"--{name} cannot be less than 1ms")
    if total > _MOST:
        raise ValueError(f"--{name} is longer than Go can count: 292 years")
    return total


_KNOWN: dict[str, Callable[[Config, str], None]] = {
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "ONBUILD": _onbuild,
    "STOPSIGNAL": _stopsignal,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}


# --- words ------------------------------------------------------------------------------------


def _one(config: Config, text: str) -> str:
    """The text as one word, quotes gone and variables replaced."""
    return _plain(text, environment(config))


def _several(config: Config, text: str) -> list[str]:
    """The words of a JSON list, or those between the spaces. Raises ValueError for none."""
    listed = _json_words(text)
    words = list(_split(text)) if listed is None else listed
    found = [_plain(word, environment(config)) for word in words]
    if not found:
        raise ValueError("the list is empty")
    return found


def _pairs(text: str, names: Mapping[str, str]) -> dict[str, str]:
    """``NAME=value`` words, or the old form: a name, and all that follows is its value."""
    words = list(_split(text))
    if "=" not in words[0]:
        name, _, value = text.partition(words[0])[2].partition(" ")
        if not value.strip():
            raise ValueError(f"{words[0]!r} has no value: NAME=VALUE")
        return {_plain(words[0], names): _plain(value.strip(), names)}
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = _plain(name, names)
        if not equals:
            raise ValueError(f"{word!r} is not NAME=VALUE")
        if not name:
            raise ValueError("a name cannot be empty")
        found[name] = _plain(value, names)
    return found


def _split(text: str) -> Iterator[str]:
    """The words between spaces that are neither quoted nor escaped, quotes and all."""
    word, quote, at = "", "", 0
    while at < len(text):
        letter = text[at]
        if letter == "\\" and quote != "'" and at + 1 < len(text):
            word += text[at : at + 2]
            at += 2
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter.isspace():
            if word:
                yield word
            word, at = "", at + 1
            continue
        word += letter
        at += 1
    if word:
        yield word


def _plain(text: str, names: Mapping[str, str]) -> str:
    """The text without quotes and backslashes, variables replaced. Raises ValueError."""
    out, quote, at = "", "", 0
    while at < len(text):
        letter = text[at]
        at += 1
        if quote == "'":
            if letter == "'":
                quote = ""
            else:
                out += letter
        elif letter == "\\":
            follower = text[at : at + 1]
            if quote and follower not in ('"', "$", "\\"):
                out += letter
            out += follower
            at += 1
        elif letter == quote:
            quote = ""
        elif not quote and letter in "'\"":
            quote = letter
        elif letter == "$" and (found := _VARIABLE.match(text, at - 1)):
            out += _value(found, names)
            at = found.end()
        elif letter == "$" and text[at : at + 1] == "{":
            raise ValueError(f"{text[at - 1 :]!r} is no variable: ${{NAME}}, ${{NAME:-WORD}}")
        else:
            out += letter
    if quote:
        raise ValueError(f"the quote {quote} is not closed")
    return out


def _value(found: re.Match[str], names: Mapping[str, str]) -> str:
    """What ``$NAME``, ``${NAME}``, ``${NAME:-WORD}`` or ``${NAME:+WORD}`` stands for."""
    name = found[1] or found[2]
    how, word = found[3] or "", found[4] or ""
    value = names.get(name)
    there = bool(value) if how.startswith(":") else value is not None
    if how.endswith("+"):
        return _plain(word, names) if there else ""
    if how and not there:
        return _plain(word, names)
    return value or ""

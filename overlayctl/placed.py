"""What is mounted into a container beside its own tree: volumes, directories of the host, tmpfs.

The words for it are docker's (``-v``, ``--mount``, ``--tmpfs``), and so is what they mean:
docs.docker.com/engine/storage; moby, ``volume/mounts``.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from overlayctl import names
from overlayctl.errors import BadInput, Usage

Kind = Literal["volume", "bind", "tmpfs"]

PROPAGATION = frozenset({"private", "rprivate", "slave", "rslave", "shared", "rshared"})
"""How mounts made later travel between the host and the container (mount_namespaces(7))."""

# Each group allows one word. Labels for SELinux are never written, and what the words of the last
# group ask for is the case on every Linux.
_GROUPS = (
    frozenset({"ro", "rw"}), PROPAGATION, frozenset({"nocopy"}), frozenset({"z", "Z"}),
    frozenset({"consistent", "cached", "delegated"}),
)  # fmt: skip
_WORDS = {word: group for group in _GROUPS for word in group}
_SYNONYMS = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}
_FLAGS = frozenset({"readonly", "volume-nocopy"})
_KEYS = _FLAGS | {
    "type", "source", "target", "bind-propagation", "tmpfs-size", "tmpfs-mode", "consistency",
}  # fmt: skip
_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})
_SIZE = r"(?i:(\d+(?:\.\d+)?) ?([kmgtp]?)(?:i?b)?)"
_OCTAL = r"[0-7]{1,5}"
_TMPFS_DEFAULT = ("noexec", "nosuid", "nodev")
_TMPFS_FLAGS = frozenset(
    {
        "exec", "suid", "dev", "sync", "async", "dirsync", "atime", "diratime", "relatime",
        "strictatime", *_TMPFS_DEFAULT, "noatime", "nodiratime", "norelatime", "nostrictatime",
    }
)  # fmt: skip
_TMPFS_VALUES = {
    "size": r"\d+[kmgKMG%]?",
    "mode": _OCTAL,
    "uid": r"\d+",
    "gid": r"\d+",
    "nr_inodes": r"\d+[kmgKMG]?",
    "nr_blocks": r"\d+[kmgKMG]?",
}


class Placed(NamedTuple):
    """One of them.

    ``source`` is a volume's name or a path of the host; a tmpfs has none. ``target`` is an
    absolute path in the container, without dots. ``copy`` is whether the image's content goes
    into a new, empty volume; ``anonymous`` whether nobody gave the volume its name; ``make``
    whether a directory of the host is made where it is missing.
    """

    kind: Kind
    source: str
    target: str
    read_only: bool = False
    options: tuple[str, ...] = ()
    copy: bool = True
    anonymous: bool = False
    make: bool = False


def wanted(
    *,
    volumes: Iterable[str] = (),
    mounts: Iterable[str] = (),
    tmpfs: Iterable[str] = (),
    here: str,
) -> tuple[Placed, ...]:
    """What the values of ``-v``, ``--mount`` and ``--tmpfs`` say, relative to the path ``here``.

    As docker has it: no two for one place, but that another one is there takes an anonymous
    volume's. Raises Usage.
    """
    given = [volume(text, here) for text in volumes]
    given += [mount(text, here) for text in mounts]
    given += [memory(text) for text in tmpfs]
    found: dict[str, Placed] = {}
    for one in given:
        if one.anonymous:
            continue
        if one.target in found:
            raise Usage(
                f"two mounts are for {one.target}: {_described(found[one.target])} "
                f"and {_described(one)}",
                hint="name another place for one of them",
            )
        found[one.target] = one
    for one in given:
        found.setdefault(one.target, one)
    return ordered(found.values())


def _described(one: Placed) -> str:
    return f"{one.kind} {one.source}".rstrip()


def ordered(mounts: Iterable[Placed]) -> tuple[Placed, ...]:
    """The mounts in the order in which none hides another."""
    return tuple(sorted(mounts, key=lambda one: (one.target.count("/"), one.target)))


def declared(paths: Iterable[str], taken: Sequence[Placed]) -> list[Placed]:
    """The anonymous volumes that an image asks for, where nothing else is mounted.

    Raises BadInput for a place where nothing can be mounted.
    """
    there = {one.target for one in taken}
    found = []
    for path in sorted(paths):
        try:
            target = _target(path, f"VOLUME {path}")
        except Usage as error:
            raise BadInput(
                f"the image asks for a volume where none can be: {error}",
                hint="build the image without that VOLUME",
            ) from None
        if target not in there:
            there.add(target)
            found.append(Placed("volume", "", target, anonymous=True))
    return found


# --- one by one ---------------------------------------------------------------------------------


def volume(text: str, here: str) -> Placed:
    """``-v [NAME|DIR:]/path[:options]``. Raises Usage."""
    said = f"-v {text}"
    parts = text.split(":")
    if len(parts) > 3:
        raise Usage(
            f"{said}: too many colons",
            hint="a path with colons: --mount type=bind,source=DIR,target=/path",
        )
    if "" in parts:
        raise Usage(f"{said}: a part is empty", hint="-v NAME:/path, or -v DIR:/path, or -v /path")
    if len(parts) == 1:
        return Placed("volume", "", _target(text, said), anonymous=True)
    if len(parts) == 2 and _is_mode(parts[1]):
        raise Usage(
            f"{said}: an anonymous volume takes no options", hint=f"-v NAME:{parts[0]}:{parts[1]}"
        )
    source, target = parts[0], _target(parts[1], said)
    words = parts[2].split(",") if len(parts) == 3 else []
    _refuse_words(words, said)
    if source.startswith("~"):
        raise Usage(f"{said}: {source} is no path", hint="the shell makes one of ~ alone: $HOME")
    if source.startswith((".", "/")):
        if "nocopy" in words:
            raise Usage(f"{said}: nocopy is for volumes", hint="leave nocopy out")
        source = _clean(os.path.join(here, source))
        options = tuple(word for word in words if word in PROPAGATION)
        return Placed("bind", source, target, "ro" in words, options, make=True)
    if any(word in PROPAGATION for word in words):
        raise Usage(f"{said}: propagation is for directories of the host", hint="leave it out")
    _volume_name(source, said)
    return Placed("volume", source, target, "ro" in words, copy="nocopy" not in words)


def _is_mode(text: str) -> bool:
    return all(word in _WORDS for word in text.split(","))


def _refuse_words(words: Sequence[str], said: str) -> None:
    for number, word in enumerate(words):
        group = _WORDS.get(word)
        if group is None:
            raise Usage(
                f"{said}: unknown option {word!r}",
                hint="ro, rw, nocopy, z, Z, and for a directory of the host "
                + ", ".join(sorted(PROPAGATION)),
            )
        if group.intersection(words[:number]):
            raise Usage(f"{said}: {word} contradicts what comes before it", hint="leave one out")


def _volume_name(text: str, said: str) -> str:
    try:
        return names.volume_name(text)
    except Usage as error:
        raise Usage(f"{said}: {error}", hint=error.hint) from None


def _clean(path: str) -> str:
    """The absolute path without dots and double slashes."""
    return "/" + posixpath.normpath(path).lstrip("/")


def _target(path: str, said: str) -> str:
    """A place in the container. Raises Usage."""
    if not path.startswith("/"):
        raise Usage(
            f"{said}: the path in the container is not absolute: {path!r}",
            hint="it starts with a slash: NAME:/path",
        )
    target = _clean(path)
    if target == "/":
        raise Usage(f"{said}: nothing can be mounted over the container's /", hint="NAME:/path")
    if is_of_kernel(target):
        raise Usage(f"{said}: /proc is the kernel's own in a container", hint="NAME:/path")
    if "\0" in target:
        raise Usage(f"{said}: a NUL in a path", hint="NAME:/path")
    try:
        os.fsencode(target)
    except UnicodeEncodeError:
        # Half a character: JSON can say that, a path cannot.
        raise Usage(f"{said!a}: no path has these characters", hint="NAME:/path") from None
    return target


def is_of_kernel(target: str) -> bool:
    """Whether the path leads into /proc: a mount there could make a program believe anything."""
    return target == "/proc" or target.startswith("/proc/")


def mount(text: str, here: str) -> Placed:
    """``--mount type=volume|bind|tmpfs,source=,target=,...``. Raises Usage."""
    said = f"--mount {text}"
    given = _fields(text, said)
    kind = given.pop("type", "volume").lower()
    makers: dict[str, Callable[[dict[str, str], str, str], Placed]] = {
        "volume": _mounted_volume,
        "bind": _mounted_directory,
        "tmpfs": _mounted_memory,
    }
    if kind not in makers:
        raise Usage(f"{said}: no type {kind!r}", hint="type=volume, type=bind or type=tmpfs")
    foreign = [
        key for key in given if (key.partition("-")[0] in makers and not key.startswith(kind))
    ]
    if foreign:
        raise Usage(f"{said}: {foreign[0]} is not for type={kind}", hint="leave it out")
    if "target" not in given:
        raise Usage(f"{said}: it has no target", hint="target=/path")
    given.pop("consistency", None)
    given["target"] = _target(given["target"], said)
    return makers[kind](given, said, here)


def _fields(text: str, said: str) -> dict[str, str]:
    """The fields of one line of CSV (RFC 4180): a value with a comma stands in quotes."""
    import csv

    try:
        (row,) = csv.reader([text], strict=True)
    except (csv.Error, ValueError) as error:
        raise Usage(f"{said}: {error}", hint="type=volume,source=NAME,target=/path") from None
    given: dict[str, str] = {}
    for field in row:
        word, equals, value = field.partition("=")
        key = _SYNONYMS.get(word.lower(), word.lower())
        if key not in _KEYS:
            close = names.near(key, _KEYS)
            raise Usage(f"{said}: unknown field {word!r}", hint=close or ", ".join(sorted(_KEYS)))
        if not equals and key not in _FLAGS:
            raise Usage(f"{said}: {word} has no value", hint=f"{word}=VALUE")
        if key in given:
            raise Usage(f"{said}: two values for {key}", hint="leave one out")
        given[key] = value if equals else "true"
    return given


def _is_set(given: dict[str, str], key: str, said: str) -> bool:
    text = given.get(key, "false")
    if text not in _TRUE | _FALSE:
        raise Usage(f"{said}: {key} is true or false, not {text!r}", hint=f"{key}=true")
    return text in _TRUE


def _mounted_volume(given: dict[str, str], said: str, _here: str) -> Placed:
    source = given.get("source", "")
    read_only = _is_set(given, "readonly", said)
    copy = not _is_set(given, "volume-nocopy", said)
    if not source and read_only:
        raise Usage(
            f"{said}: an anonymous volume that cannot be written stays empty", hint="source=NAME"
        )
    if source:
        _volume_name(source, said)
    return Placed("volume", source, given["target"], read_only, copy=copy, anonymous=not source)


def _mounted_directory(given: dict[str, str], said: str, here: str) -> Placed:
    source = given.get("source", "")
    if not source.startswith((".", "/")):
        raise Usage(
            f"{said}: {source!r} is no absolute path" if source else f"{said}: it has no source",
            hint="source=/DIR, or source=./DIR",
        )
    options = (given["bind-propagation"],) if "bind-propagation" in given else ()
    if not PROPAGATION.issuperset(options):
        raise Usage(
            f"{said}: no propagation {given['bind-propagation']!r}",
            hint=", ".join(sorted(PROPAGATION)),
        )
    source = _clean(os.path.join(here, source))
    return Placed("bind", source, given["target"], _is_set(given, "readonly", said), options)


def _mounted_memory(given: dict[str, str], said: str, _here: str) -> Placed:
    if given.get("source"):
        raise Usage(f"{said}: a tmpfs has no source", hint="leave source out")
    options = list(_TMPFS_DEFAULT)
    if "tmpfs-size" in given:
        size = re.fullmatch(_SIZE, given["tmpfs-size"])
        if size is None:
            raise Usage(f"{said}: no size {given['tmpfs-size']!r}", hint="tmpfs-size=64m")
        power = " kmgtp".index(size[2].lower() or " ")
        options.append(f"size={int(float(size[1]) * 1024**power)}")
    if "tmpfs-mode" in given:
        if not re.fullmatch(_OCTAL, given["tmpfs-mode"]):
            raise Usage(f"{said}: no mode {given['tmpfs-mode']!r}", hint="tmpfs-mode=1770")
        options.append(f"mode={given['tmpfs-mode']}")
    read_only = _is_set(given, "readonly", said)
    return Placed("tmpfs", "", given["target"], read_only, tuple(options))


def memory(text: str) -> Placed:
    """``--tmpfs /path[:options]``, with options of mount(8) for a tmpfs. Raises Usage."""
    said = f"--tmpfs {text}"
    path, _, rest = text.partition(":")
    target = _target(path, said)
    read_only = False
    options = dict.fromkeys(_TMPFS_DEFAULT)
    for word in filter(None, rest.split(",")):
        key, equals, value = word.partition("=")
        if word in {"ro", "rw"}:
            read_only = word == "ro"
        elif not equals and word in _TMPFS_FLAGS:
            options.pop(word.removeprefix("no") if word.startswith("no") else f"no{word}", None)
            options[word] = None
        elif equals and key in _TMPFS_VALUES and re.fullmatch(_TMPFS_VALUES[key], value):
            options = {one: None for one in options if not one.startswith(f"{key}=")}
            options[word] = None
        else:
            raise Usage(
                f"{said}: unknown option {word!r}", hint="--tmpfs /path:size=64m,mode=1777,exec"
            )
    return Placed("tmpfs", "", target, read_only, tuple(options))

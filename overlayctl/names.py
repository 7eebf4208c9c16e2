"""Names people type: image references, ids and their prefixes, container names.

Grammar of distribution/reference (github.com/distribution/reference) as docker applies it:
``docker.io/library/`` and ``:latest`` are implied.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from overlayctl.errors import Ambiguous, NotFound, Usage

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = (
    r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*"
)
_DOMAIN = re.compile(rf"(?:{_HOST}|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_CONTAINER = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_VOLUME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_ID = re.compile(r"(?:sha256:)?[0-9a-f]{1,64}")
_NAME_MAX = 255
_FILE_MAX = 200
_DEFAULT_DOMAIN = "docker.io"
_OFFICIAL = "library/"


def stored(text: str) -> str:
    """The fully qualified form of a reference: ``busybox`` is docker.io/library/busybox:latest.

    Raises Usage for what docker would refuse, and for a digest, which is nothing to store.
    """
    if len(text) == 64 and _ID.fullmatch(text):
        raise _bad(text, "64 hexadecimal characters are an id")
    if "@" in text:
        raise _bad(text, "it holds a digest", "name a tag: NAME:TAG")
    name, tag = text, "latest"
    if ":" in text.rsplit("/", 1)[-1]:
        name, _, tag = text.rpartition(":")
    domain, slash, path = name.partition("/")
    if not slash or not _is_domain(domain):
        domain, path = _DEFAULT_DOMAIN, name
    if domain == "index.docker.io":
        domain = _DEFAULT_DOMAIN
    if domain == _DEFAULT_DOMAIN and "/" not in path:
        path = _OFFICIAL + path
    if not _TAG.fullmatch(tag):
        raise _bad(text, "a tag is 1 to 128 letters, digits, '_', '.' and '-', no '.' or '-' first")
    if path != path.lower():
        raise _bad(text, "names are lower-case", name.lower() + text.removeprefix(name))
    if not (_DOMAIN.fullmatch(domain) and _PATH.fullmatch(path)):
        raise _bad(text, "")
    if len(domain) + 1 + len(path) > _NAME_MAX:
        raise _bad(text, f"its name is longer than {_NAME_MAX} characters", "use a shorter name")
    return f"{domain}/{path}:{tag}"


def _bad(text: str, why: str, hint: str = "") -> Usage:
    return Usage(
        f"{text[:300]!r} is no valid image name" + (f": {why}" if why else ""),
        hint=hint or "lower-case letters, digits and separators, then :TAG; as in demo/web:1.0",
    )


def _is_domain(first: str) -> bool:
    # Docker's rule for what stands before the first slash; anything else is a user of its own.
    return "." in first or ":" in first or first == "localhost" or first != first.lower()


def familiar(reference: str) -> str:
    """How people write a stored reference: ``stored`` gives it back."""
    path = reference.removeprefix(_DEFAULT_DOMAIN + "/")
    first, slash, rest = path.partition("/")
    if path == reference or (slash and _is_domain(first)):
        # docker.io/foo.bar/x must not become foo.bar/x, which is another registry's.
        return reference
    # Likewise docker.io/library/a/b is not a/b.
    return rest if first + slash == _OFFICIAL and "/" not in rest else path


def tag_file(reference: str) -> str:
    """A file name for a reference: percent-encoded, hashed behind a stem if it gets long."""
    encoded = "".join(
        chr(byte) if chr(byte).isalnum() or byte in b"._-" else f"%{byte:02X}"
        for byte in reference.encode()
    )
    if len(encoded) <= _FILE_MAX:
        return encoded
    return f"{encoded[:100]}%{hashlib.sha256(reference.encode()).hexdigest()}"


def short(identifier: str) -> str:
    """The 12 characters of an id that people see."""
    return identifier.removeprefix("sha256:")[:12]


def is_id(text: str) -> bool:
    """Whether ``text`` may be an id or the start of one."""
    return _ID.fullmatch(text) is not None


def match(text: str, candidates: Iterable[str]) -> str:
    """The one id of ``candidates`` (hex) that ``text`` starts. Raises NotFound, Ambiguous."""
    prefix = text.removeprefix("sha256:")
    found = sorted({c for c in candidates if c.startswith(prefix)}) if is_id(text) else []
    if not found:
        raise NotFound(f"nothing has the id {text!r}")
    if len(found) > 1 and found[0] != prefix:
        # So many digits that they differ, but what people are used to at least.
        digits = next(n for n in range(12, 65) if len({c[:n] for c in found}) == len(found))
        raise Ambiguous(text, [c[:digits] for c in found])
    return found[0]


def container_name(text: str) -> str:
    """``text`` as a container's name. Raises Usage."""
    if not _CONTAINER.fullmatch(text) or len(text) > _NAME_MAX:
        raise Usage(
            f"{text!r} is no valid container name",
            hint="two or more letters, digits, '_', '.', '-', the first a letter or digit",
        )
    if len(text) == 64 and _ID.fullmatch(text):
        raise Usage(f"{text!r} would hide the container with that id", hint="use another name")
    return text


def is_volume_name(text: str) -> bool:
    """Whether a volume may have that name."""
    return _VOLUME.fullmatch(text) is not None and len(text) <= _NAME_MAX


def volume_name(text: str) -> str:
    """``text`` as a volume's name. Raises Usage."""
    if not is_volume_name(text):
        hint = "two or more letters, digits, '_', '.', '-', the first a letter or digit"
        if "/" in text:
            hint = "a directory of this host is named by its whole path, or from ./ on"
        raise Usage(f"{text[:300]!r} is no valid volume name", hint=hint)
    return text


def near(text: str, candidates: Iterable[str]) -> str:
    """A hint that names what ``text`` may have meant, or nothing."""
    import difflib

    close = difflib.get_close_matches(text, list(candidates), 3)
    return f"did you mean {' or '.join(close)}?" if close else ""

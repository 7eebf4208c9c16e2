"""Docker's ``--filter KEY=VALUE``: of one key any value will do, of labels all, of keys all.

--filter name=web --filter name=db --filter label=tier=front
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from overlayctl import names
from overlayctl.errors import NotFound, Usage
from overlayctl.oci import said
from overlayctl.store import containers as stored
from overlayctl.store import images as stored_images

if TYPE_CHECKING:
    from overlayctl.layout import Layout

Row = Mapping[str, Any]
Test = Callable[[Row], bool]
_DURATION = re.compile(r"(?:(\d+(?:\.\d*)?)h)?(?:(\d+(?:\.\d*)?)m)?(?:(\d+(?:\.\d*)?)s)?", re.ASCII)
_SECONDS = re.compile(r"\d{1,15}(?:\.\d*)?", re.ASCII)
_STATES = {"running": "Running", "mounted": "Mounted"}
_ALL_OF = ("label", "until")

CONTAINERS = (
    "ancestor", "before", "id", "label", "name", "since", "status", "until", "volume",
)  # fmt: skip
IMAGES = ("before", "dangling", "label", "reference", "since", "until")
VOLUMES = ("dangling", "driver", "label", "name")
"""The keys that there are."""


def check(texts: Sequence[str], keys: Sequence[str]) -> None:
    """Raises Usage for a filter with another key than these."""
    for text in texts:
        key, equals, _ = text.partition("=")
        if not equals or key not in keys:
            hint = f"--filter KEY=VALUE, where KEY is one of {', '.join(sorted(keys))}"
            raise Usage(f"there is no filter {text!r}", hint=hint)


def select(
    rows: Iterable[Row], texts: Sequence[str], tests: Mapping[str, Callable[[str], Test]]
) -> list[Any]:
    """The rows that fit ``texts``, each ``KEY=VALUE``; ``tests`` makes a test of a key's value.

    Raises Usage for a key that there is not, and what ``tests`` raise.
    """
    check(texts, tuple(tests))
    wanted: dict[str, list[Test]] = {}
    for text in texts:
        key, _, value = text.partition("=")
        wanted.setdefault(key, []).append(tests[key](value))
    return [
        row
        for row in rows
        if all(
            (all if key in _ALL_OF else any)(test(row) for test in of_key)
            for key, of_key in wanted.items()
        )
    ]


def containers(layout: Layout, rows: Iterable[Row], texts: Sequence[str]) -> list[Any]:
    """The containers that fit (docker ps, "Filtering"). Raises Usage, NotFound."""

    def created(text: str) -> datetime | None:
        return _moment(stored.resolve(layout, text).created)

    def ancestor(text: str) -> Test:
        try:
            wanted = stored_images.resolve(layout, text)[0].id
        except NotFound:
            return lambda _: False
        return lambda row: bool(row["ImageID"] == wanted)

    return select(
        rows,
        texts,
        {
            "id": lambda text: lambda row: str(row["Id"]).startswith(text),
            "name": _named,
            "label": label,
            "status": _status,
            "ancestor": ancestor,
            "volume": lambda text: lambda row: text in row["Volumes"],
            "before": lambda text: _older(created(text)),
            "since": lambda text: _newer(created(text)),
            "until": until,
        },
    )


def images(layout: Layout, rows: Iterable[Row], texts: Sequence[str]) -> list[Any]:
    """The images that fit (docker image ls, "Filtering"). Raises Usage, NotFound."""

    def created(text: str) -> datetime | None:
        found, _ = stored_images.resolve(layout, text)
        return _moment(found.record.get("created") or found.created)

    def labelled(text: str) -> Test:
        test = label(text)

        def fits(row: Row) -> bool:
            image, _ = stored_images.resolve(layout, row["Id"])
            labels = said(stored_images.config(layout, image)).get("Labels")
            return test({"Labels": labels if isinstance(labels, dict) else {}})

        return fits

    return select(
        rows,
        texts,
        {
            "dangling": lambda text: _untagged(dangling=yes(text)),
            "label": labelled,
            "reference": lambda text: lambda row: any(_refers(text, t) for t in row["RepoTags"]),
            "before": lambda text: _older(created(text)),
            "since": lambda text: _newer(created(text)),
            "until": until,
        },
    )


def volumes(rows: Iterable[Row], texts: Sequence[str]) -> list[Any]:
    """The volumes that fit (docker volume ls, "Filtering"). Raises Usage."""
    return select(
        rows,
        texts,
        {
            "dangling": lambda text: _unused(dangling=yes(text)),
            "driver": lambda text: lambda row: bool(row["Driver"] == text),
            "label": label,
            "name": lambda text: lambda row: text in row["Name"],
        },
    )


def wanted_labels(texts: Sequence[str]) -> dict[str, str | None]:
    """The labels that filters name, and their values, None where any will do. Raises Usage."""
    check(texts, ("label",))
    pairs = [text.partition("=")[2].partition("=") for text in texts]
    return {key: value if equals else None for key, equals, value in pairs}


def label(text: str) -> Test:
    """Whether a row has the label ``KEY``, or ``KEY=VALUE``."""
    key, equals, value = text.partition("=")

    def fits(row: Row) -> bool:
        labels = row["Labels"] or {}
        return key in labels and (not equals or labels[key] == value)

    return fits


def until(text: str) -> Test:
    """Whether a row is older than a duration (``1h30m``), a time, a date or seconds since 1970.

    Raises Usage.
    """
    found = _DURATION.fullmatch(text)
    try:
        if found and text:
            hours, minutes, seconds = (float(part or 0) for part in found.groups())
            when = datetime.now(UTC) - timedelta(hours=hours, minutes=minutes, seconds=seconds)
        elif _SECONDS.fullmatch(text):
            when = datetime.fromtimestamp(float(text), UTC)
        else:
            when = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        hint = "--filter until=24h, until=1h30m, until=2026-01-31T10:00:00Z"
        raise Usage(f"{text!r} is neither a duration nor a time", hint=hint) from None
    return _older(when)


def _moment(text: object) -> datetime | None:
    """The time that a record or a config says, if it is one; without a zone it is UTC."""
    try:
        when = datetime.fromisoformat(str(text))
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def yes(text: str) -> bool:
    """What ``true`` or ``false``, ``1`` or ``0`` says. Raises Usage."""
    if text.lower() not in {"true", "false", "1", "0"}:
        raise Usage(f"{text!r} is neither true nor false", hint="--filter dangling=true")
    return text.lower() in {"true", "1"}


def _older(when: datetime | None) -> Test:
    def fits(row: Row) -> bool:
        created = _moment(row["Created"])
        return created is not None and when is not None and created < when

    return fits


def _newer(when: datetime | None) -> Test:
    def fits(row: Row) -> bool:
        created = _moment(row["Created"])
        return created is not None and when is not None and created > when

    return fits


def _untagged(*, dangling: bool) -> Test:
    return lambda row: dangling == (not row["RepoTags"])


def _unused(*, dangling: bool) -> Test:
    return lambda row: dangling == (not row["UsedBy"])


def _status(text: str) -> Test:
    if text in {"created", "exited"}:
        return lambda row: not (row["Running"] or row["Mounted"])
    if text not in _STATES:
        hint = f"one of {', '.join(sorted(_STATES))}, created"
        raise Usage(f"there is no status {text!r}", hint=hint)
    return lambda row: bool(row[_STATES[text]])


def _named(text: str) -> Test:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise Usage(f"{text!r} is no regular expression: {error}", hint="name=web") from None
    return lambda row: pattern.search(str(row["Names"])) is not None


def _refers(pattern: str, tag: str) -> bool:
    """Whether a tag fits, as it is shown or without what is implied (Go's path.Match: no '/')."""
    shown = {tag, tag.rpartition(":")[0], names.stored(tag)}
    return any(
        one.count("/") == pattern.count("/") and fnmatch.fnmatchcase(one, pattern) for one in shown
    )

"""What this host can do, tried where a store is or would be."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from overlayctl.kernel import probe
from overlayctl.layer import erofs
from overlayctl.layout import Layout


def host(root: str) -> dict[str, Any]:
    """What this host can, tried with an image of nothing where the store is or would be."""
    empty = Layout(root).empty
    if os.path.exists(empty):
        return _tried_with(empty)
    while not os.path.isdir(root):
        root = os.path.dirname(os.path.abspath(root))

    def elsewhere(directory: str | None) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix=".overlayctl-", dir=directory) as place:
            image = os.path.join(place, "empty.erofs")
            erofs.write_empty(image)
            return _tried_with(image)

    try:
        return elsewhere(root)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        # Nothing can be tried there; what the kernel can shows elsewhere, too.
        return elsewhere(None)


def _tried_with(image: str) -> dict[str, Any]:
    enforcing = _reads("/sys/fs/selinux/enforce") == "1"
    return {
        "Kernel": os.uname().release,
        "Attach": probe.attach_ways(image),
        "Mount": probe.mount_rungs(os.path.dirname(image)),
        # No labels are written: whoever runs a container's files under a policy should know.
        "SELinux": "enforcing: layers and uppers have no labels of their own" if enforcing else "",
    }


def taken(answers: Mapping[str, str], ladder: Sequence[str], setting: str, source: str) -> str:
    """Which of the tried ways is taken, and why that one."""
    if setting != "auto":
        works = answers[setting] == probe.WORKS
        return f"{setting}: {source} says so" + ("" if works else f", but {answers[setting]}")
    failed: list[str] = []
    for way in ladder:
        if answers[way] == probe.WORKS:
            before = f", after {', '.join(failed)}" if failed else ""
            return f"{way}: the first that works{before}"
        failed.append(way)
    return "none works"


def _reads(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""

"""What this host can do, tried where a store is or would be."""

from __future__ import annotations

import errno
import os
import tempfile
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
    return {
        "Kernel": os.uname().release,
        "Attach": probe.attach_ways(image),
        "Mount": probe.mount_rungs(os.path.dirname(image)),
    }

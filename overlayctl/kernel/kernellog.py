"""What the kernel says about filesystems in its log: of much that overlayfs does, the only word."""

from __future__ import annotations

import errno
import os
from typing import Self

_LEVELS = 8


class KernelLog:
    """What the kernel log gains about filesystems between entering and ``lines``.

    Where /dev/kmsg is missing or forbidden there is nothing to read, and no lines.
    """

    def __init__(self) -> None:
        self._fd = -1
        self.lost = False
        """Whether lines were overwritten before the last look could read them."""

    def __enter__(self) -> Self:
        try:
            fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EPERM, errno.EACCES, errno.ENXIO):
                raise
            return self
        # Containers put /dev/null or a terminal there.
        if os.fstat(fd).st_rdev == os.makedev(1, 11):
            os.lseek(fd, 0, os.SEEK_END)
            self._fd = fd
        else:
            os.close(fd)
        return self

    @property
    def readable(self) -> bool:
        """Whether silence means that the kernel said nothing."""
        return self._fd >= 0

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def lines(self) -> list[str]:
        """The new lines of overlayfs and EROFS."""
        found = []
        self.lost = False
        while self._fd >= 0:
            try:
                record = os.read(self._fd, 8192)
            except OSError as error:
                if error.errno == errno.EPIPE:
                    self.lost = True
                    continue
                if error.errno == errno.EAGAIN:
                    break
                raise
            head, _, tail = record.partition(b";")
            text = tail.split(b"\n", 1)[0].decode(errors="replace")
            # Facility 0: the kernel itself. Any process with the right may write the others.
            if text.startswith(("overlayfs:", "erofs")) and int(head.split(b",")[0]) < _LEVELS:
                found.append(text)
        return found

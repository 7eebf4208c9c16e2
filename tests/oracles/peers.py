"""A docker daemon of our own, to make images with and to race against.

Everything it needs (data, sockets, containerd's state) lies in directories of its own, it touches
no network and no firewall, and it is stopped by its process id: a daemon that the machine already
runs never notices.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from . import command

START_SECONDS = 60
STOP_SECONDS = 30

# docker's own filter needs a libseccomp that knows the host's system calls, and in a container more
# privilege than there may be; without a bridge there is only the host's network.
RUN_OPTIONS = ("--security-opt", "seccomp=unconfined", "--network", "host")


class DaemonError(Exception):
    """A daemon did not start, or is not running."""


class Daemon:
    """A daemon with data in ``_home`` and sockets in ``_run``: it lives as long as the ``with``.

    A Unix socket's name ends at 107 bytes, so ``_run`` has a short path.
    """

    def __init__(self) -> None:
        self._home = Path()
        self._run = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._run = Path(tempfile.mkdtemp(prefix=f"{type(self).__name__.lower()}."))
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def log(self) -> str:
        """What the daemon has written so far."""
        return (self._home / "log").read_text(errors="replace")

    def _start(self) -> None:
        raise NotImplementedError

    def _launch(self, argv: Sequence[command.Argument], ask: Callable[[], object]) -> None:
        """Start it, and wait until ``ask`` is answered."""
        with (self._home / "log").open("wb") as log:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                ask()
            except command.CommandError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    name = type(self).__name__
                    raise DaemonError(f"{name} did not start:\n{self.log()[-4000:]}") from error
                time.sleep(0.1)
            else:
                return

    def _stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                # It leads a session of its own: its shims go with it.
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None
        _remove(self._run)


class Dockerd(Daemon):
    """``with Dockerd() as docker: docker.load(path)``.

    ``directory`` is where the daemon's data goes (into a new directory, removed at the end): it has
    to be on a filesystem that overlay accepts for an upper directory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__()
        self._parent = directory

    @property
    def pid(self) -> int:
        """The daemon's process id, for who wants to measure its memory or time."""
        if self._process is None:
            raise DaemonError("dockerd is not running")
        return self._process.pid

    @property
    def data_root(self) -> Path:
        """The daemon's ``/var/lib/docker``."""
        return self._home / "data"

    @property
    def host(self) -> str:
        """What ``DOCKER_HOST`` has to be for a client of this daemon."""
        return f"unix://{self._run}/docker.sock"

    def docker(self, *args: command.Argument) -> str:
        """Run the docker client against this daemon; return its stdout, stripped.

        The client's own configuration (contexts, credentials, plugins) is kept out.
        """
        env = {"DOCKER_HOST": self.host, "DOCKER_CONFIG": str(self._run), "DOCKER_CONTEXT": ""}
        return command.output("docker", *args, env=env).strip()

    def load(self, path: Path) -> str:
        """``docker load``: return what it says, such as ``Loaded image: name:tag``."""
        return self.docker("load", "--quiet", "--input", path)

    def save(self, ref: str, path: Path) -> None:
        """Write the image ``ref`` as a docker-archive to ``path``."""
        self.docker("save", "--output", path, ref)

    def import_rootfs(self, tar: Path, ref: str, changes: Sequence[str] = ()) -> str:
        """Make an image of one layer, kept byte for byte as ``tar`` is; return the image id."""
        options = [word for change in changes for word in ("--change", change)]
        return self.docker("import", *options, tar, ref)

    def commit_layer(self, parent: str, script: str, ref: str, changes: Sequence[str] = ()) -> str:
        """Run a shell script on top of ``parent``, commit as ``ref`` what it did; return its id.

        The script runs as root with docker's default capabilities: chown, setcap and mknod work,
        mount and trusted xattrs do not. Of what it commits, docker 20.10 keeps no xattr but
        ``security.capability``.
        """
        container = self.docker("create", *RUN_OPTIONS, parent, "/bin/sh", "-ec", script)
        try:
            self.docker("start", "--attach", container)
            options = [word for change in changes for word in ("--change", change)]
            return self.docker("commit", *options, container, ref)
        finally:
            self.docker("rm", "--force", container)

    def _start(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="dockerd.", dir=self._parent or "/var/tmp"))
        (self._home / "daemon.json").write_text("{}")
        argv: list[command.Argument] = [
            "dockerd",
            *(
                "--data-root",
                self.data_root,
                "--exec-root",
                self._run / "exec",
                "--pidfile",
                self._run / "pid",
            ),
            *("--host", self.host, "--config-file", self._home / "daemon.json"),
            *("--iptables=false", "--bridge=none"),
        ]
        self._launch(argv, lambda: self.docker("version"))

    def _stop(self) -> None:
        super()._stop()
        if self._home != Path():
            _remove(self._home)


def _remove(directory: Path) -> None:
    # Dockerd leaves its network namespace's mount behind, and after a kill its overlays.
    for mountpoint in reversed(_mounts_below(directory)):
        command.output("umount", "--lazy", mountpoint)
    shutil.rmtree(directory)


def _mounts_below(directory: Path) -> list[str]:
    """Return the mountpoints inside ``directory``, in mount order.

    proc_pid_mountinfo(5): the fifth field, with octal escapes.
    """
    found = []
    with Path("/proc/self/mountinfo").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            escaped = line.split(" ")[4].encode(errors="surrogateescape")
            path = os.fsdecode(escaped.decode("unicode_escape").encode("latin-1"))
            if path.startswith(f"{directory}/"):
                found.append(path)
    return found

"""Podman and buildah with a store of their own, and a containerd of our own.

As with :class:`tests.oracles.peers.Dockerd`, nothing that the machine has is touched, and what is
started is stopped by its process id.
"""

from __future__ import annotations

from pathlib import Path

from tests.oracles import command
from tests.oracles.peers import Daemon

# Containers get no more files than are allowed in a container that runs the tests. Locks in files,
# not in a shared memory that every podman of the machine has.
_CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
lock_type = "file"
"""

# Of containerd's plug-ins only what keeps and mounts images: the others look at the host.
_CONTAINERD_CONFIG = """
version = 2
root = "{home}/root"
state = "{run}/state"
disabled_plugins = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.internal.v1.opt",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "{run}/sock"
[ttrpc]
address = "{run}/sock.ttrpc"
"""


class Podman:
    """What podman and buildah share: one store, below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._home = directory
        self._config = directory / "containers.conf"
        self._config.write_text(_CONTAINERS_CONF)

    @property
    def env(self) -> dict[str, str]:
        """What has to be added to the environment of ``argv``."""
        return {"CONTAINERS_CONF": str(self._config)}

    def argv(self, tool: str, *words: command.Argument) -> list[command.Argument]:
        """The command that runs ``podman`` or ``buildah`` on this store."""
        store = ("--root", self._home / "root", "--runroot", self._home / "run")
        options: list[command.Argument] = [*store, "--storage-driver", "overlay"]
        if tool == "podman":
            # cgroupfs: no systemd is asked.
            options += ["--tmpdir", self._home / "tmp", "--cgroup-manager", "cgroupfs"]
            options += ["--runtime", "runc"]
        return [tool, *options, *words]

    def podman(self, *words: command.Argument) -> str:
        """Run podman; return its stdout, stripped."""
        return command.output(*self.argv("podman", *words), env=self.env).strip()

    def buildah(self, *words: command.Argument) -> str:
        """Run buildah; return its stdout, stripped."""
        return command.output(*self.argv("buildah", *words), env=self.env).strip()

    def commit_layer(self, parent: str, script: str, image: str) -> None:
        """Run a shell script on top of ``parent``, let buildah commit as ``image`` what it did."""
        container = self.buildah("from", "--pull-never", parent)
        command.output("chroot", self.buildah("mount", container), "/bin/sh", "-ec", script)
        self.buildah("umount", container)
        self.buildah("commit", "--quiet", "--rm", container, image)


class Containerd(Daemon):
    """``with Containerd(directory) as containerd: containerd.ctr("images", "ls")``.

    Its data goes to ``directory``.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._home = directory

    def argv(self, *words: command.Argument) -> list[command.Argument]:
        """The command that runs containerd's client against this daemon."""
        return ["ctr", "--address", self._run / "sock", *words]

    def ctr(self, *words: command.Argument) -> str:
        """Run containerd's client against this daemon; return its stdout, stripped."""
        return command.output(*self.argv(*words)).strip()

    def _start(self) -> None:
        config = self._run / "config.toml"
        config.write_text(_CONTAINERD_CONFIG.format(home=self._home, run=self._run))
        self._launch(["containerd", "--config", config], lambda: self.ctr("version"))

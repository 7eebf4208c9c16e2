"""Docker's words, and some of this program's to come, that are no command or no option here."""

_LATER = "is not yet available in this version"
_REGISTRIES = "is not here: overlayctl does not talk to registries"
_NETWORKS = "is not here: there are no container networks"
_SERVICES = "is not here: a command runs in the foreground, and ends with the one that runs it"
_SHELL = "overlayctl run IMAGE COMMAND &, then the shell's jobs; podman or docker run services"

WORDS: dict[str, tuple[str, str]] = {
    "df": (_LATER, "overlayctl images, layer ls, ps -s and volume ls show sizes"),
    "whence": (_LATER, "overlayctl layer files REF:N lists one layer"),
    "find": (_LATER, "overlayctl layer files REF:N lists one layer"),
    "whose": (_LATER, "overlayctl mounts --json shows what is mounted where"),
    "tree": (_LATER, "overlayctl image history IMAGE shows its layers"),
    "doctor": (_LATER, "overlayctl system info says what this host can do"),
    "demo": (_LATER, "make demo, in a checkout"),
    "completion": (_LATER, "overlayctl --help lists the commands"),
    "pull": (
        _REGISTRIES,
        "skopeo copy docker://IMAGE docker-archive:FILE:IMAGE, then overlayctl load FILE",
    ),
    "push": (
        _REGISTRIES,
        "overlayctl save -o FILE IMAGE, then skopeo copy docker-archive:FILE docker://IMAGE",
    ),
    "login": (_REGISTRIES, "skopeo login REGISTRY"),
    "logout": (_REGISTRIES, "skopeo logout REGISTRY"),
    "search": (_REGISTRIES, "skopeo list-tags docker://IMAGE lists an image's tags"),
    **dict.fromkeys(
        ("build", "builder", "buildx"),
        (
            "is not here: overlayctl does not build images",
            "buildah or docker build, then overlayctl load what docker save or buildah push wrote",
        ),
    ),
    **dict.fromkeys(("network", "port"), (_NETWORKS, "podman or docker have them")),
    "compose": ("is not here", "podman compose or docker compose"),
    "update": (
        "is not here: limits are systemd's",
        "systemd-run --scope -p MemoryMax=1G overlayctl run --runtime builtin IMAGE",
    ),
    "start": (_SERVICES, "overlayctl exec CONTAINER COMMAND; podman or docker run services"),
    "restart": (_SERVICES, "overlayctl exec CONTAINER COMMAND; podman or docker run services"),
    "stop": (_SERVICES, "overlayctl rm -f CONTAINER, or a signal to the command that runs it"),
    "kill": (_SERVICES, "overlayctl rm -f CONTAINER, or a signal to the command that runs it"),
    "logs": (_SERVICES, "overlayctl run IMAGE COMMAND > FILE"),
    "attach": (_SERVICES, "overlayctl exec -it CONTAINER sh"),
    "top": (_SERVICES, "overlayctl exec CONTAINER ps"),
    "stats": (_SERVICES, "top(1) of the host, overlayctl ps -s for what was written"),
    "wait": (_SERVICES, "overlayctl run IMAGE COMMAND &, then the shell's wait"),
    "events": (_SERVICES, "overlayctl ps shows what runs"),
    **dict.fromkeys(("pause", "unpause"), (_SERVICES, _SHELL)),
    "context": ("is not here: there is no daemon, and no host but this", "--root DIR for a store"),
    "manifest": (_REGISTRIES, "skopeo inspect --raw docker://IMAGE"),
    "info": ("is a system command", "overlayctl system info"),
    "check": ("is a system command", "overlayctl system check"),
    "reset": ("is a system command", "overlayctl system reset"),
    "prune": ("is a system command", "overlayctl system prune; container and volume have theirs"),
    "version": ("is an option", "overlayctl --version"),
}
"""By word: why it is not here, and what is."""

_FOREGROUND = "podman and docker run services; here a command runs in the foreground"
_LIMITS = "systemd-run --scope -p MemoryMax=1G overlayctl run --runtime builtin ... limits it"
_NO_NETWORK = "--network none or host; podman and docker have container networks"
_BUNDLE = "overlayctl container bundle CONTAINER DIR, change DIR/config.json, runc run -b DIR NAME"

OPTIONS: dict[str, str] = {
    **dict.fromkeys(
        ("-d", "--detach", "--restart", "--health-cmd"),
        f"{_FOREGROUND}: {{path}} ... & puts it behind",
    ),
    **dict.fromkeys(("-m", "--memory", "--cpus", "--cpuset-cpus", "--pids-limit"), _LIMITS),
    **dict.fromkeys(
        (
            "-p", "--publish", "-P", "--publish-all", "--expose", "--link", "--ip",
            "--dns", "--mac-address", "--network-alias",
        ),
        _NO_NETWORK,
    ),
    "--add-host": "-v FILE:/etc/hosts",
    "--init": "an image that has tini or dumb-init: --entrypoint tini",
    "--privileged": f'chroot "$(overlayctl mount CONTAINER)", or {_BUNDLE}',
    **dict.fromkeys(
        (
            "--cap-add", "--cap-drop", "--security-opt", "--device", "--gpus", "--pid", "--ipc",
            "--uts", "--userns", "--cgroupns", "--group-add", "--sysctl",
        ),
        _BUNDLE,
    ),
    "--pull": "skopeo copy docker://IMAGE docker-archive:FILE:IMAGE, then overlayctl load FILE",
    "--platform": "overlayctl load --platform",
    "--shm-size": "--tmpfs /dev/shm:size=SIZE",
    "--ulimit": "prlimit --nofile=N overlayctl run ..., or the shell's ulimit before it",
    "--volumes-from": "-v once more; overlayctl inspect -f '{{{{json .Mounts}}}}' CONTAINER shows",
    "--cidfile": "--name NAME, or overlayctl create, which prints the id",
}  # fmt: skip
"""Docker's options of ``run``, ``create`` and ``exec`` that are none here: what to use instead."""


def option(error: Exception, path: str) -> tuple[str, str]:
    """What to say of a call that was not understood, and what to do instead."""
    word = getattr(error, "option_name", None)
    if word in OPTIONS:
        return f"No such option: {word}", OPTIONS[word].format(path=path)
    text: str = error.format_message()  # type: ignore[attr-defined]
    return text, f"{path} --help"

"""Docker's words, and some of this program's to come, that are no command: what to use instead."""

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
    "search": (_REGISTRIES, "skopeo list-tags"),
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
    **dict.fromkeys(("pause", "unpause", "stats", "wait", "events"), (_SERVICES, _SHELL)),
    "info": ("is a system command", "overlayctl system info"),
    "check": ("is a system command", "overlayctl system check"),
    "reset": ("is a system command", "overlayctl system reset"),
    "prune": ("is a system command", "overlayctl system prune; container and volume have theirs"),
    "version": ("is an option", "overlayctl --version"),
}
"""By word: why it is not here, and what is."""

"""Performs ``Mount`` values: first detached, where a failure leaves nothing, attached last.

What was asked is compared with what is, because overlayfs may grant less and report
success. A failure carries the kernel's own words: those of the filesystem context, else
what the kernel log gained meanwhile (Documentation/filesystems/mount_api.rst, overlayfs.rst).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import assert_never

from overlayctl.errors import Holder, HostCannot, InUse, KernelRefused, NotFound
from overlayctl.kernel import inuse, libc, lowers, rooted
from overlayctl.kernel.kernellog import KernelLog
from overlayctl.mount import MAX_LOWERS, Bind, Erofs, Mount, Overlay, Tmpfs

_STRING_MAX = 255
_UNKNOWN = "Unknown parameter"
_NO_FD = "Bad value for 'lowerdir+'"
_ATTEMPTS = 8
_READ_ONLY_DATA = (
    libc.MOUNT_ATTR_RDONLY | libc.MOUNT_ATTR_NOSUID | libc.MOUNT_ATTR_NODEV | libc.MOUNT_ATTR_NOEXEC
)
_HINTS = {
    errno.EPERM: inuse.NO_RIGHT,
    errno.ENOSYS: "this kernel, or the container's seccomp profile, lacks the mount calls of 5.2",
    errno.ENODEV: "the kernel lacks this filesystem: modprobe erofs overlay",
    errno.ENOTBLK: "a file on this filesystem cannot be mounted directly: use a loop device",
}
# Distributions change the defaults of these; a layer's meaning must not depend on them.
_OVERLAY_OPTIONS = (("index", "off"), ("metacopy", "off"), ("redirect_dir", "nofollow"))


def mount(what: Mount, target: str, *, attributes: int = 0) -> None:
    """Mount ``what`` at ``target``, with MOUNT_ATTR_* ``attributes`` besides its own.

    Raises KernelRefused, and for an overlay what ``detached`` raises; then nothing is mounted.
    """
    with detached(what) as fd:
        if attributes:
            with _explained("mount_setattr", target, None):
                libc.mount_setattr(fd, add=attributes)
        with _explained("move_mount", target, None):
            libc.move_mount(fd, target)
        if isinstance(what, Overlay) and (less := _less_than_asked(fd, what)):
            libc.umount2(target, libc.UMOUNT_NOFOLLOW | libc.MNT_DETACH)
            raise KernelRefused("mount overlay", what.source, errno.EOPNOTSUPP, log=less)
    if isinstance(what, Tmpfs):
        libc.make_private(target)


@contextmanager
def detached(what: Mount) -> Iterator[int]:
    """The fd of a mount that is in no mount table; leaving the block unmounts it unless moved.

    Raises KernelRefused with the kernel's text, Damaged for a lower that is no layer,
    InUse for an upper that another mount has, HostCannot for more than 500 layers.
    """
    with ExitStack() as owned:
        match what:
            case Erofs():
                fd = _erofs(what, owned)
            case Bind():
                fd = _bind(what, owned)
            case Overlay():
                fd = _overlay(what, owned)
            case Tmpfs():
                fd = _tmpfs(what, owned)
            case _:
                assert_never(what)
        yield fd


def _erofs(what: Erofs, owned: ExitStack) -> int:
    source = what.image
    if what.loop:
        from overlayctl.kernel import libmount

        source = owned.enter_context(libmount.loop_device(what.image))
    with _explained("mount", what.image, None):
        context = libc.fsopen("erofs")
        owned.callback(os.close, context)
    with KernelLog() as log, _explained("mount", what.image, context, log):
        libc.fsconfig_string(context, "source", _file_name(source, owned))
        # A read-only loop device refuses a superblock that might be written (EACCES).
        libc.fsconfig_flag(context, "ro")
        if what.directio:
            libc.fsconfig_flag(context, "directio")
        return _create(context, _READ_ONLY_DATA, owned)


def _file_name(path: str, owned: ExitStack) -> str:
    """``path``, or where it is too long for a parameter, its last two names below an fd.

    Those two tell in the mount table which layer's file it is.
    """
    if len(os.fsencode(path)) <= _STRING_MAX:
        return path
    directory, name = os.path.split(path)
    above, layer = os.path.split(directory)
    return f"/proc/self/fd/{_directory(above, owned)}/{layer}/{name}"


def _bind(what: Bind, owned: ExitStack) -> int:
    with _explained("open_tree", what.directory, None):
        fd = libc.open_tree(what.directory, clone=True)
        owned.callback(os.close, fd)
    with _explained("mount_setattr", what.directory, None):
        libc.mount_setattr(fd, add=_READ_ONLY_DATA)
    return fd


def _tmpfs(what: Tmpfs, owned: ExitStack) -> int:
    context = _context("tmpfs", what.source, owned)
    with _explained("fsconfig", "tmpfs", context):
        libc.fsconfig_string(context, "mode", "0755" if what.read_only else "0700")
        if what.read_only:
            libc.fsconfig_flag(context, "ro")
        return _create(context, libc.MOUNT_ATTR_NOSUID | libc.MOUNT_ATTR_NODEV, owned)


def _overlay(what: Overlay, owned: ExitStack) -> int:
    if len(what.lowers) > MAX_LOWERS:
        raise HostCannot(
            f"{len(what.lowers)} layers: the kernel's overlay takes at most {MAX_LOWERS}",
            hint="build the image with fewer layers (skopeo, buildah --squash)",
        )
    # One that is only read may not be written to by another overlay meanwhile, either.
    uppers = [lower.path for lower in what.lowers if lower.path == lower.tree]
    if what.upperdir:
        uppers += [what.upperdir, what.workdir]
    with KernelLog() as log:
        # Where the kernel's warning cannot be read, every upper is under suspicion.
        if not log.readable:
            inuse.refuse_used(uppers)
        for number in range(_ATTEMPTS):
            log.lines()  # What it gained until here is no answer to what comes now.
            with ExitStack() as attempt:
                fd = _new_overlay(what, attempt, log)
                said = log.lines()
                if what.upperdir and libc.fstatfs(fd).flags & libc.ST_RDONLY:
                    raise KernelRefused(
                        "mount overlay", what.source, errno.EROFS,
                        log=["the kernel would mount it read-only", *said],
                        hint="look at the work directory and at the space left on its filesystem",
                    )  # fmt: skip
                # The kernel only warns, and the second mount would break the first.
                told = log.lost or any(_tells_of_second_use(line) for line in said)
                if not uppers or not told:
                    owned.push(attempt.pop_all())
                    return fd
            # The log is the whole machine's and names no path: the line may be another's, and
            # where one such line came, more follow at once.
            inuse.refuse_used(uppers)
            if what.volatile:
                # What was dropped marked its work directory against a second mount.
                with suppress(FileNotFoundError):
                    rooted.remove_tree(os.path.join(what.workdir, "work/incompat/volatile"))
            time.sleep(0.001 * 2**number)
    raise KernelRefused(
        "mount overlay", what.source, errno.EBUSY,
        log=["other overlays keep being mounted on directories in use"],
        hint="try again",
    )  # fmt: skip


def _tells_of_second_use(line: str) -> bool:
    """Whether the kernel said this of an upper that was mounted though it is in use.

    To ``index=on`` it says how to override its refusal: no mount of ours asks for that, but
    the probe of ``inuse`` does.
    """
    return "in-use" in line and "to override" not in line


def _new_overlay(what: Overlay, owned: ExitStack, log: KernelLog) -> int:
    """An overlay by the rung that was asked for, or the first that this kernel has."""
    if what.rung == "mount":
        return _by_mount(what, owned, log)
    try:
        return _by_context(what, owned, log, by_fd=what.rung != "strings")
    except KernelRefused as error:
        if what.rung != "auto":
            raise
        # Layers by name only: before 6.13. An fd of kind O_PATH, which the upper's is, is
        # EBADF before 6.15.
        if error.errno == errno.EBADF or _NO_FD in str(error):
            try:
                return _by_context(what, owned, log, by_fd=False)
            except KernelRefused as second:
                error = second
        # Before 6.5 a context of overlayfs is mount(2) in disguise, with 255 bytes for all
        # layers together (EOPNOTSUPP); until 6.8 it does not know the parameter.
        if error.errno == errno.EOPNOTSUPP or _UNKNOWN in str(error):
            return _by_mount(what, owned, log)
        raise error from None


def _by_context(what: Overlay, owned: ExitStack, log: KernelLog, *, by_fd: bool) -> int:
    context = _context("overlay", what.source, owned)
    mounts = lowers.table()
    for lower in what.lowers:
        # The context holds the layer: 500 open files at once would pass many a limit.
        with ExitStack() as briefly:
            fd = lowers.open_verified(lower, mounts)
            briefly.callback(os.close, fd)
            with _explained("mount overlay", what.source, context, log):
                if by_fd:
                    libc.fsconfig_fd(context, "lowerdir+", fd)
                else:
                    libc.fsconfig_string(context, "lowerdir+", _text(lower.path, fd))
    for key, path in (("upperdir", what.upperdir), ("workdir", what.workdir)):
        if not what.upperdir:
            break
        fd = _directory(path, owned)
        with _explained("mount overlay", what.source, context, log):
            if by_fd:
                libc.fsconfig_fd(context, key, fd)
            else:
                # Unlike a layer's, these strings are still unescaped.
                libc.fsconfig_string(context, key, _text(path.replace("\\", "\\\\"), fd))
    with _explained("mount overlay", what.source, context, log):
        for key, value in _options(what):
            libc.fsconfig_string(context, key, value)
        if what.upperdir and what.volatile:
            libc.fsconfig_flag(context, "volatile")
        return _create(context, 0 if what.upperdir else libc.MOUNT_ATTR_RDONLY, owned)


def _by_mount(what: Overlay, owned: ExitStack, log: KernelLog) -> int:
    """Through mount(2), in a mount namespace that one thread makes, uses and leaves.

    There it may change its directory, so that a layer's name is the number of an fd, and
    500 fit into what mount(2) reads. A copy of the mount comes out detached.
    """

    def build() -> int:
        with ExitStack() as inside:
            with _explained("unshare", what.source, None):
                inside.enter_context(aside())
            # Opened here: the kernel refuses layers of another namespace's mounts.
            mounts = lowers.table()
            layers = []
            for lower in what.lowers:
                layers.append(lowers.open_verified(lower, mounts))
                inside.callback(os.close, layers[-1])
            options = ["lowerdir=" + ":".join(map(str, layers))]
            if what.upperdir:
                options.append(f"upperdir={_directory(what.upperdir, inside)}")
                options.append(f"workdir={_directory(what.workdir, inside)}")
            options += [f"{key}={value}" for key, value in _options(what)]
            options += ["volatile"] if what.upperdir and what.volatile else []
            # Any directory will do to mount on; this one is there for certain.
            place = what.lowers[0].path
            with _explained("mount overlay", what.source, None, log):
                os.chdir("/proc/self/fd")
                libc.mount(what.source, place, "overlay", ",".join(options).encode())
                return libc.open_tree(place, clone=True)

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        fd = thread.submit(build).result()
    owned.callback(os.close, fd)
    if not what.upperdir:
        with _explained("mount_setattr", what.source, None):
            libc.mount_setattr(fd, add=libc.MOUNT_ATTR_RDONLY)
    return fd


@contextmanager
def aside() -> Iterator[None]:
    """A mount namespace in which this thread, of its own, is alone; nobody sees what it mounts.

    It is gone when the block is left, not some time after the thread has ended: until then
    it would keep all that was mounted here in use.
    """
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc.unshare(libc.CLONE_FS | libc.CLONE_NEWNS)
        try:
            _stop_propagation()
            yield
        finally:
            libc.setns(before, libc.CLONE_NEWNS)
    finally:
        os.close(before)


def _stop_propagation() -> None:
    """Of all mounts of this namespace, from above a root that is none (chroot(2)), too."""
    try:
        libc.make_private("/")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    else:
        return
    with ExitStack() as opened:
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, root)
        here = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        opened.callback(os.close, here)
        # Who enters a namespace has its root, even if it is the one that it is in.
        libc.setns(here, libc.CLONE_NEWNS)
        libc.make_private("/")
        os.fchdir(root)
        os.chroot(".")


def _options(what: Overlay) -> list[tuple[str, str]]:
    return [*_OVERLAY_OPTIONS, ("xino", "on" if what.xino else "off")]


def _less_than_asked(fd: int, what: Overlay) -> list[str]:
    """What the attached overlay does otherwise than asked; nothing where it cannot be known."""
    try:
        text = libc.mount_options(libc.mount_id(fd))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM, errno.ENOENT, errno.EINVAL):
            return []
        raise
    shown = dict(option.partition("=")[::2] for option in text.split(","))
    less = [
        f"{key}={value} was asked, the mount has {key}={real}"
        for key, value in _options(what)
        if (real := shown.get(key) or _default(key)) not in ("", value)
    ]
    if what.upperdir and what.volatile and not {"volatile", "fsync"} & shown.keys():
        less.append("volatile was asked, the mount is not")
    return less


def _default(key: str) -> str:
    """The value that the kernel does not show because it is this kernel's default; or ""."""
    try:
        name = "xino_auto" if key == "xino" else key
        with open(f"/sys/module/overlay/parameters/{name}") as file:
            chosen = file.read().startswith("Y")
    except FileNotFoundError:
        return ""
    match key, chosen:
        case "xino", True:
            return "auto"
        case "redirect_dir", False:
            # "follow" or "nofollow": which one, another parameter says. Shown if not that.
            return ""
        case _:
            return "on" if chosen else "off"


def _directory(path: str, owned: ExitStack) -> int:
    with _explained("open", path, None):
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    owned.callback(os.close, fd)
    return fd


def _text(path: str, fd: int) -> str:
    """``path``, or where it is too long for a parameter, the name of the fd of it."""
    return path if len(os.fsencode(path)) <= _STRING_MAX else f"/proc/self/fd/{fd}"


def _context(fs_type: str, source: str, owned: ExitStack) -> int:
    if len(os.fsencode(source)) > _STRING_MAX:
        raise KernelRefused(
            "mount", fs_type, errno.ENAMETOOLONG, log=["a source has at most 255 bytes"]
        )
    with _explained("fsopen", fs_type, None):
        context = libc.fsopen(fs_type)
        owned.callback(os.close, context)
        libc.fsconfig_string(context, "source", source)
    return context


def _create(context: int, attributes: int, owned: ExitStack) -> int:
    libc.fsconfig_create(context)
    fd = libc.fsmount(context, attributes)
    owned.callback(os.close, fd)
    return fd


@contextmanager
def _explained(
    call: str, what: str, context: int | None, log: KernelLog | None = None
) -> Iterator[None]:
    """Turn the OSError of a system call into KernelRefused with the kernel's own text."""
    try:
        yield
    except OSError as error:
        said = _context_log(context) if context is not None else []
        if not said and log is not None:
            said = log.lines()
        number = error.errno or errno.EIO
        raise KernelRefused(call, what, number, log=said, hint=_HINTS.get(number, "")) from error


def _context_log(context: int) -> list[str]:
    """What the kernel wrote into the filesystem context, without its level marks."""
    lines: list[str] = []
    while True:
        try:
            line = os.read(context, 4096)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EMSGSIZE):
                return lines
            raise
        lines.append(line.decode(errors="replace").strip().removeprefix("e ").removeprefix("w "))


def unmount(target: str, *, lazy: bool = False) -> None:
    """Unmount what is at ``target``.

    Raises InUse naming the processes and mounts that keep it busy, NotFound if nothing is
    mounted there. ``lazy`` takes it out of sight at once and lets them go on.
    """
    try:
        libc.umount2(target, libc.UMOUNT_NOFOLLOW | (libc.MNT_DETACH if lazy else 0))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            raise NotFound(f"nothing is mounted at {target}") from error
        if error.errno != errno.EBUSY:
            raise KernelRefused("umount", target, error.errno or errno.EIO) from error
        holders = inuse.users(target) or [
            Holder(
                "a process or mount", "that cannot be seen from here", "overlayctl umount --lazy"
            )
        ]
        raise InUse(target, holders) from error

"""Mounts as values, performed: what comes out, and what is refused with nothing left."""

import errno
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overlayctl.errors import Damaged, HostCannot, InUse, KernelRefused, NotFound
from overlayctl.kernel import inuse, libc, mounter, mounttable
from overlayctl.kernel.kernellog import KernelLog
from overlayctl.mount import Erofs, Overlay, Tmpfs
from tests import kernel_has
from tests.kernel.conftest import Image, Place

ODD = os.fsdecode(b"a b,c:d\\e\nf\tg#\xff\xfe=h")


def overlay(place: Place, *lowers: str, upper: str = "upper", work: str = "work") -> Overlay:
    attached = tuple(place.lower(path) for path in lowers)
    return Overlay("overlayctl:test", attached, place.path(upper), place.path(work))


def view(place: Place, *lowers: str) -> Overlay:
    return Overlay("overlayctl:test", tuple(place.lower(path) for path in lowers))


def read(*path: str) -> str:
    return Path(*path).read_text()


def write(text: str, *path: str) -> None:
    Path(*path).write_text(text)


def flags(path: str) -> set[str]:
    mount = mounttable.at(path)
    assert mount is not None
    return set(mount.options.split(","))


def kernel_log() -> KernelLog:
    log = KernelLog().__enter__()
    assert log.readable, "these tests need /dev/kmsg"
    return log


# --- what works ---------------------------------------------------------------------------


def test_a_layer_is_read_only_and_nothing_in_it_runs(place: Place, image: Image) -> None:
    layer = place.attach("layer", image(place.path("image"), hello="hi"))
    assert read(layer, "hello") == "hi"
    assert {"ro", "nosuid", "nodev", "noexec"} <= flags(layer)
    with pytest.raises(OSError, match="Read-only"):
        write("", layer, "new")


def test_an_overlay_takes_the_upper_then_the_topmost_layer(place: Place, image: Image) -> None:
    top = place.attach("top", image(place.path("i1"), a="top", b="top", c="top"))
    bottom = place.attach("bottom", image(place.path("i2"), b="bottom", d="bottom"))
    write("upper", place.path("upper"), "a")
    mounter.mount(overlay(place, top, bottom), place.merged)
    assert [read(place.merged, name) for name in "abcd"] == ["upper", "top", "top", "bottom"]
    write("new", place.merged, "d")
    assert read(place.path("upper"), "d") == "new"
    assert read(bottom, "d") == "bottom"


def test_an_overlay_without_an_upper_is_read_only(place: Place, image: Image) -> None:
    layer = place.attach("layer", image(place.path("image"), hello="hi"))
    mounter.mount(view(place, layer, place.attach("empty", place.empty)), place.merged)
    assert read(place.merged, "hello") == "hi"
    assert "ro" in flags(place.merged)


def test_the_options_are_said_whatever_the_defaults_are(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, libc.Path]] = []
    string, mount = libc.fsconfig_string, libc.mount

    def listen(fd: int, key: str, value: libc.Path) -> None:
        given.append((key, value))
        string(fd, key, value)

    def listen_to_mount(*arguments: Any) -> None:
        given.extend(tuple(o.split("=", 1)) for o in arguments[-1].decode().split(","))
        mount(*arguments)

    monkeypatch.setattr(libc, "fsconfig_string", listen)
    monkeypatch.setattr(libc, "mount", listen_to_mount)
    lower = place.attach("empty", place.empty)
    given.clear()
    mounter.mount(overlay(place, lower), place.merged)
    assert {("index", "off"), ("metacopy", "off"), ("redirect_dir", "nofollow")} <= set(given)
    assert ("xino", "off") in given


def test_xino_and_volatile_are_what_was_asked(place: Place) -> None:
    lower = place.attach("empty", place.empty)
    what = overlay(place, lower)._replace(xino=True, volatile=True)
    mounter.mount(what, place.merged)
    mount = mounttable.at(place.merged)
    assert mount is not None
    assert mount.option("xino") == ["on"]
    assert mount.option("volatile") or mount.option("fsync") == ["volatile"]


def test_names_of_any_bytes(tmp_path: Path, empty: str, image: Image) -> None:
    root = tmp_path / ODD
    root.mkdir()
    place = Place(str(root), empty)
    layer = place.attach(ODD, image(place.path("image" + ODD), hello="hi"))
    os.rename(place.path("upper"), place.path("upper" + ODD))
    os.rename(place.path("work"), place.path("work" + ODD))
    mounter.mount(overlay(place, layer, upper="upper" + ODD, work="work" + ODD), place.merged)
    assert read(place.merged, "hello") == "hi"
    write("x", place.merged, "new")
    assert os.listdir(place.path("upper" + ODD)) == ["new"]
    mount = mounttable.at(place.merged)
    assert mount is not None
    if kernel_has.rung() != "mount":
        assert mount.option("lowerdir+") == [layer]
        assert mount.option("upperdir") == [kernel_has.shown(place.path("upper" + ODD))]
    mounter.unmount(place.merged)


def test_paths_longer_than_a_parameter_may_be(tmp_path: Path, empty: str, image: Image) -> None:
    root = tmp_path / ("d" * 200) / ("e" * 200)
    root.mkdir(parents=True)
    place = Place(str(root), empty)
    layer = place.attach("layer", image(place.path("image"), hello="hi"))
    mounter.mount(overlay(place, layer), place.merged)
    assert read(place.merged, "hello") == "hi"


def test_500_layers_and_few_descriptors_left_open(place: Place) -> None:
    lowers = [place.attach(f"l{n}", place.empty) for n in range(500)]
    before = len(os.listdir("/proc/self/fd"))
    mounter.mount(overlay(place, *lowers), place.merged)
    assert len(os.listdir("/proc/self/fd")) == before
    write("x", place.merged, "new")
    mount = mounttable.at(place.merged)
    assert mount is not None
    if kernel_has.rung() == "mount":
        assert len(mount.option("lowerdir")[0].split(":")) == 500
    else:
        assert mount.option("lowerdir+") == lowers


def test_500_layers_need_no_500_descriptors(place: Place) -> None:
    lowers = [place.attach(f"l{n}", place.empty) for n in range(500)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        mounter.mount(overlay(place, *lowers), place.merged)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_tmpfs_is_private_and_only_roots(place: Place) -> None:
    subprocess.run(["mount", "--bind", place.root, place.root], check=True)
    subprocess.run(["mount", "--make-shared", place.root], check=True)
    mounter.mount(Tmpfs("overlayctl:test:attached:"), place.merged)
    assert os.stat(place.merged).st_mode & 0o7777 == 0o700
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    mine = next(line for line in lines if f" {place.merged} " in line)
    assert "shared:" not in mine.partition(" - ")[0]


def test_attributes_besides_its_own(place: Place) -> None:
    what = overlay(place, place.attach("empty", place.empty))
    asked = libc.MOUNT_ATTR_NOSUID | libc.MOUNT_ATTR_NODEV
    mounter.mount(what, place.merged, attributes=asked)
    assert {"nosuid", "nodev"} <= flags(place.merged)


def test_an_ordinary_mount_leaves_nothing_in_the_kernel_log(place: Place, image: Image) -> None:
    layer = place.attach("layer", image(place.path("image"), hello="hi"))
    record = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(record, 0, os.SEEK_END)
    mounter.mount(overlay(place, layer), place.merged)
    write("x", place.merged, "hello")
    mounter.unmount(place.merged)
    said = b""
    try:
        while True:
            said += os.read(record, 8192)
    except BlockingIOError:
        pass
    finally:
        os.close(record)
    assert place.root.encode() not in said
    assert b"overlayfs: upper" not in said


def test_what_is_detached_is_in_no_table_and_goes_by_itself(place: Place) -> None:
    before = mounttable.read()
    with mounter.detached(Erofs(place.empty, loop=not kernel_has.erofs_from(place.empty))) as fd:
        assert libc.is_mount_root(fd)
        assert mounttable.read() == before
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


# --- the other ways, on older kernels -------------------------------------------------------


OLDER = [(9, "6.13 to 6.14"), (0, "6.8 to 6.12"), (22, "6.5 to 6.7"), (95, "before 6.5")]
FEW = ("itself", "6.8 to 6.12", "6.13 to 6.14")
"""Where mounting many layers takes long, or what mount(2) needs 500 for does not come into it."""


@pytest.fixture(params=OLDER, ids=lambda kernel: str(kernel[1]))
def older(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Answer layers by descriptor as that kernel does; one that is older answers for itself."""
    number, name = request.param
    if kernel_has.rung() != "fds":
        return "itself"
    with_fd = libc.fsconfig_fd

    def refuse(fd: int, key: str, value: int) -> None:
        if number == errno.EBADF and key == "lowerdir+":
            # Only the upper's descriptor, which is of kind O_PATH, is refused.
            return with_fd(fd, key, value)
        if number == 0:
            # The kernel's own answer to a value of the wrong kind, with its log.
            return libc.fsconfig_flag(fd, key)
        if number == errno.EINVAL:
            # The kernel's own answer to a parameter that it does not know, with its log.
            libc.fsconfig_string(fd, f"un{key}", "x")
        raise OSError(number, os.strerror(number), "fsconfig")

    monkeypatch.setattr(libc, "fsconfig_fd", refuse)
    return str(name)


def test_older_kernels_get_the_same_overlay(tmp_path: Path, empty: str, older: str) -> None:
    root = tmp_path / ODD
    root.mkdir()
    place = Place(str(root), empty)
    lowers = [place.attach(f"l{n}", empty) for n in range(20 if older in FEW else 500)]
    here, table = os.getcwd(), len(mounttable.read())
    descriptors = len(os.listdir("/proc/self/fd"))
    mounter.mount(overlay(place, *lowers), place.merged)
    write("x", place.merged, "new")
    assert os.listdir(place.path("upper")) == ["new"]
    assert os.getcwd() == here
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert len(mounttable.read()) == table + 1
    mount = mounttable.at(place.merged)
    assert mount is not None
    assert mount.source == "overlayctl:test"
    mounter.unmount(place.merged)
    mounter.mount(view(place, *lowers[:2]), place.merged)
    assert "ro" in flags(place.merged)


@pytest.mark.usefixtures("older")
def test_older_kernels_get_long_paths(tmp_path: Path, empty: str, image: Image) -> None:
    root = tmp_path / ("d" * 200) / ("e" * 200)
    root.mkdir(parents=True)
    place = Place(str(root), empty)
    layer = place.attach("layer", image(place.path("image"), hello="hi"))
    mounter.mount(overlay(place, layer), place.merged)
    assert read(place.merged, "hello") == "hi"


@pytest.mark.usefixtures("older")
def test_older_kernels_refuse_an_upper_in_use_too(place: Place) -> None:
    lower = place.attach("empty", place.empty)
    mounter.mount(overlay(place, lower), place.merged)
    os.mkdir(place.path("work2"))
    with pytest.raises(InUse):
        mounter.mount(overlay(place, lower, work="work2"), place.merged)


def test_options_that_mount_2_would_cut_are_never_given_to_it(place: Place) -> None:
    with pytest.raises(OSError, match="would cut"):
        libc.mount("x", place.merged, "overlay", b"lowerdir=" + b"x" * 4087)


# --- what is refused ------------------------------------------------------------------------


def refused(error: type[Exception], what: Erofs | Overlay, target: str) -> str:
    """The message of the refusal; the mount table and the descriptors are as before."""
    table, descriptors = mounttable.read(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(error) as caught:
        mounter.mount(what, target)
    assert mounttable.read() == table
    assert len(os.listdir("/proc/self/fd")) == descriptors
    return str(caught.value)


def test_501_layers_before_the_kernel_is_asked(place: Place) -> None:
    assert "at most 500" in refused(HostCannot, view(place, *["/nowhere"] * 501), place.merged)


def test_a_directory_that_is_no_attached_layer(place: Place, image: Image) -> None:
    layer = place.attach("layer", image(place.path("image"), hello="hi"))
    os.mkdir(place.path("plain"))
    message = refused(Damaged, overlay(place, layer, place.path("plain")), place.merged)
    assert place.path("plain") in message
    libc.umount2(layer, 0)
    assert layer in refused(Damaged, overlay(place, layer), place.merged)
    os.rmdir(layer)
    assert layer in refused(Damaged, overlay(place, layer), place.merged)


def test_a_directory_within_a_layer(place: Place, tmp_path: Path) -> None:
    (tmp_path / "tree" / "inside").mkdir(parents=True)
    made = place.path("image")
    subprocess.run(["mkfs.erofs", "--quiet", made, tmp_path / "tree"], check=True)
    layer = place.attach("layer", made)
    message = refused(Damaged, overlay(place, layer + "/inside"), place.merged)
    assert layer + "/inside" in message


def test_a_layer_given_twice_in_the_kernels_words(place: Place) -> None:
    layer = place.attach("layer", place.empty)
    assert "conflicting lowerdir path" in refused(
        KernelRefused, overlay(place, layer, layer), place.merged
    )


def test_a_mount_that_the_kernel_would_make_read_only(place: Place) -> None:
    lower = place.attach("empty", place.empty)
    # The kernel's cleanup of the work directory stops two levels down.
    os.makedirs(place.path("work/work/a/b/c/d"))
    message = refused(KernelRefused, overlay(place, lower), place.merged)
    assert "read-only" in message


def test_a_missing_upper_by_its_name(place: Place) -> None:
    lower = place.attach("empty", place.empty)
    what = overlay(place, lower, upper="absent")
    assert place.path("absent") in refused(KernelRefused, what, place.merged)


def test_a_source_longer_than_the_kernel_takes(place: Place) -> None:
    lower = place.attach("empty", place.empty)
    what = overlay(place, lower)._replace(source="s" * 256)
    assert "255 bytes" in refused(KernelRefused, what, place.merged)


def test_a_file_that_is_no_image(place: Place) -> None:
    write("x" * 8192, place.path("image"))
    loop = not kernel_has.erofs_from(place.empty)
    message = refused(KernelRefused, Erofs(place.path("image"), loop=loop), place.merged)
    assert place.path("image") in message
    assert "cannot find valid erofs superblock" in message
    assert place.path("absent") in refused(KernelRefused, Erofs(place.path("absent")), place.merged)


def test_a_file_on_a_filesystem_that_cannot_serve_it(place: Place, empty: str) -> None:
    mounter.mount(Tmpfs("x"), place.merged)
    copy = os.path.join(place.merged, "image")
    Path(copy).write_bytes(Path(empty).read_bytes())
    with pytest.raises(KernelRefused) as caught:
        mounter.mount(Erofs(copy), place.path("upper"))
    assert "loop device" in caught.value.hint


def test_a_process_without_the_privilege_is_told_which(place: Place) -> None:
    program = (
        "import sys; from overlayctl.kernel import mounter; from overlayctl.mount import Erofs\n"
        "try: mounter.mount(Erofs(sys.argv[1]), sys.argv[2])\n"
        "except mounter.KernelRefused as error: print(error.hint)"
    )
    done = subprocess.run(
        ["capsh", "--drop=cap_sys_admin", "--", "-c", 'exec "$@"', "sh",
         "python3", "-c", program, place.empty, place.merged],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert "CAP_SYS_ADMIN" in done.stdout, done


# --- in use -------------------------------------------------------------------------------


UNSEEN = "an overlay that cannot be seen from here"
"""What was given to mount(2) is a number in the mount table."""


def test_an_upper_in_use_names_the_overlay_that_has_it(place: Place) -> None:
    lower = place.attach("empty", place.empty)
    mounter.mount(overlay(place, lower), place.merged)
    write("x", place.merged, "file")
    os.mkdir(place.path("work2"))
    os.mkdir(place.path("second"))
    what = overlay(place, lower, work="work2")
    said = refused(InUse, what, place.path("second"))
    # What was given to mount(2) is a number in the mount table.
    unseen = "an overlay that cannot be seen from here"
    assert (
        unseen if kernel_has.rung() == "mount" else f"at {place.merged} (seen by process"
    ) in said
    # The first one never notices.
    write("y", place.merged, "file")
    os.unlink(os.path.join(place.merged, "file"))
    mounter.unmount(place.merged)
    mounter.mount(what, place.path("second"))


def test_an_upper_of_any_name_in_use_is_told(tmp_path: Path, empty: str) -> None:
    root = tmp_path / ODD
    root.mkdir()
    place = Place(str(root), empty)
    os.mkdir(place.path("work2"))
    what = overlay(place, place.attach("empty", place.empty))
    if kernel_has.rung() != "mount":
        what = what._replace(rung="strings")
    mounter.mount(what, place.merged)
    said = refused(InUse, what._replace(workdir=place.path("work2")), place.merged)
    assert (UNSEEN if kernel_has.rung() == "mount" else f"at {place.merged} (seen by") in said


def test_an_upper_in_use_by_a_lazily_unmounted_overlay(place: Place) -> None:
    lower = place.attach("empty", place.empty)
    mounter.mount(overlay(place, lower), place.merged)
    with open(os.path.join(place.merged, "file"), "w") as file:
        mounter.unmount(place.merged, lazy=True)
        assert inuse.upper_in_use(place.path("upper"))
        os.mkdir(place.path("work2"))
        refused(InUse, overlay(place, lower, work="work2"), place.merged)
        file.write("still there")
    assert not inuse.upper_in_use(place.path("upper"))


@pytest.mark.parametrize("volatile", [True, False])
@pytest.mark.parametrize("readable", [True, False])
def test_anothers_upper_in_use_is_not_ours(
    place: Place, monkeypatch: pytest.MonkeyPatch, *, readable: bool, volatile: bool
) -> None:
    lower = place.attach("empty", place.empty)
    for name in ("other", "otherwork", "otherwork2", "elsewhere", "again"):
        os.mkdir(place.path(name))
    theirs = overlay(place, lower, upper="other", work="otherwork")
    mounter.mount(theirs, place.path("elsewhere"))
    call = "mount" if kernel_has.rung() == "mount" else "fsconfig_create"
    make, armed = getattr(libc, call), [True]

    def disturbed(*arguments: Any) -> None:
        make(*arguments)
        if armed:
            armed.clear()
            names = {"lower": lower, "upper": place.path("other"), "work": place.path("otherwork2")}
            options = ",".join(f"{name}dir={path}" for name, path in names.items())
            command = ["mount", "-t", "overlay", "-o", options, "overlay", place.path("again")]
            subprocess.run(command, check=True)

    monkeypatch.setattr(libc, call, disturbed)
    if not readable:
        monkeypatch.setattr(KernelLog, "__enter__", lambda self: self)
    mounter.mount(overlay(place, lower)._replace(volatile=volatile), place.merged)
    assert not armed
    write("x", place.merged, "file")


def test_without_a_kernel_log_an_upper_in_use_is_found_by_asking(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = place.attach("empty", place.empty)
    mounter.mount(overlay(place, lower), place.merged)
    os.mkdir(place.path("work2"))
    monkeypatch.setattr(KernelLog, "__enter__", lambda self: self)
    refused(InUse, overlay(place, lower, work="work2"), place.merged)


Busy = Callable[[str], list[str]]
BUSY: dict[str, Busy] = {
    "cwd": lambda merged: ["sh", "-c", 'cd "$0" && echo && exec sleep 100', merged],
    "fd": lambda merged: ["sh", "-c", 'exec 7<"$0/file" && echo && exec sleep 100', merged],
    "exe": lambda merged: [merged + "/sleeper", "-c", "echo; read line"],
    "map": lambda merged: [
        "python3", "-c",
        ("import mmap, sys, time\n"
        "with open(sys.argv[1]) as f: m = mmap.mmap(f.fileno(), 0, prot=1)\n"
        "print(flush=True); time.sleep(100)"),
        merged + "/file",
    ],
}  # fmt: skip


@pytest.mark.parametrize("how", BUSY)
def test_busy_names_the_process(place: Place, image: Image, how: str) -> None:
    layer = place.attach("layer", image(place.path("image"), file="content"))
    mounter.mount(overlay(place, layer), place.merged)
    shell = os.path.join(place.merged, "sleeper")
    Path(shell).write_bytes(Path("/bin/sh").read_bytes())
    os.chmod(shell, 0o755)
    command = BUSY[how](place.merged)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            with pytest.raises(InUse) as caught:
                mounter.unmount(place.merged)
            assert [h.kind for h in caught.value.holders] == ["process"]
            assert caught.value.holders[0].name.startswith(f"{process.pid} (")
            assert place.merged in caught.value.holders[0].name
            assert caught.value.hint == f"kill {process.pid}"
            assert mounttable.at(place.merged) is not None
        finally:
            process.kill()
    mounter.unmount(place.merged)
    assert mounttable.at(place.merged) is None


def test_a_mount_below_is_named(place: Place) -> None:
    lower = place.attach("empty", place.empty)
    mounter.mount(overlay(place, lower), place.merged)
    below = os.path.join(place.merged, "below")
    os.mkdir(below)
    mounter.mount(Tmpfs("x"), below)
    with pytest.raises(InUse, match="mount " + below):
        mounter.unmount(place.merged)


def test_a_copy_in_another_namespace_is_not_in_the_way(place: Place) -> None:
    lower = place.attach("empty", place.empty)
    mounter.mount(overlay(place, lower), place.merged)
    command = ["unshare", "-m", "sh", "-c", 'cd "$0" && echo && exec sleep 100', place.merged]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            assert [u for u in inuse.users(place.merged) if str(process.pid) in u.name] == []
            assert place.merged in {m.mount_point for _, m in mounttable.everywhere()}
            mounter.unmount(place.merged)
            there = [pid for pid, m in mounttable.everywhere() if m.mount_point == place.merged]
            assert there == [process.pid]
        finally:
            process.kill()


def test_nothing_to_unmount(place: Place) -> None:
    with pytest.raises(NotFound, match=place.merged):
        mounter.unmount(place.merged)
    with pytest.raises(NotFound):
        mounter.unmount(place.path("absent"))


def test_a_nul_in_a_path_is_not_cut(place: Place) -> None:
    with pytest.raises(OSError, match="NUL"):
        libc.umount2(place.merged + "\0/x", 0)


def test_less_than_asked_is_noticed_after_attaching(place: Place) -> None:
    lower = place.attach("empty", place.empty)
    asked = overlay(place, lower)._replace(volatile=True, xino=True)
    mounter.mount(overlay(place, lower), place.merged)
    fd = os.open(place.merged, os.O_PATH)
    try:
        assert mounter._less_than_asked(fd, overlay(place, lower)) == []
        less = " ".join(mounter._less_than_asked(fd, asked))
    finally:
        os.close(fd)
    # A kernel that does not tell the options of one mount (before 6.11) is taken at its word.
    told = kernel_has.options_of(place.merged)
    assert ("xino=on was asked" in less) == told
    assert ("volatile was asked" in less) == told

"""The mount table as values, against libmount's reading of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from overlayctl.errors import HostCannot
from overlayctl.kernel import libc, libmount, mounter, mounttable
from overlayctl.mount import Erofs, Overlay, Tmpfs
from tests import kernel_has
from tests.kernel.conftest import Place
from tests.kernel.test_mounter import ODD


@pytest.mark.parametrize("character", [" ", "\t", "\n", "\\", "#", ",", ":", "=", "\\040", "é"])
def test_every_escape_is_undone_as_libmount_does(place: Place, character: str) -> None:
    target = place.attach(f"x{character}y", place.empty)
    mount = mounttable.at(target)
    assert mount is not None
    assert (mount.mount_point, mount.fs_type, mount.root) == (target, "erofs", "/")
    assert libmount.fs_type_at(target) == "erofs"
    assert mount in mounttable.below(place.root)


def test_sources_and_options_of_any_bytes(place: Place) -> None:
    lower = place.attach(ODD, place.empty)
    os.mkdir(place.path("up" + ODD))
    what = Overlay("src " + ODD, (place.lower(lower),), place.path("up" + ODD), place.path("work"))
    mounter.mount(what, place.merged)
    mount = mounttable.at(place.merged)
    assert mount is not None
    assert mount.source == what.source
    if kernel_has.rung() != "mount":
        assert mount.option("lowerdir+") == [lower]
        assert mount.option("upperdir") == [kernel_has.shown(what.upperdir)]
    assert mount.option("upper") == []


def test_the_topmost_mount_counts_whatever_was_made_first(place: Place, empty: str) -> None:
    target = place.merged
    with mounter.detached(Erofs(empty, loop=not kernel_has.erofs_from(empty))) as older:
        mounter.mount(Tmpfs("below"), target)
        libc.move_mount(older, target)
        mount = mounttable.at(target)
        assert mount is not None
        assert mount.fs_type == "erofs"
    libc.umount2(target, 0)
    mount = mounttable.at(target)
    assert mount is not None
    assert mount.source == "below"


def test_what_another_mount_covers_is_not_there(place: Place) -> None:
    inner = os.path.join(place.merged, "inner")
    os.mkdir(inner)
    mounter.mount(Tmpfs("inner"), inner)
    mounter.mount(Tmpfs("outer"), place.merged)
    assert mounttable.at(inner) is None
    os.mkdir(inner)
    assert mounttable.at(inner) is None
    libc.umount2(place.merged, 0)


def test_plain_places_are_no_mounts(place: Place) -> None:
    target = place.attach("layer", place.empty)
    os.symlink(target, place.path("link"))
    write = Path(place.path("file"))
    write.write_text("")
    for name in ("upper", "absent", "file", "file/below", "link"):
        assert mounttable.at(place.path(name)) is None


def test_below_does_not_mean_beginning_with(place: Place) -> None:
    place.attach("a", place.empty)
    place.attach("ab", place.empty)
    assert [m.mount_point for m in mounttable.below(place.path("a"))] == [place.path("a")]
    assert len(mounttable.below("/")) == len(mounttable.read())


def test_the_table_agrees_with_findmnt(place: Place) -> None:
    place.attach("a b", place.empty)
    done = subprocess.run(
        ["findmnt", "--kernel", "--json", "--list", "--output", "TARGET,FSTYPE"],
        check=True, capture_output=True,
    )  # fmt: skip
    theirs = [(m["target"], m["fstype"]) for m in json.loads(done.stdout)["filesystems"]]
    assert theirs == [(mount.mount_point, mount.fs_type) for mount in mounttable.read()]


def test_everywhere_yields_each_namespace_once(place: Place) -> None:
    place.attach("layer", place.empty)
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", "echo; exec sleep 100"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            seen = [
                pid for pid, m in mounttable.everywhere() if m.mount_point.startswith(place.root)
            ]
        finally:
            process.kill()
    assert sorted(seen) == sorted([os.getpid(), process.pid])


def test_a_process_with_another_root_hides_no_mount(place: Place, tmp_path: Path) -> None:
    # The parent comes first in the order of numbers, and sees nothing.
    program = f"import os, time; os.fork() and os.chroot({str(tmp_path)!r}); time.sleep(100)"
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", 'mount -t tmpfs there "$1"; echo; exec "$2" -c "$3"', "sh",
         place.root, sys.executable, program],
        stdout=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        try:
            while os.readlink(f"/proc/{process.pid}/root") == "/":
                time.sleep(0.01)
            found = [(pid, m) for pid, m in mounttable.everywhere() if m.source == "there"]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    ((pid, mount),) = found
    assert (mount.mount_point, pid > process.pid) == (place.root, True)


def test_without_libmount_the_refusal_says_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(*_: object, **__: object) -> None:
        raise OSError("libmount.so.1: cannot open shared object file")

    libmount._library.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", absent)
    with pytest.raises(HostCannot) as caught:
        libmount.fs_type_at("/")
    assert "libmount1" in caught.value.hint

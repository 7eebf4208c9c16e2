"""Layers through loop devices: set up by libmount, gone with the last user."""

import os
import time
from pathlib import Path

import pytest

from overlayctl.errors import KernelRefused
from overlayctl.kernel import libc, libmount, mounter, mounttable, probe
from overlayctl.mount import Erofs, Overlay
from tests import kernel_has
from tests.kernel.conftest import Image, Place
from tests.kernel.test_mounter import ODD


def backing() -> dict[str, str]:
    found = {}
    for name in os.listdir("/sys/block"):
        try:
            text = Path("/sys/block", name, "loop/backing_file").read_bytes()
        except FileNotFoundError:
            continue
        found["/dev/" + name] = os.fsdecode(text.rstrip(b"\n"))
    return found


def gone(image: str) -> bool:
    for _ in range(200):
        if image not in backing().values():
            return True
        time.sleep(0.01)
    return False


def mount_tmpfs(target: str) -> None:
    context = libc.fsopen("tmpfs")
    libc.fsconfig_create(context)
    fd = libc.fsmount(context, 0)
    libc.move_mount(fd, target)
    os.close(fd)
    os.close(context)


@pytest.mark.parametrize("name", ["image", ODD, "x" * 200])
def test_a_loop_device_lives_as_long_as_its_mount(place: Place, image: Image, name: str) -> None:
    made = image(place.path(name), hello="hi")
    layer = place.attach("layer", made, loop=True)
    assert Path(layer, "hello").read_text() == "hi"
    mount = mounttable.at(layer)
    assert mount is not None
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(mount.options.split(","))
    assert backing()[mount.source] == made
    sys = Path("/sys/block", os.path.basename(mount.source))
    assert (sys / "ro").read_text() == "1\n"
    assert (sys / "loop/autoclear").read_text() == "1\n"
    lowers = (place.lower(layer),)
    mounter.mount(Overlay("s", lowers, place.path("upper"), place.path("work")), place.merged)
    mounter.unmount(layer)
    assert Path(place.merged, "hello").read_text() == "hi"
    mounter.unmount(place.merged)
    assert gone(made)


def test_direct_reads_where_the_disk_allows(place: Place, image: Image) -> None:
    made = image(place.path("image"), hello="hi")
    if probe._direct_reads(made) != "works":
        pytest.fail("the tests' own disk has no direct I/O")
    with libmount.loop_device(made) as device:
        flag = Path("/sys/block", os.path.basename(device), "loop/dio").read_text()
    assert flag == "1\n"
    assert gone(made)


def test_a_failed_mount_leaves_no_device(place: Place) -> None:
    path = place.path("image")
    Path(path).write_bytes(b"x" * 8192)
    with pytest.raises(KernelRefused, match="superblock"):
        mounter.mount(Erofs(path, loop=True), place.merged)
    assert gone(path)
    with pytest.raises(KernelRefused, match="absent"):
        mounter.mount(Erofs(place.path("absent"), loop=True), place.merged)


def test_nodes_that_dev_lacks_are_made(place: Place, empty: str) -> None:
    dev = place.path("dev")
    os.mkdir(dev)
    # A container's /dev: the control device is there, the nodes are not.
    mount_tmpfs(dev)
    for name, numbers in (("null", (1, 3)), ("kmsg", (1, 11)), ("loop-control", (10, 237))):
        os.mknod(os.path.join(dev, name), 0o20600, os.makedev(*numbers))
    fd = libc.open_tree(dev, clone=True)
    libc.umount2(dev, 0)
    libc.move_mount(fd, "/dev")
    os.close(fd)
    try:
        layer = place.attach("layer", empty, loop=True)
        mounter.unmount(layer)
        assert gone(empty)
        assert any(name.removeprefix("loop").isdigit() for name in os.listdir("/dev"))
    finally:
        libc.umount2("/dev", libc.MNT_DETACH)


def test_without_a_loop_driver_the_refusal_says_what_to_do(place: Place, empty: str) -> None:
    mount_tmpfs("/dev")
    try:
        with pytest.raises(KernelRefused, match="loop-control") as caught:
            mounter.mount(Erofs(empty, loop=True), place.merged)
    finally:
        libc.umount2("/dev", libc.MNT_DETACH)
    assert "modprobe loop" in caught.value.hint


def test_the_same_file_twice(place: Place, empty: str) -> None:
    layers = [place.attach(name, empty, loop=True) for name in ("a", "b")]
    for layer in layers:
        mounter.unmount(layer)
    assert gone(empty)


def test_the_probe_says_what_works_here(place: Place, empty: str) -> None:
    before = mounttable.read()
    ways = probe.attach_ways(empty)
    every = ["buffered", "directio", "loop", "unpacked"]
    best = "buffered"
    if not kernel_has.erofs_from(empty):
        every, best = every[2:], "loop"
        assert "not by this kernel" in ways["buffered"]
    assert [way for way, answer in ways.items() if answer == "works"] == every
    assert probe.attach_way((empty,), "auto") == best
    assert probe.attach_way((empty,), "loop") == "loop"
    assert mounttable.read() == before
    assert gone(empty)
    refused = probe.attach_ways(place.path("absent"))
    assert [way for way, answer in refused.items() if answer == "works"] == ["unpacked"]
    assert probe.attach_way((place.path("absent"), empty), "auto") == best


def test_each_rung_of_the_mount_ladder_is_tried_where_nobody_sees_it(tmp_path: Path) -> None:
    before = mounttable.read()
    found = probe.mount_rungs(str(tmp_path))
    first = probe.RUNGS.index(kernel_has.rung())
    assert [name for name, answer in found.items() if answer == "works"] == [*probe.RUNGS[first:]]
    assert mounttable.read() == before
    assert os.listdir(tmp_path) == []

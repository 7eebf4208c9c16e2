"""``check --repair`` and ``--deep``: what follows from something is made again, the rest named."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overlayctl.errors import HostCannot
from overlayctl.kernel import mounter
from overlayctl.kernel.probe import Setting
from overlayctl.layer import attach
from overlayctl.layer.format import HEADER, PAGE, Header, index_start
from overlayctl.layout import Layout
from overlayctl.mount import Tmpfs
from overlayctl.store import check, containers, images, layers, records, repair, staging
from overlayctl.store.finding import Finding
from overlayctl.store.opened import Store
from tests.layer.tars import directory, entry, hardlink, tar
from tests.store import stores

REPAIR_POINTS = ("repair:before-rename", "repair:after-rename")
TAR = tar(directory("etc"), entry("etc/hosts", data=b"127.0.0.1"))
OTHER = tar(directory("srv", mode=0o750), entry("srv/data", data=b"d" * 700))
# What it says of srv, and the file behind its hard link, come from OTHER.
ON_OTHER = tar(entry("srv/more", data=b"m"), hardlink("srv/same", "srv/data"))
UNENDED = entry("a", data=b"1")[:515]
FULL_PAGES = tar(entry("a", data=bytes(PAGE * 2 - 512 - 1024)))
TAG = "docker.io/library/demo:1"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return stores.new(os.path.join(tmp_path, os.fsdecode(b"st ore:,\n\\\xff")))


def mended(layout: Layout, *, deep: bool = False) -> tuple[list[str], list[Finding]]:
    """What a repair did, as tags, and what remains."""
    store = Store(layout, records.open_store(layout.root, create=False)[1], timeout=5.0)
    done, remaining = repair.repair(store, deep=deep)
    assert sorted(check.check(layout)) == sorted(
        found._replace(message=found.message.split(": not repaired: ")[0])
        for found in remaining
        if found.tag not in ("layer-not-derived", "deep-impossible")
    )
    return sorted(one.finding.tag for one in done), remaining


def overwrite(path: str, at: int, data: bytes) -> None:
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def truncate(path: str, length: int) -> None:
    os.chmod(path, 0o600)
    os.truncate(path, length)


def damage(layout: Layout, name: str, part: str) -> None:
    path = layout.layer_file(name)
    with layers.open_index(layout, name) as index:
        size = index.header.tar_size
    match part:
        case "header":
            overwrite(path, 0, bytes(HEADER))
        case "a byte of the header":
            overwrite(path, 990, b"x")
        case "superblock":
            overwrite(path, HEADER, bytes(PAGE - HEADER))
        case "index":
            overwrite(path, index_start(size) + 64, b"\xff" * 400)
        case "header and index":
            overwrite(path, 0, bytes(HEADER))
            overwrite(path, index_start(size) + 64, b"\xff" * 400)
        case "all behind the tar":
            truncate(path, PAGE + size)
        case "header and superblock":
            overwrite(path, 0, bytes(PAGE))
        case "tar":
            overwrite(path, PAGE + size - 1, b"x")
        case "header and tar":
            overwrite(path, 0, bytes(HEADER))
            overwrite(path, PAGE, b"x")
        case "cut tar":
            truncate(path, PAGE + size - 1)
        case _:
            raise AssertionError(part)


REPAIRABLE = [
    "header",
    "a byte of the header",
    "superblock",
    "index",
    "header and index",
    "all behind the tar",
]


@pytest.mark.parametrize("data", [TAR, UNENDED, FULL_PAGES, b""], ids=len)
@pytest.mark.parametrize("part", REPAIRABLE)
def test_what_is_not_the_tar_is_made_again_in_a_new_file(
    layout: Layout, part: str, data: bytes
) -> None:
    image = stores.add_image(layout, data or bytes(1024), OTHER)
    name = image.layers[0]
    old = layout.layer_file(name)
    before = Path(old).read_bytes()
    damage(layout, name, part)
    with open(old, "rb") as held:
        damaged = held.read()
        assert mended(layout) == (["layer-damaged"], [])
        held.seek(0)
        assert held.read() == damaged != before
    new = layout.layer_file(name)
    assert os.listdir(layout.layer(name)) == ["layer-2.erofs"]
    assert Path(new).read_bytes() == before
    assert os.stat(new).st_mode & 0o777 == 0o400
    damage(layout, name, part)
    assert mended(layout) == (["layer-damaged"], [])
    assert os.listdir(layout.layer(name)) == ["layer-3.erofs"]
    assert records.names(layout.ingest) == []


@pytest.mark.parametrize("part", ["tar", "header and tar", "cut tar", "header and superblock"])
def test_what_cannot_be_made_again_is_named_with_its_users_and_left(
    layout: Layout, part: str
) -> None:
    image = stores.add_image(layout, TAR, OTHER)
    name, other = image.layers
    damage(layout, name, part)
    damage(layout, other, "index")
    before = Path(layout.layer_file(name)).read_bytes()
    done, remaining = mended(layout)
    assert done == ["layer-damaged"]
    assert remaining
    for found in remaining:
        assert (found.tag, found.path) == ("layer-damaged", layout.layer_file(name))
        assert found.users == (f"image {image.hex}",)
        assert "load an image that has the layer" in found.message
    assert os.listdir(layout.layer(name)) == ["layer.erofs"]
    assert Path(layout.layer_file(name)).read_bytes() == before


def test_a_header_of_a_later_format_is_no_damage(layout: Layout) -> None:
    name = stores.add_image(layout, TAR).layers[0]
    text = Path(layout.layer_file(name)).read_bytes()[:992].replace(b'"format":1', b'"format":2')
    overwrite(layout.layer_file(name), 0, text + hashlib.sha256(text).digest())
    done, (found,) = mended(layout)
    assert done == []
    assert "format 2" in found.message
    assert os.listdir(layout.layer(name)) == ["layer.erofs"]


def test_a_layer_under_anothers_name_is_left(layout: Layout) -> None:
    first, second = stores.add_image(layout, TAR, OTHER).layers
    shutil.copy(layout.layer_file(second), layout.layer_file(first))
    done, (found,) = mended(layout)
    assert (done, found.tag) == ([], "layer-misnamed")


def test_the_same_tar_with_anothers_facts_is_made_again(layout: Layout) -> None:
    other = stores.add_image(layout, tar(directory("srv"), entry("srv/data")), ON_OTHER)
    name = stores.add_image(layout, OTHER, ON_OTHER).layers[1]
    before = Path(layout.layer_file(name)).read_bytes()
    shutil.copy(layout.layer_file(other.layers[1]), layout.layer_file(name))
    assert mended(layout) == (["layer-misnamed"], [])
    assert Path(layout.layer_file(name)).read_bytes() == before


@pytest.mark.parametrize("part", REPAIRABLE)
def test_inherited_facts_are_asked_of_the_layers_below_once_more(layout: Layout, part: str) -> None:
    # On another layer the same tar has other facts: the name says which of the two it is.
    elsewhere = stores.add_image(layout, tar(directory("srv"), entry("srv/data")), ON_OTHER)
    image = stores.add_image(layout, TAR, OTHER, ON_OTHER)
    assert len({name[:64] for name in (elsewhere.layers[1], image.layers[2])}) == 1
    before = {}
    for name in (image.layers[2], image.layers[1]):
        assert ("-" in name) == (name == image.layers[2])
        before[name] = Path(layout.layer_file(name)).read_bytes()
        damage(layout, name, part)
    assert mended(layout) == (["layer-damaged"] * 2, [])
    for name, content in before.items():
        assert Path(layout.layer_file(name)).read_bytes() == content


def test_facts_of_a_layer_that_is_damaged_cannot_be_asked_for(layout: Layout) -> None:
    image = stores.add_image(layout, OTHER, ON_OTHER)
    damage(layout, image.layers[0], "tar")
    overwrite(layout.layer_file(image.layers[0]), HEADER, bytes(100))
    damage(layout, image.layers[1], "index")
    done, remaining = mended(layout)
    assert done == []
    assert {found.path for found in remaining} == set(map(layout.layer_file, image.layers))
    (above,) = {f.message for f in remaining if f.path == layout.layer_file(image.layers[1])}
    assert "below" in above


def test_a_container_knows_the_layers_below_too(layout: Layout) -> None:
    image = stores.add_image(layout, OTHER, ON_OTHER)
    stores.add_container(layout, image)
    Path(layout.image(image.hex, "image.json")).write_text("{")
    damage(layout, image.layers[1], "header")
    done, (found,) = mended(layout)
    assert (done, found.tag) == (["layer-damaged"], "image-damaged")


def test_of_two_files_of_one_layer_the_newest_whole_one_stays(layout: Layout) -> None:
    name = stores.add_image(layout, TAR).layers[0]
    before = Path(layout.layer_file(name)).read_bytes()
    shutil.copy(layout.layer_file(name), layout.layer_file(name, after=1))
    assert [found.tag for found in check.check(layout)] == ["layer-superseded"]
    assert mended(layout) == (["layer-superseded"], [])
    assert os.listdir(layout.layer(name)) == ["layer-2.erofs"]
    # The older file is what the newer can be made from, should that be worse.
    shutil.copy(layout.layer_file(name), os.path.join(layout.layer(name), "layer.erofs"))
    damage(layout, name, "tar")
    assert mended(layout)[1] == []
    assert os.listdir(layout.layer(name)) == ["layer-3.erofs"]
    assert Path(layout.layer_file(name)).read_bytes() == before


def test_staging_and_orphans_go_and_staging_of_a_living_command_stays(layout: Layout) -> None:
    kept = stores.add_image(layout, TAR, tag=TAG)
    (orphan,) = stores.add_layers(layout, OTHER).names
    os.mkdir(layout.path("ingest", "dead"))
    Path(layout.path("ingest", "dead", "layer.erofs")).write_bytes(bytes(10))
    with stores.attached(layout, [orphan]), staging.staging(layout) as living:
        done, remaining = mended(layout)
        assert os.path.isdir(living)
        assert not os.path.lexists(layout.diff(orphan))
    assert (done, remaining) == (["layer-orphan", "staging-left"], [])
    assert layers.listed(layout) == list(kept.layers)


def test_a_layer_that_only_half_a_container_needed_goes_with_it(layout: Layout) -> None:
    names = stores.add_layers(layout, OTHER).names
    stores.add_snapshot(layout, names)
    assert mended(layout) == (["layer-orphan", "snapshot-orphan"], [])
    assert layers.listed(layout) == records.names(layout.path("snapshots")) == []


def test_an_orphan_that_somebody_works_in_is_named(layout: Layout) -> None:
    (orphan,) = stores.add_layers(layout, OTHER).names
    with stores.attached(layout, [orphan]):
        worker = subprocess.Popen(["sleep", "60"], cwd=layout.diff(orphan))
        try:
            done, (found,) = mended(layout)
        finally:
            worker.kill()
            worker.wait()
        assert (done, found.tag) == ([], "layer-orphan")
        assert f"process {worker.pid}" in found.message
        assert mended(layout) == (["layer-orphan"], [])


def test_no_layer_goes_while_a_record_cannot_be_read(layout: Layout) -> None:
    image = stores.add_image(layout, TAR)
    stores.add_layers(layout, OTHER)
    Path(layout.image(image.hex, "image.json")).write_text("{")
    done, remaining = mended(layout)
    assert (done, [found.tag for found in remaining]) == ([], ["image-damaged"])
    assert len(layers.listed(layout)) == 2


@pytest.mark.parametrize("state", ["gone", "damaged", "cut"])
def test_the_image_of_nothing_is_written_again(layout: Layout, state: str) -> None:
    before = Path(layout.empty).read_bytes()
    if state == "gone":
        os.unlink(layout.empty)
    elif state == "damaged":
        overwrite(layout.empty, HEADER + 3, b"x")
    else:
        truncate(layout.empty, 100)
    done, remaining = mended(layout)
    assert (len(done), remaining) == (1, [])
    assert Path(layout.empty).read_bytes() == before


def test_the_image_of_nothing_is_left_while_it_is_in_use(layout: Layout) -> None:
    with stores.attached(layout, [attach.EMPTY]):
        overwrite(layout.empty, 100, b"x")
        worker = subprocess.Popen(["sleep", "60"], cwd=layout.diff(attach.EMPTY))
        try:
            done, (found,) = mended(layout)
        finally:
            worker.kill()
            worker.wait()
        assert (done, found.tag) == ([], "empty-image-damaged")
        assert f"process {worker.pid}" in found.message
        assert mended(layout) == (["empty-image-damaged"], [])


@pytest.mark.parametrize("name", ["ingest", "volumes", "containers/names", "layers"])
def test_a_directory_of_the_store_is_made_again(layout: Layout, name: str) -> None:
    os.rmdir(layout.path(name))
    assert [found.tag for found in check.check(layout)] == ["directory-missing"]
    assert mended(layout) == (["directory-missing"], [])
    assert os.stat(layout.path(name)).st_mode & 0o777 == 0o700


def test_names_are_made_again_from_the_record(layout: Layout) -> None:
    image = stores.add_image(layout, TAR)
    stores.add_container(layout, image)
    os.unlink(layout.container_name("web"))
    os.symlink("ee" * 32, layout.container_name("other"))
    done, remaining = mended(layout)
    assert (done, remaining) == (["container-nameless", "name-dangling"], [])
    assert containers.resolve(layout, "web").id == stores.KEY
    assert os.listdir(layout.path("containers", "names")) == ["web"]


def test_a_name_that_another_container_has_is_left_to_it(layout: Layout) -> None:
    image = stores.add_image(layout, TAR)
    stores.add_container(layout, image)
    os.unlink(layout.container_name("web"))
    stores.add_container(layout, image, key=stores.OTHER_KEY)
    assert mended(layout) == (["container-nameless"], [])
    assert containers.resolve(layout, "web").id == stores.OTHER_KEY
    assert containers.get(layout, stores.KEY).name == stores.KEY[:12]


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "x", "n" * 300, "", "."])
def test_a_name_that_no_command_would_give_is_not_made(layout: Layout, name: str) -> None:
    stores.add_container(layout, stores.add_image(layout, TAR))
    path = Path(layout.container(stores.KEY))
    path.write_text(json.dumps({**json.loads(path.read_text()), "name": name}))
    done, remaining = mended(layout)
    assert done == []
    assert [found.tag for found in remaining] == ["container-damaged"]
    assert os.listdir(layout.path("containers", "names")) == ["web"]


def test_a_snapshot_without_its_record_gets_it_from_its_container(layout: Layout) -> None:
    stores.add_container(layout, stores.add_image(layout, TAR, OTHER))
    path = Path(layout.snapshot(stores.KEY, "snapshot.json"))
    before = path.read_bytes()
    path.unlink()
    assert mended(layout) == (["snapshot-damaged"], [])
    assert path.read_bytes() == before
    path.write_text("{")
    done, (found,) = mended(layout)
    assert (done, found.tag) == ([], "snapshot-damaged")
    assert path.read_text() == "{"


def _lie(path: str, **fields: object) -> None:
    record = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({**record, **fields}))


@pytest.mark.parametrize(
    ("tag", "lie"),
    [
        (
            "container-misnamed",
            lambda layout, _: _lie(layout.container(stores.KEY), id=stores.OTHER_KEY),
        ),
        (
            "container-imageless",
            lambda layout, _: _lie(layout.container(stores.KEY), image="0" * 64),
        ),
        (
            "snapshot-misnamed",
            lambda layout, _: _lie(
                layout.snapshot(stores.KEY, "snapshot.json"), key=stores.OTHER_KEY
            ),
        ),
        (
            "image-misnamed",
            lambda layout, image: _lie(
                layout.image(image.hex, "image.json"), id="sha256:" + "0" * 64
            ),
        ),
        (
            "tag-dangling",
            lambda layout, _: Path(layout.path("tags", "x%3A1")).write_text(
                f"sha256:{'0' * 64}\nx:1\n"
            ),
        ),
        (
            "tag-misnamed",
            lambda layout, image: Path(layout.path("tags", "y")).write_text(f"{image.id}\nx:1\n"),
        ),
        (
            "tag-damaged",
            lambda layout, _: Path(layout.path("tags", "y")).write_text("nothing"),
        ),
        (
            "manifest-missing",
            lambda layout, image: os.unlink(layout.image(image.hex, "manifest.json")),
        ),
        (
            "config-damaged",
            lambda layout, image: os.unlink(layout.image(image.hex, "config.json")),
        ),
    ],
)
def test_a_record_that_lies_is_named_and_left(
    layout: Layout, tag: str, lie: Callable[[Layout, images.Image], object]
) -> None:
    image = stores.add_image(layout, TAR, tag=TAG)
    stores.add_container(layout, image)
    lie(layout, image)
    before = _content(layout.root)
    done, (found,) = mended(layout)
    assert (done, found.tag) == ([], tag)
    assert _content(layout.root) == before


def _content(root: str) -> dict[str, bytes | str | None]:
    """Every path below a directory, with what it holds."""
    found: dict[str, bytes | str | None] = {}
    for place, directories, files in os.walk(root):
        found |= {os.path.join(place, name): None for name in directories}
        for path in (os.path.join(place, name) for name in files):
            found[path] = os.readlink(path) if os.path.islink(path) else Path(path).read_bytes()
    return found


def test_nothing_that_a_person_made_goes(layout: Layout) -> None:
    image = stores.add_image(layout, TAR)
    stores.add_container(layout, image)
    stores.add_snapshot(layout, image.layers, stores.OTHER_KEY)
    for key in (stores.KEY, stores.OTHER_KEY):
        Path(layout.snapshot(key, "upper"), "mine").write_text(key)
    os.makedirs(layout.path("volumes", "v", "_data"))
    Path(layout.path("volumes", "v", "_data", "mine")).write_text("v")
    os.makedirs(layout.path("volumes", "empty", "_data"))
    (orphan,) = stores.add_layers(layout, OTHER).names
    for place in ("", "images", "tags", "layers", "snapshots", "containers", "volumes"):
        Path(layout.path(place, "NOTES")).write_text("mine")
    for place in (orphan, image.layers[0]):
        Path(layout.layer(place), "NOTES").write_text("mine")
    os.mkdir(layout.path("layers", "mine"))
    Path(layout.path("layers", "mine", "layer.erofs")).write_text("mine")
    os.unlink(layout.container(stores.KEY))
    before = _content(layout.root)
    damage(layout, image.layers[0], "index")
    mended(layout)
    after = _content(layout.root)
    after[layout.path("layers", image.layers[0], "layer.erofs")] = after.pop(
        layout.layer_file(image.layers[0])
    )
    del before[layout.container_name("web")]
    assert after == before


def test_an_attach_older_than_its_file_is_named_and_taken_away(layout: Layout) -> None:
    name = stores.add_image(layout, TAR).layers[0]
    with stores.attached(layout, [name]):
        assert check.check(layout) == []
        damage(layout, name, "index")
        worker = subprocess.Popen(["sleep", "60"], cwd=layout.diff(name))
        try:
            done, (found,) = mended(layout)
        finally:
            worker.kill()
            worker.wait()
        assert done == ["layer-damaged"]
        assert (found.tag, found.path) == ("attach-stale", layout.diff(name))
        assert f"overlayctl layer detach {name[:12]}" in found.message
        assert f"process {worker.pid}" in found.message
        assert mended(layout) == (["attach-stale"], [])
        assert not os.path.lexists(layout.diff(name))
        damage(layout, name, "index")


@pytest.mark.parametrize("mode", ["buffered", "loop"])
def test_a_repair_detaches_what_shows_the_old_file(layout: Layout, mode: Setting) -> None:
    name = stores.add_image(layout, TAR).layers[0]
    with stores.attached(layout, []):
        attach.attach(layout, "test", [name], mode)
        damage(layout, name, "header")
        assert mended(layout) == (["attach-stale", "layer-damaged"], [])
        assert not os.path.lexists(layout.diff(name))
        attach.attach(layout, "test", [name], mode)
        assert check.check(layout) == []
        shutil.copy(layout.layer_file(name), layout.layer_file(name, after=1))
        tags = {found.tag for found in check.check(layout)}
        assert tags == {"attach-stale", "layer-superseded"}
        assert mended(layout) == (["attach-stale", "layer-superseded"], [])


def test_a_stale_attach_of_another_namespace_is_named_with_who_sees_it(layout: Layout) -> None:
    name = stores.add_image(layout, TAR).layers[0]
    with stores.attached(layout, []):
        ready, tell = os.pipe()
        other = os.fork()
        if not other:
            os.setsid()
            os.close(ready)
            subprocess.run(["true"], check=True)
            _unshare()
            attach.attach(layout, "test", [name], "auto")
            os.write(tell, b"x")
            signal.pause()
        try:
            assert os.read(ready, 1) == b"x"
            damage(layout, name, "index")
            done, (found,) = mended(layout)
            assert (done, found.tag) == (["layer-damaged"], "attach-stale")
            assert f"process {other}" in found.message
            assert f"nsenter -m -t {other} overlayctl layer detach {name[:12]}" in found.message
        finally:
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)
            os.close(ready)
            os.close(tell)
        assert mended(layout) == ([], [])


def _unshare() -> None:
    """A mount namespace of its own, in which the store is not attached."""
    from tests import rootmount

    rootmount._libc.unshare(rootmount.CLONE_NEWNS)
    rootmount._libc.mount(None, b"/", None, rootmount.MS_REC | rootmount.MS_PRIVATE, None)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[str]:
    """A filesystem of 32 MiB."""
    place = str(tmp_path / "small")
    os.mkdir(place)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "small", place], check=True)
    yield place
    mounter.unmount(place)


def _fill(path: str) -> None:
    with open(path, "ab") as file:
        free = os.fstatvfs(file.fileno())
        os.posix_fallocate(file.fileno(), file.tell(), free.f_bavail * free.f_frsize)
        assert os.fstatvfs(file.fileno()).f_bavail == 0


def test_on_a_full_disk_all_is_done_that_only_removes(small: str) -> None:
    layout = stores.new(os.path.join(small, "store"))
    image = stores.add_image(layout, tar(entry("a", data=bytes(1 << 20))))
    stores.add_image(layout, OTHER)
    damage(layout, image.layers[0], "index")
    (orphan,) = stores.add_layers(layout, TAR).names
    os.mkdir(layout.path("ingest", "dead"))
    fill = os.path.join(small, "fill")
    _fill(fill)
    done, (found,) = mended(layout)
    assert done == ["layer-orphan", "staging-left"]
    assert not layers.exists(layout, orphan)
    assert found.tag == "layer-damaged"
    assert "No space left" in found.message
    _fill(fill)
    assert {one.tag for one in mended(layout, deep=True)[1]} == {"deep-impossible", "layer-damaged"}
    assert os.listdir(layout.layer(image.layers[0])) == ["layer.erofs"]
    os.unlink(fill)
    assert mended(layout) == (["layer-damaged"], [])


@pytest.mark.parametrize("point", REPAIR_POINTS)
def test_a_repair_that_is_killed_is_repeated(layout: Layout, point: str) -> None:
    image = stores.add_image(layout, TAR, tag=TAG)
    name = image.layers[0]
    before = Path(layout.layer_file(name)).read_bytes()
    damage(layout, name, "index")

    def run() -> None:
        os.environ["OVERLAYCTL_FAULT"] = point
        mended(layout)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    tags = [found.tag for found in check.check(layout)]
    if point == "repair:before-rename":
        assert tags == ["layer-damaged", "staging-left"]
    else:
        assert tags == ["layer-superseded", "staging-left"]
        assert Path(layout.layer_file(name)).read_bytes() == before
    assert images.resolve(layout, "demo:1")[0] == image
    assert mended(layout) == (tags, [])
    assert os.listdir(layout.layer(name)) == ["layer-2.erofs"]
    assert Path(layout.layer_file(name)).read_bytes() == before


def tamper(layout: Layout, name: str, **changed: Any) -> None:
    """Change an inode's time and make the header agree, or only what the header says."""
    path = layout.layer_file(name)
    data = bytearray(Path(path).read_bytes())
    header = Header.parse(bytes(data[:HEADER]), path)
    if not changed:
        data[index_start(header.tar_size) + 64 + 32] ^= 1
    after = PAGE + header.tar_size
    digest = hashlib.sha256(data[HEADER:PAGE] + data[after:]).hexdigest()
    data[:HEADER] = header._replace(index_sha256=digest, **changed).encode()
    overwrite(path, 0, bytes(data))


def test_a_deep_check_derives_the_index_again(layout: Layout) -> None:
    image = stores.add_image(layout, TAR, OTHER, ON_OTHER)
    assert check.check(layout, deep=True) == []
    before = [Path(layout.layer_file(name)).read_bytes() for name in image.layers]
    for name in image.layers[1:]:
        tamper(layout, name)
    assert check.check(layout) == []
    found = check.check(layout, deep=True)
    assert {one.tag for one in found} == {"layer-not-derived"}
    assert {one.path for one in found} == {layout.layer_file(n) for n in image.layers[1:]}
    assert {one.users for one in found} == {(f"image {image.hex}",)}
    assert records.names(layout.ingest) == []
    assert mended(layout) == ([], [])
    assert mended(layout, deep=True) == (["layer-not-derived"] * 2, [])
    assert [Path(layout.layer_file(name)).read_bytes() for name in image.layers] == before


def test_a_deep_check_asks_what_another_writer_made_of_nobody(layout: Layout) -> None:
    name = stores.add_image(layout, TAR).layers[0]
    tamper(layout, name, entries=77)
    assert [found.tag for found in check.check(layout, deep=True)] == ["layer-not-derived"]
    tamper(layout, name, writer=99)
    assert check.check(layout, deep=True) == []


def test_a_deep_check_leaves_out_what_only_a_damaged_layer_could_tell(layout: Layout) -> None:
    image = stores.add_image(layout, OTHER, ON_OTHER)
    damage(layout, image.layers[0], "header")
    assert [f.path for f in check.check(layout, deep=True)] == [layout.layer_file(image.layers[0])]


def test_on_a_read_only_disk_check_works_and_deep_says_why_not(small: str) -> None:
    layout = stores.new(os.path.join(small, "store"))
    image = stores.add_image(layout, TAR)
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    assert check.check(layout) == []
    assert mended(layout) == ([], [])
    with pytest.raises(HostCannot, match="Read-only"):
        check.check(layout, deep=True)
    subprocess.run(["mount", "-o", "remount,rw", small], check=True)
    damage(layout, image.layers[0], "index")
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    done, (found,) = mended(layout)
    assert (done, found.tag) == ([], "layer-damaged")
    assert "read-only" in found.message


def test_a_repair_waits_for_nobody_who_holds_the_lock(layout: Layout) -> None:
    from overlayctl.errors import Locked
    from overlayctl.store import locks

    store = Store(layout, records.open_store(layout.root, create=False)[1], timeout=0.1)
    with locks.hold(layout.root, exclusive=False), pytest.raises(Locked):
        repair.repair(store)


def test_a_tmpfs_for_attaching_is_no_stale_attach(layout: Layout) -> None:
    mounter.mount(Tmpfs("overlayctl:x:attached:"), layout.attached)
    try:
        assert check.check(layout) == []
    finally:
        mounter.unmount(layout.attached)


def test_a_reader_without_the_lock_finds_a_layer_while_its_file_is_replaced(layout: Layout) -> None:
    name = stores.add_image(layout, TAR).layers[0]

    def replace() -> None:
        while True:
            old = layout.layer_file(name)
            os.link(old, layout.layer_file(name, after=1))
            os.unlink(old)

    process = multiprocessing.get_context("fork").Process(target=replace)
    process.start()
    try:
        for _ in range(1000):
            layers.open_index(layout, name).close()
            assert layers.exists(layout, name)
            assert layers.stat(layout, name).name == name
    finally:
        process.kill()
        process.join()

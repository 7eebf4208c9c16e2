"""Volumes through commands: made, mounted, filled, kept, refused, removed, and found wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from overlayctl.engine import Engine
from overlayctl.errors import BadInput, Conflict, DiskFull, NotFound, OverlayctlError
from overlayctl.runtime import volumes
from overlayctl.runtime.volumes import Bound
from overlayctl.store import containers
from tests.archives import docker_archive
from tests.cli.conftest import Shell, reset
from tests.filesystems import KINDS, fill_bytes, fill_inodes, mounted, remount
from tests.layer.tars import directory, entry, symlink, tar
from tests.oracles import trees

LAYER = tar(
    directory("./"),
    directory("data", mode=0o1750, uid=7, gid=8, mtime=5),
    entry("data/file", data=b"image", mode=0o4640, uid=9, xattrs={"user.a": "b"}, mtime=6),
    symlink("data/link", "/etc/passwd"),
    directory("data/sub"),
    entry("data/sub/file", data=b"sub"),
    directory("own", mode=0o700, uid=5),
    directory("plain"),
    directory("srv"),
    entry("srv/here", data=b"srv"),
    entry("conf", data=b"conf"),
    directory("etc"),
    entry("etc/passwd", data=b"root::0:0::/:/bin/sh\n"),
    symlink("absolute", "/srv"),
    symlink("out", "../../../../../srv"),
    symlink("dangling", "made/below"),
    symlink("loop", "loop"),
    symlink("kernel", "/proc"),
    symlink("top", "/"),
    symlink("host", "/etc"),
    directory("kept"),
)


@pytest.fixture
def run(run: Shell, tmp_path: Path) -> Shell:
    run("load", docker_archive(tmp_path / "a.tar", [LAYER]))
    return run


def make(run: Shell, name: str, *options: str, image: str = "demo", ok: int = 0) -> str:
    return run("create", "--name", name, *options, image, ok=ok).err


def listed(run: Shell, *options: str) -> list[str]:
    return run("volume", "ls", "-q", *options).out.split()


def inspected(run: Shell, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("volume", "inspect", name).out)[0]
    return found


def data(run: Shell, name: str) -> Path:
    return Path(inspected(run, name)["Mountpoint"])


@contextmanager
def prepared(
    run: Shell, name: str, lives: ExitStack | None = None
) -> Iterator[tuple[Path, list[Bound]]]:
    """A container's merged view, and what is to be mounted there."""
    engine = Engine.open(run.store)
    merged = Path(engine.mount_container(name, volatile=False, xino=False))
    container = containers.resolve(engine.layout, name)
    root = os.open(merged, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield merged, volumes.prepare(engine.store, container, root, lives=lives)
    finally:
        os.close(root)
        engine.unmount_container(name, lazy=False)


@contextmanager
def placed(run: Shell, name: str) -> Iterator[Path]:
    """A container's merged view with everything mounted in it, by mount(8)."""
    with prepared(run, name) as (merged, bound):
        done: list[Path] = []
        try:
            for one in bound:
                target = Path(f"{merged}{one.target}")
                words = ["--bind", one.source]
                if one.placed.kind == "tmpfs":
                    words = ["-t", "tmpfs", "-o", ",".join(one.placed.options), "tmpfs"]
                subprocess.run(["mount", *words, target], check=True)
                done.append(target)
            yield merged
        finally:
            for target in done[::-1]:
                subprocess.run(["umount", target], check=True)


def refused(run: Shell, name: str) -> OverlayctlError:
    with pytest.raises(OverlayctlError) as error, prepared(run, name):
        pass
    assert error.value.hint
    return error.value


# --- the noun ---------------------------------------------------------------------------------


def test_a_volume_is_made_listed_and_removed(run: Shell) -> None:
    assert run("volume", "create", "data", "--label", "a=b", "--label", "c").out == "data\n"
    anonymous = run("volume", "create").out.strip()
    assert len(bytes.fromhex(anonymous)) == 32
    again = run("volume", "create", "data", "--label", "a=other")
    assert again.out == "data\n"
    assert again.err == "note: the volume is there already, and keeps its labels\n"
    assert sorted(listed(run)) == sorted(["data", anonymous])
    make(run, "cc", "-v", "data:/data")
    found = inspected(run, "data")
    created = found.pop("CreatedAt")
    assert created.endswith("Z")
    assert found == {
        "Driver": "local",
        "Labels": {"a": "b", "c": ""},
        "Mountpoint": f"{run.store}/volumes/data/_data",
        "Name": "data",
        "Options": None,
        "Scope": "local",
        "Anonymous": False,
        "UsedBy": ["cc"],
        "DiskUsage": 0,
    }
    assert run("inspect", "data").out == run("volume", "inspect", "data").out
    assert run("inspect", "--type", "volume", "-f", "{{.Name}} {{.Labels.a}}", "data").out == (
        "data b\n"
    )
    (data(run, "data") / "file").write_bytes(bytes(100_000))
    assert inspected(run, "data")["DiskUsage"] >= 100_000
    table = run("volume", "ls", "--format", "{{.Name}} {{.Driver}} {{.Links}} {{.Size}}").out
    assert "data local 1 102kB\n" in table
    for command, hint in (
        (("volume", "rm", "data"), "rm cc"),
        (("volume", "rm", "-f", "data"), ""),
    ):
        told = run(*command, ok=4).err
        assert "volume data is in use by container cc" in told
        assert hint in told
    assert (data(run, "data") / "file").stat().st_size == 100_000
    run("rm", "cc")
    assert run("volume", "rm", "-n", "data").out == "Would be removed: data\n"
    run("volume", "exists", "data")
    assert run("volume", "rm", "data", anonymous).out == f"data\n{anonymous}\n"
    run("volume", "exists", "data", ok=1)
    assert listed(run) == []
    assert "did you mean" not in run("volume", "rm", "data", ok=3).err
    assert run("volume", "rm", "-f", "data").out == "data\n"
    assert "no container, no image and no volume 'data'" in run("inspect", "data", ok=3).err


def test_who_has_it_is_named_running_or_not(run: Shell) -> None:
    for name in ("one", "two"):
        make(run, name, "-v", "data:/data")
    told = json.loads(run("--json", "volume", "rm", "data", ok=4).err)
    assert [one["name"] for one in told["details"]["holders"]] == ["one", "two"]
    assert told["hint"] == "overlayctl rm one; overlayctl rm two"


@pytest.mark.parametrize("name", ["a", "-data", "da/ta", "..", ".data", "dä", "x" * 256, "a b"])
def test_names_that_are_none(run: Shell, name: str) -> None:
    assert "is no valid volume name" in run("volume", "create", "--", name, ok=2).err
    run("volume", "rm", "--", name, ok=3)
    run("volume", "inspect", "--", name, ok=3)
    run("volume", "exists", "--", name, ok=1)


def test_prune_takes_what_nobody_has(run: Shell) -> None:
    make(run, "cc", "-v", "used:/used", "-v", "/anonymous")
    held = set(listed(run))
    for name, label in (("plain", "a=1"), ("other", "a=2")):
        run("volume", "create", name, "--label", label)
    lonely = run("volume", "create", "--label", "a=1").out.strip()
    assert "nobody is here to ask" in run("volume", "prune", ok=2).err
    assert run("volume", "prune", "-n").out == f"Would be deleted: volume {lonely}\n"
    assert run("volume", "prune", "-f", "--filter", "label=a=2").out == ""
    assert run("volume", "prune", "-f").out == f"Deleted: volume {lonely}\n"
    assert run("volume", "prune", "-a", "--yes", "--filter", "label=a=2").out == (
        "Deleted: volume other\n"
    )
    assert json.loads(run("--json", "volume", "prune", "-af").out)["Volumes"] == ["plain"]
    assert set(listed(run)) == held


def test_prune_takes_nothing_while_a_container_cannot_be_read(run: Shell) -> None:
    make(run, "cc", "-v", "/anonymous")
    (record,) = Path(run.store, "containers").glob("*.json")
    whole = record.read_bytes()
    for text in ('{"version": 99}', "{"):
        record.write_text(text)
        done = run("volume", "prune", "-af", sound=False)
        assert (done.out, "cannot be read" in done.err) == ("", True)
    record.write_bytes(whole)
    assert len(listed(run)) == 1


# --- with containers --------------------------------------------------------------------------


def test_what_is_written_outlives_the_container(run: Shell) -> None:
    make(run, "one", "-v", "keep:/data")
    with placed(run, "one") as merged:
        (merged / "data/new").write_text("mine")
        (merged / "data/sub/file").unlink()
    run("rm", "-v", "one")
    make(run, "two", "-v", "keep:/elsewhere:ro")
    with placed(run, "two") as merged:
        assert (merged / "elsewhere/new").read_text() == "mine"
        assert not (merged / "elsewhere/sub/file").exists()
        # The image's own is what it was.
        assert (merged / "data/sub/file").read_text() == "sub"
    upper = Path(run("inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", "two").out.strip())
    assert [path.name for path in upper.iterdir()] == ["elsewhere"]


def test_a_new_volume_gets_what_the_image_has_there_once(run: Shell) -> None:
    make(run, "one", "-v", "new:/data")
    with prepared(run, "one") as (merged, _):
        inside = trees.snapshot(data(run, "new"))
        assert trees.differences(trees.snapshot(merged / "data"), inside) == []
    assert inside[b""].mode == 0o1750
    assert not Path(run.store, "volumes/new/fresh").exists()
    for path in sorted(data(run, "new").rglob("*"), reverse=True):
        path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
    make(run, "two", "-v", "new:/srv")
    with prepared(run, "two"):
        assert os.listdir(data(run, "new")) == []


@pytest.mark.parametrize(
    ("option", "what"),
    [
        (("-v", "vv:/data:nocopy"), "nocopy"),
        (("--mount", "source=vv,target=/data,volume-nocopy"), "nocopy"),
        (("-v", "vv:/missing"), "nothing there"),
        (("-v", "vv:/plain"), "an empty directory"),
    ],
)
def test_what_is_not_filled_may_be_filled_later(
    run: Shell, option: tuple[str, str], what: str
) -> None:
    make(run, "one", *option)
    with prepared(run, "one"):
        assert os.listdir(data(run, "vv")) == []
    with prepared(run, "one"):
        pass
    make(run, "two", "-v", "vv:/srv")
    with prepared(run, "two"):
        assert os.listdir(data(run, "vv")) == ["here"]


def test_what_somebody_wrote_is_not_covered(run: Shell) -> None:
    run("volume", "create", "vv")
    (data(run, "vv") / "mine").write_text("mine")
    make(run, "one", "-v", "vv:/data", "-v", "./:/srv")
    with prepared(run, "one"):
        assert os.listdir(data(run, "vv")) == ["mine"]


def test_a_volume_that_somebody_sees_is_not_exchanged(run: Shell) -> None:
    make(run, "one", "-v", "vv:/missing")
    make(run, "two", "-v", "vv:/srv")
    with placed(run, "one") as merged:
        with prepared(run, "two"):
            pass
        (merged / "missing/mine").write_text("mine")
    assert os.listdir(data(run, "vv")) == ["mine"]


def test_a_volume_that_is_about_to_be_mounted_is_not_exchanged(run: Shell) -> None:
    make(run, "one", "-v", "vv:/missing")
    make(run, "two", "-v", "vv:/srv")
    with ExitStack() as lives:
        with prepared(run, "one", lives):
            pass
        with prepared(run, "two", lives):
            assert os.listdir(data(run, "vv")) == []
    with prepared(run, "two"):
        assert os.listdir(data(run, "vv")) == ["here"]


def test_owner_and_mode_come_along_without_content(run: Shell) -> None:
    make(run, "one", "-v", "vv:/own")
    with prepared(run, "one"):
        info = data(run, "vv").stat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o700, 5)


def test_anonymous_volumes_of_the_image_and_of_options(run: Shell, tmp_path: Path) -> None:
    config: dict[str, Any] = {"Volumes": {"/data": {}, "/covered/": {}, "/memory": {}}}
    run("load", docker_archive(tmp_path / "b.tar", [LAYER], tags=("vol:1",), config=config))
    make(
        run, "one", "-v", "named:/covered", "--tmpfs", "/memory", "-v", "/plain", image="vol:1"
    )  # fmt: skip
    mounts = json.loads(run("inspect", "-f", "{{json .Mounts}}", "one").out)
    names = {one["Destination"]: one.get("Name") for one in mounts}
    assert sorted(names) == ["/covered", "/data", "/memory", "/plain"]
    assert sorted(listed(run)) == sorted(
        filter(None, [names["/covered"], names["/data"], names["/plain"]])
    )
    assert inspected(run, names["/data"])["Anonymous"]
    with placed(run, "one") as merged:
        assert (merged / "data/file").read_bytes() == b"image"
        (merged / "plain/mine").write_text("mine")
    make(run, "two", "-v", f"{names['/plain']}:/there")
    run("rm", "-v", "one")
    # Somebody else has the one, and a name was given to the other.
    assert sorted(listed(run)) == sorted(["named", names["/plain"]])
    run("rm", "-v", "two")
    assert sorted(listed(run)) == sorted(["named", names["/plain"]])
    make(run, "three", image="vol:1")
    run("rm", "three")
    assert len(listed(run, "--filter", "dangling=true")) == 5


@pytest.mark.parametrize("path", ["/..", "/", "data", "/proc", "/x/../proc/sys", ""])
def test_an_image_asks_for_a_volume_where_none_can_be(
    run: Shell, path: str, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"Volumes": {path: {}}}
    run("load", docker_archive(tmp_path / "b.tar", [LAYER], tags=("bad:1",), config=config))
    told = make(run, "one", "-v", "named:/x", image="bad:1", ok=1)
    assert f"VOLUME {path}" in told
    assert (listed(run), run("ps", "-aq").out) == ([], "")


@pytest.mark.parametrize("volumes", [[], ["/data"], "/data", None, {"/data": 3}, {"/data": None}])
def test_volumes_of_an_image_in_any_shape(run: Shell, volumes: object, tmp_path: Path) -> None:
    config = {"Volumes": volumes}
    run("load", docker_archive(tmp_path / "b.tar", [LAYER], tags=("odd:1",), config=config))
    make(run, "one", image="odd:1")
    assert len(listed(run)) == (1 if isinstance(volumes, dict) else 0)


def test_nothing_is_left_of_a_creation_that_fails(run: Shell, tmp_path: Path) -> None:
    make(run, "taken")
    host = tmp_path / "made/deep"
    options = ("-v", "new:/new", "-v", "/anonymous", "-v", f"{host}:/host")
    make(run, "taken", *options, ok=4)
    make(run, "other", *options, image="nothing", ok=3)
    Path(run.store, "volumes/new").mkdir()
    Path(run.store, "volumes/new/file").touch()
    done = run("create", "--name", "other", *options, "demo", ok=4, sound=False)
    assert "something at" in done.err
    Path(run.store, "volumes/new/file").unlink()
    Path(run.store, "volumes/new").rmdir()
    assert (listed(run), os.path.exists(tmp_path / "made")) == ([], False)
    make(run, "other", *options)
    assert (len(listed(run)), stat.S_IMODE(host.stat().st_mode)) == (2, 0o755)


def test_directories_of_the_host(run: Shell, tmp_path: Path, monkeypatch: Any) -> None:
    host = tmp_path / "host"
    host.mkdir()
    (host / "file").write_text("host")
    monkeypatch.chdir(tmp_path)
    told = make(run, "bad", "--mount", f"type=bind,source={host}/no,target=/x", ok=3)
    assert f"mkdir -p {host}/no" in told
    make(
        run, "one", "-v", "./host:/data", "-v", f"{host}/file:/conf", "-v", f"{host}/file:/new/f",
        "--mount", "type=bind,source=./host,target=/srv/here2,ro",
    )  # fmt: skip
    with placed(run, "one") as merged:
        # The host's content is seen, not the image's, and it is not filled.
        assert os.listdir(merged / "data") == ["file"]
        assert (merged / "conf").read_text() == (merged / "new/f").read_text() == "host"
        (merged / "data/mine").write_text("mine")
    assert (host / "mine").read_text() == "mine"
    (host / "file").unlink()
    error = refused(run, "one")
    assert isinstance(error, NotFound)
    assert f"{host}/file is gone, which container one has at /" in str(error)
    (host / "file").mkdir()
    assert "is no directory in the container" in str(refused(run, "one"))


def test_a_file_is_not_mounted_over_a_directory(run: Shell, tmp_path: Path) -> None:
    make(run, "one", "-v", f"{tmp_path}/a.tar:/data")
    assert isinstance(refused(run, "one"), Conflict)
    make(run, "two", "-v", "vv:/conf")
    assert "is no directory" in str(refused(run, "two"))
    make(run, "three", "-v", "vv:/conf/below")
    assert "leads through '/conf', which is no directory" in str(refused(run, "three"))


def test_mounts_lie_upon_one_another(run: Shell, tmp_path: Path) -> None:
    """Given in any order; what lies in a volume is made in that volume, not in the container."""
    make(
        run, "one", "-v", "deep:/data/sub/new/deep", "-v", "top:/data", "--tmpfs", "/data/memory",
        "-v", f"{tmp_path}/host:/data/memory/host", "-v", "sub:/data/sub",
    )  # fmt: skip
    with prepared(run, "one") as (merged, bound):
        assert [one.target for one in bound] == [
            "/data", "/data/memory", "/data/sub", "/data/memory/host", "/data/sub/new/deep"
        ]  # fmt: skip
        assert not (merged / "data/sub/new").exists()
    assert sorted(os.listdir(data(run, "top"))) == ["file", "link", "memory", "sub"]
    assert sorted(os.listdir(data(run, "sub"))) == ["file", "new"]
    assert os.listdir(data(run, "sub") / "new") == ["deep"]
    run("volume", "create", "empty")
    make(run, "two", "-v", "empty:/missing:ro", "-v", "deep:/missing/below")
    assert "read-only" in str(refused(run, "two"))


def test_the_order_is_that_of_where_links_lead(run: Shell) -> None:
    make(run, "one", "-v", "below:/dangling", "-v", "above:/made")
    with placed(run, "one") as merged:
        (merged / "dangling/mine").write_text("mine")
        assert (merged / "made/below/mine").read_text() == "mine"
    assert os.listdir(data(run, "below")) == ["mine"]
    assert os.listdir(data(run, "above")) == ["below"]


def test_places_that_are_made_are_for_everybody(run: Shell, tmp_path: Path) -> None:
    """Whatever umask the caller has; and a tmpfs has the mode of the place that it covers."""
    make(
        run, "one", "-v", "vv:/new/volume", "-v", f"{tmp_path}/a.tar:/other/file",
        "--tmpfs", "/new/memory", "--tmpfs", "/own",
    )  # fmt: skip
    before = os.umask(0o077)
    try:
        with prepared(run, "one") as (merged, _):
            modes = {
                name: stat.S_IMODE((merged / name).stat().st_mode)
                for name in ("new", "new/volume", "new/memory", "other", "other/file", "own")
            }
    finally:
        os.umask(before)
    assert modes == {
        "new": 0o755, "new/volume": 0o755, "new/memory": 0o1777, "other": 0o755,
        "other/file": 0o644, "own": 0o700,
    }  # fmt: skip


# --- hostile targets --------------------------------------------------------------------------


def test_links_lead_inside_the_root_alone(run: Shell) -> None:
    options = [f"{name}:/{target}" for name, target in (
        ("v1", "absolute"), ("v2", "dangling"), ("v3", "host/new/dir"), ("v4", "out/x"),
    )]  # fmt: skip
    make(run, "one", *(word for text in options for word in ("-v", text)))
    before = sorted(os.listdir("/etc")), sorted(os.listdir("/srv"))
    with prepared(run, "one") as (merged, bound):
        assert {one.placed.source: one.target for one in bound} == {
            "v1": "/srv", "v2": "/made/below", "v3": "/etc/new/dir", "v4": "/srv/x"
        }  # fmt: skip
        assert (merged / "etc/new/dir").is_dir()
        assert (merged / "made/below").is_dir()
    assert os.listdir(data(run, "v1")) == ["here", "x"] or os.listdir(data(run, "v1")) == [
        "x", "here"
    ]  # fmt: skip
    assert (sorted(os.listdir("/etc")), sorted(os.listdir("/srv"))) == before


@pytest.mark.parametrize(
    ("options", "kind", "why"),
    [
        (("-v", "vv:/loop/x"), BadInput, "too many symbolic links"),
        (("-v", "vv:/kernel"), Conflict, "nothing can be mounted"),
        (("-v", "vv:/kernel/sys/kernel"), Conflict, "nothing can be mounted"),
        (("--tmpfs", "/top/proc"), Conflict, "nothing can be mounted"),
        (("-v", "vv:/top"), Conflict, "nothing can be mounted"),
        (("-v", "/:/top/.."), Conflict, ""),
        (("-v", "vv:/absolute", "-v", "ww:/srv"), Conflict, "would hide"),
    ],
)
def test_links_that_lead_where_nothing_can_be(
    run: Shell, options: tuple[str, ...], kind: type[OverlayctlError], why: str
) -> None:
    if not why:
        # The words themselves say so.
        assert "over the container's /" in make(run, "one", *options, ok=2)
        return
    make(run, "one", *options)
    error = refused(run, "one")
    assert isinstance(error, kind)
    assert why in str(error)
    upper = Path(run("inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", "one").out.strip())
    assert os.listdir(upper) == []
    if "vv" in listed(run):
        assert why == "would hide" or os.listdir(data(run, "vv")) == []


def test_links_within_a_volume_lead_inside_the_root(run: Shell) -> None:
    run("volume", "create", "top")
    (data(run, "top") / "link").symlink_to("/kept")
    (data(run, "top") / "up").symlink_to("../../../../../../kept")
    (data(run, "top") / "kernel").symlink_to("/proc/sys")
    make(run, "one", "-v", "top:/t", "-v", "aa:/t/link/x", "-v", "bb:/t/up/y")
    with prepared(run, "one") as (_, bound):
        assert [one.target for one in bound] == ["/t", "/kept/x", "/kept/y"]
    make(run, "two", "-v", "top:/t", "-v", "aa:/t/kernel/x")
    assert "nothing can be mounted" in str(refused(run, "two"))


# --- two at once ------------------------------------------------------------------------------


def _at_once(run: Shell, names: list[str], action: Any) -> list[int]:
    """The statuses of as many processes, each in this namespace."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(names))

    def one(name: str) -> None:
        barrier.wait()
        action(name)

    children = [context.Process(target=one, args=(name,)) for name in names]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode if child.exitcode is not None else -1 for child in children]


def test_volumes_made_and_filled_by_several_at_once(run: Shell) -> None:
    names = [f"c{number}" for number in range(6)]
    statuses = _at_once(run, names, lambda name: make(run, name, "-v", "vv:/data", "-v", "/an"))
    assert statuses == [0] * 6
    assert len(listed(run)) == 7
    roots = {name: str(run.path("mount", name)) for name in names}
    inodes = multiprocessing.get_context("fork").Queue()

    def prepare(name: str) -> None:
        engine = Engine.open(run.store)
        root = os.open(roots[name], os.O_RDONLY | os.O_DIRECTORY)
        bound = volumes.prepare(engine.store, containers.resolve(engine.layout, name), root)
        source = next(one.source for one in bound if one.placed.source == "vv")
        inodes.put((os.stat(source).st_ino, sorted(os.listdir(source))))

    assert _at_once(run, names, prepare) == [0] * 6
    assert {inodes.get()[0] for _ in names} == {data(run, "vv").stat().st_ino}
    assert sorted(os.listdir(data(run, "vv"))) == ["file", "link", "sub"]
    assert os.listdir(Path(run.store, "ingest")) == []


def test_a_volume_goes_or_is_had_not_both(run: Shell) -> None:
    for number in range(4):
        run("volume", "create", "vv")
        statuses = _at_once(
            run,
            [f"c{number}", "rm"],
            lambda name: (
                Engine.open(run.store).remove_volume("vv", force=False, dry_run=False)
                if name == "rm"
                else make(run, name, "-v", "vv:/data")
            ),
        )
        assert statuses[0] == 0
        # Made again after it went, or never gone.
        assert "vv" in listed(run)
        run("rm", f"c{number}")
        run("volume", "rm", "vv")


# --- what goes wrong --------------------------------------------------------------------------


def test_a_lost_record_takes_nothing_away(run: Shell) -> None:
    run("volume", "create", "vv", "--label", "a=b")
    (data(run, "vv") / "mine").write_text("mine")
    record, copy = (Path(run.store, "volumes/vv", name) for name in ("volume.json", "keep"))
    whole = record.read_bytes()
    for lost, left in (([record], copy), ([copy], record)):
        for path in lost:
            path.unlink()
        run("tag", "demo", "other", sound=False)
        assert left.read_bytes() == whole
        assert inspected_unsound(run, "vv")["Labels"] == {"a": "b"}
        assert ("volume-damaged" in run.findings()) == (record in lost)
        run("system", "check", "--repair")
        assert record.read_bytes() == whole
        copy.write_bytes(whole)
    for text in ("", "{", "[]", '{"version": 1}', '{"version": 99, "created": "x"}'):
        record.write_text(text)
        assert inspected_unsound(run, "vv")["UsedBy"] == []
        assert run.findings().startswith("volume-damaged: ")
        told = run("system", "check", "--repair", ok=6, sound=False).out
        assert "overlayctl volume rm removes the volume" in told
    assert Path(run.store, "volumes/vv/_data/mine").read_text() == "mine"
    run("volume", "rm", "vv")
    assert os.listdir(Path(run.store, "volumes")) == []


def test_what_nobody_can_tell_to_be_anonymous_stays(run: Shell) -> None:
    make(run, "one", "-v", "/anonymous")
    (name,) = listed(run)
    for record in ("volume.json", "keep"):
        Path(run.store, "volumes", name, record).write_text("{")
    run("rm", "-v", "one", sound=False)
    run("volume", "prune", "-f", sound=False)
    assert run("volume", "ls", "-q", sound=False).out == f"{name}\n"
    run("volume", "rm", name)


def inspected_unsound(run: Shell, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("volume", "inspect", name, sound=False).out)[0]
    return found


def test_a_directory_that_somebody_put_there_is_no_volume(run: Shell) -> None:
    place = Path(run.store, "volumes/mine")
    (place / "_data").mkdir(parents=True)
    (place / "_data/file").write_text("mine")
    run("tag", "demo", "other", sound=False)
    assert run.findings() == f"volume-foreign: {place}: this is no volume\n"
    run("system", "check", "--repair", ok=6, sound=False)
    run("volume", "rm", "mine", ok=3, sound=False)
    assert run("volume", "ls", "-q", sound=False).out == ""
    assert "something at" in run("volume", "create", "mine", ok=4, sound=False).err
    assert (place / "_data/file").read_text() == "mine"


def test_a_volume_that_is_gone_is_named(run: Shell) -> None:
    make(run, "one", "-v", "vv:/data")
    subprocess.run(["rm", "-r", Path(run.store, "volumes/vv/_data")], check=True)
    assert run.findings().startswith("volume-damaged: ")
    assert "_data of volume vv is gone" in str(refused(run, "one"))
    subprocess.run(["rm", "-r", Path(run.store, "volumes/vv")], check=True)
    assert "volume-missing: " in run.findings()
    assert "(used by container one)" in run.findings()
    error = refused(run, "one")
    assert error.hint == "overlayctl volume create vv makes it again, empty"
    run("volume", "create", "vv")
    with prepared(run, "one"):
        assert (data(run, "vv") / "file").read_bytes() == b"image"


def test_what_is_mounted_in_a_volume_is_not_deleted(run: Shell) -> None:
    run("volume", "create", "vv")
    place = data(run, "vv")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    (place / "file").touch()
    try:
        assert f"umount {place}" in run("volume", "rm", "vv", ok=4).err
        assert "kept: " in run("volume", "prune", "-af").err
        assert (place / "file").exists()
    finally:
        subprocess.run(["umount", place], check=True)
    run("volume", "rm", "vv")


FULL = {"bytes": fill_bytes, "inodes": fill_inodes}


@pytest.mark.parametrize(
    ("kind", "full"),
    # btrfs takes seconds until it is that full.
    [(kind, full) for kind in KINDS for full in FULL if (kind, full) != ("btrfs", "inodes")],
)
def test_a_full_and_a_read_only_disk(kind: str, full: str, tmp_path: Path) -> None:
    options = "commit=1" if kind == "btrfs" else "defaults"
    with mounted(kind, tmp_path, inodes=2000, options=options) as root:
        run = Shell(str(root / "store"))
        run("load", docker_archive(tmp_path / "a.tar", [LAYER]), sound=False)
        make(run, "cc", "-v", "held:/data", "-v", "/anonymous")
        for name in ("one", "two"):
            run("volume", "create", name)
            (data(run, name) / "directory").mkdir()
            (data(run, name) / "directory/file").write_bytes(bytes(100_000))
        remount(root, "ro")
        assert len(listed(run)) == 4
        assert inspected(run, "one")["DiskUsage"] >= 100_000
        assert "read-only filesystem" in run("volume", "rm", "one", ok=5).err
        assert "read-only filesystem" in run("volume", "create", "new", ok=5).err
        remount(root, "rw")
        run("mount", "cc")
        FULL[full](root)
        assert len(listed(run)) == 4
        with pytest.raises(DiskFull), prepared(run, "cc"):
            pass
        assert os.listdir(data(run, "held")) == []
        assert os.listdir(Path(run.store, "ingest")) == []
        assert "disk is full" in run("volume", "create", "new", ok=1, sound=False).err
        assert "in use by container cc" in run("volume", "rm", "held", ok=4, sound=False).err
        run("volume", "rm", "one", sound=False)
        run("volume", "prune", "-af", sound=False)
        run("rm", "-fv", "cc", sound=False)
        assert listed(run) == ["held"]
        run("volume", "rm", "held")
        assert os.listdir(Path(run.store, "volumes")) == []
        reset(run.store)

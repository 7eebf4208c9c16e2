"""What a person relies on, through the commands, on real mounts; ``check`` after each call."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overlayctl.engine import Engine
from overlayctl.errors import KernelRefused, NotFound
from overlayctl.kernel import mounttable
from overlayctl.layer.index import Index
from overlayctl.layout import Layout
from overlayctl.store import snapshots, staging
from tests.archives import diff_id, docker_archive
from tests.cli.conftest import Shell, reset
from tests.layer.tars import directory, entry, tar
from tests.rootmount import missing

Run = Callable[..., str]

LAYERS = [
    tar(directory("./"), directory("etc"), entry("etc/conf", data=b"one\n"), entry("etc/old")),
    tar(entry("etc/second", data=b"two\n")),
    tar(entry("etc/.wh.old")),
]


class Silent:
    """No progress shown."""

    def start(self, total: int | None, layers: int) -> None: ...

    def advance(self, count: int) -> None: ...

    def layer_done(self, number: int) -> None: ...


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def run(root: Path) -> Iterator[Run]:
    """Run a command; its exit status must be ``status``; the store must be sound afterwards."""
    shell = Shell(str(root))

    def command(*arguments: str | Path, status: int = 0, sound: bool = True) -> str:
        done = shell(*arguments, ok=status, sound=sound)
        return done.out + done.err if status else done.out

    yield command
    reset(str(root))


def inspect(run: Run, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("inspect", name))[0]
    return found


def test_every_path_of_an_image_is_there(run: Run, tmp_path: Path) -> None:
    loaded = run("load", "-i", docker_archive(tmp_path / "a.tar", LAYERS))
    assert "Loaded image: demo:latest" in loaded
    image = inspect(run, "demo")
    assert [layer["DiffID"] for layer in image["Layers"]] == [diff_id(x) for x in LAYERS]
    paths = [layer["DiffPath"] for layer in image["Layers"]]
    assert image["GraphDriver"]["Data"]["LowerDir"].split(":") == paths[::-1]
    assert [sorted(os.listdir(path + "/etc")) for path in paths] == [
        ["conf", "old"], ["second"], ["old"],
    ]  # fmt: skip
    for layer in image["Layers"]:
        with Index.open(layer["File"]) as index:
            size = index.header.tar_size
        data = Path(layer["File"]).read_bytes()[4096 : 4096 + size]
        assert diff_id(data) == layer["DiffID"]
    view = Path(run("image", "mount", "demo").strip())
    assert sorted(os.listdir(view / "etc")) == ["conf", "second"]
    run("image", "unmount", "demo")


def test_copy_up_whiteout_and_two_containers(run: Run, root: Path, tmp_path: Path) -> None:
    run("load", docker_archive(tmp_path / "a.tar", LAYERS))
    file = Path(inspect(run, "demo")["Layers"][0]["File"])
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    first = run("create", "--name", "c1", "demo").strip()
    run("create", "--name", "c2", "demo")
    one, two = (Path(run("mount", name).strip()) for name in ("c1", "c2"))
    with (one / "etc/conf").open("a") as conf:
        conf.write("1111\n")
    (one / "etc/second").unlink()
    upper = root / "snapshots" / first / "upper"
    assert (upper / "etc/conf").read_text() == "one\n1111\n"
    gone = (upper / "etc/second").lstat()
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    assert (two / "etc/conf").read_text() == "one\n"
    assert (two / "etc/second").exists()
    assert one.stat().st_mode == two.stat().st_mode
    refused = run("rmi", "demo", status=4)
    assert "c1" in refused
    assert "c2" in refused
    run("rm", "c1", status=4)
    for name in ("c1", "c2"):
        run("umount", name)
        run("rm", name)
    run("rmi", "demo")
    assert os.listdir(root / "layers") == []


def test_an_image_that_is_mounted_stays(run: Run, tmp_path: Path) -> None:
    run("load", docker_archive(tmp_path / "a.tar", LAYERS))
    (tmp_path / "mnt").mkdir()
    run("image", "mount", "demo", tmp_path / "mnt")
    mounted = mounttable.at(str(tmp_path / "mnt"))
    assert mounted is not None
    assert {"ro", "nosuid", "nodev"} <= set(mounted.options.split(","))
    assert str(tmp_path / "mnt") in run("rmi", "-f", "demo", status=4)
    run("umount", tmp_path / "mnt")
    run("rmi", "demo")


def test_one_of_two_tags_is_only_untied(run: Run, tmp_path: Path) -> None:
    run("load", docker_archive(tmp_path / "a.tar", LAYERS, tags=("a:1", "b:2")))
    assert "Untagged: a:1" in run("rmi", "a:1")
    run("image", "exists", "b:2")
    run("image", "exists", "a:1", status=1)
    assert "Deleted: sha256:" in run("rmi", "b:2")


def test_the_same_empty_layer_twice_and_a_single_layer(run: Run, tmp_path: Path) -> None:
    empty = tar()
    run("load", docker_archive(tmp_path / "a.tar", [LAYERS[0], empty, LAYERS[1], empty]))
    run("load", docker_archive(tmp_path / "b.tar", LAYERS[:1], tags=("single:1",)))
    assert len(inspect(run, "demo")["Layers"]) == 4
    run("create", "--name", "cc", "demo")
    assert sorted(os.listdir(run("mount", "cc").strip() + "/etc")) == ["conf", "old", "second"]
    assert os.listdir(run("image", "mount", "single:1").strip()) == ["etc"]
    run("umount", "cc")
    run("umount", "single:1")


@pytest.mark.parametrize(("count", "status"), [(500, 0), (501, 5)])
def test_five_hundred_layers_and_one_more(
    run: Run, tmp_path: Path, count: int, status: int
) -> None:
    layers = [tar(directory("./"), entry(f"f{number}")) for number in range(count)]
    run("load", docker_archive(tmp_path / "a.tar", layers))
    run("create", "--name", "cc", "demo")
    told = run("mount", "cc", status=status)
    if status:
        assert "500" in told
        assert mounttable.at(str(tmp_path / "store/attached/merged")) is None
    else:
        assert len(os.listdir(told.strip())) == count
        run("umount", "cc")


def test_a_layer_with_an_opaque_root_ends_the_list(run: Run, tmp_path: Path) -> None:
    layers = [LAYERS[0], tar(entry(".wh..wh..opq"), entry("new"))]
    run("load", docker_archive(tmp_path / "a.tar", layers))
    assert os.listdir(run("image", "mount", "demo").strip()) == ["new"]
    run("umount", "demo")


ODD = b"a b:c,d\\e\nf\xff"


def test_odd_names_everywhere(tmp_path: Path) -> None:
    odd = os.fsdecode(ODD)
    root = os.path.join(tmp_path, odd)
    layer = tar(directory("./"), entry(odd, data=b"1"), entry("x"))
    archive = docker_archive(tmp_path / "a.tar", [layer, tar(entry(".wh." + odd))])
    call = [sys.executable, "-m", "overlayctl", "--root", root]
    for arguments in (["load", str(archive)], ["create", "--name", "cc", "demo"]):
        subprocess.run([*call, *arguments], check=True, capture_output=True)
    engine = Engine.open(root)
    merged = engine.mount_container("cc", volatile=False, xino=False)
    assert os.listdir(os.fsencode(merged)) == [b"x"]
    Path(merged, odd).write_text("new")
    assert os.listdir(os.fsencode(engine.layer_path("demo:1"))) == [ODD, b"x"]
    listed = subprocess.run(
        [*call, "layer", "files", "demo:1"], check=True, capture_output=True
    ).stdout
    assert b"\xff" not in listed
    assert len(listed.splitlines()) == 3
    assert b"".join(engine.layer_cat("demo:1", ODD)) == b"1"
    assert engine.check() == []
    engine.reset(dry_run=False)


def test_a_mount_that_the_kernel_downgrades_is_seen_by_nobody(
    run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("load", docker_archive(tmp_path / "a.tar", LAYERS))
    identifier = run("create", "--name", "cc", "demo").strip()
    real = snapshots.mounts

    def with_junk(*arguments: Any, **options: Any) -> Any:
        overlay = real(*arguments, **options)
        # Deeper than the kernel cleans: it then mounts read-only and calls it success.
        os.makedirs(overlay.workdir + "/work/a/b/c/d")
        return overlay

    monkeypatch.setattr(snapshots, "mounts", with_junk)
    engine = Engine.open(str(root))
    with pytest.raises(KernelRefused, match="read-only"):
        engine.mount_container("cc", volatile=False, xino=False)
    assert mounttable.at(engine.layout.merged(identifier)) is None
    monkeypatch.undo()
    run("mount", "cc")
    run("umount", "cc")


GARBAGE = {
    "gzip": gzip.compress(LAYERS[0])[:-20] + b"\xff" * 20,
    "xz": lzma.compress(LAYERS[0])[:40] + b"\xff" * 40,
    "bzip2": bz2.compress(LAYERS[0])[:30] + b"\xff" * 40,
    "zstd": b"\x28\xb5\x2f\xfd" + b"\xff" * 100,
    "text": b"ID=debian\n" * 300,
    "cut": LAYERS[0][:700],
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_leaves_nothing(run: Run, root: Path, tmp_path: Path, kind: str) -> None:
    layers = [LAYERS[1], LAYERS[0]]
    stored = [LAYERS[1], GARBAGE[kind]]
    ids = [diff_id(LAYERS[1]), diff_id(GARBAGE[kind] if kind in ("text", "cut") else LAYERS[0])]
    told = run(
        "load",
        docker_archive(tmp_path / "a.tar", layers, stored=stored, diff_ids=ids),
        status=1,
    )
    assert "hint:" in told or "overlayctl:" in told
    assert "Traceback" not in told
    for place in ("layers", "images", "tags", "ingest"):
        assert os.listdir(root / place) == []


def test_wrong_digest_and_cut_archive(run: Run, root: Path, tmp_path: Path) -> None:
    wrong = docker_archive(tmp_path / "a.tar", LAYERS, diff_ids=[diff_id(b"x")] * 3)
    assert "digest" in run("load", wrong, status=1)
    cut = docker_archive(tmp_path / "b.tar", LAYERS)
    cut.write_bytes(cut.read_bytes()[:-6000])
    run("load", cut, status=1)
    assert os.listdir(root / "layers") == os.listdir(root / "ingest") == []


@pytest.mark.parametrize(
    ("part", "place"), [("header", 10), ("superblock", 1030), ("tar", 4096 + 600), ("index", -4000)]
)
def test_a_changed_byte_is_found(run: Run, tmp_path: Path, part: str, place: int) -> None:
    run("load", docker_archive(tmp_path / "a.tar", LAYERS))
    image = inspect(run, "demo")
    file = Path(image["Layers"][0]["File"])
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    found = json.loads(run("system", "check", "--json", status=6, sound=False))
    rows = found if isinstance(found, list) else found["Findings"]
    row = next(row for row in rows if row["Tag"] == "layer-damaged")
    assert part in row["Message"]
    assert file.parent.name[:12] in row["Message"]
    assert row["Users"] == ["image " + image["Id"].removeprefix("sha256:")]
    data[place] ^= 1
    file.write_bytes(data)


def program(code: str) -> bytes:
    """A static x86-64 program of a few instructions, given in hexadecimal."""
    body = bytes.fromhex(code)
    base, head = 0x400000, 0x78
    size = head + len(body)
    elf = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, base + head, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    return elf + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096) + body


# The first ends with its effective user id, the second with 0 if it may become root.
EUID = "b86b000000 0f05 89c7 b83c000000 0f05"
SETUID = "b869000000 31ff 0f05 89c7 b83c000000 0f05"
CAP_SETUID = struct.pack("<IIIII", 0x02000001, 1 << 7, 0, 0, 0)


def test_programs_of_the_image_run_in_its_root(run: Run, tmp_path: Path) -> None:
    """Also setuid and file capabilities, though the layer's own mount allows neither."""
    if os.uname().machine != "x86_64":
        missing("x86-64")
    capable = {"security.capability": CAP_SETUID.decode("utf-8", "surrogateescape")}
    layer = tar(
        directory("./"),
        entry("euid", data=program(EUID), mode=0o755),
        entry("suid", data=program(EUID), mode=0o4755),
        entry("plain", data=program(SETUID), mode=0o755),
        entry("capable", data=program(SETUID), mode=0o755, xattrs=capable),
    )
    run("load", docker_archive(tmp_path / "a.tar", [layer]))
    run("create", "--name", "cc", "demo")
    merged = run("mount", "cc").strip()
    status = {
        name: subprocess.run(
            ["chroot", "--userspec=1234:1234", merged, "/" + name], check=False
        ).returncode
        for name in ("euid", "suid", "plain", "capable")
    }
    assert status == {"euid": 1234 & 0xFF, "suid": 0, "plain": 0xFF, "capable": 0}
    path = run("layer", "path", "demo:1").strip()
    mounted = mounttable.at(path)
    assert mounted is not None
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(mounted.options.split(","))
    assert os.getxattr(path + "/capable", "security.capability") == CAP_SETUID
    run("umount", "cc")


def test_the_words_of_refusals(run: Run, tmp_path: Path) -> None:
    run("load", docker_archive(tmp_path / "a.tar", LAYERS))
    assert "did you mean demo?" in run("image", "mount", "dmo", status=3)
    run("create", "--name", "cc", "demo")
    assert "taken" in run("create", "--name", "cc", "demo", status=4)
    run("create", "--name", "no/slash", "demo", status=2)
    run("image", "tag", "demo", "UPPER", status=2)
    flat = tmp_path / "flat.tar"
    flat.write_bytes(tar(directory("bin"), directory("etc"), entry("etc/passwd"), directory("usr")))
    assert "import" in run("load", flat, status=1)
    run("import", flat, "flat:1")
    assert len(inspect(run, "flat:1")["Layers"]) == 1
    assert Layout(str(tmp_path / "store")).root == str(tmp_path / "store")


def test_reset_takes_no_store_away_from_a_load(run: Run, root: Path, tmp_path: Path) -> None:
    run("load", docker_archive(tmp_path / "a.tar", LAYERS))
    engine = Engine.open(str(root))
    with staging.staging(engine.layout):
        assert f"process {os.getpid()} " in run("system", "reset", "--yes", status=4, sound=False)
    run("images")
    run("system", "reset", "--yes")
    # Who had it open, and waited for the lock.
    with pytest.raises(NotFound, match="is gone"):
        engine.create("demo", name="late")
    assert os.listdir(root) == []

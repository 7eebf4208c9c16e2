"""Archives that come once: through a pipe, or out of a compression that wraps all of it."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import pytest

from overlayctl.engine import Engine
from overlayctl.errors import DigestMismatch
from tests.archives import diff_id
from tests.cli.conftest import Shell
from tests.layer.tars import directory, entry, hardlink, symlink, tar
from tests.rootmount import require
from tests.store.stores import Silent

MIB = 1 << 20
NOISE = random.Random(1).randbytes(MIB)


def layer(name: str, size: int = MIB) -> bytes:
    return tar(directory("./"), entry(name, data=(NOISE * (size // MIB + 1))[:size]))


def parts(stored: Iterable[tuple[str, bytes]], tars: list[bytes], tag: str = "demo:1") -> bytes:
    """The config and manifest.json for layers that lie under those names."""
    rootfs = {"type": "layers", "diff_ids": [diff_id(one) for one in tars]}
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": rootfs}).encode()
    names = [name for name, _ in stored]
    manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": names}]
    return entry("config.json", data=config) + entry(
        "manifest.json", data=json.dumps(manifest).encode()
    )


def archive(*stored: tuple[str, bytes], tars: list[bytes], rest: bytes = b"") -> bytes:
    """A docker archive in which the manifest comes last."""
    members = [entry(name, data=data) for name, data in stored]
    return tar(*members, rest, parts(stored, tars))


def load(run: Shell, data: bytes, *, ok: int = 0) -> subprocess.CompletedProcess[bytes]:
    """``load -`` of a pipe."""
    done = subprocess.run(
        [sys.executable, "-m", "overlayctl", "--root", run.store, "load", "-"],
        input=data,
        capture_output=True,
        check=False,
    )
    assert done.returncode == ok, done
    assert not os.path.isdir(f"{run.store}/ingest") or os.listdir(f"{run.store}/ingest") == []
    assert run.findings() == ""
    return done


def seen(run: Shell, name: str = "demo:1") -> dict[str, str]:
    """The files of a merged view and the digests of their content."""
    view = run.path("image", "mount", name)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in view.iterdir()}
    run("image", "umount", name)
    return found


def test_layers_come_before_the_manifest_and_what_it_does_not_name_is_dropped(run: Shell) -> None:
    tars = [layer("a"), layer("b", 3 * MIB), layer("c", 100)]
    stored = [("x/layer.tar", tars[0]), ("y", gzip.compress(tars[1], 1)), ("z", tars[2])]
    rest = b"".join(
        (
            entry("stray.tar", data=layer("stray")),
            entry("cut.gz", data=gzip.compress(NOISE)[: MIB // 2]),
            entry("noise", data=NOISE),
            entry("text", data=b"{}" * MIB),
            directory("dir"),
        )
    )
    load(run, archive(*stored, tars=tars, rest=rest))
    assert sorted(seen(run)) == ["a", "b", "c"]
    assert len(os.listdir(f"{run.store}/layers")) == 3


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
def test_a_pipe_and_a_file_give_the_same(
    run: Shell, tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    tars = [layer("a"), layer("b")]
    data = pack(archive(("0", tars[0]), ("1", gzip.compress(tars[1])), tars=tars))
    load(run, data)
    by_pipe = seen(run)
    run("rmi", "demo:1")
    file = tmp_path / "file"
    file.write_bytes(data)
    run("load", file)
    assert seen(run) == by_pipe
    assert len(by_pipe) == 2


def test_one_layer_under_several_names_and_in_several_places(run: Shell) -> None:
    one, two = layer("a"), layer("b")
    stored = [("0", one), ("link", one), ("1", two), ("hard", one)]
    links = symlink("link", "0") + hardlink("hard", "./0")
    data = tar(
        entry("0", data=one),
        links,
        entry("1", data=two),
        parts(stored, [one, one, two, one]),
    )
    load(run, data)
    assert sorted(seen(run)) == ["a", "b"]
    assert len(os.listdir(f"{run.store}/layers")) == 2


def test_a_tar_that_inherits_otherwise_in_each_place(run: Shell) -> None:
    """It names no parent: what ``d`` is, the layers below say."""
    bare = tar(entry("d/file", data=NOISE))
    tars = [bare, tar(directory("d", mode=0o700)), bare]
    load(run, archive(*((str(n), data) for n, data in enumerate(tars)), tars=tars))
    names = sorted(os.listdir(f"{run.store}/layers"))
    assert [len(name) for name in names].count(64 + 17) == 1
    assert len(names) == 3


def test_a_damaged_layer_of_a_stream_is_refused(run: Shell) -> None:
    good, bad = layer("a"), layer("b")
    packed = gzip.compress(bad)
    done = load(run, archive(("0", good), ("1", packed[:-9]), tars=[good, bad]), ok=1)
    assert b"the gzip data of 1 is damaged or cut" in done.stderr
    done = load(run, archive(("0", good), ("1", layer("other")), tars=[good, bad]), ok=1)
    assert b"digest" in done.stderr
    done = load(run, archive(("0", good), ("1", NOISE), tars=[good, bad]), ok=1)
    assert b"digest" in done.stderr
    assert os.listdir(f"{run.store}/layers") == []


@pytest.mark.parametrize("at", [100, 700, MIB // 2, MIB + 1024, 2 * MIB, -2000])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_cut_pipe_leaves_nothing(run: Shell, pack: Callable[[bytes], bytes], at: int) -> None:
    tars = [layer("a"), layer("b")]
    data = pack(archive(("0", tars[0]), ("1", tars[1]), tars=tars))
    done = load(run, data[:at], ok=1)
    assert b"hint: " in done.stderr
    assert os.listdir(f"{run.store}/layers") == []
    assert run("images", "-q").out == ""


def test_nothing_is_written_twice(run: Shell) -> None:
    tars = [layer("a", 8 * MIB), layer("b", 8 * MIB)]
    Engine.open(run.store, create=True)
    for data in (
        archive(("0", tars[0]), ("1", tars[1]), tars=tars),
        gzip.compress(archive(("0", tars[0]), ("1", tars[1]), tars=tars), 1),
        archive(("0", gzip.compress(tars[0], 1)), ("1", tars[1]), tars=tars),
    ):
        written = _written(run, data)
        assert 16 * MIB < written < 16.5 * MIB
        run("rmi", "demo:1")


def _written(run: Shell, data: bytes) -> int:
    """The bytes that a load writes (proc_pid_io(5))."""
    code = (
        "import sys; from overlayctl.cli import main; "
        f"main(['--root', {run.store!r}, 'load', '-']); "
        "print([l.split()[1] for l in open('/proc/self/io') if 'wchar' in l][0])"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    return int(done.stdout.split()[-1])


def test_a_candidate_is_at_its_place_when_it_has_passed(run: Shell) -> None:
    """What is kept of a pipe is the layer's own file: it has the same inode in the end."""
    one = layer("a")
    data = archive(("0", one), tars=[one])
    process = subprocess.Popen(
        [sys.executable, "-m", "overlayctl", "--root", run.store, "load", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert process.stdin
    process.stdin.write(data[: MIB + 4096])
    process.stdin.flush()
    deadline = time.monotonic() + 20
    while not (passed := [*Path(run.store, "ingest").glob("*/passed-*/layer.erofs")]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    inode = passed[0].stat().st_ino
    process.communicate(data[MIB + 4096 :])
    assert process.returncode == 0
    (stored,) = Path(run.store, "layers").glob("*/layer.erofs")
    assert stored.stat().st_ino == inode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_load_of_a_pipe_that_is_stopped_leaves_nothing(run: Shell, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "overlayctl", "--root", run.store, "load", "-"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin
    process.stdin.write(entry("0", data=layer("a", 4 * MIB))[: 3 * MIB])
    process.stdin.flush()
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    process.stdin.close()
    assert os.listdir(f"{run.store}/ingest") == []


@pytest.mark.parametrize("outside", [bytes, gzip.compress])
def test_a_stopped_load_does_not_end_its_layers_first(
    run: Shell, tmp_path: Path, outside: Callable[[bytes], bytes]
) -> None:
    """A GiB of zeros in gzip takes a while; the signal comes early in it."""
    zeros = gzip.compress(bytes(64 * MIB), 9)
    head = tarfile.TarInfo("zeros")
    head.size = 1024 * MIB
    packed = gzip.compress(head.tobuf()) + zeros * 16 + gzip.compress(tar())
    file = tmp_path / "file"
    file.write_bytes(outside(archive(("0", packed), tars=[b""])))
    process = subprocess.Popen(
        [sys.executable, "-m", "overlayctl", "--root", run.store, "load", file],
        stderr=subprocess.DEVNULL,
    )
    staged = Path(run.store, "ingest")
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size > MIB for path in staged.glob("*/**/layer.erofs")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.wait(20) == 130
    took = time.monotonic() - began
    assert os.listdir(staged) == []
    load = subprocess.run(
        [sys.executable, "-m", "overlayctl", "--root", run.store, "load", file],
        stderr=subprocess.DEVNULL,
        check=False,
    )
    # The digest is wrong, which is known when all has been read.
    assert load.returncode == 1
    assert took < (time.monotonic() - began - took) / 2


def test_a_reader_of_the_output_that_left_takes_nothing_away(run: Shell, tmp_path: Path) -> None:
    one = layer("a")
    file = tmp_path / "a.tar"
    file.write_bytes(archive(("0", one), tars=[one]))
    out, into = os.pipe()
    os.close(out)
    done = subprocess.run(
        [sys.executable, "-m", "overlayctl", "--root", run.store, "load", file],
        stdout=into,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(into)
    assert (done.returncode, done.stderr) == (141, b"")
    assert os.listdir(f"{run.store}/ingest") == []
    assert list(seen(run)) == ["a"]


def test_import_of_a_pipe_writes_a_layer_once(run: Shell) -> None:
    data = layer("a", 2 * MIB)
    for packed in (data, gzip.compress(data), lzma.compress(data)):
        done = subprocess.run(
            [sys.executable, "-m", "overlayctl", "--root", run.store, "import", "-", "demo:1"],
            input=packed,
            capture_output=True,
            check=True,
        )
        assert done.stdout.startswith(b"sha256:")
        (stored,) = os.listdir(f"{run.store}/layers")
        assert "sha256:" + stored == diff_id(data)
    assert os.listdir(f"{run.store}/ingest") == []


def test_loading_what_is_there_reads_only_the_config(run: Shell, tmp_path: Path) -> None:
    """Seen by what is no longer there: the archive's layers are gone, but their headers."""
    tars = [layer("a", 4 * MIB), layer("b", 4 * MIB)]
    file = tmp_path / "a.tar"
    file.write_bytes(archive(("0", tars[0]), ("1", tars[1]), tars=tars))
    run("load", file)
    with file.open("r+b") as out:
        out.seek(512)
        out.write(bytes(4 * MIB))
    assert run("load", file).out == "Loaded image: demo:1\n"
    run("rmi", "demo:1")
    assert "digest" in run("load", file, ok=1).err


def test_a_damaged_layer_is_healed_by_loading_again(run: Shell, tmp_path: Path) -> None:
    tars = [layer("a"), tar(directory("d", mode=0o700)), tar(entry("d/b", data=NOISE))]
    stored = [(str(number), data) for number, data in enumerate(tars)]
    file = tmp_path / "a.tar"
    file.write_bytes(archive(*stored, tars=tars))
    run("load", file)
    run("create", "--name", "web", "demo:1")
    mounted = run.path("mount", "web")
    inspected = json.loads(run("inspect", "demo:1").out)[0]["Layers"]
    for one in inspected:
        with open(one["File"], "r+b") as damaged:
            damaged.seek(4096 + 600)
            damaged.write(b"damage")
    assert run.findings().count("layer-damaged") == 3
    healed = run("load", file, sound=False)
    assert healed.err.count("was damaged") == 3
    assert f"{mounted}: mounted before layer" in healed.err
    assert "unmount it, and mount it again" in healed.err
    for one in inspected:
        place = os.path.dirname(one["File"])
        assert os.listdir(place) == ["layer-2.erofs"]
    run("umount", "web", sound=False)
    again = run.path("mount", "web")
    assert (again / "a").read_bytes() == NOISE
    assert (again / "d/b").read_bytes() == NOISE
    assert (again / "d").stat().st_mode & 0o777 == 0o700
    run("umount", "web")


def test_a_layer_is_healed_from_a_pipe(run: Shell) -> None:
    one = layer("a")
    data = archive(("0", one), tars=[one])
    load(run, data)
    (stored,) = Path(run.store, "layers").glob("*/layer.erofs")
    os.truncate(stored, 500_000)
    done = subprocess.run(
        [sys.executable, "-m", "overlayctl", "--root", run.store, "load", "-"],
        input=data,
        capture_output=True,
        check=True,
    )
    assert b"was damaged" in done.stderr
    assert run.findings() == ""
    assert list(seen(run)) == ["a"]


def test_a_stream_in_pieces_of_any_size(run: Shell, tmp_path: Path) -> None:
    """What a pipe gives at once ends anywhere, in headers and in magic numbers too."""
    tars = [layer("a", 200_000), layer("b", 100_000)]
    data = archive(("0", gzip.compress(tars[0], 0)), ("1", tars[1]), tars=tars)
    engine = Engine.open(run.store, create=True)
    for step in (1, 511, 513, 70_001):
        out, into = os.pipe()
        feeder = os.fork()
        if not feeder:
            os.close(out)
            small = data if step > 1 else data[:2000]
            for at in range(0, len(small), step):
                os.write(into, data[at : at + step])
            with os.fdopen(into, "wb") as rest:
                rest.write(data[len(small) :])
            os._exit(0)
        os.close(into)
        loaded = engine.load(f"/dev/fd/{out}", tag=None, platform=None, progress=Silent())
        os.close(out)
        os.waitpid(feeder, 0)
        assert loaded[0].layers == 2
        assert sorted(seen(run)) == ["a", "b"]
        run("rmi", "demo:1")


def test_a_signal_while_a_layer_ends_is_obeyed(run: Shell) -> None:
    """The threads that store lag behind, so most of the time is spent waiting for them."""
    packed = bz2.compress(tar(entry("a", data=random.Random(3).randbytes(5_000_000))))
    data = b"".join(entry(str(number), data=packed) for number in range(8))
    for moment in (0.6, 0.7, 0.8):
        process = subprocess.Popen(
            [sys.executable, "-m", "overlayctl", "--root", run.store, "load", "-"],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdin
        feeder = threading.Thread(target=_feed, args=(process.stdin, data))
        feeder.start()
        time.sleep(moment)
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(20) == 128 + signal.SIGTERM
        finally:
            process.kill()
            feeder.join()
        assert os.listdir(f"{run.store}/ingest") == []


def _feed(pipe: IO[bytes], data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), pipe:
        pipe.write(data)


def test_what_a_failed_load_has_not_begun_is_not_done(run: Shell, tmp_path: Path) -> None:
    class Counting(Silent):
        done = 0

        def advance(self, count: int) -> None:
            self.done += count

    tars = [layer(str(number)) for number in range(40)]
    stored = [(str(number), data) for number, data in enumerate(tars)]
    file = tmp_path / "a.tar"
    file.write_bytes(archive(("0", layer("other")), *stored[1:], tars=tars))
    counting = Counting()
    with pytest.raises(DigestMismatch):
        Engine.open(run.store, create=True).load(
            str(file), tag=None, platform=None, progress=counting
        )
    assert MIB < counting.done < 20 * MIB


def test_every_form_of_a_tar_is_healed(run: Shell) -> None:
    """Two layers have one tar; the one that inherits is damaged alone."""
    bare = tar(entry("d/file", data=NOISE))
    tars = [bare, tar(directory("d", mode=0o700)), bare]
    data = archive(*((str(n), data) for n, data in enumerate(tars)), tars=tars)
    load(run, data)
    (stored,) = Path(run.store, "layers").glob("*-*/layer.erofs")
    with stored.open("r+b") as damaged:
        damaged.seek(4096 + 600)
        damaged.write(b"damage")
    assert run.findings().count("layer-damaged") == 1
    assert b"was damaged" in load(run, data).stderr
    assert os.listdir(stored.parent) == ["layer-2.erofs"]
    assert b"was damaged" not in load(run, data).stderr


def test_a_text_that_looks_like_a_tar_at_one_place_is_a_text(run: Shell) -> None:
    one = layer("a")
    rootfs = {"type": "layers", "diff_ids": [diff_id(one)]}
    start = '{"padding": "'
    config = json.dumps(
        {"padding": "x" * (257 - len(start)) + "ustar" + "x" * MIB, "os": "linux", "rootfs": rootfs}
    ).encode()
    assert config[257:262] == b"ustar"
    manifest = json.dumps([{"Config": "c", "RepoTags": ["demo:1"], "Layers": ["0"]}]).encode()
    load(
        run,
        tar(entry("c", data=config), entry("0", data=one), entry("manifest.json", data=manifest)),
    )
    assert list(seen(run)) == ["a"]


def test_a_stream_of_empty_files_is_no_image(run: Shell) -> None:
    done = load(run, tar(entry("version"), entry("manifest.json")), ok=1)
    assert b"manifest.json is no JSON" in done.stderr


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello\n" * 20_000, b"it is a text"),
        (b"hello\n", b"it is a text"),
        (b"<html>" + NOISE, b"it is an HTML or XML text"),
        (b"\x04\x22\x4d\x18" + NOISE, b"it is lz4 data"),
        (bytes(1024) + b"\xe2\xe1\xf5\xe0" + NOISE, b"it is an EROFS image"),
    ],
)
def test_what_is_no_layer_is_named_from_a_pipe_too(run: Shell, data: bytes, words: bytes) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "overlayctl", "--root", run.store, "import", "-", "demo:1"],
        input=data,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert b"standard input is no layer: " + words in done.stderr


def test_a_root_that_modes_bind_loads_from_a_pipe(run: Shell) -> None:
    require("setpriv")
    one = layer("a")
    done = subprocess.run(
        [
            *("setpriv", "--bounding-set", "-dac_override,-dac_read_search"),
            *(sys.executable, "-m", "overlayctl", "--root", run.store, "load", "-"),
        ],
        input=archive(("0", one), tars=[one]),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done
    (stored,) = Path(run.store, "layers").glob("*/layer.erofs")
    assert stored.stat().st_mode & 0o777 == 0o400
    assert list(seen(run)) == ["a"]

"""Random changes, at once in a writable overlay and in a plain directory: they end up the same.

What was written becomes a layer, again and again, so that the layers below are as odd as what is
done to them. Each time the list of changes has to be what a comparison of the plain directory,
before and after, says.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    rule,
    run_state_machine_as_test,
)

from overlayctl.kernel import mounter
from overlayctl.layer import diff
from overlayctl.layer.index import Index
from overlayctl.layer.tar_writer import TarWriter
from overlayctl.mount import Erofs, Lower, Overlay
from tests.layer.tars import directory, entry, symlink, tar
from tests.layer.test_tree import build
from tests.oracles import command, trees

TIME = 1_234_567_890
_NOW = 1 << 62
_OWN = (b"trusted.overlay.origin",)
_NAMES = ("a", "b", "c", "d-e", "d", "\udcff\n")

names = st.sampled_from(_NAMES)
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
# Where something is more often than not.
likely = st.one_of(st.sampled_from(("a", "a/b", "a/b/c", "b", "d", "d/a", "c/a", "c/b/d")), paths)
contents = st.sampled_from((b"", b"1", b"2", b"three", b"x" * 5000))
Act = Callable[[str], object]


def _base() -> tuple[bytes, bytes]:
    """Two layers, the upper one with whiteouts and an opaque directory."""
    fields: dict[str, Any] = {"mtime": TIME + 0.5, "uid": 1, "gid": 2}
    below = tar(
        directory("./", mtime=TIME),
        directory("a/", **fields), directory("a/b/", mode=0o700, **fields),
        entry("a/b/c", data=b"1", mode=0o644, **fields), entry("a/a", data=b"2", **fields),
        entry("a/d", data=b"three", xattrs={"user.note": "1"}, mode=0o600, **fields),
        directory("c/", **fields), directory("c/b/", **fields), entry("c/b/d", **fields),
        entry("c/a", data=b"x" * 5000, **fields), symlink("b", "a/a", **fields),
        directory("d/", **fields), directory("d/a/", **fields), entry("d/a/a", **fields),
        entry("d/b", data=b"1", **fields), entry("d-e", data=b"1", **fields),
    )  # fmt: skip
    above = tar(
        directory("./", mtime=TIME),
        directory("c/", mtime=TIME), entry("c/.wh..wh..opq"), entry("c/d", data=b"2", **fields),
        directory("d/", mtime=TIME), entry("d/.wh.a"), entry(".wh.d-e"),
        entry("a/.wh.a", mtime=TIME), directory("a/", **fields),
    )  # fmt: skip
    return below, above


class Place:
    """Layers, and a writable overlay on them, all made below one directory."""

    def __init__(self, root: Path, *, layers: Sequence[Path]) -> None:
        self.root = root
        self.merged = root / "merged"
        self.merged.mkdir()
        self.indexes: list[Index] = []
        self._lowers: list[Lower] = []
        self._mounted: list[Path] = []
        for file in layers:
            self._add(file, Index.open(file))

    def add(self, data: bytes) -> None:
        """Put a layer on top."""
        file = self.root / f"{len(self.indexes)}.erofs"
        self._add(file, build(file, data, tuple(self.indexes)))

    def _add(self, file: Path, index: Index) -> None:
        seen = self.root / f"{len(self.indexes)}.seen"
        seen.mkdir()
        self._mount(Erofs(str(file)), seen)
        self.indexes.insert(0, index)
        self._lowers.insert(0, Lower(str(seen), index.uuid, f"{file.parent.name}/{file.name}"))

    def write(self) -> None:
        """Mount an overlay with an empty upper directory that looks like the root below it."""
        self.upper = self.root / f"{len(self.indexes)}.upper"
        work = self.root / f"{len(self.indexes)}.work"
        work.mkdir()
        self.upper.mkdir()
        with self.reading() as view:
            _copy_attributes(view, self.upper)
        self._mount(
            Overlay("test", tuple(self._lowers), str(self.upper), str(work), volatile=True),
            self.merged,
        )

    def reading(self) -> _Reading:
        """The layers alone, mounted read-only for a block."""
        return _Reading(self.root / "view", Overlay("test", tuple(self._lowers)))

    def stop_writing(self) -> None:
        self._mounted.remove(self.merged)
        mounter.unmount(str(self.merged))

    def layer(self) -> bytes:
        """What was written, as the tar of a layer."""
        fd = os.open(self.upper, os.O_RDONLY | os.O_DIRECTORY)
        try:
            writer = TarWriter(fd, layer=True)
            data = b"".join(writer)
        finally:
            os.close(fd)
        assert writer.notes == {}
        return data

    def changes(self) -> list[diff.Change]:
        fd = os.open(self.upper, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return list(diff.changes(fd, self.indexes, sizes=True))
        finally:
            os.close(fd)

    def clear(self) -> None:
        for place in reversed(self._mounted):
            mounter.unmount(str(place))
        for index in self.indexes:
            index.close()
        shutil.rmtree(self.root)

    def _mount(self, what: Erofs | Overlay, place: Path) -> None:
        mounter.mount(what, str(place))
        self._mounted.append(place)


class _Reading:
    def __init__(self, place: Path, what: Overlay) -> None:
        self._place = place
        self._what = what

    def __enter__(self) -> Path:
        self._place.mkdir(exist_ok=True)
        mounter.mount(self._what, str(self._place))
        return self._place

    def __exit__(self, *_: object) -> None:
        mounter.unmount(str(self._place))


def _copy_attributes(source: Path, target: Path) -> None:
    info = source.stat()
    for name in os.listxattr(source):
        os.setxattr(target, name, os.getxattr(source, name))
    os.chown(target, info.st_uid, info.st_gid)
    target.chmod(stat.S_IMODE(info.st_mode))
    os.utime(target, ns=(info.st_mtime_ns, info.st_mtime_ns))


class Machine(RuleBasedStateMachine):
    def __init__(self, root: Path, layers: Sequence[Path]) -> None:
        super().__init__()
        self.place = Place(Path(tempfile.mkdtemp(dir=root)), layers=layers)
        self.plain = self.place.root / "plain"
        self.place.write()
        command.output("cp", "-a", "--preserve=all", self.place.merged, self.plain)
        self.start = time.time_ns() - 10**9
        self.before = trees.snapshot(self.plain, ignore=_OWN)

    def _seen(self, root: Path) -> dict[bytes, trees.Entry]:
        return self._at_one_time(trees.snapshot(root, ignore=_OWN))

    def _at_one_time(self, seen: Mapping[bytes, trees.Entry]) -> dict[bytes, trees.Entry]:
        """A tree, in which all times of the test's own are one: the two are not written at once."""
        return {
            path: found._replace(mtime_ns=_NOW) if found.mtime_ns > self.start else found
            for path, found in seen.items()
        }

    def both(self, act: Act) -> None:
        """Do it in both; it has to go as well, or fail for the same reason."""
        there = _tried(act, str(self.place.merged))
        if there == errno.EXDEV:
            return
        assert _tried(act, str(self.plain)) == there

    # --- files --------------------------------------------------------------------------

    @rule(path=likely, content=contents)
    def write(self, path: str, content: bytes) -> None:
        self.both(lambda root: _write(f"{root}/{path}", os.O_CREAT | os.O_TRUNC, content))

    @rule(path=likely, content=contents)
    def append(self, path: str, content: bytes) -> None:
        self.both(lambda root: _write(f"{root}/{path}", os.O_APPEND, content))

    @rule(path=likely, longer=st.booleans())
    def in_disguise(self, path: str, *, longer: bool) -> None:
        """Another content, target or number, with the time of before."""

        def act(root: str) -> None:
            name = f"{root}/{path}"
            before = os.lstat(name)
            if stat.S_ISREG(before.st_mode):
                # One more byte, or the first one.
                _write(name, os.O_APPEND if longer or not before.st_size else 0, b"*")
            else:
                target = os.readlink(name) if stat.S_ISLNK(before.st_mode) else ""
                os.unlink(name)
                if target:
                    os.symlink(target.swapcase(), name)
                else:
                    os.mknod(name, before.st_mode, before.st_rdev + 1)
                os.chown(name, before.st_uid, before.st_gid, follow_symlinks=False)
            os.utime(name, ns=(0, before.st_mtime_ns), follow_symlinks=False)

        self.both(act)

    @rule(path=likely)
    def renewed(self, path: str) -> None:
        """A directory is made again with the directories in it, and without their files."""

        def act(root: str) -> None:
            top = f"{root}/{path}"
            found = [place for place, _, _ in os.walk(top)]
            _remove_tree(top)
            for place in found:
                os.mkdir(place)

        self.both(act)

    @rule(path=likely, size=st.sampled_from((0, 1, 4096, 1 << 20)))
    def truncate(self, path: str, size: int) -> None:
        def act(root: str) -> None:
            if os.path.islink(f"{root}/{path}"):
                raise FileNotFoundError
            os.truncate(f"{root}/{path}", size)

        self.both(act)

    @rule(path=likely)
    def unlink(self, path: str) -> None:
        self.both(lambda root: os.unlink(f"{root}/{path}"))

    @rule(path=likely, to=st.sampled_from(("a", "nowhere", "../a")))
    def symlink(self, path: str, to: str) -> None:
        self.both(lambda root: os.symlink(to, f"{root}/{path}"))

    @rule(path=likely, other=likely)
    def link(self, path: str, other: str) -> None:
        self.both(lambda root: os.link(f"{root}/{path}", f"{root}/{other}", follow_symlinks=False))

    @rule(path=likely, kind=st.sampled_from((stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK)))
    def mknod(self, path: str, kind: int) -> None:
        self.both(lambda root: os.mknod(f"{root}/{path}", kind | 0o600, os.makedev(7, 300)))

    # --- directories --------------------------------------------------------------------

    @rule(path=likely)
    def mkdir(self, path: str) -> None:
        self.both(lambda root: os.mkdir(f"{root}/{path}"))

    @rule(path=paths)
    def makedirs(self, path: str) -> None:
        self.both(lambda root: os.makedirs(f"{root}/{path}", exist_ok=True))

    @rule(path=likely)
    def rmdir(self, path: str) -> None:
        self.both(lambda root: os.rmdir(f"{root}/{path}"))

    @rule(path=likely, again=st.booleans())
    def remove_tree(self, path: str, *, again: bool) -> None:
        def act(root: str) -> None:
            _remove_tree(f"{root}/{path}")
            if again:
                os.mkdir(f"{root}/{path}")

        self.both(act)

    @rule(path=likely, other=likely)
    def rename(self, path: str, other: str) -> None:
        """Where the overlay says EXDEV programs copy and delete."""

        def act(root: str) -> None:
            os.rename(f"{root}/{path}", f"{root}/{other}")

        there = _tried(act, str(self.place.merged))
        if there != errno.EXDEV:
            assert _tried(act, str(self.plain)) == there
        elif not os.path.lexists(self.plain / other) and not f"{other}/".startswith(f"{path}/"):
            self.both(lambda root: _copied(f"{root}/{path}", f"{root}/{other}"))

    # --- attributes ---------------------------------------------------------------------

    @rule(path=likely, mode=st.sampled_from((0o644, 0o700, 0o4755, 0o2775, 0o1777)))
    def chmod(self, path: str, mode: int) -> None:
        def act(root: str) -> None:
            if os.path.islink(f"{root}/{path}"):
                raise FileNotFoundError
            os.chmod(f"{root}/{path}", mode)

        self.both(act)

    @rule(path=likely, uid=st.integers(0, 2))
    def chown(self, path: str, uid: int) -> None:
        self.both(lambda root: os.chown(f"{root}/{path}", uid, 7, follow_symlinks=False))

    @rule(path=likely, seconds=st.sampled_from((-1, 5, TIME)), ns=st.sampled_from((0, 5 * 10**8)))
    def utime(self, path: str, seconds: int, ns: int) -> None:
        moment = seconds * 10**9 + ns
        self.both(
            lambda root: os.utime(f"{root}/{path}", ns=(moment, moment), follow_symlinks=False)
        )

    @rule(
        path=likely,
        name=st.sampled_from(("user.note", "trusted.note", "trusted.overlay.opaque")),
        value=st.sampled_from((b"1", b"y")),
    )
    def setxattr(self, path: str, name: str, value: bytes) -> None:
        self.both(lambda root: os.setxattr(f"{root}/{path}", name, value, follow_symlinks=False))

    @rule(path=likely)
    def removexattr(self, path: str) -> None:
        self.both(lambda root: os.removexattr(f"{root}/{path}", "user.note", follow_symlinks=False))

    @rule(mode=st.sampled_from((0o755, 0o700)), uid=st.integers(0, 1))
    def change_the_root(self, mode: int, uid: int) -> None:
        def act(root: str) -> None:
            os.chmod(root, mode)
            os.chown(root, uid, 0)

        self.both(act)

    # --- what has to hold ---------------------------------------------------------------

    @rule()
    def becomes_a_layer(self) -> None:
        # Whoever writes to one of two names of a lower file has it alone from then on.
        self.both(_break_links)
        after = self.judge()
        self.place.stop_writing()
        self.place.add(self.place.layer())
        self.before = after
        self.place.write()
        assert self.place.changes() == []

    def judge(self) -> dict[bytes, trees.Entry]:
        after = trees.snapshot(self.plain, ignore=_OWN)
        alike = self._at_one_time(after)
        assert trees.differences(self._seen(self.place.merged), alike) == []
        listed = self.place.changes()
        assert [(c.kind, c.path) for c in listed] == expected(self.before, after)
        for change in listed:
            for look, found in ((change.before, self.before), (change.after, after)):
                entry = found.get(change.path)
                assert (look is None) == (entry is None)
                if look is not None and entry is not None:
                    assert look[:4] == (entry.type, entry.mode, entry.uid, entry.gid)
                    assert look.size == (entry.size or 0) or look.type == "directory"
        return after

    def teardown(self) -> None:
        try:
            after = self.judge()
            self.place.stop_writing()
            self.place.add(self.place.layer())
            with self.place.reading() as view:
                assert trees.differences(self._seen(view), self._at_one_time(after)) == []
        finally:
            self.place.clear()


def _tried(act: Act, root: str) -> int:
    try:
        act(root)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _write(path: str, flags: int, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ENXIO, "no file")
        os.write(fd, content)
    finally:
        os.close(fd)


def _remove_tree(path: str) -> None:
    # rmtree opens whatever is there, and a fifo does not open until somebody writes.
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "no directory", path)
    shutil.rmtree(path)


def _break_links(root: str) -> None:
    # In one order in both: the last name of a file stays, and so does the time of its directory.
    for above, directories, names in os.walk(root):
        directories.sort()
        for name in sorted(names):
            path = os.path.join(above, name)
            if os.lstat(path).st_nlink > 1:
                command.output("cp", "-a", "--preserve=all", path, f"{path}.own")
                os.rename(f"{path}.own", path)


def _copied(path: str, other: str) -> None:
    command.output("cp", "-a", "--preserve=all", path, other)
    shutil.rmtree(path)


def expected(
    before: Mapping[bytes, trees.Entry], after: Mapping[bytes, trees.Entry]
) -> list[tuple[str, bytes]]:
    """The list, from two looks at a plain directory."""
    found: dict[bytes, str] = {}
    for path in {*before, *after}:
        old, new = before.get(path), after.get(path)
        above = path.rpartition(b"/")[0]
        if old is None:
            found[path] = "A"
        elif new is None:
            if above in after and after[above].type == "directory":
                found[path] = "D"
        elif _fields(old) != _fields(new):
            found[path] = "C"
    for path in list(found):
        while path := path.rpartition(b"/")[0]:
            found.setdefault(path, "C")
    return sorted(
        ((kind, path) for path, kind in found.items()),
        key=lambda one: one[1].split(b"/") if one[1] else [],
    )


def _fields(found: trees.Entry) -> tuple[object, ...]:
    found = found._replace(link_group=())
    return found._replace(mtime_ns=0) if found.type == "directory" else found


def _run(place: Path, *, examples: int, steps: int) -> None:
    layers = []
    for number, data in enumerate(_base()):
        layers.append(place / f"base-{number}.erofs")
        build(layers[-1], data).close()

    class Here(Machine):
        def __init__(self) -> None:
            super().__init__(place, layers)

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_an_overlay_and_a_plain_directory_change_alike(tmp_path: Path) -> None:
    _run(tmp_path, examples=40, steps=30)


@pytest.mark.long
def test_they_do_for_long(tmp_path: Path) -> None:
    _run(tmp_path, examples=1500, steps=60)

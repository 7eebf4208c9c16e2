r"""What programs do to a container's files, as data: each case has a directory of its own.

A case is scripts for the layers of an image, bottom to top, and a script for the container: POSIX
sh with busybox (and ``setfattr``), run with ``-e`` in the directory ``/NAME`` of the tree. So one
image holds every case, and one container can do them all: a listing is told apart by the first name
of each path. ``build`` makes the image, ``everything`` the script, ``of`` picks one case's lines.

    archive = changes.build(tmp_path)              # loaded by docker and by overlayctl
    docker run changes:lower sh -c "$SCRIPT"       # SCRIPT = changes.everything()
    chroot "$(overlayctl mount c)" sh -c "$SCRIPT"

The cases are those that others found worth testing (continuity's fstest, moby's and
containers/storage's graphtest), and those that an overlay gets wrong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from overlayctl.layer.tar_writer import TarWriter
from tests.archives import docker_archive
from tests.oracles import command
from tests.rootmount import missing, require

NAME = "changes:lower"


class Case(NamedTuple):
    """``below`` are the scripts of the layers, bottom to top; ``script`` is the container's."""

    name: str
    below: tuple[str, ...]
    script: str


_OLD = "touch -h -d @1234567890"

_TREE = f"""
mkdir -p tree/sub/deep empty; echo one > tree/one; echo two > tree/two; echo x > tree/sub/x
echo y > tree/sub/deep/y; ln -s one tree/link; ln tree/two tree/zwei; echo top > top
mkfifo tree/fifo; mknod tree/null c 1 3; mknod tree/loop b 7 0
{_OLD} tree tree/sub tree/sub/deep empty tree/one tree/two tree/sub/x tree/sub/deep/y tree/link top
{_OLD} tree/fifo tree/null tree/loop
"""
# Layers that delete, hide and replace what lies below them.
_LAYERS = (
    """
    mkdir -p gone/sub hidden/sub again d/sub/deep kept; echo 1 > gone/sub/x; echo 1 > hidden/old
    echo 1 > hidden/sub/x; echo 1 > again/x; echo 1 > d/low; echo 1 > d/sub/low; echo 1 > file
    echo 1 > d/sub/deep/low; echo 1 > directory; echo 1 > kept/x; ln -s kept link; echo 1 > d/back
    """,
    """
    rm -r gone; rm -r hidden; mkdir hidden; echo 2 > hidden/new; rm -r again; rm d/back
    echo 2 > d/mid; echo 2 > d/sub/mid; rm d/sub/deep/low; rm file; mkdir file; echo 2 > file/f
    rm directory; mkdir directory; rm link; mkdir link; echo 2 > link/l
    """,
    """
    mkdir again; echo 3 > again/y; echo 3 > d/back; echo 3 > d/sub/top; rm -r d/sub/mid
    rm -r file; echo 3 > file
    """,
)


def _on_tree(name: str, script: str) -> Case:
    return Case(name, (_TREE,), script)


def _on_layers(name: str, script: str) -> Case:
    return Case(name, _LAYERS, script)


def _echo(depth: int) -> Case:
    """A chain of directories of which one is deleted."""
    chain = ["1", "2", "3", "4", "5"]
    make = f"mkdir -p {'/'.join(chain)}; echo end > {'/'.join([*chain, 'file'])}"
    path = "/".join(["", f"chain-{depth}", *chain, "file"][: depth + 2])
    return Case(f"chain-{depth}", (make,), f"cd /; rm -r {path}")


def _echo_again(depth: int) -> Case:
    """The same, and then what was deleted is made again, with other content."""
    chain = ["1", "2", "3", "4", "5"]
    whole = "/".join(chain)
    make = f"mkdir -p {whole}; echo end > {whole}/file"
    path = "/".join(["", f"again-{depth}", *chain, "file"][: depth + 2])
    name = f"again-{depth}"
    return Case(
        name,
        (make,),
        f"cd /; rm -r {path}; mkdir -p {name}/{whole}; echo new > {name}/{whole}/file",
    )


CASES: tuple[Case, ...] = (
    # --- nothing, and what looks like something ---------------------------------------------
    _on_tree("nothing", "true"),
    _on_tree("reading", "cat tree/one tree/sub/x; ls -lR ."),
    _on_tree("opened-for-writing", ": >> tree/one"),
    _on_tree("mode-and-back", "chmod 600 tree/one; chmod 644 tree/one"),
    _on_tree("owner-and-back", "chown 5:6 tree/sub/x; chown 0:0 tree/sub/x"),
    _on_tree("directory-mode-and-back", "chmod 700 tree/sub; chmod 755 tree/sub"),
    _on_tree("directory-time", "touch -d @1000000000 tree/sub empty"),
    _on_tree("made-and-removed", "echo x > tree/sub/new; mkdir -p a/b; rm -r a tree/sub/new"),
    _on_tree("moved-and-back", "mv tree/one tree/sub/uno; mv tree/sub/uno tree/one"),
    _on_tree("linked-and-unlinked", "ln tree/one tree/uno; rm tree/uno"),
    # --- files ------------------------------------------------------------------------------
    _on_tree("new-files", "echo a > a; echo b > tree/b; echo c > tree/sub/deep/c; : > empty/e"),
    _on_tree("append", "echo more >> tree/one; echo more >> tree/sub/deep/y"),
    _on_tree("overwrite-same-size", "printf 'ONE\\n' > tree/one"),
    _on_tree("truncate", ": > tree/one; truncate -s 1 tree/sub/x; truncate -s 9000 top"),
    _on_tree("time-of-a-file", "touch -d @1000000000 tree/one"),
    _on_tree("time-of-a-symlink", "touch -h -d @1000000000 tree/link"),
    Case("time-without-nanoseconds", ("echo a > a",), 'touch -d "@$(stat -c %Y a)" a'),
    _on_tree("change-and-old-time", f"echo longer > tree/one; {_OLD} tree/one"),
    _on_tree("mode", "chmod 4755 tree/one; chmod 600 tree/sub/x"),
    _on_tree("owner", "chown 1000:1001 tree/one; chown -h 7:8 tree/link; chgrp 9 tree/sub"),
    _on_tree("directory-mode", "chmod 1777 empty; chmod 700 tree/sub"),
    _on_tree("remove-a-file", "rm tree/one; rm tree/sub/deep/y"),
    _on_tree("remove-and-make", "rm tree/one; echo new > tree/one"),
    _on_tree("replaced-by-rename", "echo new > tree/.one.tmp; mv tree/.one.tmp tree/one"),
    _on_tree(
        "sparse", "truncate -s 1G hole; printf x | dd of=hole bs=1 seek=536870912 conv=notrunc"
    ),
    Case("zero-size-to-sparse", ("truncate -s 100M s; : > z",), "printf x >> s; truncate -s 3M z"),
    Case(
        "large", ("yes | head -c 3000000 > f",), "printf x | dd of=f bs=1 seek=1500000 conv=notrunc"
    ),
    # --- directories ------------------------------------------------------------------------
    _on_tree("new-directories", "mkdir -p a/b/c tree/sub/n empty/m; echo f > a/b/f"),
    _on_tree("remove-a-directory", "rm -r tree/sub; rmdir empty"),
    _on_tree("remove-all", "rm -r tree empty top"),
    _on_tree("remove-deep", "rm -r tree/sub/deep"),
    _on_tree("directory-again", "rm -r tree/sub; mkdir tree/sub; echo new > tree/sub/new"),
    _on_tree("directory-again-empty", "rm -r tree/sub; mkdir tree/sub"),
    _on_tree("directory-again-mode", "rm -r tree/sub; mkdir -m 700 tree/sub"),
    _on_tree(
        "directory-again-same-names",
        "rm -r tree/sub; mkdir -p tree/sub/deep; echo z > tree/sub/deep/z; echo x > tree/sub/x",
    ),
    _on_tree("empty-directory-again", "rmdir empty; mkdir empty"),
    _on_tree("directory-again-restored", "cp -a tree copy; rm -r tree; mv copy tree"),
    _on_tree(
        "twice", "rm -r tree; mkdir tree; echo a > tree/a; rm -r tree; mkdir tree; echo b > tree/b"
    ),
    *(_echo(depth) for depth in range(6)),
    *(_echo_again(depth) for depth in range(6)),
    # --- another type -----------------------------------------------------------------------
    _on_tree("file-to-directory", "rm tree/one; mkdir tree/one; echo in > tree/one/in"),
    _on_tree("directory-to-file", "rm -r tree/sub; echo file > tree/sub"),
    _on_tree("file-to-symlink", "rm tree/one; ln -s two tree/one"),
    _on_tree("symlink-to-file", "rm tree/link; echo file > tree/link"),
    _on_tree("directory-to-symlink", "mv tree/sub tree/real; ln -s real tree/sub"),
    _on_tree("symlink-to-directory", "rm tree/link; mkdir tree/link; echo in > tree/link/in"),
    _on_tree(
        "file-to-directory-and-back",
        "rm tree/one; mkdir tree/one; rmdir tree/one; echo one > tree/one",
    ),
    _on_tree(
        "directory-to-file-and-back",
        "rm -r tree/sub; echo f > tree/sub; rm tree/sub; mkdir tree/sub",
    ),
    _on_tree("fifo-to-file", "rm tree/fifo; echo f > tree/fifo; rm tree/null; mkfifo tree/null"),
    _on_tree(
        "symlink-target", "ln -sfn two tree/link; ln -s nowhere dangling; ln -s /etc/absolute abs"
    ),
    _on_tree("symlink-same-length", f"ln -sfn TWO tree/link; {_OLD} tree/link"),
    # --- renames ----------------------------------------------------------------------------
    _on_tree("rename-a-file", "mv tree/one tree/uno; mv tree/sub/x x"),
    _on_tree("rename-onto-a-file", "mv tree/one tree/sub/x"),
    _on_tree("rename-a-directory", "mv tree/sub tree/renamed"),
    _on_tree("rename-up-and-down", "mv tree/sub/deep deep; mv empty tree/sub/empty"),
    _on_tree("rename-a-new-directory", "mkdir new; echo a > new/a; mv new tree/newer"),
    _on_tree("rename-over-an-empty-directory", "mkdir n; echo a > n/a; rmdir empty; mv n empty"),
    _on_tree("rename-twice", "mv tree wood; mv wood forest; echo more >> forest/one"),
    _on_tree("swap", "mv tree/one t; mv tree/two tree/one; mv t tree/two"),
    _on_tree("swap-directories", "mv tree/sub t; mv empty tree/sub; mv t empty"),
    _on_tree("rename-a-symlink", "mv tree/link tree/lien"),
    # --- hard links -------------------------------------------------------------------------
    _on_tree("link-to-a-lower-file", "ln tree/one uno"),
    _on_tree("link-and-change", "ln tree/one uno; echo more >> uno"),
    _on_tree("link-of-a-lower-pair", "ln tree/two tree/three; chmod 600 tree/two"),
    _on_tree("write-one-of-a-pair", "echo more >> tree/two"),
    _on_tree("remove-one-of-a-pair", "rm tree/zwei"),
    _on_tree("remove-a-pair", "rm tree/zwei tree/two"),
    _on_tree("new-pair", "echo a > a; ln a tree/b; ln a tree/sub/c"),
    _on_tree("link-to-a-symlink", "ln tree/link lien"),
    _on_tree("link-rename-remove", "ln tree/one uno; mv uno tree/sub/uno; rm tree/one"),
    _on_tree("link-over-a-file", "ln -f tree/one tree/sub/x"),
    _on_tree("links-of-devices", "ln tree/null nul; ln tree/fifo pipe"),
    # --- devices, fifos, xattrs -------------------------------------------------------------
    _on_tree("new-devices", "mknod c c 5 1; mknod b b 7 300; mkfifo p; mknod tree/z c 1 5"),
    _on_tree("device-number", "rm tree/null; mknod tree/null c 1 5"),
    _on_tree("device-mode", "chmod 600 tree/null tree/loop tree/fifo"),
    _on_tree("device-time", "touch -h -d @1000000000 tree/loop tree/null tree/fifo"),
    _on_tree("xattr", "setfattr -n user.note -v 1 tree/one; setfattr -n user.d -v 2 tree/sub"),
    Case(
        "xattr-value", ("echo a > a; setfattr -n user.note -v 1 a",), "setfattr -n user.note -v 2 a"
    ),
    Case("xattr-removed", ("echo a > a; setfattr -n user.note -v 1 a",), "setfattr -x user.note a"),
    Case("xattr-kept", ("echo a > a; setfattr -n user.note -v 1 a",), "chmod 600 a; chmod 644 a"),
    _on_tree("xattr-and-content", "setfattr -n user.note -v 1 tree/one; echo m >> tree/one"),
    # --- names ------------------------------------------------------------------------------
    Case(
        "odd-names",
        (r"""echo a > 'a b'; echo n > "$(printf 'n\nl')"; mkdir -- -d; echo i > ./-d/i""",),
        r"""
        echo m >> 'a b'; rm "$(printf 'n\nl')"; echo n > "$(printf '\377\t')"; rm -r -- -d
        echo q > "'\""
        """,
    ),
    Case(
        "unicode",
        ("echo a > ä; echo e > \"$(printf 'e\\314\\201')\"; echo é > é",),
        "rm ä; echo m >> é; mkdir 日本; echo x > 日本/語",
    ),
    Case(
        "sorted",
        ("mkdir a; echo 1 > a/x; echo 1 > a-b; echo 1 > a.b; echo 1 > ab",),
        "echo 2 >> a/x; echo 2 >> a-b; echo 2 >> a.b; rm ab",
    ),
    Case(
        "long-names",
        (f"echo 1 > {'n' * 255}",),
        f"echo 2 >> {'n' * 255}; mkdir -p {'d' * 200}/{'e' * 200}; echo 3 > {'m' * 255}",
    ),
    _on_tree("looks-like-a-marker", "echo a > .wh; mkdir wh.; echo b > tree/wh.one"),
    # --- several layers below ---------------------------------------------------------------
    _on_layers("layers-untouched", "chmod 755 d d/sub; touch again"),
    _on_layers(
        "layers-append", "for f in d/low d/mid d/back d/sub/low d/sub/top; do echo 4 >> $f; done"
    ),
    _on_layers("layers-remove", "rm -r d"),
    _on_layers(
        "layers-remove-and-make", "rm -r d; mkdir -p d/sub; echo 4 > d/low; echo 4 > d/sub/new"
    ),
    _on_layers(
        "layers-made-again-where-deleted",
        "mkdir -p gone/sub; for f in gone/sub/x d/sub/mid d/sub/deep/low; do echo 4 > $f; done",
    ),
    _on_layers(
        "layers-in-opaque",
        "echo 4 >> hidden/new; echo 4 > hidden/old; mkdir hidden/sub; rm again/y; :> again/x",
    ),
    _on_layers("layers-remove-opaque", "rm -r hidden; mkdir hidden; rm -r again"),
    _on_layers(
        "layers-types",
        "rm file link/l; mkdir file; : > file/f; rmdir directory link; : >directory; ln -s d link",
    ),
    _on_layers("layers-rename", "mv d e; mv hidden/new hidden/old; mv kept/x again/x"),
    _on_layers("layers-mode", "chmod 700 d d/sub/deep hidden again; chmod 600 d/back file"),
)


def named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


def everything(cases: Iterable[Case] = CASES) -> str:
    """One script for ``sh -c`` that does what the cases do; where one fails it names it."""
    return _joined((case.name, case.script) for case in cases)


def of(name: str, lines: Iterable[str]) -> set[str]:
    """Of a listing (``A /path`` lines) what is of that case."""
    start = "/" + name
    return {line for line in lines if line[2:] == start or line[2:].startswith(start + "/")}


def _joined(scripts: Iterable[tuple[str, str]]) -> str:
    lines = ["set -e", "trap '[ $? = 0 ] || echo \"in $name\" >&2' EXIT", "umask 022"]
    for name, script in scripts:
        lines += [f"name={name}", f"( cd /{name}", script.strip(), ")"]
    return "\n".join(lines) + "\n"


def build(place: Path, cases: Iterable[Case] = CASES) -> Path:
    """The image of all cases as a docker-archive in ``place``, tagged ``NAME``; ``CMD`` is sh.

    Its layers are real upper directories. To be called in a mount namespace of the caller's own.
    """
    cases = tuple(cases)
    root = place / "changes"
    (root / "0").mkdir(parents=True)
    _programs(root / "0")
    for case in cases:
        (root / "0" / case.name).mkdir()
    layers = [_layer(root, number, cases) for number in range(max(len(c.below) for c in cases))]
    archive = docker_archive(place / "changes.tar", layers, tags=(NAME,))
    shutil.rmtree(root)
    return archive


def _layer(root: Path, number: int, cases: Iterable[Case]) -> bytes:
    """What the scripts for one layer do, as a layer's tar."""
    script = _joined((case.name, case.below[number]) for case in cases if number < len(case.below))
    here = root / str(number)
    if number == 0:
        _run(here, script)
    else:
        here.mkdir()
        here.chmod(0o755)
        (root / "work").mkdir(exist_ok=True)
        (root / "merged").mkdir(exist_ok=True)
        lower = ":".join(str(root / str(below)) for below in reversed(range(number)))
        options = f"lowerdir={lower},upperdir={here},workdir={root}/work"
        options += ",index=off,metacopy=off,redirect_dir=nofollow,xino=off"
        command.output("mount", "-t", "overlay", "overlay", "-o", options, root / "merged")
        try:
            _run(root / "merged", script)
        finally:
            command.output("umount", root / "merged")
    fd = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Docker could not save what it has loaded.
        writer = TarWriter(fd, layer=number > 0, sparse=False)
        tar = b"".join(writer)
    finally:
        os.close(fd)
    assert writer.notes == {}
    return tar


def _run(root: Path, script: str) -> None:
    done = subprocess.run(
        ["chroot", root, "/bin/sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env={"PATH": "/bin:/usr/sbin:/usr/bin"},
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")


def run(root: Path, cases: Iterable[Case] = CASES) -> None:
    """Let the cases happen in a mounted container."""
    _run(root, everything(cases))


def _programs(root: Path) -> None:
    """Busybox and setfattr, with what it loads."""
    require("busybox", "setfattr")
    busybox = Path(shutil.which("busybox") or "")
    if b"/ld-" in busybox.read_bytes():
        missing("a static busybox")
    (root / "bin").mkdir()
    (root / "dev").mkdir()
    shutil.copy(busybox, root / "bin/busybox")
    for name in command.output(busybox, "--list").split():
        if name != "busybox":
            os.symlink("busybox", root / "bin" / name)
    for path in _loaded(shutil.which("setfattr") or ""):
        (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.lstrip("/"))
    shutil.copy(shutil.which("setfattr") or "", root / "bin/setfattr")


def _loaded(program: str) -> Iterator[str]:
    for word in command.output("ldd", program).split():
        if word.startswith("/"):
            yield word

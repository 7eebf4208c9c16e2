"""The header parser against Python's tarfile, GNU tar and bsdtar, and on what must fail."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlayctl.errors import BadTar, LimitExceeded
from overlayctl.layer.tar import Member
from tests.layer.tars import (
    END,
    directory,
    entry,
    hardlink,
    members,
    python_members,
    symlink,
    tar,
)

_names = st.lists(
    st.text(
        st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60
    ).filter(lambda n: n not in (".", "..")),
    min_size=1,
    max_size=5,
).map("/".join)
_entries = st.fixed_dictionaries(
    {
        "name": _names,
        "type": st.sampled_from(
            [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
        ),
        "mode": st.integers(0, 0o7777),
        "uid": st.integers(0, 2**32 - 2),
        "gid": st.integers(0, 2**32 - 2),
        "mtime": st.integers(-(2**40), 2**40),
        "data": st.binary(max_size=1500),
        "devmajor": st.integers(1, 4095),
        "devminor": st.integers(0, 1048575),
    }
)


def _build(entries: list[dict[str, object]], form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for fields in entries:
            info = tarfile.TarInfo(str(fields["name"]))
            for key in ("type", "mode", "uid", "gid", "mtime", "devmajor", "devminor"):
                setattr(info, key, fields[key])
            data = fields["data"]
            assert isinstance(data, bytes)
            if info.type == tarfile.REGTYPE:
                info.size = len(data)
            elif info.type == tarfile.SYMTYPE:
                info.linkname = "target/" + info.name
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _of_ours(member: Member, data: bytes) -> tuple[object, ...]:
    device = (member.major, member.minor) if member.type == b"3" else ()
    content = data[member.data : member.data + member.stored]
    return (
        member.name.rstrip(b"/"), member.type, member.mode, member.uid, member.gid,
        member.mtime, member.linkname, device, content,
    )  # fmt: skip


def _of_python(info: tarfile.TarInfo, data: bytes) -> tuple[object, ...]:
    device = (info.devmajor, info.devminor) if info.type == tarfile.CHRTYPE else ()
    content = data[info.offset_data : info.offset_data + info.size] if info.isreg() else b""
    name, link = (text.encode("utf-8", "surrogateescape") for text in (info.name, info.linkname))
    return (
        name.rstrip(b"/"), info.type, info.mode, info.uid, info.gid,
        info.mtime, link, device, content,
    )  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(entries=st.lists(_entries, max_size=8))
@settings(max_examples=150, deadline=None)
def test_agrees_with_tarfile(
    tmp_path_factory: pytest.TempPathFactory, form: int, entries: list[dict[str, object]]
) -> None:
    data = _build(entries, form)
    place = tmp_path_factory.mktemp("tar")
    ours = members(data, place)
    listed = subprocess.run(
        ["bsdtar", "-tf", place / "members.tar"], check=True, capture_output=True
    ).stdout.splitlines()
    assert len(listed) == len(ours)
    assert [_of_ours(m, data) for m in ours] == [_of_python(i, data) for i in python_members(data)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format=gnu"],
        ["--format=oldgnu"],
        ["--format=v7"],
        ["--format=ustar"],
        ["--format=posix"],
        ["--format=gnu", "--sparse"],
        ["--format=posix", "--sparse", "--sparse-version=0.0"],
        ["--format=posix", "--sparse", "--sparse-version=0.1"],
        ["--format=posix", "--sparse", "--sparse-version=1.0"],
    ],
    ids=" ".join,
)
def test_reads_what_gnu_tar_writes(tmp_path: Path, arguments: list[str]) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "plain").write_bytes(b"x" * 700)
    (tree / "empty").touch()
    with (tree / "holes").open("wb") as file:
        for piece in range(40):
            file.seek(piece * 100_000)
            file.write(b"piece %d" % piece)
        file.truncate(5_000_001)
    (tree / "link").symlink_to("plain")
    (tree / "hard").hardlink_to(tree / "plain")
    path = tmp_path / "out.tar"
    subprocess.run(["tar", *arguments, "--sort=name", "-cf", path, "-C", tree, "."], check=True)
    data = path.read_bytes()
    ours = {m.name: m for m in members(data, tmp_path)}
    listed = subprocess.run(["tar", "-tf", path], check=True, capture_output=True).stdout.split()
    assert sorted(ours) == sorted(listed)
    holes = ours[b"./holes"]
    assert holes.size == 5_000_001
    content = bytearray(holes.size)
    at = holes.data
    for offset, length in holes.extents or ((0, holes.size),):
        content[offset : offset + length] = data[at : at + length]
        at += length
    assert content == (tree / "holes").read_bytes()
    if "--sparse" in arguments:
        assert holes.extents is not None
        assert holes.stored < 1_000_000


@pytest.mark.parametrize("tool", [["tar", "-tf"], ["bsdtar", "-tf"]], ids=lambda t: t[0])
def test_agrees_on_names_with_other_tools(tmp_path: Path, tool: list[str]) -> None:
    data = tar(directory("a"), entry("a/" + "n" * 150 + "/" + "m" * 200), symlink("b", "t" * 300),
               hardlink("c", "a/" + "n" * 150 + "/" + "m" * 200))  # fmt: skip
    path = tmp_path / "names.tar"
    path.write_bytes(data)
    listed = subprocess.run([*tool, path], check=True, capture_output=True).stdout.splitlines()
    assert [m.name.rstrip(b"/") for m in members(data, tmp_path)] == [
        n.rstrip(b"/") for n in listed
    ]


def test_times_keep_their_nanoseconds(tmp_path: Path) -> None:
    def at(text: str) -> bytes:
        info = tarfile.TarInfo("f")
        info.pax_headers = {"mtime": text}
        return info.tobuf(tarfile.PAX_FORMAT)

    cases = {
        "1.5": (1, 500_000_000),
        "-1.5": (-2, 500_000_000),
        "-0.25": (-1, 750_000_000),
        "7": (7, 0),
        "7.1234567899": (7, 123_456_789),
        "-9223372036854775808": (-(2**63), 0),
    }
    for text, expected in cases.items():
        (member,) = members(at(text) + END, tmp_path)
        assert (member.mtime, member.mtime_ns) == expected, text


def test_input_may_end_after_the_data(tmp_path: Path) -> None:
    data = entry("f", data=b"abc")[:515]
    assert len(data) == 515
    (member,) = members(data, tmp_path)
    assert (member.size, member.dirty_tail) == (3, False)
    assert members(b"", tmp_path) == []
    assert members(bytes(512), tmp_path) == []


def test_what_follows_the_end_is_not_read(tmp_path: Path) -> None:
    assert len(members(tar(entry("f")) + b"garbage" * 1000, tmp_path)) == 1


def test_old_directories_and_sizes_on_links(tmp_path: Path) -> None:
    sized_link = bytearray(hardlink("l", "f"))
    sized_link[124:136] = b"00000001000\0"
    data = tar(entry("d/", tarfile.AREGTYPE), entry("f"), _checked(sized_link), entry("g"))
    assert [(m.type, m.name) for m in members(data, tmp_path)] == [
        (b"5", b"d/"), (b"0", b"f"), (b"1", b"l"), (b"0", b"g"),
    ]  # fmt: skip


def _checked(block: bytes | bytearray) -> bytes:
    """The header block with its checksum made right again."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


def test_padding_that_is_not_zero_is_seen(tmp_path: Path) -> None:
    dirty = bytearray(entry("f", data=b"abc"))
    dirty[-1] = 1
    assert members(tar(bytes(dirty)), tmp_path)[0].dirty_tail


def test_long_names_win_over_pax_names(tmp_path: Path) -> None:
    long = entry("x", b"L", b"from-L\0")
    pax = entry("x", tarfile.XHDTYPE, b"17 path=from-pax\n")
    assert [m.name for m in members(tar(long, pax, entry("f")), tmp_path)] == [b"from-L"]


def test_pax_size_counts_for_the_next_entry_only(tmp_path: Path) -> None:
    header = bytearray(entry("f"))
    pax = entry("x", tarfile.XHDTYPE, b"9 size=3\n")
    data = tar(pax, bytes(header), b"abc" + bytes(509), entry("g"))
    assert [(m.name, m.size) for m in members(data, tmp_path)] == [(b"f", 3), (b"g", 0)]


_GOOD = tar(directory("d"), entry("d/f", data=b"x" * 1000), symlink("s", "d/f"))


@pytest.mark.parametrize(
    ("what", "data", "words"),
    [
        ("cut in a header", _GOOD[: 512 + 100], "cut inside a header"),
        ("cut in data", _GOOD[: 1024 + 300], "claims 1000 bytes"),
        ("bad checksum", b"e" + _GOOD[1:], "checksum"),
        ("text", b"ID=debian\n" * 200, "not a tar header|octal"),
        ("one zero block, then data", bytes(512) + _GOOD, "one zero block"),
        ("vendor type", tar(entry("f", b"D")), "incremental dump"),
        ("volume label", tar(entry("f", b"V")), "volume label"),
        ("unknown type", tar(entry("f", b"Z")), "unknown type"),
        ("broken pax", tar(entry("x", tarfile.XHDTYPE, b"99 path=a\n"), entry("f")), "pax record"),
        ("pax without length", tar(entry("x", tarfile.XHDTYPE, b"path=a\n"), entry("f")), "pax"),
        (
            "pax size not a number",
            tar(entry("x", tarfile.XHDTYPE, b"10 size=x\n"), entry("f")),
            "number",
        ),
        ("negative owner", tar(entry("x", tarfile.XHDTYPE, b"9 uid=-1\n"), entry("f")), "owner"),
        ("octal nonsense", tar(_checked(entry("f")[:124] + b"0x12_4" + entry("f")[130:])), "octal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(tmp_path: Path, what: str, data: bytes, words: str) -> None:
    with pytest.raises(BadTar, match=words):
        members(data, tmp_path)


def test_tarfile_stops_silently_where_we_fail(tmp_path: Path) -> None:
    """Why ``tarfile`` is an oracle and not the parser."""
    broken = bytearray(_GOOD)
    broken[512] ^= 0xFF
    assert len(list(python_members(bytes(broken)))) == 1
    with pytest.raises(BadTar):
        members(bytes(broken), tmp_path)


def test_limits(tmp_path: Path) -> None:
    with pytest.raises(LimitExceeded, match="extended header"):
        members(tar(entry("x", b"L", b"n" * (1 << 20) + b"n"), entry("f")), tmp_path)


@given(at=st.integers(0, len(_GOOD) - 1), value=st.integers(0, 255))
@settings(max_examples=400, deadline=None)
def test_any_changed_byte_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    """A changed header byte never passes: only data and what follows the end may differ."""
    data = bytearray(_GOOD)
    if data[at] == value:
        return
    data[at] = value
    good = members(_GOOD, tmp_path_factory.mktemp("good"))
    try:
        changed = members(bytes(data), tmp_path_factory.mktemp("changed"))
    except (BadTar, LimitExceeded):
        return
    assert [m._replace(dirty_tail=False) for m in changed] == [
        m._replace(dirty_tail=False) for m in good
    ]

"""What ``-v``, ``--mount`` and ``--tmpfs`` say, and what is refused by name."""

from __future__ import annotations

import pytest

from overlayctl import placed
from overlayctl.errors import BadInput, Usage
from overlayctl.placed import Placed

HERE = "/work/dir"


def bind(source: str, target: str, *options: str, read_only: bool = False) -> Placed:
    return Placed("bind", source, target, read_only, options, make=True)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("data:/data", Placed("volume", "data", "/data")),
        ("data:/data:ro", Placed("volume", "data", "/data", read_only=True)),
        ("data:/data:rw,nocopy", Placed("volume", "data", "/data", copy=False)),
        ("data:/data:z,ro", Placed("volume", "data", "/data", read_only=True)),
        ("data:/a/../b//c/.", Placed("volume", "data", "/b/c")),
        ("data://b", Placed("volume", "data", "/b")),
        ("da-t_a.1:/..//x", Placed("volume", "da-t_a.1", "/x")),
        ("/data", Placed("volume", "", "/data", anonymous=True)),
        ("/data/", Placed("volume", "", "/data", anonymous=True)),
        ("/host:/x", bind("/host", "/x")),
        ("/:/host", bind("/", "/host")),
        ("//a/./b/../c:/x", bind("/a/c", "/x")),
        ("/host:/x:ro,rshared,Z", bind("/host", "/x", "rshared", read_only=True)),
        ("/host:/x:cached", bind("/host", "/x")),
        ("./sub:/x", bind("/work/dir/sub", "/x")),
        (".:/x", bind("/work/dir", "/x")),
        ("../y:/x", bind("/work/y", "/x")),
        (".hidden:/x", bind("/work/dir/.hidden", "/x")),
        ("/proc:/host/proc:ro", bind("/proc", "/host/proc", read_only=True)),
        ("/a b\udcff:/x\ny", bind("/a b\udcff", "/x\ny")),
    ],
)
def test_volumes(text: str, wanted: Placed) -> None:
    assert placed.volume(text, HERE) == wanted


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("data", "not absolute"),
        ("data:x", "not absolute"),
        ("", "empty"),
        (":", "empty"),
        (":/x", "empty"),
        ("data:", "empty"),
        ("data:/x:", "empty"),
        ("data:/x:ro,", "unknown option ''"),
        ("data:/x:,ro", "unknown option ''"),
        ("/x:ro", "anonymous"),
        ("/x:ro,nocopy", "anonymous"),
        ("data:/", "over the container's /"),
        ("data:/x/..", "over the container's /"),
        ("/..", "over the container's /"),
        ("data:/proc", "/proc"),
        ("data:/proc/sys/kernel", "/proc"),
        ("data:/x/../proc/1", "/proc"),
        ("a:b:/x:ro", "colons"),
        ("/a:b:/x:ro:z", "colons"),
        ("data:/x:no", "unknown option 'no'"),
        ("data:/x:ro,rw", "contradicts"),
        ("data:/x:ro,ro", "contradicts"),
        ("/h:/x:z,Z", "contradicts"),
        ("/h:/x:shared,rslave", "contradicts"),
        ("/h:/x:nocopy", "for volumes"),
        ("data:/x:rshared", "for directories of the host"),
        ("a:/x", "no valid volume name"),
        ("-ab:/x", "no valid volume name"),
        ("sub/dir:/x", "no valid volume name"),
        ("~/dir:/x", "no path"),
        ("d\xe4ta:/x", "no valid volume name"),
        ("data:/x\0y", "NUL"),
        ("data\n:/x", "no valid volume name"),
    ],
)
def test_volumes_that_are_refused(text: str, why: str) -> None:
    with pytest.raises(Usage, match=why) as refused:
        placed.volume(text, HERE)
    assert refused.value.hint
    assert str(refused.value).startswith(f"-v {text}"[:20])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("source=data,target=/x", Placed("volume", "data", "/x")),
        ("type=volume,src=data,dst=/x,ro", Placed("volume", "data", "/x", read_only=True)),
        ("TYPE=Volume,Source=data,Destination=/x", Placed("volume", "data", "/x")),
        ("src=data,dst=/x,readonly=false", Placed("volume", "data", "/x")),
        ("src=data,dst=/x,volume-nocopy", Placed("volume", "data", "/x", copy=False)),
        ("src=data,dst=/x,volume-nocopy=0", Placed("volume", "data", "/x")),
        ("type=volume,target=/x", Placed("volume", "", "/x", anonymous=True)),
        ("type=bind,source=/h,target=/x", Placed("bind", "/h", "/x")),
        ('type=bind,"source=/h,:i",target=/x', Placed("bind", "/h,:i", "/x")),
        ("type=bind,source=./h,target=/x", Placed("bind", "/work/dir/h", "/x")),
        (
            "type=bind,source=/h,target=/x,ro=1,bind-propagation=rslave,consistency=cached",
            Placed("bind", "/h", "/x", True, ("rslave",)),
        ),
        ("type=tmpfs,target=/x", Placed("tmpfs", "", "/x", False, ("noexec", "nosuid", "nodev"))),
        (
            "type=tmpfs,target=/x,tmpfs-size=1.5m,tmpfs-mode=1770,ro",
            Placed(
                "tmpfs", "", "/x", True,
                ("noexec", "nosuid", "nodev", "size=1572864", "mode=1770"),
            ),
        ),
        (
            "type=tmpfs,target=/x,tmpfs-size=64KiB",
            Placed("tmpfs", "", "/x", False, ("noexec", "nosuid", "nodev", "size=65536")),
        ),
    ],
)  # fmt: skip
def test_mounts(text: str, wanted: Placed) -> None:
    assert placed.mount(text, HERE) == wanted


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no target"),
        ("source=data", "no target"),
        ("type=volume,source=data,target=x", "not absolute"),
        ("type=npipe,target=/x", "no type 'npipe'"),
        ("type=image,target=/x", "no type 'image'"),
        ("target=/x,size=3", "unknown field 'size'"),
        ("target=/x,source", "has no value"),
        ("target=/x,target=/y", "two values"),
        ("dst=/x,target=/y", "two values"),
        ("target=/x,readonly=maybe", "true or false"),
        ("target=/x,readonly", "stays empty"),
        ("target=/x,source=./data", "no valid volume name"),
        ("target=/x,tmpfs-size=3m", "not for type=volume"),
        ("target=/x,bind-propagation=shared", "not for type=volume"),
        ("type=bind,target=/x", "no source"),
        ("type=bind,source=h,target=/x", "no absolute path"),
        ("type=bind,source=/h,target=/x,volume-nocopy", "not for type=bind"),
        ("type=bind,source=/h,target=/x,bind-propagation=all", "no propagation"),
        ("type=tmpfs,source=data,target=/x", "no source"),
        ("type=tmpfs,target=/x,tmpfs-size=much", "no size"),
        ("type=tmpfs,target=/x,tmpfs-mode=9", "no mode"),
        ('target="/x', "quote|end of data|'"),
    ],
)
def test_mounts_that_are_refused(text: str, why: str) -> None:
    with pytest.raises(Usage, match=why) as refused:
        placed.mount(text, HERE)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("text", "read_only", "options"),
    [
        ("/run", False, "noexec,nosuid,nodev"),
        ("/run:", False, "noexec,nosuid,nodev"),
        ("/run:exec", False, "nosuid,nodev,exec"),
        ("/run:exec,noexec", False, "nosuid,nodev,noexec"),
        ("/run:ro,size=64m,mode=1777", True, "noexec,nosuid,nodev,size=64m,mode=1777"),
        ("/run:size=1k,size=2k,uid=7", False, "noexec,nosuid,nodev,size=2k,uid=7"),
        ("/run:rw,noatime,nr_inodes=10k", False, "noexec,nosuid,nodev,noatime,nr_inodes=10k"),
    ],
)
def test_tmpfs(text: str, read_only: bool, options: str) -> None:  # noqa: FBT001
    wanted = Placed("tmpfs", "", "/run", read_only, tuple(options.split(",")))
    assert placed.memory(text) == wanted


@pytest.mark.parametrize(
    "text", ["run", "/", "/proc/x", "/run:size", "/run:size=much", "/run:huge=always", "/run:bind"]
)
def test_tmpfs_that_is_refused(text: str) -> None:
    with pytest.raises(Usage) as refused:
        placed.memory(text)
    assert refused.value.hint


def test_upper_directories_come_first_and_no_two_have_one_place() -> None:
    volumes = ["cc:/a/b/c", "aa:/a", "/h:/a/b", "bb:/z", "/z", "/n", "/n"]
    found = placed.wanted(volumes=volumes, mounts=["source=dd,target=/d"], tmpfs=["/t"], here="/")
    assert [one.target for one in found] == ["/a", "/d", "/n", "/t", "/z", "/a/b", "/a/b/c"]
    assert {one.target: one.source for one in found}["/z"] == "bb"
    for volumes, mounts, tmpfs in (
        (["aa:/x", "bb:/x/"], [], []),
        (["aa:/x"], ["type=tmpfs,target=/x"], []),
        (["aa:/x"], [], ["/y/../x"]),
        ([], [], ["/x", "/x:ro"]),
    ):
        with pytest.raises(Usage, match="two mounts are for /x"):
            placed.wanted(volumes=volumes, mounts=mounts, tmpfs=tmpfs, here="/")


def test_volumes_of_an_image() -> None:
    taken = [Placed("tmpfs", "", "/run"), Placed("volume", "data", "/data")]
    found = placed.declared(["/data/", "/var//lib", "/run", "/../x", "/x"], taken)
    assert [(one.target, one.anonymous) for one in found] == [("/x", True), ("/var/lib", True)]
    for path in ("/", "/..", "data", "", "/proc", "/proc/sys", "/a/../../proc/1"):
        with pytest.raises(BadInput, match="asks for a volume") as refused:
            placed.declared([path], [])
        assert "VOLUME" in refused.value.hint

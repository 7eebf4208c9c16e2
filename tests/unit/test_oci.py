import json
import os
from types import SimpleNamespace

import pytest

from overlayctl import oci
from overlayctl.digest import DiffID, of_bytes
from overlayctl.errors import NotFound, Usage
from overlayctl.oci import Platform

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64", "v8")
ARM = {variant: Platform("linux", "arm", variant) for variant in ("", "v5", "v6", "v7", "v8")}
EMPTY = DiffID(of_bytes(b""))


def on(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine, sysname="Linux"))


@pytest.mark.parametrize(
    ("machine", "platform"),
    [
        ("x86_64", "linux/amd64"),
        ("i686", "linux/386"),
        ("aarch64", "linux/arm64/v8"),
        ("armv7l", "linux/arm/v7"),
        ("armv6l", "linux/arm/v6"),
        ("ppc64le", "linux/ppc64le"),
        ("s390x", "linux/s390x"),
        ("riscv64", "linux/riscv64"),
        ("loongarch64", "linux/loong64"),
    ],
)
def test_the_host_in_go_s_words(
    monkeypatch: pytest.MonkeyPatch, machine: str, platform: str
) -> None:
    on(monkeypatch, machine)
    assert str(oci.host_platform()) == platform
    assert oci.parse_platform(platform) == oci.host_platform()


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/arm64/v8", ARM64),
        ("linux/arm64", Platform("linux", "arm64")),
        ("arm64", Platform("linux", "arm64")),
        ("Linux/AMD64", AMD64),
        ("linux/x86_64", AMD64),
        ("linux/aarch64", ARM64),
        ("linux/armv7l", ARM["v7"]),
        ("windows/amd64", Platform("windows", "amd64")),
        ("linux/arm64/v8.2", Platform("linux", "arm64", "v8.2")),
    ],
)
def test_platforms_as_people_write_them(text: str, platform: Platform) -> None:
    assert oci.parse_platform(text) == platform


@pytest.mark.parametrize("text", ["", "/", "linux/", "/amd64", "a/b/c/d", "linux", "linux/a b"])
def test_what_is_no_platform(text: str) -> None:
    with pytest.raises(Usage) as caught:
        oci.parse_platform(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("there", "wanted", "chosen"),
    [
        ([AMD64, ARM64], ARM64, ARM64),
        ([AMD64, ARM64], Platform("linux", "arm64"), ARM64),
        ([Platform("linux", "arm64")], ARM64, Platform("linux", "arm64")),
        ([ARM["v6"], ARM["v7"]], ARM[""], ARM["v7"]),
        ([ARM["v5"], ARM["v6"]], ARM[""], ARM["v6"]),
        ([ARM["v8"]], ARM[""], ARM["v8"]),
        ([ARM["v7"], ARM["v6"]], ARM["v6"], ARM["v6"]),
        ([Platform("linux", "amd64", "v3"), AMD64], None, AMD64),
        ([Platform("linux", "amd64", "v3"), ARM64], None, Platform("linux", "amd64", "v3")),
        ([ARM64, AMD64], None, AMD64),
        ([ARM64], None, ARM64),
        ([ARM64, ARM64], None, ARM64),
        ([Platform("", "")], None, Platform("", "")),
    ],
)
def test_the_platform_that_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    there: list[Platform],
    wanted: Platform | None,
    chosen: Platform,
) -> None:
    on(monkeypatch, "x86_64")
    assert oci.choose(there, wanted, "it") == chosen


def test_an_older_variant_than_the_host_s_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "armv7l")
    assert oci.choose([ARM["v5"], ARM["v6"], ARM["v8"], AMD64], None, "it") == ARM["v6"]


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ([ARM64], AMD64),
        ([ARM["v7"]], ARM["v6"]),
        ([ARM64, ARM["v7"]], None),
        ([Platform("windows", "amd64"), ARM64], None),
        ([], None),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(
    monkeypatch: pytest.MonkeyPatch, there: list[Platform], wanted: Platform | None
) -> None:
    on(monkeypatch, "x86_64")
    with pytest.raises(NotFound) as caught:
        oci.choose(there, wanted, "it")
    assert all(str(platform) in str(caught.value) for platform in there)


def test_a_new_config_is_the_same_bytes_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "x86_64")
    made = [
        oci.new_config([EMPTY, EMPTY], created="2020-01-01T00:00:00Z", comment="x")
        for _ in range(2)
    ]
    assert made[0] == made[1]
    config = json.loads(made[0])
    assert (config["os"], config["architecture"]) == ("linux", "amd64")
    assert config["rootfs"] == {"type": "layers", "diff_ids": [EMPTY, EMPTY]}
    assert len(config["history"]) == 2


def test_a_new_manifest_describes_config_and_layers() -> None:
    config = b'{"a": 1}'
    manifest = json.loads(oci.new_manifest(config, [(EMPTY, 0)]))
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["config"] == {
        "mediaType": "application/vnd.oci.image.config.v1+json",
        "digest": of_bytes(config),
        "size": len(config),
    }
    assert manifest["layers"] == [
        {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": EMPTY, "size": 0}
    ]


@pytest.mark.parametrize(
    ("history", "layers", "lines"),
    [
        ([{"created_by": "a"}, {"created_by": "b"}], 2, ["a", "b"]),
        ([{"created_by": "a"}, {"created_by": "e", "empty_layer": True}, {}], 2, ["a", ""]),
        ([{"created_by": "a"}], 3, ["a", "", ""]),
        ([{"created_by": "a"}, {"created_by": "b"}], 1, ["a"]),
        ([{"comment": "c"}], 1, ["c"]),
        ([None, 3, {"created_by": None}], 1, [""]),
        (None, 2, ["", ""]),
        ("odd", 1, [""]),
        ([], 0, []),
    ],
)
def test_each_layer_has_its_line_of_history(history: object, layers: int, lines: list[str]) -> None:
    assert oci.created_by({"history": history}, layers) == lines

"""The project on Debian's older kernels: each booted in QEMU, with tests of this suite inside.

Emulated without KVM, so that it runs wherever the other tests do: ten to twenty times as slow.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

import pytest

from tests.kernels import qemu
from tests.kernels.test_here import large_images
from tests.oracles.command import output
from tests.rootmount import missing

pytestmark = [pytest.mark.long, pytest.mark.kernels]

SECONDS = 1500
"""More than twice what a kernel takes on two cores that do nothing else."""


class Known(NamedTuple):
    """What a kernel is known to have; the probe in there has to find the same."""

    ways: str
    rungs: str


KERNELS = {
    "6.1": Known(ways="loop unpacked", rungs="mount"),
    "6.12": Known(ways="buffered directio loop unpacked", rungs="strings mount"),
}
INSIDE = (
    "tests/kernels/test_here.py",
    "tests/kernel",
    "tests/test_rungs.py::test_every_way_and_rung_on_every_filesystem",
    "tests/test_rungs.py::test_a_store_on_an_overlay",
    "tests/cli/test_store_through_commands.py",
    "tests/cli/test_in_use.py",
    "tests/cli/test_unpacked.py",
    "tests/store/test_check.py",
)


# Where layers are attached by loop devices, hundreds take minutes there: once is enough.
LEFT_OUT = "not 500_layers and not five_hundred_layers_and_one_more"


class Outcome(NamedTuple):
    """What pytest wrote of its tests."""

    passed: list[str]
    failed: dict[str, str]
    skipped: dict[str, str]
    properties: dict[str, str]


def outcome(report: bytes) -> Outcome:
    """Read a report of pytest's ``--junitxml``."""
    found = Outcome([], {}, {}, {})
    for case in ET.fromstring(report).iter("testcase"):  # noqa: S314 - our own
        name = f"{case.get('classname')}::{case.get('name')}"
        for part in case.iter("property"):
            found.properties[str(part.get("name"))] = str(part.get("value"))
        said = {part.tag: str(part.get("message")) for part in case}
        if problem := said.get("failure") or said.get("error"):
            found.failed[name] = problem
        elif "skipped" in said:
            found.skipped[name] = said["skipped"]
        else:
            found.passed.append(name)
    return found


@pytest.mark.parametrize("series", KERNELS)
def test_on_an_older_kernel(
    tmp_path: Path,
    kept: Path,
    pytestconfig: pytest.Config,
    capsys: pytest.CaptureFixture[str],
    series: str,
) -> None:
    if os.uname().machine != "x86_64":
        missing("x86-64")
    kernel = qemu.debian_kernel(kept / "kernels", series)
    disk = tmp_path / "disk"
    disk.mkdir()
    large_images(disk / "large", tmp_path)
    for layer in (disk / "large" / "layers").glob("*/*.erofs"):
        output("fallocate", "--dig-holes", layer)
    command = [
        "env", "OVERLAYCTL_TEST_LARGE=/mnt/large",
        sys.executable, "-m", "pytest", "-v", "--color=no", "--tb=short", "--durations=20",
        "-p", "no:cacheprovider", "--basetemp=/mnt/tests",
        # The newer family has no properties of tests.
        "-o", "junit_family=xunit1", f"--junitxml={qemu.RESULT}",
        "-m", "kernels or not long", "-k", LEFT_OUT, *INSIDE,
    ]  # fmt: skip
    done = qemu.run(
        kernel,
        command,
        place=tmp_path / "vm",
        directory=pytestconfig.rootpath,
        seconds=SECONDS,
        disk=disk,
    )
    print(done.console)
    found = outcome(done.result)
    with capsys.disabled():
        print(
            f"\nLinux {kernel.release}: {len(found.passed)} passed, {len(found.failed)} failed,"
            f" {len(found.skipped)} skipped in {done.seconds:.0f} s"
        )
    assert found.failed == {}
    # For want of a tool, which is then named here.
    assert found.skipped == {}
    assert done.status == 0
    assert found.properties["kernel"] == kernel.release
    assert found.properties["kernel"].startswith(series + ".")
    known = KERNELS[series]
    assert found.properties["ways"] == known.ways
    assert found.properties["rungs"] == known.rungs

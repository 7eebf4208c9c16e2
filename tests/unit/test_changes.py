"""Dockerfile words that change a config: what docker makes of each was measured (20.10)."""

from __future__ import annotations

import pytest

from overlayctl.errors import Usage
from overlayctl.runtime.changes import changed

CONFIG = {"Env": ["A=1", "B=2"], "Cmd": ["/bin/sh"], "WorkingDir": "/bin", "Labels": {"one": "1"},
          "Healthcheck": {"Test": ["CMD-SHELL", "true"], "Interval": 5_000_000_000}}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("CMD a b", "Cmd", ["/bin/sh", "-c", "a b"]),
        ('CMD ["a", "b"]', "Cmd", ["a", "b"]),
        ('CMD=["a"]', "Cmd", ["a"]),
        ("cmd x", "Cmd", ["/bin/sh", "-c", "x"]),
        ("CMD [a", "Cmd", ["/bin/sh", "-c", "[a"]),
        ("CMD []", "Cmd", None),
        ("ENTRYPOINT a", "Cmd", None),
        ("ENTRYPOINT a", "Entrypoint", ["/bin/sh", "-c", "a"]),
        ("ENTRYPOINT []", "Cmd", ["/bin/sh"]),
        ('ENV A=7 Z="q w"', "Env", ["A=7", "B=2", "Z=q w"]),
        ("ENV=C=3", "Env", ["A=1", "B=2", "C=3"]),
        ("ENV A b c", "Env", ["A=b c", "B=2"]),
        ('ENV A="b\\"c"', "Env", ['A=b"c', "B=2"]),
        ("ENV A='$A'", "Env", ["A=$A", "B=2"]),
        ("ENV A=${A}-${Q:-d}-$NO", "Env", ["A=1-d-", "B=2"]),
        ("ENV X=$A\\ny", "Env", ["A=1", "B=2", "X=1ny"]),
        ("ENV X=${A:+set}${Q:+not}", "Env", ["A=1", "B=2", "X=set"]),
        ("LABEL a b", "Labels", {"one": "1", "a": "b"}),
        ("LABEL a=b\\ c", "Labels", {"one": "1", "a": "b c"}),
        ('LABEL "a b"=c d=\'e f\'', "Labels", {"one": "1", "a b": "c", "d": "e f"}),
        ("WORKDIR sub", "WorkingDir", "/bin/sub"),
        ("WORKDIR $A/x", "WorkingDir", "/bin/1/x"),
        ("WORKDIR /x/../y", "WorkingDir", "/y"),
        ("USER bob", "User", "bob"),
        ("EXPOSE 99/udp 1-3 7:8", "ExposedPorts",
         {"99/udp": {}, "1/tcp": {}, "2/tcp": {}, "3/tcp": {}, "8/tcp": {}}),
        ("VOLUME /a /b", "Volumes", {"/a": {}, "/b": {}}),
        ('VOLUME ["/a b"]', "Volumes", {"/a b": {}}),
        ("ONBUILD RUN y", "OnBuild", ["RUN y"]),
        ("STOPSIGNAL SIGKILL", "StopSignal", "SIGKILL"),
        ("STOPSIGNAL 9", "StopSignal", "9"),
        ("HEALTHCHECK NONE", "Healthcheck", {"Test": ["NONE"], "Interval": 5_000_000_000}),
        ('HEALTHCHECK --retries=3 --timeout=1m1.5s CMD ["a","b"]', "Healthcheck",
         {"Test": ["CMD", "a", "b"], "Interval": 5_000_000_000, "Timeout": 61_500_000_000,
          "Retries": 3}),
        ("HEALTHCHECK CMD a b", "Healthcheck",
         {"Test": ["CMD-SHELL", "a b"], "Interval": 5_000_000_000}),
    ],
)  # fmt: skip
def test_a_change(change: str, key: str, value: object) -> None:
    result = changed(CONFIG, [change])
    assert result[key] == value
    touched = {key, "Cmd", "Entrypoint"} if change.startswith("ENTRYPOINT") else {key}
    assert {k: v for k, v in result.items() if k not in touched} == {
        k: v for k, v in CONFIG.items() if k not in touched
    }


def test_a_command_before_or_after_the_entrypoint_stays() -> None:
    for both in (["CMD b", 'ENTRYPOINT ["a"]'], ['ENTRYPOINT ["a"]', "CMD b"]):
        assert changed(CONFIG, both)["Cmd"] == ["/bin/sh", "-c", "b"]


@pytest.mark.parametrize(
    "change",
    [
        "", "#x", "FROM x", "RUN x", "MAINTAINER x", 'SHELL ["a"]', "CMD", "USER", "WORKDIR",
        "ENV A", "LABEL a", "ENV A=1 B", 'ENV "A=b"', "ENV =b", "ENV A=${x", "ENV A='x",
        "EXPOSE x", "EXPOSE 80/foo", "EXPOSE 70000", "EXPOSE 3-1", "VOLUME []", 'CMD ["a", 1]',
        "ONBUILD FROM x", "STOPSIGNAL nosuch", "STOPSIGNAL 99", "HEALTHCHECK x",
        "HEALTHCHECK --retries=0 CMD x", "HEALTHCHECK --interval=1us CMD x",
        "HEALTHCHECK --interval=5 CMD x", "HEALTHCHECK --x=1 NONE",
        "HEALTHCHECK --interval=9999999h CMD x", f"HEALTHCHECK --interval={'9' * 400}h CMD x",
        "HEALTHCHECK --retries=9223372036854775808 CMD x", "HEALTHCHECK --retries=\u0663 CMD x",
        f"EXPOSE {'9' * 5000}", "EXPOSE \u0663",
    ],
)  # fmt: skip
def test_no_change(change: str) -> None:
    with pytest.raises(Usage) as error:
        changed(CONFIG, [change])
    assert repr(change) in str(error.value)
    assert error.value.hint

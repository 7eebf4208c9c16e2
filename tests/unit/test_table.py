import base64
import time
import unicodedata
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayctl.cli import table

MINUTE, HOUR, DAY = 60, 3600, 86_400


def test_columns_stand_three_spaces_apart() -> None:
    assert table.table(["ID", "NAME"], [["1", "long one"], ["22222", "x"]]) == (
        "ID      NAME\n1       long one\n22222   x"
    )


def test_no_rows_and_uneven_rows() -> None:
    assert table.table(["A", "B"], []) == "A   B"
    assert table.table(["A", "B"], [["1"], ["1", "2", "3"]]) == "A   B\n1\n1   2   3"


def test_wide_and_combining_characters_are_counted_as_a_terminal_shows_them() -> None:
    lines = table.table(["N", "X"], [["漢字", "x"], ["e\u0301", "x"], ["abcd", "x"]]).split("\n")
    assert lines == ["N      X", "漢字   x", "e\u0301      x", "abcd   x"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "1kB"),
        (1120, "1.12kB"),
        (999_400, "999kB"),
        (999_500, "1MB"),
        (1_234_567, "1.23MB"),
        (21_500_000, "21.5MB"),
        (142_000_000, "142MB"),
        (1_000_000_000_000, "1TB"),
        (5 * 10**20, "500EB"),
        (10**22, "1e+04EB"),
    ],
)
def test_sizes_are_docker_s(count: int, text: str) -> None:
    assert table.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-100, "Less than a second"),
        (0.9, "Less than a second"),
        (1, "1 second"),
        (59.9, "59 seconds"),
        (MINUTE, "About a minute"),
        (119, "About a minute"),
        (120, "2 minutes"),
        (HOUR - 1, "59 minutes"),
        (HOUR, "About an hour"),
        (HOUR + 29 * MINUTE, "About an hour"),
        (HOUR + 30 * MINUTE, "2 hours"),
        (47 * HOUR, "47 hours"),
        (48 * HOUR, "2 days"),
        (13 * DAY + 23 * HOUR, "13 days"),
        (14 * DAY, "2 weeks"),
        (59 * DAY, "8 weeks"),
        (60 * DAY, "2 months"),
        (729 * DAY, "24 months"),
        (730 * DAY, "2 years"),
        (10 * 365 * DAY, "10 years"),
    ],
)
def test_ages_are_docker_s(monkeypatch: pytest.MonkeyPatch, seconds: float, text: str) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000 + seconds)
    when = datetime.fromtimestamp(1_700_000_000, UTC).isoformat()
    assert table.ago(when) == f"{text} ago"
    assert table.ago(when.replace("+00:00", "Z")) == f"{text} ago"


@pytest.mark.parametrize("when", ["", "yesterday", "2020-13-01T00:00:00Z"])
def test_what_is_no_time_stays_as_it_is(when: str) -> None:
    assert table.ago(when) == when


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name é漢🙂", "plain name é漢🙂"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\tb\nc\rd\x7f\0", "a\\x09b\\x0ac\\x0dd\\x7f\\x00"),
        ("\x9b", "\\u009b"),
        (b"\x9b\xff", "\\x9b\\xff"),
        ("\udcff", "\\xff"),
        ("\ud800", "\\ud800"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\u200e\u061c\u2066\u200b\ufeff\u2028", "\\u200e\\u061c\\u2066\\u200b\\ufeff\\u2028"),
        ("\U000e0041", "\\U000e0041"),
        ("\\x1b", "\\x1b"),
    ],
)
def test_what_steers_a_terminal_is_shown(name: str | bytes, shown: str) -> None:
    assert table.printable(name) == shown


@given(st.text(st.characters(codec=None)) | st.binary())
def test_nothing_hidden_is_ever_printed(name: str | bytes) -> None:
    shown = table.printable(name)
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown)
    assert table.printable(shown) == shown
    shown.encode()


@given(st.binary())
def test_names_in_json_lose_nothing(name: bytes) -> None:
    fields = table.json_name(name)
    if "name_base64" in fields:
        assert base64.b64decode(fields["name_base64"]) == name
        with pytest.raises(UnicodeDecodeError):
            name.decode()
    else:
        assert fields["name"].encode() == name

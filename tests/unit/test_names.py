import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from overlayctl import names
from overlayctl.errors import Ambiguous, NotFound, Usage

HEX = "0123456789abcdef" * 4

component = st.from_regex(r"\A[a-z0-9]{1,8}(?:(?:\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}\Z")
references = st.builds(
    lambda domain, path, tag: f"{domain}/{'/'.join(path)}:{tag}",
    st.sampled_from(["docker.io", "localhost", "ghcr.io", "host:5000", "[::1]:80", "Upper"]),
    st.lists(component, min_size=1, max_size=3) | st.just(["library", "a", "b"]),
    st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}\Z"),
)


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("library/busybox", "docker.io/library/busybox:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("team/app", "docker.io/team/app:latest"),
        ("localhost", "docker.io/library/localhost:latest"),
        ("localhost/x:1", "localhost/x:1"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("host:5000/a/b:tag", "host:5000/a/b:tag"),
        ("127.0.0.1:5055/toy:oci", "127.0.0.1:5055/toy:oci"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("gcr.io/google-containers/pause:2.0", "gcr.io/google-containers/pause:2.0"),
        ("Host/app", "Host/app:latest"),
        ("a__b/c---d.e", "docker.io/a__b/c---d.e:latest"),
        ("a:" + "t" * 128, "docker.io/library/a:" + "t" * 128),
        ("deadbeef", "docker.io/library/deadbeef:latest"),
        (HEX + ":x", f"docker.io/library/{HEX}:x"),
    ],
)
def test_a_reference_is_stored_fully_qualified(text: str, stored: str) -> None:
    assert names.stored(text) == stored
    assert names.stored(stored) == stored


@pytest.mark.parametrize(
    "text",
    [
        *["", ":tag", "a:", "/a", "a/", "a//b", "docker.io/", "localhost/", "a b", "a\n", "a:b\n"],
        *["A", "a/B", "a:t:u", "a:-x", "a:.x", "a:" + "t" * 129, "a..b", "a___b", "-a", "a-", ".a"],
        *["host:port/a", "ho_st.x/a", "-host.x/a", "https://x.io/a", "é", "a:é", "../a", "a\0"],
        *["a@sha256:" + HEX, "a:1@sha256:" + HEX, HEX, "x" * 255],
    ],
)
def test_what_docker_refuses_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(Usage) as caught:
        names.stored(text)
    assert caught.value.hint


def test_a_name_is_255_characters_at_most() -> None:
    longest = "x" * (255 - len("docker.io/library/"))
    assert names.stored(longest).endswith(longest + ":latest")
    with pytest.raises(Usage, match="255"):
        names.stored(longest + "x")


def test_the_hint_for_capitals_is_a_name_that_works() -> None:
    with pytest.raises(Usage) as caught:
        names.stored("ghcr.io/Team/App")
    assert names.stored(caught.value.hint) == "ghcr.io/team/app:latest"


@pytest.mark.parametrize(
    ("stored", "familiar"),
    [
        ("docker.io/library/busybox:latest", "busybox:latest"),
        ("docker.io/team/app:1", "team/app:1"),
        ("localhost/x:1", "localhost/x:1"),
        ("ghcr.io/library/x:1", "ghcr.io/library/x:1"),
        ("docker.io/library/a/b:1", "library/a/b:1"),
        ("docker.io/foo.bar/x:1", "docker.io/foo.bar/x:1"),
        ("docker.io/localhost/x:1", "docker.io/localhost/x:1"),
    ],
)
def test_the_familiar_form_is_docker_s(stored: str, familiar: str) -> None:
    assert names.familiar(stored) == familiar


@given(references)
def test_the_familiar_form_means_the_same_reference(text: str) -> None:
    stored = names.stored(text)
    assert names.stored(names.familiar(stored)) == stored


def test_tag_files_are_percent_encoded() -> None:
    assert names.tag_file("docker.io/library/a:1.0") == "docker.io%2Flibrary%2Fa%3A1.0"


@given(references, references)
def test_tag_files_differ_and_are_safe(first: str, second: str) -> None:
    one, two = (names.tag_file(names.stored(text)) for text in (first, second))
    assert (one == two) == (names.stored(first) == names.stored(second))
    assert re.fullmatch(r"[A-Za-z0-9%][A-Za-z0-9._%-]{0,199}", one)


def test_long_references_get_files_of_their_own() -> None:
    stem = names.stored("x.io/" + "/".join(["abcdefgh"] * 25))
    first, second = names.tag_file(stem + "1"), names.tag_file(stem + "2")
    assert first != second
    assert max(len(first), len(second)) <= 200


def test_an_exact_id_beats_a_longer_one() -> None:
    assert names.match("abc", ["abcd", "abc"]) == "abc"


@pytest.mark.parametrize("text", ["0", "01", "sha256:01", HEX, "sha256:" + HEX])
def test_a_unique_start_is_enough(text: str) -> None:
    assert names.match(text, [HEX, "f" * 64, HEX]) == HEX


@pytest.mark.parametrize("text", ["", "sha256:", "g", "0F", "/", "e", HEX + "0", "sha512:01"])
def test_what_starts_no_id_is_not_found(text: str) -> None:
    with pytest.raises(NotFound):
        names.match(text, [HEX, "f" * 64])


def test_an_ambiguous_start_names_candidates_that_can_be_told_apart() -> None:
    first, second = "a" * 20 + "b" * 44, "a" * 20 + "c" * 44
    with pytest.raises(Ambiguous) as caught:
        names.match("aa", [first, second])
    assert caught.value.details["candidates"] == [first[:21], second[:21]]


@pytest.mark.parametrize(
    ("text", "fits"),
    [("a", True), ("sha256:" + HEX, True), ("", False), ("A", False), (HEX + "0", False)],
)
def test_what_may_be_an_id(text: str, fits: bool) -> None:  # noqa: FBT001
    assert names.is_id(text) is fits


def test_twelve_digits_are_shown() -> None:
    assert names.short("sha256:" + HEX) == names.short(HEX) == "0123456789ab"


@pytest.mark.parametrize("name", ["ab", "A1", "0_.-", "x" * 255, "deadbeef"])
def test_container_names_that_fit(name: str) -> None:
    assert names.container_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a", ".a", "-a", "_a", "a/b", "a b", "ab\n", "é1", "x" * 256, HEX]
)
def test_container_names_that_do_not(name: str) -> None:
    with pytest.raises(Usage):
        names.container_name(name)


def test_a_hint_names_what_is_close() -> None:
    assert names.near("busybx", ["alpine", "busybox"]) == "did you mean busybox?"
    assert names.near("zzz", ["alpine", "busybox"]) == ""


@given(st.text(max_size=40))
def test_any_text_is_a_reference_or_usage(text: str) -> None:
    try:
        stored = names.stored(text)
    except Usage:
        return
    assume(stored)
    assert names.stored(stored) == stored

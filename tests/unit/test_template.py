import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayctl.cli.template import render, split_table
from overlayctl.errors import Usage

IMAGE: dict[str, Any] = {
    "Id": "sha256:abc",
    "RepoTags": ["a:1", "b:2"],
    "Size": 1234,
    "Ratio": 0.5,
    "Attached": True,
    "Parent": "",
    "Config": {"Labels": {"b": "2", "a": "1"}, "Env": None, "Cmd": ["sh", "-c", "x | y"]},
    "GraphDriver": {"Data": {"UpperDir": "/u"}},
    "Layers": [{"Index": 1, "Path": "/l/1"}, {"Index": 2, "Path": "/l/2"}],
    "None": [],
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("", ""),
        ("plain }} { text", "plain }} { text"),
        ("{{.Id}}", "sha256:abc"),
        ("{{ .GraphDriver.Data.UpperDir }}", "/u"),
        ("{{$.Id}}{{$.Config.Cmd}}", "sha256:abc[sh -c x | y]"),
        # Values as Go shows them.
        ("{{.Attached}} {{.Size}} {{.Ratio}}", "true 1234 0.5"),
        ("{{.RepoTags}} {{.None}}", "[a:1 b:2] []"),
        ("{{.Config.Labels}} {{.Config.Env}}", "map[a:1 b:2] <no value>"),
        ("{{.Layers}}", "[map[Index:1 Path:/l/1] map[Index:2 Path:/l/2]]"),
        # Maps with anybody's keys, and what is below nothing.
        ("{{.Config.Labels.a}} {{.Config.Labels.zz}}", "1 <no value>"),
        ('[{{index .Config.Labels "zz"}}]', "[]"),
        ("{{.Config.Env.x}}", "<no value>"),
        # Functions.
        ("{{json .RepoTags}}", '["a:1","b:2"]'),
        ("{{json .Config.Env}} {{json .Attached}}", "null true"),
        ("{{len .RepoTags}} {{len .Id}} {{len .Config.Env}}", "2 10 0"),
        ('{{index .RepoTags 1}} {{index .Config.Labels "a"}}', "b:2 1"),
        ("{{(index .Layers 1).Path}}", "/l/2"),
        ('{{index .Layers 0 "Path"}}', "/l/1"),
        ('{{join .RepoTags ", "}}', "a:1, b:2"),
        ('{{index (split .Id ":") 1}}', "abc"),
        ("{{upper .Id}} {{lower `ABC`}} {{title `two words`}}", "SHA256:ABC abc Two Words"),
        ("{{println .Id 1 2}}", "sha256:abc 1 2\n"),
        ('{{print 1 2 "a" "b" 3}}', "1 2ab3"),
        ("{{truncate .Id 3}}{{slice .Id 7}}{{slice .Id 7 8}}", "shaabca"),
        ('{{pad "x" 1 2}}|', " x  |"),
        # printf.
        (
            '{{printf "%s %d %q %v%%" .Id .Size .Id .RepoTags}}',
            'sha256:abc 1234 "sha256:abc" [a:1 b:2]%',
        ),
        (
            '{{printf "[%-5s][%5d][%05d][%.2f][%.2s][%x][%t]" "ab" 7 7 .Ratio "abc" 255 true}}',
            "[ab   ][    7][00007][0.50][ab][ff][true]",
        ),
        ('{{printf "%q" "a\\"\\n\\x1b\\u202e"}}', '"a\\"\\n\\x1b\\u202e"'),
        # Pipelines; a bar within a string is none.
        ("{{.RepoTags | json}}", '["a:1","b:2"]'),
        ('{{.Id | printf "%s=%s" "id" | upper}}', "ID=SHA256:ABC"),
        ('{{join .RepoTags "|"}}', "a:1|b:2"),
        ("{{len (index .RepoTags 0 | json)}}", "5"),
        # Strings.
        ('{{"a\\tb\\u00e9"}}{{`raw\\n`}}{{"}}"}}{{"{{"}}', "a\tbéraw\\n}}{{"),
        # range.
        ('{{range .Layers}}{{.Index}} {{.Path}}{{"\\n"}}{{end}}', "1 /l/1\n2 /l/2\n"),
        ("{{range .None}}x{{else}}none{{end}}", "none"),
        ("{{range .Config.Env}}x{{else}}none{{end}}", "none"),
        ("{{range $i, $v := .RepoTags}}{{if $i}},{{end}}{{$i}}={{$v}}{{end}}", "0=a:1,1=b:2"),
        ("{{range $v := .RepoTags}}{{$v}}{{$.Size}}{{.}} {{end}}", "a:11234a:1 b:21234b:2 "),
        ("{{range .Config.Labels}}{{.}}{{end}}", "12"),
        ("{{range $k, $v := .Config.Labels}}{{$k}}={{$v}};{{end}}", "a=1;b=2;"),
        ("{{range .Layers}}{{range $.RepoTags}}{{.}}{{end}}{{.Index}}{{end}}", "a:1b:21a:1b:22"),
        # if, with, variables.
        ("{{if .Attached}}yes{{else}}no{{end}}", "yes"),
        ("{{if .Parent}}yes{{else}}no{{end}}", "no"),
        ("{{if .Config.Env}}1{{else if .None}}2{{else if .Size}}3{{else}}4{{end}}", "3"),
        ("{{if and .Attached (eq .Size 1234) (not .Parent)}}y{{end}}", "y"),
        ('{{if eq .Id "x" "sha256:abc"}}y{{end}}{{if ne .Id "x"}}z{{end}}', "yz"),
        ("{{lt 1 2}}{{le 2 2}}{{gt 1 2}}{{ge `b` `a`}}", "truetruefalsetrue"),
        ("{{and .Parent .Absent}}{{or .Id .Absent}}", "sha256:abc"),
        ("{{with .GraphDriver.Data}}{{.UpperDir}}{{end}}", "/u"),
        ("{{with $x := .Size}}{{$x}}{{.}}{{end}}{{with .Parent}}a{{else}}b{{end}}", "12341234b"),
        ("{{$n := len .RepoTags}}{{range .Layers}}{{$n}}{{end}}", "22"),
        # White space, comments, escapes of the shell's.
        ("a  {{- .Size -}}  b", "a1234b"),
        ("a {{/* {{ no */}} b {{- /* c */ -}} d", "a  bd"),
        ("{{- 3}}{{-3}}{{3 -}} ", "3-33"),
        ("{{.Size}}\\t{{.Id}}\\n", "1234\tsha256:abc\n"),
        ("{{\n.Size\n}}", "1234"),
    ],
)
def test_templates(template: str, text: str) -> None:
    assert render(template, IMAGE) == text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{.Idd}}", "Idd"),
        ("{{.GraphDriver.Data.UperDir}}", "UperDir"),
        ("{{.RepoTags.Id}}", "list"),
        ("{{.Id.Size}}", "fields"),
        ("{{.Id.__class__}}", "fields"),
        ("{{.__class__}}", "__class__"),
        ("{{range .RepoTags}}{{.Id}}{{end}}", "fields"),
        ("{{range .Id}}{{end}}", "list"),
        ("{{", "}}"),
        ("{{.Id", "}}"),
        ('{{"a}}', "}}"),
        ("{{}}", "empty"),
        ("{{end}}", "end"),
        ("{{else}}", "else"),
        ("{{if .Id}}", "end"),
        ("{{if .Id}}a{{else}}b{{else}}c{{end}}", "end"),
        ("{{if}}{{end}}", "value"),
        ("{{range .Id", "}}"),
        ("{{.Id |}}", "value"),
        ("{{| json}}", "value"),
        ("{{(.Id}}", ")"),
        ("{{.Id)}}", ")"),
        ("{{.Id .Size}}", "function"),
        ("{{.Id | .Size}}", "function"),
        ("{{evil .}}", "evil"),
        ("{{json}}", "json"),
        ("{{json .Id .Id}}", "json"),
        ("{{index .RepoTags 2}}", "out of range"),
        ("{{index .RepoTags -1}}", "out of range"),
        ('{{index .RepoTags "a"}}', "number"),
        ("{{index .Id 0}}", "index"),
        ("{{len .Size}}", "len"),
        ('{{join .Id ","}}', "join"),
        ("{{upper .Size}}", "upper"),
        ('{{printf "%d" .Id}}', "printf"),
        ('{{printf "%s"}}', "printf"),
        ('{{printf "%z" 1}}', "%z"),
        ('{{printf "a" 1}}', "verb"),
        ("{{lt 1 `a`}}", "lt"),
        ("{{$x}}", "$x"),
        ("{{range $i, $v := .Layers}}{{end}}{{$i}}", "$i"),
        ('{{"\\q"}}', "\\q"),
        ('{{"\\Uffffffff"}}', "string"),
        ("{{.Id; .Id}}", ";"),
        ("{{..}}", ".."),
        ("{{.Config.}}", "."),
        ("{{'a'}}", "'"),
        ("{{if .Id}}" * 60 + "{{end}}" * 60, "deep"),
        ("{{" + "(" * 60 + ".Id" + ")" * 60 + "}}", "deep"),
    ],
)
def test_what_is_wrong_is_named(template: str, words: str) -> None:
    with pytest.raises(Usage) as caught:
        render(template, IMAGE)
    assert words in str(caught.value)
    assert caught.value.hint


def test_the_hint_names_the_nearest_fields() -> None:
    with pytest.raises(Usage) as caught:
        render("{{.ID}}", IMAGE)
    assert caught.value.hint == "did you mean Id?"
    with pytest.raises(Usage) as caught:
        render("{{.Zzzzzz}}", {"One": 1, "Two": 2})
    assert caught.value.hint == "there are: One, Two"


def test_no_attribute_of_an_object_is_read() -> None:
    class Secret:
        Field = "secret"

    with pytest.raises(Usage):
        render("{{.Field}}", Secret())


def test_values_nested_too_deeply_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for template in ("{{.}}", "{{json .}}"):
        with pytest.raises(Usage, match="deep"):
            render(template, deep)
    while deep:
        deep = deep.pop()


@pytest.mark.parametrize(
    ("template", "split"),
    [
        ("table {{.ID}}\\t{{.Size}}", (True, "{{.ID}}\\t{{.Size}}")),
        ("table", (True, "")),
        ("table ", (True, "")),
        ("{{.ID}}", (False, "{{.ID}}")),
        ("tables {{.ID}}", (False, "tables {{.ID}}")),
    ],
)
def test_the_word_table(template: str, split: tuple[bool, str]) -> None:
    assert split_table(template) == split


@given(st.text(alphabet='{}.$|()"`-/* \\abAIdrangeifelswthjo0123:=,', max_size=60))
def test_any_template_is_text_or_usage(template: str) -> None:
    with contextlib.suppress(Usage):
        assert isinstance(render(template, IMAGE), str)


@given(st.text().filter(lambda text: "{{" not in text and "\\" not in text))
def test_text_without_actions_stays(text: str) -> None:
    assert render(text, IMAGE) == text

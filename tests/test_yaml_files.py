"""YAML from anyone: aliases that multiply, tags, depths, sizes, odd keys and characters end in one line that says where, at once."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from fastgen.errors import UserError
from fastgen.yaml_files import MOST_BYTES, parse, read_text, read_yaml

LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(LAUGHS, "more than 20000 values", id="aliases of aliases"),
        pytest.param(MERGES, "more than 20000 values", id="merges of merges"),
        pytest.param("a: &a [*a]", "line 1, column 4: more than", id="an alias within itself"),
        pytest.param("a: &a {<<: *a}", "line 1, column 8: more than", id="a merge of itself"),
        pytest.param("a: &a\n  b: *a", "more than", id="a mapping within itself"),
        pytest.param("a: " + "[" * 5000, "more than 24 of them within each other", id="deep lists"),
        pytest.param("{a: " * 5000, "more than 24 of them within each other", id="deep mappings"),
        pytest.param("- " * 5000 + "1", "more than 24 of them within each other", id="deep blocks"),
        pytest.param("? " * 5000 + "1", "more than 24 of them within each other", id="deep keys"),
        pytest.param("a: [" + "1," * 30_000 + "]", "more than 20000 values", id="a long list"),
        ("a: !!float x", "line 1, column 4: 'x' is no float"),
        ("a: 1\nb: !!int x", "line 2, column 4: 'x' is no int"),
        ('a: !!int ""', "'' is no int"),
        ("a: !!bool x", "'x' is no bool"),
        ("a: !!seq x", "expected a sequence node"),
        ("a: !!map [1]", "expected a mapping node"),
        ("a: !!str {b: 1}", "expected a scalar node"),
        ("a: !!binary YQ==", "could not determine a constructor for the tag 'tag:yaml.org,2002:binary'"),
        ("a: !!timestamp x", "2002:timestamp'"),
        ("a: !!set {b}", "2002:set'"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        pytest.param("a: 1" + "0" * 5000, "00000' is no int", id="more digits than Python reads"),
        pytest.param("a: 1" + "0" * 4000, "00000' is too large a number", id="more digits than a float has"),
        pytest.param("a: 0x1" + "0" * 9000, "00000' is too large a number", id="hexadecimal digits"),
        ("1: 2", "line 1, column 1: key 1 is not text; put it in quotes"),
        ("a: {null: 1}", "key None is not text"),
        ("on: 1", "key True is not text"),
        ("[a]: b", "key ['a'] is not text"),
        ("{a: 1}: b", "key {'a': 1} is not text"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' is given twice"),
        (r'a: "\ud800"', r"line 1, column 4: '\ud800' holds half of a character"),
        (r'"\udfff": 1', "holds half of a character"),
        (r'a: "\0"', r"'\x00' holds a NUL character"),
        (r'a: "\UFFFFFFFF"', "line 1"),
        ("a: 1\nb: \x07", "line 2 holds the control character '\\x07'"),
        ("a: \udc80", "line 1 holds the control character '\\udc80'"),
        ("a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
        ("a: *b", "line 1, column 4: found undefined alias 'b'"),
        ("a: 'b", "found unexpected end of stream"),
        ("a: %b", "cannot start any token"),
        ("\ta: 1", "line 1, column 1"),
        ("%YAML 9.9\n---\na: 1", "found incompatible YAML document"),
    ],
)
def test_what_no_recipe_needs_is_refused_in_one_short_line_that_says_where(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        parse(text)
    message = str(refused.value)
    assert type(refused.value) is ValueError
    assert "\n" not in message and len(message) < 600 and message.startswith("line ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing", None),
        ("a: 2024-01-31", {"a": "2024-01-31"}),
        ("a: 1.0e+999", {"a": float("inf")}),  # the schema refuses it, with its key
        ("a: 1e999", {"a": "1e999"}),
        (r'a: "\ud83d\ude00"', {"a": "\U0001f600"}),  # as JSON writes it
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("? a\n: 1", {"a": 1}),
    ],
)
def test_what_a_recipe_may_hold_is_read(text: str, value: Any) -> None:
    assert parse(text) == value


def test_two_aliases_are_two_values() -> None:
    data = parse("a: &x {b: [1]}\nc: *x\nd: {<<: *x}")
    assert data["a"] is not data["c"] and data["a"]["b"] is not data["c"]["b"] and data["a"]["b"] is not data["d"]["b"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_file_may_be_utf_8_or_have_a_mark(encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding.endswith("e") else ""
    (tmp_path / "a.yaml").write_bytes(f"{mark}a: größe\r\nb: 1\r\n".encode(encoding))
    assert read_yaml(tmp_path / "a.yaml") == {"a": "größe", "b": 1}


@pytest.mark.parametrize("content", [b"", b"\n", b"- a", b"a", b"\xef\xbb\xbf"])
def test_a_file_without_a_mapping_is_no_recipe(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.yaml' is not a recipe: a mapping of blocks"):
        read_yaml(tmp_path / "a.yaml")


def test_a_file_of_100_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.touch()
    os.truncate(path, 100_000_000)
    with pytest.raises(UserError, match=rf"a\.yaml' is not a recipe: it is larger than {MOST_BYTES // 1024} KiB"):
        read_text(path)


def test_what_is_no_file_is_named_and_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "a device or a pipe"), (tmp_path, "a folder"), (tmp_path / "none", "not there")):
        with pytest.raises(UserError, match=f"is {words}; a file is needed"):
            read_text(path)

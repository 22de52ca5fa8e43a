"""Prompt files: weights become probabilities, repeats add up, and every mistake names the recipe key, the file and the line."""

from __future__ import annotations

import builtins
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from fastgen.data.digits import prompts as digit_prompts
from fastgen.data.prompts import load_prompts
from fastgen.errors import UserError


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_text_lines_are_equally_likely_and_repeats_add_up(tmp_path: Path) -> None:
    table = load_prompts(write(tmp_path / "p.txt", "a cat\n\n  a dog  \r\na cat\n   \nein Bär, 猫"))
    assert table == {"a cat": 0.5, "a dog": 0.25, "ein Bär, 猫": 0.25}
    assert list(table) == ["a cat", "a dog", "ein Bär, 猫"]


def test_jsonl_weights_are_normalised_and_zero_weights_dropped(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "weight": 3},
        {"prompt": "b"},
        {"prompt": "a", "weight": 0.5},
        {"prompt": "never", "weight": 0},
        {"prompt": "", "weight": 0.5, "seed": 7},
    ]
    table = load_prompts(write(tmp_path / "p.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n"))
    assert table == pytest.approx({"a": 0.7, "b": 0.2, "": 0.1})


def test_csv_with_quotes_weights_and_other_columns(tmp_path: Path) -> None:
    text = 'id,prompt,weight\r\n1,"a cat, ""asleep""",3\r\n\r\n2,a dog, 0.5\r\n3,"a cat, ""asleep""",.5\r\n'
    assert load_prompts(write(tmp_path / "p.csv", "\ufeff" + text)) == {'a cat, "asleep"': 0.875, "a dog": 0.125}
    assert load_prompts(write(tmp_path / "p.csv", "prompt\na cat\na dog\n")) == {"a cat": 0.5, "a dog": 0.5}


def exact(*weights: float) -> list[float]:
    """Shares from integers: no double is too large, too small or rounded before the quotient."""
    total = sum(map(Fraction, weights))
    return [float(Fraction(weight) / total) for weight in weights]


@pytest.mark.parametrize(
    "weights",
    [
        (1e308, 1e308),
        (1.7e308, 1e308, 1.7e308, 1.0),
        (5e-324, 5e-324, 1e-323),
        (1e-310, 3e-310),
        (1e308, 1e-10),
        (1.0, *[1e-16] * 50_000),
        (*[0.1] * 10, 1e16),
    ],
)
def test_weights_of_any_size_keep_their_proportions(tmp_path: Path, weights: tuple[float, ...]) -> None:
    rows = [{"prompt": str(i), "weight": weight} for i, weight in enumerate(weights)]
    table = load_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert list(table) == [str(i) for i in range(len(weights))]
    assert list(table.values()) == pytest.approx(exact(*weights), rel=1e-15)
    assert sum(table.values()) == pytest.approx(1, abs=1e-11)


def test_repeats_add_up_beyond_the_largest_double_and_below_the_smallest_step(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "weight": 1e308}] * 3 + [{"prompt": "b", "weight": 1e308}]
    assert load_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))) == {"a": 0.75, "b": 0.25}
    rows = [{"prompt": "a", "weight": 1.0}] + [{"prompt": "a", "weight": 1e-16}] * 40_000 + [{"prompt": "b", "weight": 1.0}]
    table = load_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert table["a"] / table["b"] - 1 == pytest.approx(4e-12, rel=1e-3)


def test_a_share_too_small_for_a_double_is_not_zero(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "weight": 1e308}, {"prompt": "b", "weight": 5e-324}, {"prompt": "c", "weight": 0}]
    assert load_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))) == {"a": 1.0, "b": 5e-324}


def test_a_file_beginning_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path / "p.txt", "\ufeffa cat\na dog")) == {"a cat": 0.5, "a dog": 0.5}
    assert load_prompts(write(tmp_path / "p.jsonl", '\ufeff{"prompt": "a cat"}')) == {"a cat": 1.0}


def test_only_newlines_separate_lines(tmp_path: Path) -> None:
    odd = "one\u2028still one\u0085and one\x0b."
    assert load_prompts(write(tmp_path / "p.txt", f"{odd}\ntwo")) == {odd: 0.5, "two": 0.5}
    assert load_prompts(write(tmp_path / "p.jsonl", json.dumps({"prompt": odd[:18]}, ensure_ascii=False))) == {odd[:18]: 1.0}


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "p.txt", "a cat")
    assert load_prompts("~/p.txt") == {"a cat": 1.0}


def test_the_embedded_digits_are_a_prompt_set() -> None:
    table = load_prompts("fastgen:digits")
    assert table == digit_prompts()
    assert sum(table.values()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.tsv", "a", r"is none of fastgen:digits, fastgen:scenes, \*\.txt, \*\.jsonl, \*\.csv, \*\.parquet"),
        ("p.csv", "", "holds no prompts with a positive weight"),
        ("p.csv", "prompt\n", "holds no prompts with a positive weight"),
        ("p.csv", "text\na cat\n", r"p.csv' line 1 must name the columns, .* prompt among them; it is \['text'\]"),
        ("p.csv", "prompt,weight\na cat, asleep,1\n", r"line 2 has 3 fields for 2 columns; a text with commas needs quotes"),
        ("p.csv", "prompt,weight\na cat,often\n", r"line 2 has weight 'often', not a number >= 0"),
        ("p.csv", "prompt,weight\na cat,-1\n", r"line 2 has weight -1.0, not a number >= 0"),
        ("p.csv", "prompt,weight\na cat,nan\n", r"line 2 has weight nan, not a number >= 0"),
        ("p.csv", "prompt,weight\na cat,\n", r"line 2 has weight '', not a number >= 0"),
        ("p", "a", r"is none of fastgen:digits"),
        ("p.txt", "\n  \n", "holds no prompts with a positive weight"),
        ("p.txt", b"caf\xe9", "p.txt' is not UTF-8 text"),
        ("p.jsonl", "", "holds no prompts with a positive weight"),
        ("p.jsonl", b'{"prompt": "caf\xe9"}', "p.jsonl' is not UTF-8 text"),
        ("p.jsonl", '{"prompt": "a", "weight": 0}', "holds no prompts with a positive weight"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "p.jsonl' line 3 is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n"b"', "line 2 has no text field 'prompt'"),
        ("p.jsonl", '{"text": "a"}', "line 1 has no text field 'prompt'"),
        ("p.jsonl", '{"prompt": 5}', "line 1 has no text field 'prompt'"),
        ("p.jsonl", '{"prompt": "a", "weight": -1}', r"line 1 has weight -1, not a number >= 0"),
        ("p.jsonl", '{"prompt": "a", "weight": "2"}', r"line 1 has weight '2', not a number"),
        ("p.jsonl", '{"prompt": "a", "weight": true}', r"line 1 has weight True, not a number"),
        ("p.jsonl", '{"prompt": "a", "weight": null}', r"line 1 has weight None, not a number"),
        ("p.jsonl", '{"prompt": "a", "weight": NaN}', r"line 1 has weight nan, not a number"),
        ("p.jsonl", '{"prompt": "a", "weight": Infinity}', r"line 1 has weight inf, not a number"),
        ("p.jsonl", '{"prompt": "a", "weight": 1e999}', r"line 1 has weight inf, not a number"),
        ("p.jsonl", '{"prompt": "a", "weight": 1' + "0" * 400 + "}", r"line 1 has weight 10{50}0*\.\., not a number"),
        ("p.jsonl", '{"prompt": "a", "weight": 1' + "0" * 5000 + "}", r"p.jsonl' line 1 is not JSON"),
        ("p.jsonl", "\n" + "[" * 100_000, r"line 2 is not JSON \(it is nested too deeply\)"),
        ("p.jsonl", '{"prompt": "a", "weight": ' + "[" * 900 + "]" * 900 + "}", r"line 1 has weight \[\[\[.*, not a number"),
        ("p.jsonl", '{"text": "' + "a" * 1_000_000 + '"}', r"line 1 has no text field 'prompt': \{'text': 'a{20,60}$"),
        ("p.jsonl", r'{"prompt": "a \ud800 b"}', r"line 1: the prompt holds half a surrogate pair, '\\ud800'"),
        ("p.jsonl", r'{"prompt": "a \u0000 b"}', r"line 1: the prompt holds a NUL character"),
        ("p.txt", b"a cat\na \0 dog", "p.txt' holds NUL bytes"),
        ("p.txt", "a cat".encode("utf-16-le"), "p.txt' holds NUL bytes, .* UTF-16 .* with a byte order mark only"),
        ("p.txt", "a cat".encode("utf-16")[:-1], "p.txt' is neither UTF-8 text nor the UTF-16 that its first bytes say"),
        ("p.txt", b"\xff\xfe\x00", "p.txt' is neither UTF-8 text nor the UTF-16 that its first bytes say"),
        ("p" * 300 + ".txt/p.txt", None, "no file"),
        ("p.txt\0.txt", None, r"no file '.*p\.txt\\x00\.txt'"),
    ],
)
def test_mistakes_name_the_key_the_file_and_the_line(tmp_path: Path, name: str, text: str | bytes | None, message: str) -> None:
    with pytest.raises(UserError, match=rf"^recipe key data\.prompts: .*{message}") as error:
        load_prompts(str(tmp_path / name) if text is None else write(tmp_path / name, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"])
def test_text_in_any_encoding_that_begins_with_its_mark(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("be") else ""
    assert load_prompts(write(tmp_path / "p.txt", f"{mark}ein Bär\r\n猫".encode(encoding))) == {"ein Bär": 0.5, "猫": 0.5}
    assert load_prompts(write(tmp_path / "p.jsonl", (mark + '{"prompt": "猫 𝔊"}\n').encode(encoding))) == {"猫 𝔊": 1.0}


def test_suffixes_in_upper_case(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path / "P.TXT", "a cat")) == {"a cat": 1.0}
    assert load_prompts(write(tmp_path / "P.JsonL", '{"prompt": "a cat"}')) == {"a cat": 1.0}


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "null.txt").symlink_to("/dev/null")
    (tmp_path / "dangling.txt").symlink_to("gone")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    messages = {
        "fifo": "is no file, but a device",
        "folder": "is a folder",
        "null": "is no file, but a device",
        "dangling": "link to 'gone'",
        "circle": "link",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=rf"^recipe key data\.prompts: .*{name}\.txt'.*{message}"):
            load_prompts(str(tmp_path / f"{name}.txt"))


def test_a_home_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^recipe key data\.prompts: no file '~nobody-of-this-name/p\.txt'"):
        load_prompts("~nobody-of-this-name/p.txt")


def test_a_weight_of_minus_zero_is_zero(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path / "p.jsonl", '{"prompt": "a", "weight": -0.0}\n{"prompt": "b", "weight": 2}')) == {"b": 1.0}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe key data\.prompts: no file '.*nothing\.jsonl'"):
        load_prompts(str(tmp_path / "nothing.jsonl"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refusing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(UserError, match=r"data\.prompts: reading '.*p\.parquet' needs pyarrow: pip install 'fastgen-distill\[data\]'$"):
        load_prompts(write(tmp_path / "p.parquet", b"PAR1"))


def test_parquet_columns(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"prompt": ["a", "b", "a"], "weight": [1.0, 2.0, 5.0], "seed": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert load_prompts(str(tmp_path / "p.parquet")) == {"a": 0.75, "b": 0.25}
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"]}), tmp_path / "p.parquet")
    assert load_prompts(str(tmp_path / "p.parquet")) == {"a": 0.5, "b": 0.5}


def test_parquet_mistakes(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", None]}), path)
    with pytest.raises(UserError, match=r"p\.parquet' row 2 has no text field 'prompt'"):
        load_prompts(str(path))
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "weight": [1.0, None]}), path)
    with pytest.raises(UserError, match=r"p\.parquet' row 2 has weight None, not a number"):
        load_prompts(str(path))
    with pytest.raises(UserError, match=r"^recipe key data\.prompts: '.*p\.parquet' is not a parquet file"):
        load_prompts(write(path, b"not parquet"))


def test_parquet_of_foreign_types(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    far = pyarrow.array([2**62], pyarrow.timestamp("ms"))  # beyond what Python's datetime holds
    invalid = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")])
    text = pyarrow.array(["a"])
    tables = {
        "time": ({"prompt": far}, "not a parquet file that can be read|no text field 'prompt'"),
        "invalid": ({"prompt": invalid}, "not a parquet file that can be read"),
        "bytes": ({"prompt": pyarrow.array([b"a"])}, "row 1 has no text field 'prompt'"),
        "list": ({"prompt": pyarrow.array([["a"]])}, "row 1 has no text field 'prompt'"),
        "weight": ({"prompt": text, "weight": pyarrow.array([{"a": 1}])}, "row 1 has weight {'a': 1}, not a number"),
        "none": ({"caption": text}, "row 1 has no text field 'prompt'|has no column 'prompt'"),
    }
    for name, (columns, message) in tables.items():
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
        with pytest.raises(UserError, match=rf"^recipe key data\.prompts: '.*{name}\.parquet' .*({message})"):
            load_prompts(str(tmp_path / f"{name}.parquet"))
    parquet.write_table(pyarrow.table({"prompt": text, "when": far}), tmp_path / "other.PARQUET")  # what is not asked for is not read
    assert load_prompts(str(tmp_path / "other.PARQUET")) == {"a": 1.0}

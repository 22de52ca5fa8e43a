"""JSON records: what is too large, too deep or of another shape is one line that names file and key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from fastgen import records
from fastgen.errors import UserError
from fastgen.files import loading, reading


class Shape(records.Schema):
    layers: Annotated[int, Field(ge=1, le=100)]
    scale: float = 1.0
    names: list[str] = Field(default_factory=list)
    on: bool = False


GOOD = {"layers": 3, "scale": 2, "names": ["a"], "on": True, "more": {"of": [None, 1e300, float("-inf")]}}


def test_a_record_comes_back_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(GOOD))
    assert records.read(path, Shape) == GOOD
    assert records.read(path) == GOOD


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("[1]", "must be a JSON object, not [1]"),
        ("{}", "key layers: missing"),
        ('{"layers": 1e12}', "key layers: must be a whole number, not 1000000000000.0"),
        ('{"layers": 1000000000000}', "key layers: must be less than or equal to 100, not 1000000000000"),
        ('{"layers": 0}', "key layers: must be greater than or equal to 1, not 0"),
        ('{"layers": true}', "key layers: must be a whole number, not true"),
        ('{"layers": "3"}', 'key layers: must be a whole number, not "3"'),
        ('{"layers": null}', "key layers: must be a whole number, not null"),
        ('{"layers": 1, "scale": NaN}', "key scale: must be a finite number, not NaN"),
        ('{"layers": 1, "scale": Infinity}', "key scale: must be a finite number, not Infinity"),
        ('{"layers": 1, "scale": 1e400}', "key scale: must be a finite number, not Infinity"),
        ('{"layers": 1, "scale": "x"}', 'key scale: must be a number, not "x"'),
        ('{"layers": 1, "names": {}}', "key names: must be a list, not {}"),
        ('{"layers": 1, "names": ["a", 2]}', "key names.1: must be a text, not 2"),
        ('{"layers": 1, "on": 1}', "key on: must be true or false, not 1"),
        (f'{{"layers": 1, "x": [1{"0" * 400}]}}', "key x.0: a number too large to count with"),
        (f'{{"layers": 1, "x": 1{"0" * 5000}}}', "4300"),  # Python's own limit
        (r'{"layers": 1, "x": {"y": "\ud800"}}', "key x.y: half of a surrogate pair, which is no text"),
        (r'{"layers": 1, "\udfff": 1}', "half of a surrogate pair"),
        (f'{{"layers": 1, "x": {"[" * 70}{"]" * 70}}}', "nested more than 64 deep"),
        (f'{{"layers": 1, "x": {"[" * 10**6}{"]" * 10**6}}}', "nested more than 64 deep"),
        (f'{{"layers": "{"x" * 10**6}"}}', f'must be a whole number, not "{"x" * 59}…'),
    ],
)
def test_everything_else_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        records.read(path, Shape)
    message = str(caught.value)
    assert message.startswith(f"cannot read {str(path)!r}: ")
    assert said in message
    assert "\n" not in message and len(message) < 600
    message.encode()


def test_bytes_that_are_no_text_and_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(b'{"layers": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8 text"):
        records.read(path)
    monkeypatch.setattr(records, "LARGEST", 2**20)
    path.write_text(json.dumps("x" * 2**20))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        records.read(path)


@pytest.mark.parametrize("around", [reading, loading])
def test_nobody_waits_for_a_fifo(around: Any, tmp_path: Path) -> None:
    below = tmp_path / "folder"
    below.mkdir()
    os.mkfifo(below / "fifo")
    for source in (tmp_path, below / "fifo"):
        with pytest.raises(UserError, match=r"cannot read '.*/folder/fifo': it is no file, but a FIFO, a socket or a device"), around(source):
            raise AssertionError("entered")
    with pytest.raises(UserError, match="it is no file"):
        records.read(below / "fifo")


@pytest.mark.parametrize(
    "error", [KeyError("a"), TypeError("b"), AttributeError("c"), AssertionError(), IndexError("d"), RecursionError("e"), MemoryError()]
)
def test_whatever_another_library_raises_is_one_line(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"cannot read '{tmp_path}': {type(error).__name__}"), loading(tmp_path):
        raise error
    with pytest.raises(type(error)), reading(tmp_path):  # of our own code that is a fault, and stays one
        raise error


def test_a_panic_of_rust_is_one_line_and_an_interrupt_is_none(tmp_path: Path) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it; its class cannot be imported."""

    with pytest.raises(UserError, match="PanicException: index out of bounds"), loading(tmp_path):
        raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), loading(tmp_path):
        raise KeyboardInterrupt

"""Lines of any text on streams of any kind."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastgen
from fastgen.printing import printable, put


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("runs/[bold]x[/] :bomb: $\\frac {0}%s", "runs/[bold]x[/] :bomb: $\\frac {0}%s"),
        ("a\tb – ü 猫 👩‍🚀", "a\tb – ü 猫 👩‍🚀"),
        ("red\x1b[31m\x07 \x9b2J", "red\\x1b[31m\\x07 \\x9b2J"),
        ("two\nlines\r\u2028more", "two\\nlines\\r\\u2028more"),
        ("gnp.\u202eexe", "gnp.\\u202eexe"),
        (os.fsdecode(b"caf\xe9"), "caf\\udce9"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text: str, shown: str) -> None:
    stream = io.StringIO()
    put(text, stream)
    assert stream.getvalue() == f"{printable(text)}\n" == f"{shown}\n"


def test_an_encoding_that_lacks_a_character_shows_its_escape() -> None:
    held = io.BytesIO()
    stream = io.TextIOWrapper(held, "ascii")
    put("caf\udce9 – 猫", stream)
    assert held.getvalue() == b"caf\\udce9 \\u2013 \\u732b\n"


def test_nobody_who_reads_is_no_error(tmp_path: Path) -> None:
    put("nowhere", None)
    closed = (tmp_path / "log").open("w")
    closed.close()
    put("nowhere", closed)


def program(arguments: list[str], **settings: str) -> list[str]:
    root = Path(fastgen.__file__).parent.parent
    return ["env", f"PYTHONPATH={root}", *(f"{key}={value}" for key, value in settings.items()), sys.executable, "-m", "fastgen", *arguments]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_disk_or_a_reader_that_left_ends_no_command_in_a_traceback() -> None:
    with open("/dev/full", "w") as full:
        assert subprocess.run(program(["recipes", "list"]), stdout=full, stderr=subprocess.PIPE, check=False).stderr == b""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert subprocess.run(program(["recipes", "list"]), stdout=writing, stderr=subprocess.PIPE, check=False).stderr == b""
    finally:
        os.close(writing)


def test_an_ascii_terminal_gets_the_help_and_the_name_of_any_file() -> None:
    arguments = program(["train", os.fsdecode(b"caf\xe9\x1b[31m.yaml")], PYTHONIOENCODING="ascii:strict")
    done = subprocess.run(arguments, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert done.stderr.startswith(b"error: ") and b"caf\\udce9\\x1b[31m" in done.stderr
    helped = subprocess.run(program(["train", "--help"], PYTHONIOENCODING="ascii:strict", COLUMNS="100"), capture_output=True, check=False)
    assert (helped.returncode, helped.stderr) == (0, b"")
    assert b"[key=value]" in helped.stdout


def encodings(path: Path) -> list[str]:
    """Places of a source file where text is read or written in the encoding of whichever locale there is."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text", "open"):
            modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str)]
            elsewhere = ast.unparse(node.func.value) in ("os", "Image", "self._zip", "tarfile") or any("b" in mode for mode in modes)
            if (node.func.attr != "open" or not elsewhere) and "encoding" not in {keyword.arg for keyword in node.keywords}:
                found.append(f"{path.name}:{node.lineno}")
    return found


def test_no_file_is_in_the_encoding_of_a_locale() -> None:
    """A Chinese prompt in a card, under LANG=C."""
    package = Path(fastgen.__file__).parent
    assert [place for path in sorted(package.rglob("*.py")) for place in encodings(path)] == []

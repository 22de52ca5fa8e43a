"""Recipes and command lines as nobody means them end in status 0, or in status 2 and one line, in bounded time; failures name their seed.

`python tests/faults/test_recipes.py SEED` shows one of them.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from fastgen import cli

sys.path.insert(0, str(Path(__file__).parent))
from mutations import arguments, make_places

SECONDS = 60  # for one; most take milliseconds


class Late(BaseException):
    """Past the time of a case; not an Exception, which somebody might catch."""


def _ring(number: int, frame: Any) -> None:
    raise Late


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault(words: list[str]) -> str:
    """What is wrong with how a command line ends; nothing is the rule."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = None
    try:
        with alarm(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(words)
    except Late:
        return f"no end after {SECONDS} seconds: " + "".join(traceback.format_exc().splitlines(keepends=True)[-8:])
    except (Exception, SystemExit):
        return "".join(traceback.format_exc().splitlines(keepends=True)[-8:])
    lines = err.getvalue().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if status not in (0, 2) or len(errors) != (status == 2) or "Traceback" in err.getvalue():
        return f"status {status}, {lines}"
    return next((f"not printable: {line!r}" for line in errors if not line.isprintable() or len(line) > 5000), "")


def faults(root: Path, seeds: range) -> dict[int, str]:
    """What is wrong, by seed. The working folder becomes `root`."""
    os.chdir(root)
    places = make_places(root)
    found = {}
    for seed in seeds:
        words = arguments(seed, places)
        if wrong := fault(words):
            found[seed] = f"{[word[:200] for word in words]}\n{wrong}"
    return found


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def assert_none(found: dict[int, str]) -> None:
    assert not found, "\n\n".join(f"seed {seed}: {wrong}" for seed, wrong in found.items())


def test_60_odd_recipes_and_command_lines_end_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # and back
    assert_none(faults(tmp_path, range(60)))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_2500_odd_recipes_and_command_lines_end_in_a_line(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_none(faults(tmp_path, range(block * 250, block * 250 + 250)))


def main() -> None:
    """Seeds FIRST (LAST): their command lines' faults."""
    first, last = int(sys.argv[1]), int(sys.argv[-1])
    with tempfile.TemporaryDirectory() as folder:
        found = faults(Path(folder).resolve(), range(first, last + 1))
        for seed, wrong in found.items():
            print(f"== seed {seed}: {wrong}")
        print(f"{len(found)} of {last + 1 - first}")
        os.chdir("/")


if __name__ == "__main__":
    main()

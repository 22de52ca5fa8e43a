"""One interpreter without fastgen that runs verify's script again and again: starting one for each folder would take ten seconds each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from fastgen import export

# Answers go out by a copy of stdout, for scripts and libraries may print.
_LOOP = """
import io, json, os, sys
answers, orders = os.fdopen(os.dup(1), "w"), sys.stdin
os.dup2(2, 1)
for line in orders:
    order = json.loads(line)
    sys.stdin = io.StringIO(order["input"])
    try:
        exec(order["script"], {})
        said = ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps(said), file=answers, flush=True)
"""


@contextmanager
def plain_child() -> Iterator[subprocess.Popen[str]]:
    """verify runs its scripts in this child within."""
    child = subprocess.Popen([sys.executable, "-P", "-c", _LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdin is not None and child.stdout is not None
    orders, answers = child.stdin, child.stdout

    def run(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        print(json.dumps({"script": command[-1], "input": input}), file=orders, flush=True)
        said = json.loads(answers.readline())
        return subprocess.CompletedProcess(command, 1 if said else 0, "", said)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "subprocess", SimpleNamespace(run=run))
            yield child
    finally:
        orders.close()
        child.wait(60)

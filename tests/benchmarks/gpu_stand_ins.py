"""Cases that behave and misbehave, for test_gpu_session.py: what they measure is how often they ran, in a file that COUNTER names."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measuring.case import Case, LeftOut, Row, Target


def count(name: str) -> list[Row]:
    """One more time, on disk."""
    file = Path(os.environ["COUNTER"]) / name
    file.write_text(file.read_text() + "x" if file.exists() else "x")
    return [{"times": len(file.read_text())}]


def fail() -> list[Row]:
    raise ValueError("this one always fails\nand says more")


def too_small() -> list[Row]:
    raise LeftOut("needs 80 GiB, 1 is free")


def out_of_memory() -> list[Row]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB")


def broken_device() -> list[Row]:
    count("broken_device")
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def hang() -> list[Row]:
    count("hanging")
    time.sleep(600)
    return []


def contenders() -> list[Row]:
    return [{"contender": "ours", "median_ms": 1.0}, {"contender": "theirs", "status": "left out", "reason": "not installed"}]


def cases(target: Target) -> Iterator[Case]:
    assert target == Target("cpu", rehearsal=True)
    yield Case("first", lambda: count("first"), 0)
    yield Case("fails", fail, 0)
    yield Case("small", too_small, 0)
    yield Case("memory", out_of_memory, 0)
    yield Case("broken", broken_device, 0)
    yield Case("dies", lambda: os._exit(11), 0)
    yield Case("contenders", contenders, 0)
    yield Case("last", lambda: count("last"), 0)


def hanging(target: Target) -> Iterator[Case]:
    yield Case("begun", lambda: count("begun"), 0)
    yield Case("hangs", hang, 0)
    yield Case("never", lambda: count("never"), 0)


def slow(target: Target) -> Iterator[Case]:
    yield Case("quick", lambda: count("quick"), 0)
    yield Case("long", lambda: count("long"), 3000)


def red(target: Target) -> Iterator[Case]:
    yield Case("tests", lambda: [{"passed": 3, "failed": 1, "status": "failed", "reason": "1 of 4 tests failed: test_x"}], 0)


def unimportable(target: Target) -> Iterator[Case]:
    raise ImportError("no such library")

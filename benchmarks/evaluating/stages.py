"""What each stage of a process takes: seconds, and the memory that was resident at most."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

from fastgen.evaluation.speed import peak_memory_bytes

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Stages:
    """`seconds` (wall), `cpu_seconds` (of all threads of this process) and `peak_bytes` of each stage by name, in their order."""

    def __init__(self) -> None:
        self.costs: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        reset_peak()
        began, computed = time.perf_counter(), time.process_time()
        yield
        self.costs[name] = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - computed,
            "peak_bytes": resident_peak(),
        }

    @property
    def peak_bytes(self) -> int:
        return round(max(cost["peak_bytes"] for cost in self.costs.values()))


def reset_peak() -> None:
    """Begin a new peak, where the kernel lets one: Linux. Elsewhere a stage's peak is that of all before it, too."""
    with contextlib.suppress(OSError):
        _RESET.write_text("5")


def resident_peak() -> int:
    """Bytes, libraries and files that are mapped included. Linux keeps ru_maxrss of the process that a process was forked from: not that."""
    if not _STATUS.is_file():
        return peak_memory_bytes()
    found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found.group(1))

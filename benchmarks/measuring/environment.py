"""Where a run measures: machine, versions, code, and the ceilings that its numbers can be held against."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import rows
from benchmarks.measuring.case import Row, Target
from benchmarks.measuring.clock import kernel_time

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "numpy")


def environment(target: Target, run: str) -> Row:
    """The line of a run, ceilings included. `source` is what is measured: a change of it makes every measurement again."""
    versions = {name: version(name) for name in PACKAGES}
    return {
        "slice": "environment",
        "case": "environment",
        "run": run,
        "status": "measured",
        "rehearsal": target.rehearsal,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_device(target),
        "source": source_hash(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        **versions,
        **ceilings(target),
    }


def _device(target: Target) -> Row:
    if not target.is_gpu:
        return {"gpu": f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str | None:
    """None where nvidia-smi is missing or says nothing."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_hash() -> str:
    """SHA-256, shortened, of the code that is measured."""
    found = hashlib.sha256()
    for path in sorted(path for folder in ("fastgen", "kernels") for path in (ROOT / folder).rglob("*.py")):
        found.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def ceilings(target: Target) -> dict[str, Any]:
    """What this machine does at best, now: bytes read and written by a copy within its memory, and a large bf16 product of normal numbers."""
    size, count = (8192, min(2**30, target.free_bytes() // 16)) if target.is_gpu else (256, 2**20)
    generator = torch.Generator(target.device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=target.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(count, dtype=torch.int32, device=target.device).random_(generator=generator)
    copy = torch.empty_like(source)
    copied, product = (kernel_time(call, target) for call in (lambda: copy.copy_(source), lambda: torch.mm(a, b)))
    return {
        "copy_gb_per_s": 2 * source.nbytes / copied["median_ms"] / 1e6,
        "bf16_tflop_per_s": 2 * size**3 / product["median_ms"] / 1e9,
        "bf16_product": [size] * 3,
    }


def main() -> None:
    """Write the line of a run: `python -m benchmarks.measuring.environment FILE RUN [--rehearsal]`."""
    parser = argparse.ArgumentParser(description="Write where a run measures.")
    parser.add_argument("file", type=Path)
    parser.add_argument("run")
    parser.add_argument("--rehearsal", action="store_true")
    chosen = parser.parse_args()
    rows.append(chosen.file, [environment(Target("cpu" if chosen.rehearsal else "cuda", chosen.rehearsal), chosen.run)])


if __name__ == "__main__":
    main()

"""The benchmark script runs: tiny shapes on the CPU, and a plain word where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels" / "jvp_attention.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_smoke(tmp_path: Path) -> None:
    done = benchmark("--smoke", "--output", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    kernels = {(row["problem"]["name"], row["kernel"]) for row in rows}
    assert {("self_tiny", "fastgen_jvp"), ("self_tiny", "math_jvp"), ("text_tiny", "fastgen_jvp")} <= kernels
    assert all(row["median_ms"] > 0 and row["provenance"]["versions"]["torch"] == torch.__version__ for row in rows)
    assert all(row["error_to"] <= 1e-5 for row in rows if row["kernel"] == "fastgen_jvp")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure() -> None:
    done = benchmark()
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "not yet measured: needs a CUDA GPU")

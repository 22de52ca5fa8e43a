"""Two launchers, as on two machines, over loopback. Run with `pytest -m distributed`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import free_port
from test_faults import RECIPE

import fastgen

pytestmark = pytest.mark.distributed
ROOT = Path(fastgen.__file__).parents[1]


def launchers(folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    port = str(free_port())
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    each = []
    for node in ("0", "1"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1"]
        command += ["--master-addr", "127.0.0.1", "--master-port", port, "-m", "fastgen", "train", "recipe.yaml", "--only", "train", *arguments]
        each.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return each


def test_two_launchers_train_one_run_and_a_signal_to_one_saves_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("0\n1\n2\n", encoding="utf-8")
    each = launchers(tmp_path, "--output", "run")
    log, end = tmp_path / "run/metrics.jsonl", time.monotonic() + 180
    while not (log.is_file() and len(log.read_text(encoding="utf-8").splitlines()) >= 3):
        assert time.monotonic() < end and all(one.poll() is None for one in each), [one.communicate() for one in each]
        time.sleep(0.2)
    each[1].send_signal(signal.SIGTERM)
    (said, _), (silent, _) = [one.communicate(timeout=60) for one in each]
    assert [one.returncode for one in each] == [1, 1]  # torchrun's own status, whatever that of its processes
    assert "stopped at step" in said and silent == ""
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert json.loads((saved / "state.json").read_text(encoding="utf-8"))["step"] == len(log.read_text(encoding="utf-8").splitlines())

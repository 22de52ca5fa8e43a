"""What do more processes bring, what do they say to one another, and how long does saving stop them?

    python benchmarks/scaling.py [--processes 1 2 4] [--steps 10] [--shard ddp]     # into benchmarks/results/scaling.jsonl

`samples_per_second` of the global batch; `communication` the share of a step in collectives, waiting for the slowest process included; `stall`
the seconds that a save keeps all processes from training. Processes beyond the cores of a machine share them: then only the last two numbers mean
anything. Every process has one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastgen import checkpoint, group, run
from fastgen.config import Recipe
from fastgen.parallel import Strategy
from fastgen.plan import plan
from fastgen.trainer import Trainer

RESULTS = Path(__file__).parent / "results/scaling.jsonl"
RECIPE = "digits_dmd2_1step"
COLLECTIVES = ("reduce", "total", "gather", "any", "first")
WARM_UP = 2  # steps


class Clock:
    """Seconds that calls of some functions took; on a GPU until what they asked for is done."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self.device = 0.0, device

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            began = self.now()
            try:
                return function(*given, **named)
            finally:
                self.seconds += self.now() - began

        return timed


def measure(steps: int, overrides: list[str], folder: Path) -> dict[str, Any] | None:
    """In one of the processes; the main one's row."""
    with group.joined() as members:
        planned = plan(Recipe.load(RECIPE, overrides), only="train")
        trainer = run.build(planned, run.Progress()).trainer
        clock = Clock(trainer.parallel.device)
        for name in COLLECTIVES:
            setattr(trainer.parallel, name, clock.around(getattr(trainer.parallel, name)))
        for _ in range(WARM_UP):
            trainer.train_step()
        clock.seconds, began = 0.0, clock.now()
        for _ in range(steps):
            trainer.train_step()
        taken, inside = clock.now() - began, clock.seconds
        trainer.parallel.barrier()
        began = clock.now()
        save(trainer, trainer.parallel, planned.resolved(), folder)
        trainer.parallel.barrier()
        stall, size = clock.now() - began, sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        if not members.is_main:
            return None
        parameters = sum(parameter.numel() for own in trainer.parameters.values() for parameter in own)
        return {
            "samples_per_second": trainer.settings.batch_size * steps / taken,
            "communication": inside / taken if members.world_size > 1 else 0.0,
            "stall": stall,
            "checkpoint_bytes": size,
            "trained_parameters": parameters,
            "device": torch.cuda.get_device_name() if clock.device.type == "cuda" else "cpu",
        }


def save(trainer: Trainer, parallel: Strategy, recipe: dict[str, Any], folder: Path) -> None:
    parallel.lone(lambda: checkpoint.save(folder, trainer, recipe, keep=1))


def launched(count: int, steps: int, overrides: list[str]) -> dict[str, Any]:
    """The row of `count` processes."""
    with tempfile.TemporaryDirectory(prefix="fastgen-scaling-") as folder:
        start = [sys.executable] if count == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [*start, __file__, "--case", folder, "--steps", str(steps), *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--shard", default="ddp")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    chosen, overrides = parser.parse_known_args()
    if chosen.case:
        if row := measure(chosen.steps, overrides, chosen.case):
            print(json.dumps(row), flush=True)
        return
    for count in chosen.processes:
        shard = "none" if count == 1 else chosen.shard
        row = launched(count, chosen.steps, [f"train.shard={shard}", "train.batch_size=32", *overrides])
        row = {"processes": count, "shard": shard, "recipe": RECIPE, "overrides": overrides, "steps": chosen.steps, **row, **machine()}
        print(json.dumps(row), flush=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def machine() -> dict[str, Any]:
    """load: processes that wanted a processor in the last minute, on average."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    main()

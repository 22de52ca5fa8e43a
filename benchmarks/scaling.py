"""What do more processes bring, what do they say to one another, and how long does saving stop them?

    python benchmarks/scaling.py [--processes 1 2 4] [--steps 10] [--shard ddp fsdp]     # into results/scaling.jsonl, and scaling.md from that

`samples_per_second` of the global batch; `communication` the share of a step in collectives, waiting for the slowest process included; `stall` the
seconds that a save keeps all processes from training, and `stall_beside` with `train.save_beside: true`; `held_bytes` of networks, gradients,
moments and averages on the process that has most. Processes beyond the cores of a machine share them: then only the numbers behind the first mean
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
import torch.distributed as dist

from fastgen import group, run, shards
from fastgen.config import Recipe
from fastgen.plan import plan
from fastgen.saving import Saver
from fastgen.trainer import Trainer

RESULTS = Path(__file__).parent / "results/scaling.jsonl"
TABLE = Path(__file__).parent / "scaling.md"
RECIPE = "digits_dmd2_1step"
COLLECTIVES = ("reduce", "total", "gather", "any", "first")  # of a strategy
# FSDP2's own, which run beside what is computed on a GPU: there this counts the time until both are done.
GATHERING = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_single", "reduce_scatter_single")
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
        for name in GATHERING:
            if hasattr(dist, name):
                setattr(dist, name, clock.around(getattr(dist, name)))
        for _ in range(WARM_UP):
            trainer.train_step()
        clock.seconds, began = 0.0, clock.now()
        for _ in range(steps):
            trainer.train_step()
        taken, inside = clock.now() - began, clock.seconds
        stalls = [stall(trainer, clock, folder / name, beside=name == "beside") for name in ("waiting", "beside")]
        size = sum(file.stat().st_size for file in (folder / "waiting").rglob("*.safetensors"))
        most = max(members.gather(held(trainer))) if members.world_size > 1 else held(trainer)
        if not members.is_main:
            return None
        parameters = sum(parameter.numel() for own in trainer.parameters.values() for parameter in own)
        return {
            "samples_per_second": trainer.settings.batch_size * steps / taken,
            "communication": inside / taken if members.world_size > 1 else 0.0,
            "stall": stalls[0],
            "stall_beside": stalls[1],
            "checkpoint_bytes": size,
            "held_bytes": most,
            "trained_parameters": parameters,
            "device": torch.cuda.get_device_name() if clock.device.type == "cuda" else "cpu",
        }


def stall(trainer: Trainer, clock: Clock, folder: Path, *, beside: bool) -> float:
    """Seconds until all processes train on, once one of them saves."""
    with Saver(folder, keep=1, beside=beside) as saver:
        trainer.parallel.barrier()
        began = clock.now()
        saver.save(trainer, {}, inputs={}, metrics={})
        trainer.parallel.barrier()
        return clock.now() - began


def held(trainer: Trainer) -> int:
    """Bytes of networks, gradients as large as what is trained, moments and averages on this process."""
    networks = {id(parameter): parameter for role in trainer.roles.values() for parameter in role.denoiser.parameters()}
    gradients = [parameter for own in trainer.parameters.values() for parameter in own]
    moments = [value for made in trainer.optimizers.values() for state in made.state.values() for value in state.values() if torch.is_tensor(value)]
    averages = [value for average in trainer.ema.values() for value in average.shadow.values()]
    return sum(shards.own(each).nbytes for each in (*networks.values(), *gradients, *moments, *averages))


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
    parser.add_argument("--shard", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    chosen, overrides = parser.parse_known_args()
    if chosen.case:
        if row := measure(chosen.steps, overrides, chosen.case):
            print(json.dumps(row), flush=True)
        return
    for shard, count in [("none", 1)] * (1 in chosen.processes) + [(shard, n) for shard in chosen.shard for n in chosen.processes if n > 1]:
        row = launched(count, chosen.steps, [f"train.shard={shard}", "train.batch_size=32", *overrides])
        row = {"processes": count, "shard": shard, "recipe": RECIPE, "overrides": overrides, "steps": chosen.steps, **row, **machine()}
        print(json.dumps(row), flush=True)
        with chosen.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    if chosen.output == RESULTS:
        TABLE.write_text(table(RESULTS), encoding="utf-8")


def table(results: Path) -> str:
    """The newest row of each number of processes and way to share, of the shipped recipe as it is."""
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if not row["overrides"] and "held_bytes" in row:
            newest[(row["shard"], row["processes"])] = row
    lines = [
        "# What more processes bring",
        "",
        f"`{RECIPE}` at a global batch of 32 (`python benchmarks/scaling.py`, whose first lines say what the columns are); one thread a process.",
        "",
        "| processes | shard | samples a second | communication | stall of saving, s | beside, s | MB on a process | device, cores, load |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for (shard, count), row in sorted(newest.items(), key=lambda found: (found[0][0] != "none", found[0])):
        numbers = f"{row['samples_per_second']:.0f} | {row['communication']:.0%} | {row['stall']:.2f} | {row['stall_beside']:.2f}"
        lines.append(f"| {count} | {shard} | {numbers} | {row['held_bytes'] / 1e6:.1f} | {row['device']}, {row['cores']}, {row['load']} |")
    return "\n".join(lines) + "\n"


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

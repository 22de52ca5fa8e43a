"""Does sCM need images? TBCM against sCM on noised data, at equal student steps and equal training points a step.

    python benchmarks/tbcm_against_scm.py

Both train the digits student with the settings of recipes/digits_tbcm_2step.yaml, each run in a process of its own, whose peak
resident memory is measured; then the exported students are measured with protocol `digits`. JSON lines for each method and metric go
to benchmarks/results/tbcm_against_scm.jsonl: mean and standard deviation over seeds, and under `seed` the value of each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgen import families, fingerprints, run
from fastgen.config import Recipe
from fastgen.evaluation import results, unkept
from fastgen.evaluation.protocol import load_protocol

ROOT = Path(__file__).parent.parent
RECIPE = "digits_tbcm_2step"
METRICS = ("fd_digits", "fd_digits_named", "prompt_accuracy", "diversity")


def overrides(method: str, seed: int, steps: int | None) -> list[str]:
    """What differs from the recipe. One trajectory of N evaluations gives N - 1 points."""
    recipe = Recipe.load(RECIPE)
    common = [f"train.seed={seed}", *([f"train.steps={steps}"] if steps else []), "train.sample_every=0", "train.checkpoint_every=0"]
    if method == "tbcm":
        return common
    config = run.plan(recipe).method_config.model_dump()
    points = recipe.train.batch_size * (config["trajectory"]["evaluations"] - 1)
    shared = {key: config[key] for key in ("warmup", "normaliser", "tangent", "discrete_step")}
    return [
        *common,
        f"distiller={json.dumps({'name': 'scm', **shared})}",
        "data={images: fastgen:digits}",
        f"train.batch_size={points}",
    ]


def train_apart(folder: Path, keys: list[str]) -> int:
    """Train and nothing else in its own process; its peak resident bytes."""
    command = [sys.executable, "-m", "fastgen", "train", RECIPE, "--output", str(folder), "--only", "train", "--overwrite", *keys]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"training in {folder} failed")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(method: str, seed: int, steps: int | None, work: Path) -> dict[str, float]:
    """Metrics of one run."""
    folder = work / f"{method}_seed{seed}"
    peak = train_apart(folder, overrides(method, seed, steps))
    seconds = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    run.export(folder, folder / "student")
    rows = run.evaluate(folder / "student", protocol="digits", teacher=False)["metrics"]
    quality = {row["name"]: row["value"] for row in rows if row["model"] == "student" and row["name"] in METRICS}
    return {"training_seconds": seconds, "training_peak_memory_bytes": float(peak), **quality}


def rows_of(method: str, runs: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    """For each metric the mean and standard deviation over seeds, then the value of each seed."""
    rows = []
    for name in next(iter(runs.values())):
        values = {seed: metrics[name] for seed, metrics in runs.items()}
        std = statistics.stdev(values.values()) if len(values) > 1 else 0.0
        rows.append({"model": method, "name": name, "value": statistics.mean(values.values()), "std": std, "std_over": "seeds"})
        rows += [{"model": method, "name": name, "value": value, "seed": seed} for seed, value in values.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="student steps, default the recipe's")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "tbcm_against_scm")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "tbcm_against_scm.jsonl")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; seconds and the last digits depend on it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    protocol, model_hash = load_protocol("digits"), fingerprints.folder_hash(families.resolve_source("fastgen:digits"))
    origin = results.provenance(protocol, model_hash=model_hash, extractors=unkept.what_is_real(protocol).extractors)
    lines: list[dict[str, Any]] = []
    for method in ("scm", "tbcm"):
        rows = rows_of(method, {seed: measure(method, seed, arguments.steps, arguments.work) for seed in arguments.seeds})
        for row in rows:
            if "seed" not in row:
                print(f"{method:5} {row['name']:28} {row['value']:14.4g} ± {row['std']:.2g}", flush=True)
        lines += rows
    shared = {"recipe": RECIPE, "student_steps": arguments.steps or Recipe.load(RECIPE).train.steps, "seeds": arguments.seeds, "provenance": origin}
    arguments.output.write_text("".join(json.dumps({**line, **shared}) + "\n" for line in lines))


if __name__ == "__main__":
    main()

"""Does a student trained on a GPU come out as one trained on a CPU? Two shipped recipes, from start to report, as a user would run them.

    python benchmarks/gpu.py --only training

`digits_scm_2step` has exact tangents, so on a GPU the kernel trains it; `digits_dmd2_1step` trains two networks. Each is exported, verified in
plain diffusers and measured with protocol `digits`; beside its numbers stand those of a CPU (quality_digits.jsonl: mean and standard deviation
over training seeds). The third case starts one recipe twice and compares the weights: whether the device gives the same bits again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.measuring.case import Case, Row, Target
from benchmarks.measuring.environment import ROOT
from fastgen import run
from fastgen.config import Recipe
from fastgen.evaluation import runner
from fastgen.export import verify
from fastgen.plan import plan

RECIPES = ("digits_scm_2step", "digits_dmd2_1step")
CPU_RESULTS = ROOT / "benchmarks" / "results" / "quality_digits.jsonl"
METRICS = {"fd": "fd_digits", "prompt_accuracy": "prompt_accuracy", "parity_accuracy": "parity_accuracy"}


def cases(target: Target) -> Iterator[Case]:
    for recipe in RECIPES[-1:] if target.rehearsal else RECIPES:
        yield Case(recipe, partial(train_and_measure, recipe, target), 70)
    yield Case("same_again", partial(same_again, RECIPES[0], target), 30)


def train_and_measure(name: str, target: Target) -> list[Row]:
    """The row of one recipe; a rehearsal takes three steps and measures nothing."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = asked(name, target, ["train.steps=3", "train.batch_size=4", "evaluate.protocol=null"] if target.rehearsal else [])
        made = run.train(recipe, Path(folder) / "run")
        verified = verify(made / "student")
        log = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
        results = None if target.rehearsal else runner.read_results(made / "results.json")["metrics"]
    row: Row = {
        "recipe": name,
        "steps": len(log),
        "batch": recipe.train.batch_size,
        "seconds": log[-1]["seconds"],
        "samples_per_s": recipe.train.batch_size * len(log) / log[-1]["seconds"],
        "verified_difference": verified.picture_error,
    }
    return [row | (measured(results, "student") if results else {}) | on_a_cpu(name)]


def asked(name: str, target: Target, overrides: list[str]) -> Recipe:
    """A shipped recipe on the target's device, with seed 0 and without pictures on the way."""
    own = [f"train.device={target.device}", "train.seed=0", "train.sample_every=0", "train.checkpoint_every=0"]
    return Recipe.load(name, [*own, *overrides])


def measured(results: list[dict[str, Any]], model: str) -> Row:
    """The headline metrics of one model."""
    values = {row["name"]: row["value"] for row in results if row["model"] == model}
    return {key: values[name] for key, name in METRICS.items()}


def on_a_cpu(recipe: str, path: Path = CPU_RESULTS) -> Row:
    """Mean and standard deviation of the same metrics over the seeds of that recipe, trained on a CPU."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    means = {row["name"]: row for row in rows if row["model"] == recipe and row.get("std_over") == "seeds"}
    return {f"{key}_cpu_{what}": means[name][of] for key, name in METRICS.items() for what, of in (("mean", "value"), ("std", "std"))}


def same_again(name: str, target: Target) -> list[Row]:
    """The largest difference between the weights of two runs of ten steps, over the largest weight: 0 where they are equal to the bit."""
    steps = 2 if target.rehearsal else 10
    recipe = asked(name, target, [f"train.steps={steps}", "evaluate.protocol=null", *(["train.batch_size=4"] if target.rehearsal else [])])
    first, second = (trained(recipe) for _ in range(2))
    difference = max(float((first[key].double() - second[key].double()).abs().max()) for key in first)
    largest = max(float(value.abs().max()) for value in first.values())
    return [{"recipe": name, "steps": steps, "difference": difference / largest}]


def trained(recipe: Recipe) -> dict[str, Tensor]:
    """The student's weights after a run that writes nothing."""
    made = run.build(plan(recipe, only="train"), run.Progress())
    made.trainer.run([])
    return {name: value.cpu() for name, value in made.roles["student"].state_dict().items()}

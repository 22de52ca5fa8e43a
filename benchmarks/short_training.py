"""Does a GPU train as well as a CPU, and how fast? Two shipped recipes from start to measured student, and one run made twice.

    python -m benchmarks.short_training                # on the GPU
    python -m benchmarks.short_training --device cpu   # minutes

Each recipe runs as shipped, with seed 0: trained, exported, verified in plain diffusers and measured with protocol `digits`, in a temporary
folder. Beside it stands what benchmarks/results/quality_digits.jsonl holds of the same recipe on a CPU, mean and standard deviation over
seeds. digits_scm_2step takes the exact tangent along x, which on a GPU is the Triton kernel's.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.measuring import alone
from benchmarks.measuring.case import Case, Row, Target
from benchmarks.measuring.clock import peak_bytes
from fastgen import checkpoint, run
from fastgen.config import Recipe
from fastgen.export import verify
from fastgen.generator import load_student, read_manifest
from fastgen.runlog import read_rows

RECIPES = {"digits_scm_2step": 75.0, "digits_dmd2_1step": 50.0}  # seconds on an H100, about
QUALITY = Path(__file__).parent / "results" / "quality_digits.jsonl"
METRICS = ("fd_digits", "prompt_accuracy", "parity_accuracy")


def cases(target: Target) -> Iterator[Case]:
    if target.is_gpu:
        # PyTorch reads it at the first matrix product of a process, and then knows that cuBLAS may be asked for the same sums again.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    trainings = [Case(recipe, partial(trained, recipe, target), seconds) for recipe, seconds in RECIPES.items()]
    repetitions = [Case(f"{recipe} twice", partial(twice, recipe, target), 25) for recipe in RECIPES]
    yield from (trainings[0], repetitions[1]) if target.rehearsal else (*trainings, *repetitions)


def overrides(target: Target) -> list[str]:
    """What differs from the shipped recipe; in a rehearsal, that it is short."""
    short = ["train.steps=3", "train.batch_size=32", "train.sample_every=0", "train.checkpoint_every=0", "evaluate.protocol=null"]
    return [f"train.device={target.device}", "train.seed=0", *(short if target.rehearsal else [])]


def trained(recipe: str, target: Target) -> list[Row]:
    """One student from its recipe to its numbers. What fails on the way is raised: training, export, verification or measurement."""
    loaded = Recipe.load(recipe, overrides(target))
    with tempfile.TemporaryDirectory() as folder:
        with peak_bytes(target) as peak:
            run_dir = run.train(loaded, Path(folder) / "run", only="train")
            peak_held = peak()
        student = run.export(run_dir, run_dir / "student")
        row = {
            "recipe": recipe,
            **_speed(read_rows(run_dir / "metrics.jsonl"), loaded.train.batch_size),
            "peak_bytes": peak_held,
            **({} if target.rehearsal else _verified(student)),  # in a process that imports everything anew
            "difference_from_cpu": from_cpu(student, target),
        }
        return [row | _quality(recipe, student, loaded.evaluate.protocol, target)]


def _speed(log: list[dict[str, Any]], batch_size: int) -> Row:
    """seconds: of all steps, without checkpoints and sample pictures; first_step_s: with compiling and the tangent's check; samples_per_s:
    of the median step."""
    return {
        "steps": log[-1]["step"],
        "batch_size": batch_size,
        "seconds": log[-1]["seconds"],
        "first_step_s": log[0]["seconds"],
        "samples_per_s": statistics.median(row["samples_per_second"] for row in log),
        "samples_per_s_of_all": log[-1]["step"] * batch_size / log[-1]["seconds"],
    }


def _verified(student: Path) -> Row:
    """How far plain diffusers is from our sampler; UserError where that is too far."""
    found = verify(student)
    run.require_verified(found, student)
    return {"verify_picture_error": found.picture_error, "verify_grid_error": found.grid_error}


def from_cpu(student: Path, target: Target) -> float:
    """Largest difference of four pictures, in [0, 1], that the student draws on the target and on a CPU, where `verify` draws."""
    prompts, seeds = read_manifest(student)["prompts"][:4], range(4)
    here, there = (load_student(student, device=device)(prompts, seeds) for device in (target.device, "cpu"))
    return (here - there).abs().max().item()


def _quality(recipe: str, student: Path, protocol: str | None, target: Target) -> Row:
    """What the protocol measures of the student, drawn on the target, beside the CPU's; of a rehearsal only the latter. fd_deviations: how
    many standard deviations over seeds its FD is above the CPU's mean."""
    reference = cpu_reference(recipe)
    known = {f"{name.removesuffix('_digits')}_cpu_{what}": value for name, own in reference.items() for what, value in own.items()}
    if protocol is None:
        return known
    metrics = run.evaluate(student, protocol=protocol, teacher=False, device=target.device)["metrics"]
    own = {row["name"]: row["value"] for row in metrics if row["model"] == "student" and row["name"] in METRICS}
    return own | known | {"fd_deviations": (own["fd_digits"] - known["fd_cpu_mean"]) / known["fd_cpu_std"]}


def cpu_reference(recipe: str, path: Path = QUALITY) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of each of METRICS, and of the training seconds, as quality.py wrote them. ValueError where
    one is missing."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {row["name"]: row for row in rows if row["model"] == recipe and "seed" not in row}
    names = (*METRICS, "training_seconds")
    if missing := [name for name in names if "std" not in found.get(name, {})]:
        raise ValueError(f"{path.name} has no mean and deviation over seeds of {', '.join(missing)} of {recipe}")
    return {name: {"mean": found[name]["value"], "std": found[name]["std"]} for name in names}


def twice(recipe: str, target: Target) -> list[Row]:
    """Ten steps made twice, with PyTorch's deterministic algorithms and with those that users get."""
    return [_repeated(recipe, target, deterministic=chosen) for chosen in ((True,) if target.rehearsal else (True, False))]


def _repeated(recipe: str, target: Target, *, deterministic: bool) -> Row:
    steps = 2 if target.rehearsal else 10
    loaded = Recipe.load(recipe, [*overrides(target), f"train.steps={steps}", "train.sample_every=0", "train.checkpoint_every=0"])
    with tempfile.TemporaryDirectory() as folder, algorithms(deterministic=deterministic) as complaints:
        first, second = (run.train(loaded, Path(folder) / name, only="train") for name in ("first", "second"))
        found = compared(_saved(first), _saved(second))
        losses = [
            [{key: value for key, value in row.items() if "second" not in key} for row in read_rows(each / "metrics.jsonl")]
            for each in (first, second)
        ]
    unequal = [i + 1 for i, (one, other) in enumerate(zip(*losses, strict=True)) if one != other]
    chosen = "deterministic" if deterministic else "default"
    return {
        "recipe": recipe,
        "steps": steps,
        "algorithms": chosen,
        **found,
        "first_unequal_step": unequal[0] if unequal else None,
        "complaints": complaints,
    }


@contextmanager
def algorithms(*, deterministic: bool) -> Iterator[list[str]]:
    """Yields a list that afterwards names the operations which PyTorch cannot do deterministically."""
    before, complaints = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()), []
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield complaints
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    said = (str(warning.message) for warning in caught)
    complaints += dict.fromkeys(text.split(". ")[0][:200] for text in said if "determinis" in text)


def _saved(run_dir: Path) -> dict[str, Tensor]:
    """Everything that the last checkpoint holds: weights, averages, moments."""
    files = sorted(checkpoint.latest(run_dir).glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def compared(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Row:
    """Whether tensors of the same names are equal to the bit, and by how much they differ at most."""
    if first.keys() != second.keys():
        raise ValueError(f"only one of two equal runs saved {', '.join(sorted(first.keys() ^ second.keys()))}")
    unequal = [name for name in first if not torch.equal(first[name], second[name])]
    differences = [(first[name].double() - second[name].double()).abs().max().item() for name in unequal]
    return {"tensors": len(first), "unequal_tensors": len(unequal), "equal": not unequal, "largest_difference": max(differences, default=0.0)}


if __name__ == "__main__":
    alone.main(cases, "Does a GPU train as well as a CPU, and how fast?")

"""What the bundled teacher of scenes draws, as mean and covariance of features: a student is compared with it without drawing it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.assets import SCENES_STATISTICS
from fastgen.evaluation.extractors import find_extractor
from fastgen.evaluation.extractors.base import Pictures, Resources
from fastgen.evaluation.frechet import FeatureStatistics, GaussianFit
from fastgen.evaluation.preparation import quantised
from fastgen.evaluation.weights import Unavailable
from fastgen.evaluation.worlds import scenes as world
from fastgen.families import source_hash
from fastgen.fingerprints import digest
from fastgen.generator import ImageGenerator, load_teacher

TEACHER, FIRST_SEED = "fastgen:scenes", 10**6  # noise that no protocol draws
_BATCH = 250


class TeacherStatistics(NamedTuple):
    """fit: of so many pictures; teacher and extractor: SHA-256 of the weights that drew and saw them."""

    fit: GaussianFit
    teacher: str
    extractor: str


def write_statistics(output: Path, seed: int, guidance: float | None = None, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Draw the open prompts of protocol scenes with the teacher, at its own steps, from seeds of their own, and keep the features' mean and
    covariance; returns what was recorded beside them."""
    generator = load_teacher(TEACHER, guidance=guidance)
    kind = find_extractor("scenes_classifier")
    extractor = kind(kind.Config(), Resources())
    prompts, first = world.open_prompts(), FIRST_SEED + seed * world.NUM_OPEN
    seeds = range(first, first + len(prompts))
    features: list[Tensor] = []
    for start in range(0, len(prompts), _BATCH):
        features.append(_features(extractor, generator, prompts[start : start + _BATCH], list(seeds[start : start + _BATCH])))
        say(f"statistics: {start + _BATCH} of {len(prompts)} pictures")
    found = FeatureStatistics.from_features(torch.cat(features))
    record = {
        "command": f"python -m fastgen.assets.build scenes statistics --seed {seed}",
        "n": found.n,
        "steps": generator.steps,
        "guidance": generator.guidance,
        "first_seed": first,
        "prompts": digest(list(prompts)),
        "teacher": source_hash(TEACHER),
        "extractor": extractor.hash,
    }
    output.mkdir(parents=True, exist_ok=True)
    save_file({"mean": found.mean, "cov": found.cov}, output / "statistics.safetensors")
    (output / "config.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


@torch.no_grad()
def _features(extractor: Any, generator: ImageGenerator, prompts: tuple[str, ...], seeds: list[int]) -> Tensor:
    pixels = quantised(generator(list(prompts), seeds), "edm")
    return extractor(Pictures(pixels, prompts), ("features",))["features"]


def read_statistics(folder: Path = SCENES_STATISTICS) -> TeacherStatistics:
    """Those that are bundled. Unavailable where there are none, as before the teacher is built."""
    if not (folder / "config.json").is_file():
        raise Unavailable("needs the statistics of the bundled teacher: python -m fastgen.assets.build scenes statistics")
    record, tensors = json.loads((folder / "config.json").read_text(encoding="utf-8")), load_file(folder / "statistics.safetensors")
    return TeacherStatistics(GaussianFit(tensors["mean"], tensors["cov"], record["n"]), record["teacher"], record["extractor"])

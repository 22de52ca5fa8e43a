"""The same work by fastgen and by torch-fidelity, in turn in one process, each through its own entry point with its own defaults."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.evaluating.stages import Stages
from benchmarks.evaluating.stand_in import Synthetic
from benchmarks.measuring.case import Row
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.frechet import frechet_distance, table_statistics
from fastgen.evaluation.metrics.precision_recall import share_within
from fastgen.evaluation.protocol import Protocol, protocol_from
from fastgen.evaluation.runner import Evaluation
from fastgen.evaluation.settings import Settings
from fastgen.evaluation.tables import Table
from fastgen.evaluation.weights import Weights

WEIGHTS_OF_TESTS = Path(__file__).parents[2] / "tests" / "evaluation"
WIDTH = 2048
K = 3


def speed(count: int, rounds: int = 3) -> Row:
    """Inception score of `count` pictures of 256 x 256 by the real network with seeded random weights, loading it included. Of all rounds what
    took least: other processes only add to it. difference: of the two scores, relative."""
    with tempfile.TemporaryDirectory(prefix="fastgen-evaluation-") as name:
        scratch = Path(name)
        sha256 = _random_weights(scratch / "random.pth")
        pixels = Synthetic().draw([""] * count, list(range(count)), range(count))
        contenders = {
            "fastgen": lambda: _our_score(pixels, scratch, sha256),
            "torch_fidelity": lambda: _their_score(pixels, scratch / "random.pth"),
        }
        return _least_of(contenders, rounds)


def _random_weights(path: Path) -> str:
    """Those that the tests measure with; the file's SHA-256."""
    sys.path.append(str(WEIGHTS_OF_TESTS))
    from inception_weights import random_weights  # pyright: ignore[reportMissingImports]

    return random_weights(path)


def _least_of(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Row:
    """Each in turn; of each the least seconds and the largest memory."""
    row: Row = {}
    values: dict[str, float] = {}
    for _ in range(rounds):
        stages = Stages()
        for name, contender in contenders.items():
            with stages.stage(name):
                values[name] = contender()
        for name, cost in stages.costs.items():
            before = row.get(name, cost)
            row[name] = {key: (max if key == "peak_bytes" else min)(before[key], value) for key, value in cost.items()}
    ours, theirs = values.values()
    return {**row, "difference": abs(ours - theirs) / abs(theirs)}


class Ready(Synthetic):
    """Pictures that are in memory, as torch-fidelity gets them."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def draw(self, prompts: Any, seeds: Any, ids: Any) -> Tensor:
        return self.pixels[list(ids)]


class Images(Dataset):
    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


def _our_score(pixels: Tensor, scratch: Path, sha256: str) -> float:
    with tempfile.TemporaryDirectory(dir=scratch) as store:
        evaluation = Evaluation(_score_protocol(len(pixels), sha256), Resources(Weights(scratch)), Settings(Path(store)))
        evaluation.draw(Ready(pixels))
        return evaluation.rows()[0]["value"]


def _score_protocol(count: int, sha256: str) -> Protocol:
    metrics = {"inception_score": {"splits": 1, "weights": "random.pth", "sha256": sha256}}
    return protocol_from({"name": "score", "sets": {"main": {"prompts": None, "count": count}}, "metrics": metrics, "batch_size": 64})


def _their_score(pixels: Tensor, weights: Path) -> float:
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=Images(pixels), isc=True, isc_splits=1, cuda=False, cache=False, verbose=False, feature_extractor_weights_path=str(weights)
    )
    return found["inception_score_mean"]


def fid_arithmetic(count: int, rounds: int = 1, width: int = WIDTH) -> Row:
    """From features of `count` pictures, twice, to their Fréchet distance: ours from files a block at a time, by two symmetric eigenproblems;
    theirs from memory, where torch-fidelity has all features, by `np.cov` and `eigvals` of a product."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    def ours(first: Path, second: Path) -> float:
        return frechet_distance(table_statistics(Table(first)), table_statistics(Table(second)))

    def theirs(first: Path, second: Path) -> float:
        one, other = (fid_features_to_statistics(torch.from_numpy(np.load(each))) for each in (first, second))
        return fid_statistics_to_metric(one, other, verbose=False)["frechet_inception_distance"]

    return _of_features(ours, theirs, count, rounds, width)


def neighbours(count: int, rounds: int = 1, width: int = WIDTH) -> Row:
    """Precision and recall of features of `count` pictures, twice: ours in fp64 from files, 1024 · 1024 distances at a time; theirs in fp32, all at
    once. The value that is compared is the sum of both."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    def ours(first: Path, second: Path) -> float:
        one, other = Table(first), Table(second)
        return share_within(one, other, K) + share_within(other, one, K)

    def theirs(first: Path, second: Path) -> float:
        one, other = (torch.from_numpy(np.load(each)) for each in (first, second))
        found = prc_features_to_metric(one, other, prc_neighborhood=K, prc_batch_size=10_000, save_cpu_ram=False, verbose=False)
        return found["precision"] + found["recall"]

    return _of_features(ours, theirs, count, rounds, width)


def _of_features(ours: Callable[[Path, Path], float], theirs: Callable[[Path, Path], float], count: int, rounds: int, width: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="fastgen-evaluation-") as name:
        files = [_write_features(Path(name) / f"{seed}.npy", count, width, seed) for seed in (0, 1)]
        return _least_of({"fastgen": lambda: ours(*files), "torch_fidelity": lambda: theirs(*files)}, rounds)


def _write_features(path: Path, count: int, width: int, seed: int) -> Path:
    """Rows (count, width) fp32 in 16 dimensions and a little noise, positive as Inception's: their neighbours are some near, some far."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(16, width, generator=torch.Generator().manual_seed(99))
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, width))
    for start in range(0, count, 1024):
        some = min(1024, count - start)
        rows = (1 + 0.1 * seed) * torch.randn(some, 16, generator=generator) @ directions + 0.3 * torch.randn(some, width, generator=generator)
        array[start : start + some] = rows.abs().numpy() / 4
    array.flush()
    return path

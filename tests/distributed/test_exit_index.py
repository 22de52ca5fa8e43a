"""Every process leaves a rollout at the same step, whatever its share of the batch (gloo, CPU). Run with `pytest -m distributed`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matching_cases import batch_of
from torch import Tensor
from toy_runs import Recorded, toy_method, toy_roles, toy_setting

from fastgen.distillers.dmd2 import DMD2
from fastgen.distillers.phased_dmd import PhasedDMD
from fastgen.families.toy import Toy
from fastgen.rng import SampleRng

pytestmark = pytest.mark.distributed
GRID, STEPS = (1.0, 0.75, 0.5, 0.25), 12
PHASES = [{"start": 1, "end": 0.5}, {"start": 0.5, "end": 0}]


def rollouts(kind: type[DMD2], ids: range, **keys: Any) -> tuple[list[tuple[float, ...]], list[Tensor]]:
    """At each step the times (of the student's evaluations, the exit's the last) and samples of `match` and `critic` of samples `ids`."""
    family = Toy("toy:mixture")
    method: Any = toy_method(kind, replace(toy_setting(family, grid=GRID), train_steps=STEPS), **keys)
    roles, times, samples = toy_roles(method, family), [], []
    for step in range(STEPS):
        for index, term in enumerate(("critic", "match")):
            models = {name: Recorded(predictor) for name, predictor in roles.predictors().items()}
            rng = SampleRng(0, (step, index), ids).at(term)
            getattr(method, term)(models, batch_of(len(ids)), rng, step)
            calls = [(x, t) for name in method.roles_for(method.config) if name.startswith("student") for x, t, _ in models[name].inputs]
            assert all(bool((t == t[0]).all()) for _, t in calls)
            times.append(tuple(round(t[0].item(), 6) for _, t in calls))
            samples.append(calls[0][0])
    return times, samples


def exits_agree(rank: int, kind: type[DMD2], keys: dict[str, Any]) -> None:
    """Exits and times are equal on both processes and to those of one process with the whole batch; noises are each process's own."""
    times, samples = rollouts(kind, range(3 * rank, 3 * rank + 3), **keys)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, (times, samples))
    (first, noise), (second, other) = everyone
    whole, together = rollouts(kind, range(6), **keys)
    assert first == second == whole
    assert len({each[-1] for each in first}) > 1
    for a, b, both in zip(noise, other, together, strict=True):
        assert torch.equal(torch.cat([a, b]), both)
        assert not torch.equal(a, b)


CASES: dict[str, Callable[[int], None]] = {
    "dmd2": lambda rank: exits_agree(rank, DMD2, {}),
    "sampled times": lambda rank: exits_agree(rank, DMD2, {"rollout": {"times": "sampled", "steps": 4}}),
    "phased": lambda rank: exits_agree(rank, PhasedDMD, {"phases": PHASES}),
}


def process(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for case in CASES.values():
            case(rank)
    finally:
        dist.destroy_process_group()


def test_on_two_processes(tmp_path: Path) -> None:
    mp.spawn(process, (str(tmp_path / "store"),), nprocs=2)  # type: ignore[attr-defined]

"""Replicas on two processes (gloo, CPU) train as one process does at the same global batch. Run with `pytest -m distributed`."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from run_cases import CASES, difference, kept, trained
from toy_runs import CPU

from fastgen.data.rows import Held
from fastgen.errors import TrainingFailed
from fastgen.parallel import Replicas, SingleProcess

pytestmark = pytest.mark.distributed


def compared(name: str) -> list[str]:
    """What is wrong with a case."""
    several: Any = CASES[name](Replicas(CPU))
    rows, weights = trained(several), kept(several)
    each: list[Any] = [None, None]
    dist.all_gather_object(each, (rows, weights))
    (first, ours), (second, theirs) = each
    wrong = [] if first == second else ["the processes log other numbers"]
    wrong += [f"{key} differs between processes" for key in ours if not torch.equal(ours[key], theirs[key])]
    if dist.get_rank() == 0:
        alone = CASES[name](SingleProcess(CPU))
        expected = trained(alone)
        if [row.keys() for row in rows] != [row.keys() for row in expected]:
            wrong.append("other numbers are logged")
        worst = max(
            (difference(key, want[key], row[key]), step, key) for step, (row, want) in enumerate(zip(rows, expected, strict=True)) for key in want
        )
        print(f"{name}: {worst}", flush=True)
        if worst[0] > 1e-9:
            wrong.append(f"differs from one process: {worst}")
        if not any(key.startswith("loss/") and value for key, value in expected[-1].items()):
            wrong.append("there is nothing to train")
    return wrong


def failed_together() -> list[str]:
    """Rows that are not finite lie in one process's share of the first step; both stop there, with the same words."""
    trainer: Any = CASES["scm"](Replicas(CPU))
    drawn = trainer.data._rows(trainer._samples_of(0)[0].at("data"))[1]
    broken = trainer.data.latents.select(torch.arange(64))["latents"].clone()
    if dist.get_rank() == 1:
        broken[(broken == drawn[0]).all(1)] = torch.nan
    trainer.data = replace(trainer.data, latents=Held({"latents": broken}))
    try:
        trainer.run([])
    except TrainingFailed as error:
        each: list[Any] = [None, None]
        dist.all_gather_object(each, str(error))
        right = each[0] == each[1] and each[0].startswith("step 0: the loss of term 'consistency'") and "the latents of data.images" in each[0]
        return [] if right else [f"it says {each}"]
    return ["nobody failed"]


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        only = os.environ.get("CASE")
        wrong = [f"{name}: {each}" for name in CASES if only in (None, name) for each in compared(name)]
        wrong += failed_together()
        Path(folder, f"wrong_{rank}").write_text("\n".join(wrong), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_replicas_are_one_process(tmp_path: Path) -> None:
    mp.spawn(process, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    assert [Path(tmp_path, f"wrong_{rank}").read_text(encoding="utf-8") for rank in (0, 1)] == ["", ""]

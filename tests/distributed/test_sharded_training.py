"""Networks cut over two processes (gloo, CPU) train as whole ones do on one process at the same global batch. Run with `pytest -m distributed`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from run_cases import CASES, difference, kept, trained
from torch import Tensor
from toy_runs import CPU

from fastgen import shards
from fastgen.parallel import Cut, SingleProcess
from fastgen.sharding import Shards

pytestmark = pytest.mark.distributed


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: shards.whole(tensor) for name, tensor in tensors.items()}


def compared(name: str) -> list[str]:
    """What is wrong with a case."""
    several = CASES[name](Shards(CPU, Cut()))
    rows, weights = trained(several), whole(kept(several))
    each: list[Any] = [None, None]
    dist.all_gather_object(each, (rows, weights))
    (first, ours), (second, theirs) = each
    wrong = [] if first == second else ["the processes log other numbers"]
    wrong += [f"{key} differs between processes" for key in ours if not torch.equal(ours[key], theirs[key])]
    if dist.get_rank() == 0:
        alone = CASES[name](SingleProcess(CPU))
        expected, there = trained(alone), kept(alone)
        if [row.keys() for row in rows] != [row.keys() for row in expected] or there.keys() != weights.keys():
            wrong.append("other numbers are logged or kept")
        worst = max((difference(want[key], row[key]), step, key) for step, (row, want) in enumerate(zip(rows, expected, strict=True)) for key in want)
        off = max((float((weights[key].double() - there[key].double()).abs().max()), key) for key in there)
        print(f"{name}: {worst} {off}", flush=True)
        if worst[0] > 1e-9 or off[0] > 1e-7:
            wrong.append(f"differs from one process: {worst}, {off}")
    return wrong


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        only = os.environ.get("CASE")
        wrong = [f"{name}: {each}" for name in CASES if only in (None, name) for each in compared(name)]
        Path(folder, f"wrong_{rank}").write_text("\n".join(wrong), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_parts_are_one_process(tmp_path: Path) -> None:
    mp.spawn(process, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    assert [Path(tmp_path, f"wrong_{rank}").read_text(encoding="utf-8") for rank in (0, 1)] == ["", ""]

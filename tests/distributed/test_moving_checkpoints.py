"""Checkpoints go from any number of processes to any other, replicas or parts (gloo, CPU): the state to the bit, the next losses to rounding.
Run with `pytest -m distributed`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from run_cases import CASES, difference, kept
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_runs import CPU

from fastgen import checkpoint, shards
from fastgen.parallel import Replicas, SingleProcess, Strategy
from fastgen.saving import Saver, own_group
from fastgen.sharding import Cut, Shards
from fastgen.tensor_files import Group
from fastgen.trainer import Metrics, Trainer

pytestmark = pytest.mark.distributed

# A method with a discriminator, statistics and averages each; phases with roles that come and go.
NAMES = ("dmd2", "f_distill lora", "phased_dmd")
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "single": lambda: SingleProcess(CPU),
    "ddp": lambda: Replicas(CPU),
    "fsdp": lambda: Shards(CPU, Cut()),
    "hsdp": lambda: Shards(CPU, Cut(mesh=(2, 2))),
}
STEPS = 3


def steps(trainer: Trainer, count: int) -> list[Metrics]:
    return [trainer.train_step() for _ in range(count)]


def whole(trainer: Trainer) -> dict[str, Tensor]:
    """Collective: weights, averages, statistics and moments."""
    return {name: shards.whole(tensor).contiguous() for name, tensor in kept(trainer).items()}


def save_at(folder: Path, name: str, strategy: str, group: Group, *, beside: bool = False) -> None:
    """Train some steps and save; note what was saved, and the metrics of two steps from there."""
    trainer = CASES[name](STRATEGIES[strategy]())
    steps(trainer, STEPS)
    here = folder / f"{name} {strategy}"
    if beside:
        with Saver(here / "checkpoints", keep=1, beside=True) as saver:
            saver.save(trainer, {}, inputs={}, metrics={})
            steps(trainer, 1)  # which the copies must not see
        checkpoint.load(checkpoint.latest(here), trainer := CASES[name](STRATEGIES[strategy]()))
    else:
        checkpoint.save(here / "checkpoints", trainer, {}, keep=1, group=group)
    state = whole(trainer)
    if trainer.parallel.is_main:
        save_file(state, here / "state.safetensors")
    after = steps(trainer, 2)
    if trainer.parallel.is_main:
        (here / "after.json").write_text(json.dumps(after), encoding="utf-8")


def wrong_after_loading(folder: Path, name: str, source: str, strategy: str) -> list[str]:
    """Collective: what differs when a run goes on from what `source` saved."""
    here = folder / f"{name} {source}"
    trainer = CASES[name](STRATEGIES[strategy]())
    checkpoint.load(checkpoint.latest(here), trainer)
    found, expected = whole(trainer), load_file(here / "state.safetensors")
    wrong = sorted(found.keys() ^ expected.keys()) or [key for key, value in expected.items() if not torch.equal(found[key], value)]
    for want, row in zip(json.loads((here / "after.json").read_text(encoding="utf-8")), steps(trainer, 2), strict=True):
        wrong += list(want.keys() ^ row.keys()) or [key for key in want if difference(key, want[key], row[key]) > 1e-9]
    return [f"{name} from {source} to {strategy}: {each}" for each in wrong]


def two(rank: int, group: Group, folder: Path) -> list[str]:
    for name in NAMES:
        save_at(folder, name, "ddp", group)
        save_at(folder, name, "fsdp", group)
    return [
        *wrong_after_loading(folder, "dmd2", "ddp", "fsdp"),
        *wrong_after_loading(folder, "dmd2", "fsdp", "ddp"),
        *wrong_after_loading(folder, "dmd2", "single", "fsdp"),
    ]


def four(rank: int, group: Group, folder: Path) -> list[str]:
    wrong = [*wrong_after_loading(folder, "dmd2", "fsdp", "ddp"), *wrong_after_loading(folder, "dmd2", "ddp", "fsdp")]
    wrong += wrong_after_loading(folder, "f_distill lora", "fsdp", "ddp")
    save_at(folder, "dmd2", "hsdp", group, beside=True)
    return wrong + wrong_after_loading(folder, "dmd2", "hsdp", "ddp")


def process(rank: int, world: int, work: Callable[[int, Group, Path], list[str]], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store_{world}", rank=rank, world_size=world)
    try:
        wrong = work(rank, own_group(60), Path(folder))
        Path(folder, f"wrong_{rank}").write_text("\n".join(wrong), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def on(world: int, work: Callable[[int, Group, Path], list[str]], folder: Path) -> list[str]:
    mp.spawn(process, (world, work, str(folder)), nprocs=world)  # type: ignore[attr-defined]
    return [Path(folder, f"wrong_{rank}").read_text(encoding="utf-8") for rank in range(world)]


def test_any_number_of_processes_goes_on_from_what_any_other_saved(tmp_path: Path) -> None:
    save_at(tmp_path, "dmd2", "single", None)
    assert on(2, two, tmp_path) == [""] * 2
    assert on(4, four, tmp_path) == [""] * 4
    wrong = [each for name in NAMES for source in ("ddp", "fsdp") for each in wrong_after_loading(tmp_path, name, source, "single")]
    assert wrong + wrong_after_loading(tmp_path, "dmd2", "hsdp", "single") == []
    for source, world in {"ddp": 2, "fsdp": 2, "hsdp": 4}.items():
        assert_each_is_written_once(checkpoint.latest(tmp_path / f"dmd2 {source}"), world, load_file(tmp_path / f"dmd2 {source}/state.safetensors"))


def assert_each_is_written_once(path: Path, world: int, state: Mapping[str, Tensor]) -> None:
    """Every process has a share of the files, no number lies in two of them, and Adam's steps are what they were."""
    files = sorted(path.glob("*.safetensors"))
    assert {file.name for file in files} == checkpoint.read_state(path)["files"].keys()
    writers = {int(re.findall(r"-(\d+)-of-", file.name)[0]) for file in files}
    assert writers == set(range(1, world + 1))
    tensors = [value for file in files for key, value in load_file(file).items()]
    assert sum(tensor.numel() for tensor in tensors) == sum(value.numel() for value in state.values())
    counts = [float(value) for file in files for key, value in load_file(file).items() if key.endswith("/step")]
    assert sorted(counts) == sorted(float(value) for key, value in state.items() if key.endswith("/step")) and min(counts) >= STEPS

"""Networks cut over two processes (gloo, CPU) train as whole ones do on one process at the same global batch. Run with `pytest -m distributed`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from run_cases import CASES, WITH_ROOTS, altered, difference, digits, kept, resumed, trained, trained_experts
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from toy_runs import CPU, normal

from fastgen import checkpoint, divergence, inputs, shards
from fastgen.families.weights import WeightFiles
from fastgen.memory import part_as_cut
from fastgen.parallel import Cut, Replicas, SingleProcess
from fastgen.run import calibration
from fastgen.saving import own_group
from fastgen.sharding import Shards, mesh_of, shard
from fastgen.trainer import Trainer

pytestmark = pytest.mark.distributed

# What issues of sharding there are: heads on frozen and on trained networks, roles that leave, adapters of one base, tangents, running statistics,
# a role without additions, experts, gradients that pass a network's own parameters.
TRAINED = ["dmd2", "dmd2 heads on the fake score", "dmd2 lora", "dmd2 micro-batches", "scm", "scm lora", "phased_dmd", "phased_dmd lora", "f_distill"]
TRAINED += ["f_distill lora", "reflow", "reflow lora", "dense2moe", "dense2moe blocks", *WITH_ROOTS]
ALL = CASES | WITH_ROOTS


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: shards.whole(tensor) for name, tensor in tensors.items()}


def agree(found: Any) -> None:
    """Both processes have the same, to the bit."""
    each: list[Any] = [None, None]
    dist.all_gather_object(each, found)
    (rows, ours), (others, theirs) = each
    assert rows == others
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())


def training_is_that_of_one_process() -> None:
    """Losses to 1e-9, weights and moments to 1e-10, of 20 steps in fp64. Each process makes the reference of every other
    case."""
    found = {}
    for name in TRAINED:
        trainer = ALL[name](Shards(CPU, Cut()))
        found[name] = trained(trainer), whole(kept(trainer))
        agree(found[name])
    for place, name in enumerate(TRAINED):
        if place % 2 != dist.get_rank() and not name.startswith("dense2moe"):  # whose data processes prepare together
            continue
        alone = ALL[name](SingleProcess(CPU))
        (rows, tensors), expected, there = found[name], trained(alone), kept(alone)
        assert [row.keys() for row in rows] == [row.keys() for row in expected] and there.keys() == tensors.keys()
        worst = max(
            (difference(key, want[key], row[key]), step, key) for step, (row, want) in enumerate(zip(rows, expected, strict=True)) for key in want
        )
        assert worst[0] <= 1e-9, (name, worst)
        off = max((float((tensors[key].double() - there[key].double()).abs().max()), key) for key in there if not key.startswith("ema/"))
        assert off[0] <= 1e-10, (name, off)
        averages = [float((tensors[key].double() - there[key].double()).abs().max()) for key in there if key.startswith("ema/")]
        assert max(averages) <= 1e-6, name  # which are in fp32


def copies_of_parts_train_so_too() -> None:
    """Two copies in one part each, and one in two: the mean of gradients is over all processes."""
    found = []
    for mesh in ((2, 1), (1, 2)):
        trainer = CASES["dmd2"](Shards(CPU, Cut(mesh)))
        found.append((trained(trainer), whole(kept(trainer))))
        agree(found[-1])
    for row, other in zip(found[0][0], found[1][0], strict=True):
        assert max(difference(key, row[key], other[key]) for key in row) <= 1e-9


def each_process_has_its_part(world: int = 2) -> None:
    """Bytes are counted: of every network each process has what a plan says of the largest part, and the processes together have it once; what
    lies beside networks is whole."""
    for name in ("dmd2", "dmd2 lora"):
        trainer = CASES[name](Shards(CPU, Cut()))
        trainer.train_step()
        plain = CASES[name](SingleProcess(CPU))
        plain.train_step()
        for role in trainer.roles:
            own, full = (dict(each.roles[role].denoiser.backbone.named_parameters()) for each in (trainer, plain))
            assert own.keys() == full.keys()
            for key, parameter in own.items():
                part = shards.own(parameter)
                assert part.numel() <= part_as_cut(full[key], world).numel()
                total = torch.tensor(part.numel())
                dist.all_reduce(total)
                assert total.item() == full[key].numel()
            assert not any(isinstance(p, DTensor) for key, p in trainer.roles[role].parameters().items() if key.startswith("heads."))
        together = torch.tensor(_held(trainer))
        dist.all_reduce(together)
        assert together.item() == _held(plain)
        assert _held(trainer) <= 0.6 * _held(plain)  # an adapter of rank 3 has 2 and 1 of it
    assert len({id(role.denoiser.backbone) for role in trainer.roles.values()}) == 1  # adapters, their base and the teacher: one root
    assert isinstance(trainer.roles["student"].denoiser.backbone, FSDPModule)


def _held(trainer: Trainer) -> int:
    """Bytes of networks, their moments and averages on this process."""
    networks = {id(p): p for role in trainer.roles.values() for p in role.denoiser.backbone.parameters()}
    moments = [
        v
        for o in trainer.optimizers.values()
        for p, s in o.state.items()
        if id(p) in networks
        for v in s.values()
        if isinstance(v, Tensor) and v.ndim
    ]
    averages = [value for average in trainer.ema.values() for key, value in average.shadow.items() if not key.startswith("heads.")]
    return sum(shards.own(each).nbytes for each in (*networks.values(), *moments, *averages))


def parts_are_read_and_written() -> None:
    """A bias of 3 over 2 processes, and one of 1, of which the second has nothing."""
    net = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1)).double()
    values = {name: normal(*p.shape, seed=i) for i, (name, p) in enumerate(net.named_parameters())}
    values["1.bias"][0] = -7.5
    shard(net, list(net), mesh_of(CPU, None), Cut())
    for name, parameter in net.named_parameters():
        shards.assign(parameter, values[name])
        assert torch.equal(shards.whole(parameter), values[name])
        again: Any = shards.sharded_like(values[name], parameter)
        assert torch.equal(shards.own(again), shards.own(parameter)) and again.shape == parameter.shape
    vector = torch.cat([value.flatten() for value in values.values()])
    assert shards.largest(net.parameters()) == vector.abs().max().item()
    assert abs(shards.norm(net.parameters()) - vector.norm().item()) <= 1e-12
    first = next(net.parameters())
    elsewhere: Any = shards.moved(first, "meta", torch.float32)  # there is no other device here
    assert (elsewhere.to_local().device.type, elsewhere.dtype, elsewhere.shape) == ("meta", torch.float32, first.shape)
    assert shards.own(first).device == CPU and elsewhere.to_local().shape == shards.own(first).shape
    if dist.get_rank() == 0:
        shards.own(next(net.parameters()))[0, 0] = math.nan
    assert shards.largest(net.parameters()) == math.inf  # on the process that has it, and on the other
    assert divergence._first(dict(net.named_parameters())) == "0.weight"


def in_bf16_with_recomputation() -> None:
    """Parameters are gathered in bf16 and gradients reduced in fp32; blocks run again in the backward pass; frozen parts lie on the CPU. Near a
    run in bf16 on one process, whose norms and biases are not rounded."""
    keys = ("train.precision=bf16", "train.checkpointing=true", "train.steps=2", "optimizer.student.warmup=0", "optimizer.fake_score.warmup=0")
    recipe = "digits_dmd2_1step"
    for more in ((), ("student.tune={lora: {rank: 4}}",)):
        cut = digits(recipe, Shards(CPU, Cut(compute=torch.bfloat16, offload=True)), *keys, *more, wide=False)
        rows, tensors = trained(cut), whole(kept(cut))
        agree((rows, tensors))
        dtypes = {p.dtype for p in cut.roles.trained["student"].parameters().values()}
        assert dtypes == {torch.float32}
        expected = trained(digits(recipe, SingleProcess(CPU), *keys, *more, wide=False))
        for row, want in zip(rows, expected, strict=True):
            assert abs(row["loss/match"] - want["loss/match"]) <= 0.05 * want["loss/match"]
            assert abs(row["loss/critic"] - want["loss/critic"]) <= 0.05 * want["loss/critic"]


def each_process_reads_its_part_alone() -> None:
    """Weights of a folder are the same to the bit whether all processes load them whole or each its rows, which is all that it then reads of them:
    for networks that train, beside a teacher in half precision, and for adapters on one."""
    read: list[int] = []

    def counted(files: WeightFiles, rows: Any) -> Any:
        for name, part in before(files, rows):
            read.append(part.nbytes)
            yield name, part

    before, WeightFiles.read = WeightFiles.read, counted  # type: ignore[method-assign]
    try:
        for more, networks in ((("train.precision=bf16",), 3), (("student.tune={lora: {rank: 4}}",), 1)):
            keys = ("train.shard=fsdp", "train.steps=2", *more)
            whole_first = digits("digits_dmd2_1step", Shards(CPU, Cut()), *keys, wide=None)
            read.clear()
            own = digits("digits_dmd2_1step", Shards(CPU, Cut()), *keys, wide=False)
            assert len({id(role.denoiser.backbone) for role in own.roles.values()}) == networks
            full = sum(p.numel() * 4 for p in own.roles["teacher"].denoiser.family.load_backbone().parameters())
            assert 0.4 * networks * full < sum(read) < 0.6 * networks * full
            for name, role in own.roles.items():
                theirs = whole_first.roles[name].denoiser.backbone.state_dict()
                ours = role.denoiser.backbone.state_dict()
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(shards.own(ours[key]), shards.own(theirs[key])) and ours[key].dtype == theirs[key].dtype for key in ours)
            rows, expected = trained(own), trained(whole_first)
            assert [row["loss/match"] for row in rows] == [row["loss/match"] for row in expected]
    finally:
        WeightFiles.read = before  # type: ignore[method-assign]


def a_whole_network_is_gathered_on_one_process() -> None:
    for name in ("dmd2", "dmd2 lora"):
        trainer = CASES[name](Shards(CPU, Cut()))
        trainer.train_step()
        role = trainer.roles["student"]
        tensors = {key: shards.whole(p) for key, p in role.denoiser.backbone.named_parameters()}
        plain = trainer.parallel.plain(role)
        assert (plain is None) == (dist.get_rank() == 1)
        if plain is not None:
            own = dict(plain.denoiser.backbone.named_parameters())
            assert own.keys() == tensors.keys() and all(torch.equal(own[key], tensors[key]) for key in own)
            assert type(plain.denoiser.backbone).__name__ == "Backbone"
            x, t = normal(3, 2), torch.tensor([0.2, 0.5, 0.9])
            assert bool(plain.predictor(x, t, {}).isfinite().all())


def experts_that_one_process_removed_and_copied_go_on_anywhere() -> None:
    """In micro-batches. What the main process has measured all have, and checkpoints of parts go on as replicas and on one process."""
    trained_experts()
    keys, measure = ("train.micro_batch=1",), calibration._denoising
    if dist.get_rank():
        calibration._denoising = lambda *_: pytest.fail("the main process measures for all")
    with TemporaryDirectory() as own:
        names = [own]
        dist.broadcast_object_list(names)
        folder = Path(names[0])
        running = altered(Shards(CPU, Cut()), folder / f"source_{dist.get_rank()}", *keys)
        trainer, recipe, began = running.trainer, running.plan.resolved(), inputs.identify(running.plan).hashes
        rows = [trainer.train_step()]
        checkpoint.write(folder / "checkpoints", checkpoint.Content.of(trainer, recipe, inputs=began), keep=1, group=own_group(60))
        state = whole(kept(trainer))
        rows += [trainer.train_step(), trainer.train_step()]
        agree((rows, whole(kept(trainer))))
        for strategy in (Replicas(CPU), SingleProcess(CPU)):
            again = resumed(strategy, folder)
            found = kept(again)
            assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
            for want in rows[1:]:
                row = again.train_step()
                assert row.keys() == want.keys() and max(difference(key, want[key], row[key]) for key in want) <= 1e-9
        dist.barrier()
    calibration._denoising = measure


CHECKS: list[Callable[[], None]] = [
    experts_that_one_process_removed_and_copied_go_on_anywhere,
    parts_are_read_and_written, each_process_has_its_part, a_whole_network_is_gathered_on_one_process, copies_of_parts_train_so_too,
    in_bf16_with_recomputation, each_process_reads_its_part_alone, training_is_that_of_one_process,
]  # fmt: skip


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for check in CHECKS:
            check()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_parts_are_one_process(tmp_path: Path) -> None:
    mp.spawn(process, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]

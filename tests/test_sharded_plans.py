"""What a plan says and refuses of processes that keep parts of networks (train.shard: fsdp)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.memory import gathered_bytes, held, part_as_cut
from fastgen.plan import plan
from fastgen.roles import build_roles
from fastgen.room import answer

FSDP = ("train.shard=fsdp", "train.device=cpu", "evaluate.protocol=null", "train.batch_size=16", "train.micro_batch=1")


def planned(name: str, processes: int, *keys: str) -> Any:
    return plan(Recipe.load(name, [*FSDP, *keys]), dry=True, processes=processes)


def shares(name: str, processes: int, *keys: str) -> Any:
    found = planned(name, processes, *keys)
    return held(found, build_roles(found.roles, found.family, found.family.load_backbone(meta=True), **found.student, storage=found.storage))


@pytest.mark.parametrize("keys", [(), ("student.tune={lora: {rank: 16}}",)])
def test_memory_falls_as_the_number_of_processes_grows(keys: tuple[str, ...]) -> None:
    """By 1/N for what dimensions of 16 and more divide."""
    one = plan(Recipe.load("digits_dmd2_1step", ["train.device=cpu", "evaluate.protocol=null", *keys]), dry=True)
    whole = held(one, build_roles(one.roles, one.family, one.family.load_backbone(meta=True), **one.student, storage=one.storage))
    for processes in (2, 4, 8):
        part = shares("digits_dmd2_1step", processes, *keys)
        for kind in ("frozen", "trained", "gradients", "optimizers", "averages"):
            assert getattr(whole, kind) / processes <= getattr(part, kind) <= 1.03 * getattr(whole, kind) / processes, (processes, kind)
        assert part.buffers == whole.buffers


def test_parts_are_as_torch_cuts() -> None:
    for rows, parts in ((7, 2), (1, 4), (16, 8), (5, 4)):
        assert part_as_cut(torch.empty(rows, 3), parts).shape == torch.empty(rows, 3).chunk(parts)[0].shape


def test_a_copy_for_each_machine_has_the_parts_of_its_own_processes() -> None:
    mesh = planned("digits_dmd2_1step", 8, "train.mesh=[2, 4]")
    assert (mesh.processes, mesh.parts, mesh.cut.mesh) == (8, 4, (2, 4))
    assert shares("digits_dmd2_1step", 8, "train.mesh=[2, 4]") == shares("digits_dmd2_1step", 4)


def test_blocks_are_gathered_in_the_dtype_that_is_computed_in() -> None:
    """But where the student is differentiated, which is checked in full precision."""
    bf16 = ("train.precision=bf16",)
    assert planned("digits_dmd2_1step", 2, *bf16).cut.compute == torch.bfloat16
    assert planned("digits_scm_2step", 2, *bf16).cut.compute is None
    assert planned("digits_meanflow_2step", 2, *bf16).cut.compute is None
    assert planned("digits_dmd2_1step", 2).cut.compute is None
    whole, half = (planned("digits_dmd2_1step", 2, *keys) for keys in ((), bf16))
    sizes = [gathered_bytes(each, build_roles(each.roles, each.family, each.family.load_backbone(meta=True))) for each in (whole, half)]
    assert sizes[1] < sizes[0]


def test_a_plan_says_what_one_process_needs() -> None:
    found = answer(Recipe.load("digits_dmd2_1step", list(FSDP)), processes=4)
    assert (found["processes"], found["parts"]) == (4, 4)
    alone = answer(Recipe.load("digits_dmd2_1step", [*FSDP, "train.shard=none"]), processes=1)
    assert found["bytes"]["optimizers"] < 0.3 * alone["bytes"]["optimizers"] and found["peak"] < alone["peak"]


REFUSED = {
    "quantised": (("student.tune={lora: {rank: 4}}", "teacher.quantise=int8"), "teacher.quantise: int8"),
    "held": (("student.tune={lora: {rank: 4}}", "teacher.dtype=bf16"), "teacher.dtype: bf16"),
    "measuring": (("evaluate.protocol=digits", "evaluate.every=5"), "evaluate.every: 5"),
    "batch": (("train.batch_size=9",), "train.batch_size: 9"),
    "mesh": (("train.mesh=[3, 2]",), "train.mesh: 3 x 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_parts_cannot_have_is_refused_by_key(name: str) -> None:
    keys, said = REFUSED[name]
    with pytest.raises(UserError, match=f"^recipe key {said.replace('.', '[.]')}"):
        planned("digits_dmd2_1step", 4, *keys)


def test_pairs_are_drawn_beforehand() -> None:
    with pytest.raises(UserError, match=r"^recipe key data[.]pairs: drawn by the teacher"):
        planned("digits_reflow_1step", 2, "data.pairs=32")


def test_one_process_has_no_parts() -> None:
    with pytest.raises(UserError, match=r"^recipe key train[.]shard: 'fsdp' needs several processes"):
        plan(Recipe.load("digits_dmd2_1step", list(FSDP)))

"""A network whose blocks lie elsewhere computes the same; here both places are the CPU, and only when blocks move is seen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_roles import SPECS, perturb, sd3_case

from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.parallel import SingleProcess
from fastgen.plan import plan
from fastgen.roles import build_roles
from fastgen.run import Progress, build
from fastgen.surgery.held import Storage
from fastgen.surgery.offload import is_offloaded, offload

CPU = torch.device("cpu")


@pytest.mark.parametrize("storage", [Storage(), Storage("bf16", "int8")], ids=["fp32", "int8"])
def test_the_teacher_gives_the_same_and_its_copies_are_not_offloaded(storage: Storage) -> None:
    case = sd3_case()
    there, here = (build_roles(SPECS, case.family, case.backbone(), storage=storage, device=CPU, offloaded=offloaded) for offloaded in (True, False))
    assert [is_offloaded(role.denoiser.backbone) for role in there.values()] == [False, False, True]
    perturb(there["student"], 0)
    with torch.no_grad():
        assert torch.equal(case.run(there["teacher"]), case.run(here["teacher"]))


def test_each_block_moves_for_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.hooks.group_offloading import ModuleGroup

    case, moves = sd3_case(), []
    network = case.backbone()
    plain = copy.deepcopy(network)
    offload(network, CPU)
    for name in ("onload_", "offload_"):
        own = getattr(ModuleGroup, name)
        monkeypatch.setattr(ModuleGroup, name, lambda group, own=own, name=name: (moves.append((name, type(group.modules[0]).__name__)), own(group)))
    with torch.no_grad():
        out, expected = (case.family.call(each, case.x, case.t, case.cond) for each in (network, plain))
    assert torch.equal(out, expected)
    blocks = [(name, place) for name, place in moves if place == "JointTransformerBlock"]
    assert [name for name, _ in blocks] == ["onload_", "offload_"] * len(plain.transformer_blocks)  # type: ignore[arg-type]


def test_preparing_a_role_leaves_what_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = build_roles(SPECS, (case := sd3_case()).family, case.backbone(), device=CPU, offloaded=True)
    moved: list[Any] = []
    for name, role in roles.items():
        monkeypatch.setattr(role.denoiser, "to", lambda device, name=name, role=role: (moved.append(name), role.denoiser)[1])
        SingleProcess(CPU).prepare(role)
    assert moved == ["student", "fake_score"]
    assert roles["teacher"].module is roles["teacher"].denoiser


def digits(*overrides: str) -> Recipe:
    return Recipe.load("digits_dmd2_1step", ["train.batch_size=4", "train.device=cpu", *overrides])


def test_a_run_trains_to_the_same_numbers() -> None:
    weights = []
    for offloaded in ("true", "false"):
        run = build(plan(digits(f"teacher.offload={offloaded}")), Progress())
        run.trainer.train_step()
        weights.append(run.roles["student"].state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["student.tune.lora.rank=2"], "the student's adapters train on the teacher's network"),
        (["distiller.gan={}", "data={images: 'fastgen:digits'}", "optimizer.discriminator.lr=0.001"], "the discriminator sends gradients through"),
    ],
)
def test_what_gradients_go_through_stays(overrides: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^recipe key teacher\.offload: true, but {said}"):
        plan(digits("teacher.offload=true", *overrides))

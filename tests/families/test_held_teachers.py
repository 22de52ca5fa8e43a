"""Every family's call on a base that holds its weights in fewer bits, beside the fp32 network made from the same, rounded, weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import check_cell
from pipelines import tiny_sd3
from test_matrix import FAMILIES
from tiny_flux import tiny_flux
from tiny_sana import tiny_sana
from tiny_sd15 import tiny_sd15
from torch import Tensor

from fastgen.denoiser import Denoiser
from fastgen.families import find_family
from fastgen.families.base import Family
from fastgen.jvp import tangent
from fastgen.roles import LoraTuning, Role, build_roles, frozen, trainable
from fastgen.surgery.held import Held, Storage, is_held


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def perturbed(role: Role) -> Role:
    """Adapters away from the identity they start as."""
    for i, parameter in enumerate(role.parameters().values()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return role


@dataclass(frozen=True)
class Case:
    family: Family
    x: Tensor
    t: Tensor
    cond: dict[str, Tensor]

    def student(self, storage: Storage, *, of: Denoiser | None = None, autocast: torch.dtype | None = None) -> Role:
        """A student with adapters; of: on the weights that this network reads."""
        base = self.family.load_backbone()
        for key, layer in of.backbone.named_modules() if of else ():
            if isinstance(layer, Held):
                base.get_submodule(key.replace(".base_layer", "")).weight.data = layer.weight  # type: ignore[union-attr]
        tuning = LoraTuning(rank=2, alpha=3.0, targets=self.family.lora_targets)
        roles = build_roles({"student": trainable(), "teacher": frozen()}, self.family, base, tuning=tuning, storage=storage, autocast=autocast)
        return perturbed(roles["student"])

    def run(self, role: Role) -> tuple[Tensor, Tensor]:
        """Its prediction and all its adapters' gradients, of a random linear loss."""
        out = role.module(self.x, self.t, self.cond).prediction
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
        gradients = torch.autograd.grad((out * weight).sum(), list(role.parameters().values()), allow_unused=True)
        return out.detach(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])

    @torch.no_grad()
    def tangent(self, role: Role) -> Tensor:
        return tangent(lambda x, t: role.module(x, t, self.cond).prediction, (self.x, self.t), (torch.ones_like(self.x), torch.ones_like(self.t)))[1]


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "sd2"])
def case(request: Any) -> Case:
    row = FAMILIES[request.param]
    family = find_family(row.build(), **row.teacher)
    x = torch.randn(2, *family.latent.shape, generator=torch.Generator().manual_seed(0))
    return Case(family, x, torch.tensor([0.3, 0.8]) * family.path.t_max, family.encode_prompts(row.prompts))


@pytest.mark.parametrize("storage", [Storage("bf16"), Storage("bf16", "fp8"), Storage(quantise="int8")], ids=["bf16", "fp8", "int8"])
def test_a_held_base_computes_in_fp32_what_its_weights_give(case: Case, storage: Storage) -> None:
    held = case.student(storage)
    plain = case.student(Storage(), of=held.denoiser)
    assert is_held(held.denoiser.backbone) and not is_held(plain.denoiser.backbone)
    assert held.denoiser.dtype == torch.float32 and {p.dtype for p in held.parameters().values()} == {torch.float32}
    for ours, theirs in zip(case.run(held), case.run(plain), strict=True):
        assert relative(ours, theirs) < 1e-5
    assert relative(case.tangent(held), case.tangent(plain)) < 1e-5


def test_under_autocast_a_bf16_base_rounds_where_an_fp32_one_does(case: Case) -> None:
    held = case.student(Storage("bf16"), autocast=torch.bfloat16)
    same, full = (case.student(Storage(), of=held.denoiser, autocast=dtype) for dtype in (torch.bfloat16, None))
    (out, gradient), (as_fp32, as_fp32_gradient) = case.run(held), case.run(same)
    assert out.dtype == torch.float32
    assert relative(out, as_fp32) < 5e-3 and relative(gradient, as_fp32_gradient) < 5e-3
    assert 1e-4 < relative(out, case.run(full)[0]) < 0.06, "which is what autocast itself does"


CELLS: list[tuple[str, Callable[[], Any], str, bool, dict[str, Any]]] = [
    ("flux", tiny_flux, "dmd2", True, {**FAMILIES["flux"].teacher, "dtype": "bf16", "quantise": "fp8"}),
    ("sana", tiny_sana, "scm", True, {**FAMILIES["sana"].teacher, "quantise": "int8"}),
    ("sd", tiny_sd15, "lcm", True, {"quantise": "fp8"}),  # with a scalar input, which is folded into the network that is exported
    ("sd3", tiny_sd3, "dmd2", False, {**FAMILIES["sd3"].teacher, "dtype": "bf16", "quantise": "int8"}),  # the teacher alone is frozen
]


@pytest.mark.parametrize(("name", "build", "method", "lora", "teacher"), CELLS, ids=[cell[0] for cell in CELLS])
def test_students_of_held_teachers_train_and_verify(
    name: str, build: Callable[[], Any], method: str, lora: bool, teacher: dict[str, Any], tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path / "teacher")
    check_cell(tmp_path / "teacher", method, tmp_path, lora=lora, **teacher)

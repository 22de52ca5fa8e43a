"""Runs on a held base: they go on exactly, and the student is exported on the teacher's own weights, as if nothing had been held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import FORMATS
from pipelines import adapter_tuning, in_a_run, student_info
from pipelines import same_interpreter as same_interpreter
from pipelines import sd3_folder as sd3_folder
from safetensors.torch import load_file
from test_plan import recipe as recipe

from fastgen import checkpoint
from fastgen.config import Recipe
from fastgen.export import Expert, export_lora, export_student, verify
from fastgen.families.sd3 import SD3
from fastgen.generator import ADAPTER_FILE
from fastgen.plan import plan
from fastgen.roles import Role, build_roles, student
from fastgen.run import Progress, build
from fastgen.surgery.held import Storage, is_held


@pytest.fixture(scope="module")
def family(sd3_folder: Path) -> SD3:
    return SD3(sd3_folder, max_sequence_length=16)


def role(family: SD3, storage: Storage) -> Role:
    """A student whose adapter is not the identity, the same on any storage."""
    made = build_roles({"student": student()}, family, family.load_backbone(), tuning=adapter_tuning(), storage=storage)["student"]
    for i, parameter in enumerate(made.parameters().values()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return made


def storage_of(name: str) -> Storage:
    return Storage("bf16") if name == "bf16" else Storage(quantise=name)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_goes_on_exactly(name: str, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    kept = {"dtype": "bf16"} if name == "bf16" else {"quantise": name}
    tune: dict[str, Any] = {"tune": {"lora": {"rank": 2}}}
    whole, first, rest = (build(plan(recipe(teacher=kept, student=tune, train={"steps": 3}), only="train"), Progress()).trainer for _ in range(3))
    whole.run([])
    first.run([], should_stop=lambda: first.step == 2)
    checkpoint.load(checkpoint.save(tmp_path / "checkpoints", first, {}, keep=1), rest)
    rest.run([])
    for role, there in whole.roles.trained.items():
        assert all(torch.equal(value, rest.roles[role].state_dict()[key]) for key, value in there.state_dict().items())


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_student_has_the_teachers_own_weights_with_the_adapter_merged(name: str, family: SD3, sd3_folder: Path, tmp_path: Path) -> None:
    held, info = role(family, storage_of(name)), student_info(sd3_folder)
    ours = export_student(held, family, info, tmp_path / "held")
    plain = export_student(role(family, Storage()), family, info, tmp_path / "plain")
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(ours)[key], value, msg=key)
    assert is_held(held.denoiser.backbone), "the run may go on with it"
    assert verify(ours, seeds=(0, 1)).passed


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_an_adapter_is_exported_as_from_any_base(name: str, family: SD3, sd3_folder: Path, tmp_path: Path) -> None:
    held, info = role(family, storage_of(name)), student_info(sd3_folder)
    before = {key: value.dtype for key, value in held.denoiser.backbone.named_buffers()}
    ours = export_lora(held, family, info, tmp_path / "held/student")
    plain = export_lora(role(family, Storage()), family, info, tmp_path / "plain/student")
    for key, value in load_file(plain / ADAPTER_FILE).items():
        assert torch.equal(load_file(ours / ADAPTER_FILE)[key], value)
    assert {key: value.dtype for key, value in held.denoiser.backbone.named_buffers()} == before
    assert verify(in_a_run(ours, sd3_folder), seeds=(0, 1)).passed


def test_several_experts_on_one_held_base_are_merged_each_into_its_own(family: SD3, sd3_folder: Path, tmp_path: Path) -> None:
    folders = []
    for storage in (Storage(quantise="int8"), Storage()):
        roles = build_roles({"student": student(), "student_2": student()}, family, family.load_backbone(), tuning=adapter_tuning(), storage=storage)
        for k, made in enumerate(roles.values()):
            for i, parameter in enumerate(made.parameters().values()):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * k + i))
        experts = [Expert(roles["student"], 0.5), Expert(roles["student_2"])]
        folders.append(export_student(experts, family, student_info(sd3_folder), tmp_path / str(storage.quantise)))
    for place in ("transformer", "expert_2"):
        ours, plain = (load_file(folder / place / "diffusion_pytorch_model.safetensors") for folder in folders)
        for key, value in plain.items():
            torch.testing.assert_close(ours[key], value, msg=key)

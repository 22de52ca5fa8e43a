"""teacher.dtype: frozen weights in half precision, adapters in single, and students that hold the teacher's own weights and not the rounded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import sd3_folder as sd3_folder
from pipelines import verifying_here
from safetensors.torch import load_file

from fastgen import run
from fastgen.config import Recipe, validate
from fastgen.memory import network_bytes
from fastgen.plan import plan
from fastgen.progress import Progress
from fastgen.roles import build_roles
from fastgen.run.building import build
from fastgen.surgery.held import num_held

HALF, SINGLE = torch.bfloat16, torch.float32


def recipe(teacher: Path, tmp_path: Path, *, lora: bool = True, weights: str = "full", precision: str = "fp32", **block: Any) -> Recipe:
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo boats at sea", encoding="utf-8")
    content = {
        "teacher": {"pretrained": str(teacher), "max_sequence_length": 16, **block},
        "student": {"steps": 2, "tune": {"lora": {"rank": 2}} if lora else "full"},
        "distiller": {"name": "dmd2"},
        "data": {"prompts": str(tmp_path / "prompts.txt")},
        "optimizer": {"student": {"lr": 1e-2}, "fake_score": {"lr": 1e-2}},
        "train": {"steps": 2, "batch_size": 2, "sample_every": 0, "device": "cpu", "precision": precision},
        "export": {"weights": weights},
    }
    return validate(Recipe, content)


def dtypes(given: Recipe) -> tuple[set[torch.dtype], torch.dtype]:
    """Of the parameters that are trained, and of a weight that is not, as it is kept."""
    roles = build(plan(given), Progress()).roles
    layer: Any = roles["teacher"].denoiser.backbone.get_submodule("transformer_blocks.0.attn.to_q")
    layer = getattr(layer, "base_layer", layer)
    kept = next(iter(layer._buffers.values()), None)
    return {p.dtype for role in roles.trained.values() for p in role.parameters().values()}, (layer.weight if kept is None else kept).dtype


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    ("precision", "dtype", "frozen"),
    [("fp32", "auto", SINGLE), ("bf16", "auto", HALF), ("bf16", "fp32", SINGLE), ("fp32", "bf16", HALF)],
)
def test_what_is_trained_is_single_and_what_is_not_is_what_the_recipe_says(
    sd3_folder: Path, tmp_path: Path, lora: bool, precision: str, dtype: str, frozen: torch.dtype
) -> None:
    given = recipe(sd3_folder, tmp_path, lora=lora, precision=precision, dtype=dtype)
    assert dtypes(given) == ({SINGLE}, frozen)


def test_tables_of_positions_stay_exact_and_memory_counts_what_is_held(sd3_folder: Path, tmp_path: Path) -> None:
    half, single = (plan(recipe(sd3_folder, tmp_path, dtype=dtype)) for dtype in ("bf16", "fp32"))
    running = build(half, Progress())
    network = running.roles["teacher"].denoiser.backbone
    table = dict(running.plan.family.load_backbone().named_buffers())["pos_embed.pos_embed"]
    assert torch.equal(dict(network.named_buffers())["pos_embed.pos_embed"], table) and table.dtype == SINGLE
    half_bytes, single_bytes = (
        network_bytes(each, build_roles(each.roles, each.family, each.family.load_backbone(meta=True), tuning=each.tuning, storage=each.storage))
        for each in (half, single)
    )
    assert single_bytes - half_bytes == 2 * num_held([network])


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_students_of_a_rounded_base_hold_the_teachers_own_weights(sd3_folder: Path, tmp_path: Path, weights: str) -> None:
    with verifying_here():
        folder = run.train(recipe(sd3_folder, tmp_path, weights=weights, dtype="bf16"), tmp_path / "run") / "student"
    if weights == "lora":
        assert all(value.dtype == SINGLE for value in load_file(folder / "pytorch_lora_weights.safetensors").values())
        return
    name = "diffusion_pytorch_model.safetensors"
    teacher, student = load_file(sd3_folder / "transformer" / name), load_file(folder / "transformer" / name)
    averages = load_file(next((tmp_path / "run/checkpoints").glob("*2/ema_student.safetensors")))
    moved = {key.removesuffix(".lora_A.student.weight") for key in averages if "lora_A" in key}
    assert sum(not torch.equal(student[f"{layer}.weight"], teacher[f"{layer}.weight"]) for layer in moved) > 4
    assert teacher.keys() == student.keys()
    for key, value in teacher.items():
        layer = key.removesuffix(".weight")
        delta = 0.0
        if layer in moved:
            delta = averages[f"{layer}.lora_B.student.weight"] @ averages[f"{layer}.lora_A.student.weight"]
        torch.testing.assert_close(student[key], value + delta, rtol=0, atol=1e-6)

"""Text encoders in a teacher's dtype give what those of the stock pipeline give, loaded in that dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import sd3_folder as sd3_folder
from test_matrix import FAMILIES
from test_plan import recipe as recipe

from fastgen.config import Recipe
from fastgen.families import find_family
from fastgen.plan import plan
from fastgen.run import Progress, build

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("sd2", "dit", "ddpm", "consistency")])
def test_half_precision_is_stocks(name: str, tmp_path: Path) -> None:
    row = FAMILIES[name]
    row.build().save_pretrained(tmp_path / "teacher")
    family: Any = find_family(tmp_path / "teacher", **row.teacher)
    full = family.encode_prompts(row.prompts)
    family.encode_with(CPU, torch.bfloat16)
    half = family.encode_prompts(row.prompts)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "teacher", torch_dtype=torch.bfloat16)
    with torch.no_grad():
        expected = family.encode(stock, list(row.prompts))
    assert half.keys() == expected.keys() == full.keys()
    for key, value in expected.items():
        assert half[key].dtype == full[key].dtype and half[key].shape == full[key].shape
        assert torch.equal(half[key], value.to(half[key].dtype)), key
        if value.is_floating_point():
            assert 0 < (half[key] - full[key]).norm() < 0.1 * full[key].norm()


def test_a_live_pipelines_encoders_stay_as_they_are() -> None:
    live = FAMILIES["sd3"].build()
    family = find_family(live, **FAMILIES["sd3"].teacher)
    before = family.encode_prompts(["a red cat"])
    family.encode_with(CPU, torch.bfloat16)
    assert all(torch.equal(value, before[key]) for key, value in family.encode_prompts(["a red cat"]).items())
    assert next(live.text_encoder.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elsewhere_one_encoder_at_a_time_is_moved(dtype: torch.dtype, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' own offloading is asked for, once for each loading; it moves nothing on this machine."""
    asked: list[Any] = []
    monkeypatch.setattr(DiffusionPipeline, "enable_model_cpu_offload", lambda self, device: asked.append((device, self.text_encoder.dtype)))
    family = find_family(sd3_folder, max_sequence_length=16)
    for device in (CPU, torch.device("cuda", 0)):
        family.encode_with(device, dtype)
        family.encode_prompts(["a red cat"])
        family.encode_prompts(["a red dog"])
    assert asked == [(torch.device("cuda", 0), dtype)]


def test_a_run_encodes_in_its_teachers_dtype(recipe: Callable[..., Recipe], sd3_folder: Path) -> None:
    family = find_family(sd3_folder, max_sequence_length=16)
    lora: dict[str, Any] = {"tune": {"lora": {"rank": 2}}}
    for dtype in (torch.float32, torch.bfloat16):
        family.encode_with(CPU, dtype)
        run = build(plan(recipe(student=lora, teacher={"dtype": "bf16"} if dtype == torch.bfloat16 else {})), Progress())
        for key, value in family.encode_prompts(run.data.prompts, batch=2).items():
            assert torch.equal(run.data.conditioning(run.data.prompts)[key], value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd3", "flux", "sdxl"])
def test_on_a_gpu_no_encoder_stays_there(name: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    row = FAMILIES[name]
    row.build().save_pretrained(tmp_path / "teacher")
    family: Any = find_family(tmp_path / "teacher", **row.teacher)
    expected = family.encode_prompts(row.prompts)
    family.encode_with(torch.device("cuda"), torch.float32)
    for key, value in family.encode_prompts(row.prompts).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3)
    encoders = [getattr(family._encoders, part) for part in ("text_encoder", "text_encoder_2")]
    assert {encoder.device.type for encoder in encoders} == {"cpu"}

"""Stable Diffusion 1.x and 2.x against the stock StableDiffusionPipeline on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from diffusers import DDIMScheduler
from tiny_sd15 import tiny_sd15

from fastgen.families import find_family
from fastgen.families.base import Family


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    return tiny_sd15(prediction_type=request.param)


@pytest.fixture(scope="module")
def family(pipeline: Any) -> Family:
    return find_family(pipeline)


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    given = stock.check_first_call(family, pipeline)
    assert given["timestep"] == 899
    assert family.kind == ("v" if pipeline.scheduler.config.prediction_type == "v_prediction" else "eps")


@pytest.mark.parametrize(
    ("steps", "guidance", "negative", "size"),
    [(1, 1.0, None, None), (2, 7.5, None, [16, 24]), (4, 7.5, stock.NEGATIVE, [24, 16]), (3, 1.0, None, [24, 32])],
)
def test_pictures_are_stocks(pipeline: Any, steps: int, guidance: float, negative: str | None, size: Any) -> None:
    stock.check_pictures(find_family(pipeline, size=size), pipeline, steps=steps, guidance=guidance, negative=negative)


@pytest.mark.parametrize("grid", [[0.4], [1.0, 0.7, 0.2]])
def test_explicit_times_are_stocks(family: Family, pipeline: Any, grid: list[float]) -> None:
    stock.check_pictures(family, pipeline, steps=len(grid), guidance=3.0, grid=grid)


def test_latents_are_scaled_as_the_pipeline_scales_them(family: Family, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)


def test_what_the_plan_counts_with_is_what_there_is(family: Family) -> None:
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_the_exact_tangent_is_that_of_finite_differences(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.check_exact_tangent(family, monkeypatch)


def test_a_schedule_that_ends_in_pure_noise_is_stocks(tmp_path: Path) -> None:
    """v, as SD 2.x tuned to zero terminal SNR (Lin et al. 2024): the student's folder too has the last training step all but there."""
    pipeline = tiny_sd15(prediction_type="v_prediction")
    pipeline.register_modules(scheduler=DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True, clip_sample=False))
    family: Any = find_family(pipeline)
    assert family.path.zero_snr and family.path.coeffs(torch.ones(1))[0] == 0
    for steps in (1, 4):
        stock.check_pictures(family, pipeline, steps=steps, guidance=2.0)
    family.load_pipeline(None, family.sampling_scheduler(4)).save_pretrained(tmp_path)
    student: Any = find_family(tmp_path)
    assert student.kind == "v" and 0 < student.path.coeffs(torch.ones(1))[0] < 1e-6
    torch.testing.assert_close(student.path.coeffs(torch.tensor([0.3]))[0], family.path.coeffs(torch.tensor([0.3]))[0], rtol=0, atol=1e-6)
    prompts, seeds = stock.PROMPTS, stock.SEEDS
    torch.testing.assert_close(stock.generator(student, 4)(prompts, seeds), stock.generator(family, 4)(prompts, seeds), rtol=0, atol=2e-6)

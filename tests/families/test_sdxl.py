"""SDXL against the stock StableDiffusionXLPipeline on random weights."""

from __future__ import annotations

from typing import Any

import pytest
import stock
import torch
from tiny_sdxl import tiny_sdxl

from fastgen.families import find_family
from fastgen.families.base import Family


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_sdxl()


@pytest.fixture(scope="module")
def family(pipeline: Any) -> Family:
    return find_family(pipeline, size=[32, 48])


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    given = stock.check_first_call(family, pipeline)
    assert given["timestep"] == 999
    assert given["added_cond_kwargs"]["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 2


@pytest.mark.parametrize(
    ("steps", "guidance", "negative", "size"),
    [(1, 1.0, None, None), (2, 5.0, None, [32, 48]), (4, 5.0, stock.NEGATIVE, [48, 32]), (3, 1.0, None, [48, 32])],
)
def test_pictures_are_stocks(pipeline: Any, steps: int, guidance: float, negative: str | None, size: Any) -> None:
    stock.check_pictures(find_family(pipeline, size=size), pipeline, steps=steps, guidance=guidance, negative=negative)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_negative_prompt_that_is_not_given_is_the_pipelines_own(pipeline: Any, zeros: bool) -> None:
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    family = find_family(pipeline)
    try:
        stock.check_pictures(family, pipeline, steps=2, guidance=3.0)
        encoded = family.encode_negative(None)
        assert all(bool((value == 0).all()) == zeros for value in encoded.values())
        assert all(torch.equal(family.encode_negative("")[key], value) for key, value in family.encode_prompts([""]).items())
    finally:
        pipeline.register_to_config(force_zeros_for_empty_prompt=True)


@pytest.mark.parametrize("grid", [[0.4], [1.0, 0.7, 0.2]])
def test_explicit_times_are_stocks(family: Family, pipeline: Any, grid: list[float]) -> None:
    """Yin et al. 2024 tell SDXL's one-step student that it is at training step 399."""
    assert family.call_arguments(len(grid), 1.0, grid)["timesteps"][0] == round(1000 * grid[0]) - 1
    stock.check_pictures(family, pipeline, steps=len(grid), guidance=3.0, grid=grid)


def test_latents_are_scaled_as_the_pipeline_scales_them(family: Family, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)


def test_what_the_plan_counts_with_is_what_there_is(family: Family) -> None:
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_the_exact_tangent_is_that_of_finite_differences(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.check_exact_tangent(family, monkeypatch)

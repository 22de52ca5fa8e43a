"""PixArt-Sigma against the stock PixArtSigmaPipeline on random weights."""

from __future__ import annotations

from typing import Any

import pytest
import stock
from tiny_pixart import tiny_pixart

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family

OPTIONS: dict[str, Any] = {"max_sequence_length": 22}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_pixart()


@pytest.fixture(scope="module")
def family(pipeline: Any) -> Family:
    return find_family(pipeline, **OPTIONS)


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    given = stock.check_first_call(family, pipeline)
    assert given["timestep"].tolist() == [799, 799]
    assert given["encoder_attention_mask"].sum(1).tolist()[0] < 22 == given["encoder_hidden_states"].shape[1]


@pytest.mark.parametrize(
    ("steps", "guidance", "negative", "size"),
    [(1, 1.0, None, None), (2, 4.5, None, [16, 24]), (4, 4.5, stock.NEGATIVE, [24, 16]), (3, 1.0, None, [24, 32])],
)
def test_pictures_are_stocks(pipeline: Any, steps: int, guidance: float, negative: str | None, size: Any) -> None:
    told = None if negative is None else negative
    stock.check_pictures(find_family(pipeline, size=size, **OPTIONS), pipeline, steps=steps, guidance=guidance, negative=told)


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


def test_a_network_that_wants_resolutions_is_refused(pipeline: Any) -> None:
    pipeline.transformer.register_to_config(use_additional_conditions=True)
    try:
        with pytest.raises(UserError, match=r"recipe key teacher\.pretrained: its transformer takes resolution and aspect ratio"):
            find_family(pipeline)
    finally:
        pipeline.transformer.register_to_config(use_additional_conditions=None)

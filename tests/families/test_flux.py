"""FLUX.1 against the stock FluxPipeline on random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from pipelines import draw
from tiny_flux import tiny_flux

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family

OPTIONS: dict[str, Any] = {"size": [16, 24], "max_sequence_length": 20}


@pytest.fixture(scope="module")
def dev() -> Any:
    return tiny_flux()


@pytest.fixture(scope="module")
def schnell() -> Any:
    return tiny_flux(schnell=True)


@pytest.fixture(params=["dev", "schnell"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def family(pipeline: Any) -> Family:
    return find_family(pipeline, **OPTIONS)


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    given = stock.check_first_call(family, pipeline)
    assert (given.get("guidance") is None) == (not pipeline.transformer.config.guidance_embeds)


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (3.0, "blurry"), (3.0, "")])
def test_pictures_are_stocks(family: Family, pipeline: Any, steps: int, guidance: float, negative: str | None) -> None:
    stock.check_pictures(family, pipeline, steps=steps, guidance=guidance, negative=negative)


def test_explicit_times_are_stepped_on_exactly(dev: Any) -> None:
    family, grid = find_family(dev, **OPTIONS), [1.0, 0.625, 0.25]
    assert family.grid(3, grid).tolist() == grid
    stock.check_pictures(family, dev, steps=3, grid=grid)


def test_the_shift_goes_by_the_number_of_tokens(dev: Any, schnell: Any) -> None:
    for size, tokens in (([16, 24], 24), ([16, 16], 16)):
        given: dict[str, Any] = OPTIONS | {"size": size}
        family = find_family(dev, **given)
        assert family.shift == pytest.approx(math.exp(0.4 + (tokens - 10) * (1.3 - 0.4) / (90 - 10)), rel=1e-9)
        draw(dev, stock.PROMPTS[:1], stock.SEEDS[:1], **family.call_arguments(4, 1.0))
        torch.testing.assert_close(family.grid(4), dev.scheduler.sigmas[:-1].double(), rtol=0, atol=1e-6)
    assert find_family(schnell, **OPTIONS).grid(4).tolist() == [1.0, 0.75, 0.5, 0.25]


def test_embedded_guidance_is_an_option_and_no_classifier_free_guidance(dev: Any, schnell: Any) -> None:
    family = find_family(dev, **OPTIONS)
    assert (family.options["embedded_guidance"], family.own_call["guidance_scale"]) == (3.5, 1.0)
    own = stock.check_pictures(family, dev, steps=2)
    other = find_family(dev, **OPTIONS, embedded_guidance=1.5)
    assert other.call_arguments(2, 1.0)["guidance_scale"] == 1.5
    assert (stock.check_pictures(other, dev, steps=2) - own).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"^recipe key teacher\.embedded_guidance: does not apply to FluxPipeline"):
        find_family(schnell, embedded_guidance=3.5)


def test_a_student_is_told_what_it_was_trained_with(dev: Any, tmp_path: Path) -> None:
    dev.save_pretrained(tmp_path)
    assert find_family(tmp_path, **OPTIONS).options["embedded_guidance"] == 3.5
    record = {"format": 3, "steps": 4, "guidance": 1.0, "options": {"embedded_guidance": 2.0}, "teacher": {"guidance": 1.0}, "method": "reflow"}
    (tmp_path / "fastgen.json").write_text(json.dumps(record), encoding="utf-8")
    assert find_family(tmp_path, **OPTIONS).call_arguments(4, 1.0)["guidance_scale"] == 2.0
    assert find_family(tmp_path, **OPTIONS, embedded_guidance=3.0).options["embedded_guidance"] == 3.0


def test_codec_shapes_and_time_features(family: Family, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_exact_tangents(dev: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.check_exact_tangent(find_family(dev, **OPTIONS), monkeypatch)


def test_a_saved_folder_draws_the_same(dev: Any, tmp_path: Path) -> None:
    dev.save_pretrained(tmp_path)
    family = find_family(tmp_path, **OPTIONS)
    theirs, ours = (stock.generator(made, 2)(stock.PROMPTS, stock.SEEDS) for made in (find_family(dev, **OPTIONS), family))
    assert (theirs - ours).abs().max() <= 4e-6
    assert family.legibility(["a" * 40, "cat"]).cut.keys() == {"a" * 40}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [16, 18]}, r"teacher\.size: 18 is not a multiple of 4$"),
        ({"resolution": 18}, r"teacher\.resolution: 18 is not a multiple of 4$"),
        ({"max_sequence_length": 513}, r"teacher\.max_sequence_length: 513, but the pipeline takes at most 512"),
        ({"frames": 5}, r"teacher\.frames: does not apply to FluxPipeline"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused_by_its_key(dev: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^recipe key {said}"):
        find_family(dev, **options)

"""Qwen-Image against the stock QwenImagePipeline on random weights."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from tiny_qwen import tiny_qwen

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family

OPTIONS: dict[str, Any] = {"size": [32, 48], "max_sequence_length": 40}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_qwen()


@pytest.fixture
def family(pipeline: Any) -> Family:
    return find_family(pipeline, **OPTIONS)


@pytest.mark.parametrize("prompts", [stock.PROMPTS, ["a red cat", "a red dog"]], ids=["ragged", "even"])
def test_the_first_network_call_is_stocks(family: Family, pipeline: Any, prompts: list[str]) -> None:
    given = stock.check_first_call(family, pipeline, prompts)
    assert (given["encoder_hidden_states_mask"] is None) == (prompts != stock.PROMPTS)


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (3.0, "blurry"), (3.0, "")])
def test_pictures_are_stocks(family: Family, pipeline: Any, steps: int, guidance: float, negative: str | None) -> None:
    stock.check_pictures(family, pipeline, steps=steps, guidance=guidance, negative=negative)


def test_guidance_keeps_the_length_of_each_tokens_velocity(family: Family) -> None:
    cond, negative = (torch.randn(2, *family.latent.shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    guided = family.guidance_rule(cond, negative, 3.0)
    for row, column in ((0, 0), (3, 5)):
        token, before, without = (x[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] for x in (guided, cond, negative))
        combined = without + 3 * (before - without)
        torch.testing.assert_close(token, combined * before.norm() / combined.norm(), rtol=1e-5, atol=1e-6)
    each = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(family.guidance_rule(cond, negative, each), torch.stack([cond[0], guided[1]]), rtol=1e-5, atol=1e-6)


def test_the_template_is_dropped_and_texts_are_as_long_as_they_are(family: Family) -> None:
    """Thirteen tokens follow the prompt, letters of `assistant` for the most part; at forty a text is cut."""
    cond = family.encode_prompts(["", "fox", "a" * 60])
    assert cond["length"].tolist() == [13, 16, 40]
    assert not cond["text"][0, 13:].any() and cond["text"][0, :13].any(-1).all()
    assert family.legibility(["a" * 60, "cat"]).cut.keys() == {"a" * 60}


def test_the_grid_is_shifted_by_tokens_and_not_stretched(family: Family, pipeline: Any) -> None:
    assert family.shift == pytest.approx(math.exp(0.6 + (24 - 12) * (1.1 - 0.6) / (100 - 12)), rel=1e-9)
    assert pipeline.scheduler.config.shift_terminal == 0.03
    u = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(family.grid(4), family.shift * u / (1 + (family.shift - 1) * u), rtol=0, atol=1e-6)
    assert family.grid(1).tolist() == [1.0]


def test_explicit_times_are_stepped_on_exactly(family: Family, pipeline: Any) -> None:
    grid = [1.0, 0.625, 0.25]
    assert family.grid(3, grid).tolist() == grid
    stock.check_pictures(family, pipeline, steps=3, grid=grid)


def test_codec_shapes_and_time_features(family: Family, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_exact_tangents(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.keep_wide_norms(monkeypatch)
    stock.check_exact_tangent(family, monkeypatch)


def test_a_saved_folder_draws_the_same(pipeline: Any, family: Family, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    theirs, ours = (stock.generator(made, 2, 3.0)(stock.PROMPTS, stock.SEEDS) for made in (family, find_family(tmp_path, **OPTIONS)))
    assert (theirs - ours).abs().max() <= 4e-6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [32, 36]}, r"teacher\.size: 36 is not a multiple of 8$"),
        ({"max_sequence_length": 1025}, r"teacher\.max_sequence_length: 1025, but the pipeline takes at most 1024"),
        ({"embedded_guidance": 3.5}, r"teacher\.embedded_guidance: does not apply to QwenImagePipeline"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused_by_its_key(pipeline: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^recipe key {said}"):
        find_family(pipeline, **OPTIONS | options)


def test_a_schedule_that_no_shift_describes_is_refused_unless_one_is_stated() -> None:
    pipeline = tiny_qwen()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    with pytest.raises(UserError, match=r"^recipe key teacher\.pretrained: .*use_karras_sigmas.*teacher\.shift"):
        find_family(pipeline, **OPTIONS)
    assert find_family(pipeline, **OPTIONS, shift=3.0).grid(4).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5], abs=1e-7)


def test_a_folder_without_its_text_encoder_is_refused_in_one_line(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "text_encoder")
    with pytest.raises(UserError, match=r"^recipe key teacher\.pretrained: its model_index\.json names a text_encoder .*[^\n]*$"):
        find_family(tmp_path, **OPTIONS)


def test_what_stands_before_a_prompt_takes_its_part_of_the_texts_length(family: Family) -> None:
    """The last letter that is said to be read changes what stock's encoders say, the next one nothing."""
    stock.check_cut(family)

"""Z-Image against the stock ZImagePipeline on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from tiny_zimage import tiny_zimage

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family

OPTIONS: dict[str, Any] = {"size": [16, 24], "max_sequence_length": 40}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_zimage()


@pytest.fixture
def family(pipeline: Any) -> Family:
    return find_family(pipeline, **OPTIONS)


@pytest.mark.parametrize("prompts", [stock.PROMPTS, ["a red cat", "a red dog"]], ids=["ragged", "even"])
def test_the_first_network_call_is_stocks(family: Family, pipeline: Any, prompts: list[str]) -> None:
    texts = stock.check_first_call(family, pipeline, prompts)["cap_feats"]
    assert (len(texts[0]) == len(texts[1])) == (prompts != stock.PROMPTS)


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (3.0, "blurry"), (3.0, None)])
def test_pictures_are_stocks(family: Family, pipeline: Any, steps: int, guidance: float, negative: str | None) -> None:
    stock.check_pictures(family, pipeline, steps=steps, guidance=guidance, negative=negative)


def test_the_pipeline_counts_guidance_from_none(family: Family) -> None:
    assert family.own_call["guidance_scale"] == 6.0
    assert [family.call_arguments(4, guidance)["guidance_scale"] for guidance in (1.0, 6.0)] == [0.0, 5.0]


def test_explicit_times_are_stepped_on_exactly(family: Family, pipeline: Any) -> None:
    grid = [1.0, 0.625, 0.25]
    assert family.grid(3, grid).tolist() == grid
    stock.check_pictures(family, pipeline, steps=3, grid=grid)


def test_codec_shapes_and_time_features(family: Family, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_a_blocks_feature_is_the_pictures_alone(family: Family) -> None:
    """Of 24 tokens, though the network pads pictures to 32 and puts texts behind them."""
    network, cond = stock.denoiser(family), family.encode_prompts(stock.PROMPTS)
    with torch.no_grad():
        features = network(torch.randn(2, *family.latent.shape), torch.full((2,), 0.4), cond, taps=range(3)).features
    assert [feature.shape for feature in features] == [(2, 24, 32)] * 3


def test_exact_tangents(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.keep_wide_norms(monkeypatch)
    stock.check_exact_tangent(family, monkeypatch)


def test_a_saved_folder_draws_the_same(pipeline: Any, family: Family, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    theirs, ours = (stock.generator(made, 2)(stock.PROMPTS, stock.SEEDS) for made in (family, find_family(tmp_path, **OPTIONS)))
    assert (theirs - ours).abs().max() <= 4e-6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [16, 18]}, r"teacher\.size: 18 is not a multiple of 4 and at most 128$"),
        ({"size": [132, 16]}, r"teacher\.size: 132 is not a multiple of 4 and at most 128$"),
        ({"max_sequence_length": 225}, r"teacher\.max_sequence_length: 225, but the network has places for at most 224"),
        ({"embedded_guidance": 3.5}, r"teacher\.embedded_guidance: does not apply to ZImagePipeline"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused_by_its_key(pipeline: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^recipe key {said}"):
        find_family(pipeline, **OPTIONS | options)


def test_the_longest_text_and_the_largest_picture_have_places(pipeline: Any) -> None:
    family = find_family(pipeline, size=[128, 16], max_sequence_length=224)
    cond = family.encode_prompts(["a" * 300, "b"])
    assert cond["length"].max() == 224
    with torch.no_grad():
        out = family.call(family.load_backbone(), torch.randn(2, *family.latent.shape), torch.full((2,), 0.4), cond)
    assert out.isfinite().all()


def test_what_stands_before_a_prompt_takes_its_part_of_the_texts_length(family: Family) -> None:
    """The last letter that is said to be read changes what stock's encoders say, the next one nothing."""
    stock.check_cut(family)

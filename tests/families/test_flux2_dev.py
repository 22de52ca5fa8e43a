"""FLUX.2 dev against the stock Flux2Pipeline on random weights, with Pixtral's processor and a small Mistral3."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from tiny_flux2 import tiny_flux2_dev

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family
from fastgen.families.flux2_dev import Flux2Dev

OPTIONS: dict[str, Any] = {"size": [16, 24], "max_sequence_length": 70}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_flux2_dev()


@pytest.fixture
def family(pipeline: Any) -> Family:
    return find_family(pipeline, **OPTIONS)


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    given = stock.check_first_call(family, pipeline)
    assert given["guidance"].tolist() == [4.0, 4.0]
    assert given["encoder_hidden_states"].shape == (2, 70, 24)


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_pictures_are_stocks(family: Family, pipeline: Any, steps: int) -> None:
    stock.check_pictures(family, pipeline, steps=steps)


def test_explicit_times_are_stepped_on_exactly(family: Family, pipeline: Any) -> None:
    grid = [1.0, 0.625, 0.25]
    assert family.grid(3, grid).tolist() == grid
    stock.check_pictures(family, pipeline, steps=3, grid=grid)


def test_its_guidance_is_an_input_of_the_network_and_no_classifier_free_guidance(family: Family, pipeline: Any) -> None:
    assert (family.options["embedded_guidance"], family.own_call) == (4.0, {"num_inference_steps": 50, "guidance_scale": 1.0})
    assert not family.takes_guidance and not family.takes_negative
    own = stock.check_pictures(family, pipeline, steps=2)
    other = find_family(pipeline, **OPTIONS, embedded_guidance=1.5)
    assert other.call_arguments(2, 1.0)["guidance_scale"] == 1.5
    assert (stock.check_pictures(other, pipeline, steps=2) - own).abs().max() > 1e-3


def test_a_network_that_is_told_no_guidance_has_no_such_option() -> None:
    untold = tiny_flux2_dev(guidance=False)
    found = find_family(untold, **OPTIONS)
    assert "embedded_guidance" not in found.options
    stock.check_pictures(found, untold, steps=2)
    with pytest.raises(UserError, match=r"^recipe key teacher\.embedded_guidance: does not apply to Flux2Pipeline"):
        find_family(untold, embedded_guidance=3.5)


def test_mu_is_stocks(family: Family) -> None:
    assert isinstance(family, Flux2Dev) and family.tokens == 24
    assert family.shift == pytest.approx(math.exp(compute_empirical_mu(24, 50)), rel=1e-12)


def test_codec_shapes_and_time_features(family: Family, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_exact_tangents(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.check_exact_tangent(family, monkeypatch)


def test_tangents_in_half_precision(family: Family) -> None:
    stock.check_half_precision_tangent(family)


def test_a_saved_folder_draws_the_same(pipeline: Any, family: Family, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    found = find_family(tmp_path, **OPTIONS)
    theirs, ours = (stock.generator(made, 2)(stock.PROMPTS, stock.SEEDS) for made in (family, found))
    assert (theirs - ours).abs().max() <= 4e-6


@pytest.mark.parametrize("of", ["live", "folder"])
def test_the_instruction_takes_its_part_of_the_texts_length(of: str, pipeline: Any, tmp_path: Path) -> None:
    """Of 70 tokens it leaves 33: a prompt of 33 letters is read whole with the mark behind it, of one more that mark is lost."""
    pipeline.save_pretrained(tmp_path)
    found = find_family(pipeline if of == "live" else tmp_path, **OPTIONS)
    assert found.legibility(["a" * 33, "b" * 34]).cut == {"b" * 34: "tokenizer keeps 33 of its 34 tokens"}
    longer = find_family(pipeline, size=[16, 24], max_sequence_length=71)
    last = [longer.encode_prompts([letter * 33])["encoder_hidden_states"][0, -2] for letter in "ab"]
    assert not torch.equal(*last), "the last letter of 33 is told"
    assert found.encode_prompts(["c" * 36])["encoder_hidden_states"].equal(found.encode_prompts(["c" * 39])["encoder_hidden_states"])


def test_nothing_is_left_of_prompts_behind_too_short_a_text(pipeline: Any) -> None:
    found = find_family(pipeline, size=[16, 24], max_sequence_length=30)
    with pytest.raises(UserError, match=r"^recipe key data\.prompts: 'a red cat' \(tokenizer reads nothing in it\), so it conditions on nothing"):
        found.legibility(["a red cat"]).check("recipe key data.prompts")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [16, 18]}, r"teacher\.size: 18 is not a multiple of 4$"),
        ({"max_sequence_length": 513}, r"teacher\.max_sequence_length: 513, but the pipeline takes at most 512"),
        ({"frames": 5}, r"teacher\.frames: does not apply to Flux2Pipeline"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused_by_its_key(pipeline: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^recipe key {said}"):
        find_family(pipeline, **OPTIONS | options)


def test_a_negative_prompt_is_refused(family: Family) -> None:
    with pytest.raises(UserError, match=r"recipe key teacher\.negative_prompt: 'blurry', but the call of Flux2Pipeline takes none"):
        family.encode_negative("blurry")

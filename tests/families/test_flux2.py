"""FLUX.2 klein against the stock Flux2KleinPipeline on random weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from tiny_flux2 import tiny_flux2

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family
from fastgen.families.flux2 import Flux2Klein

OPTIONS: dict[str, Any] = {"size": [16, 24], "max_sequence_length": 40}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_flux2()


@pytest.fixture
def family(pipeline: Any) -> Family:
    return find_family(pipeline, **OPTIONS)


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    given = stock.check_first_call(family, pipeline)
    assert given["img_ids"].shape == (2, 24, 4) and given["txt_ids"].shape == (2, 40, 4)


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures_are_stocks(family: Family, pipeline: Any, steps: int, guidance: float) -> None:
    stock.check_pictures(family, pipeline, steps=steps, guidance=guidance)


def test_explicit_times_are_stepped_on_exactly(family: Family, pipeline: Any) -> None:
    grid = [1.0, 0.625, 0.25]
    assert family.grid(3, grid).tolist() == grid
    stock.check_pictures(family, pipeline, steps=3, grid=grid)


@pytest.mark.parametrize("tokens", [24, 4300, 4301, 16384])
def test_mu_is_stocks(pipeline: Any, tokens: int) -> None:
    found = find_family(pipeline, size=[4, 4 * tokens], max_sequence_length=40)
    assert isinstance(found, Flux2Klein) and found.tokens == tokens
    for steps in (1, 4, 50, 200):
        assert found.mu_at(steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)
    assert found.shift == pytest.approx(math.exp(found.mu_at(50)), rel=1e-12)


@pytest.mark.parametrize("steps", [2, 4])
def test_the_grid_follows_the_number_of_steps_in_stock_too(family: Family, steps: int) -> None:
    live = tiny_flux2()
    live(**family.call_inputs(stock.PROMPTS[:1]), output_type="latent", **family.call_arguments(steps, 1.0))
    torch.testing.assert_close(family.grid(steps), live.scheduler.sigmas[:-1].double(), rtol=0, atol=1e-6)
    assert family.export_scheduler().config.use_dynamic_shifting and not family.export_scheduler([1.0, 0.5]).config.use_dynamic_shifting


def test_a_constant_shift_stays_one(pipeline: Any) -> None:
    constant, stated = find_family(tiny_flux2(dynamic=False), **OPTIONS), find_family(pipeline, shift=2.1, **OPTIONS)
    for family in (constant, stated):
        assert family.shift == 2.1 and not family.export_scheduler().config.use_dynamic_shifting
        assert family.grid(2).tolist() == pytest.approx([1.0, 2.1 / 3.1])
    stock.check_pictures(stated, pipeline, steps=3)


def test_the_distilled_one_is_called_without_guidance(family: Family) -> None:
    distilled = tiny_flux2(distilled=True)
    found = find_family(distilled, **OPTIONS)
    assert (family.own_call["guidance_scale"], found.own_call["guidance_scale"]) == (4.0, 1.0)
    unguided = stock.check_pictures(found, distilled, steps=2)
    assert torch.equal(stock.drawn_by_stock(found, distilled, steps=2, guidance=4.0), stock.drawn_by_stock(found, distilled, steps=2))
    assert (stock.check_pictures(found, distilled, steps=2) - unguided).abs().max() == 0
    assert found.load_pipeline(None, found.export_scheduler()).config.is_distilled


def test_codec_shapes_and_time_features(family: Family, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_latents_are_normalised_as_the_pipeline_does_it(family: Family, pipeline: Any) -> None:
    pixels = 2 * torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        expected = pipeline._encode_vae_image(pixels, torch.Generator())
    torch.testing.assert_close(family.encode_latents(pixels), expected, rtol=0, atol=1e-6)


def test_a_blocks_feature_is_the_pictures_alone(family: Family) -> None:
    network, cond = stock.denoiser(family), family.encode_prompts(stock.PROMPTS)
    into_output: list[torch.Tensor] = []
    network.backbone.get_submodule("norm_out").register_forward_pre_hook(lambda _module, inputs: into_output.append(inputs[0]))
    with torch.no_grad():
        features = network(torch.randn(2, *family.latent.shape), torch.full((2,), 0.4), cond, taps=range(2)).features
    assert [feature.shape for feature in features] == [(2, 24, 32)] * 2
    assert torch.equal(features[1], into_output[0])


def test_exact_tangents(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.check_exact_tangent(family, monkeypatch)


def test_tangents_in_half_precision(family: Family) -> None:
    stock.check_half_precision_tangent(family)


def test_a_saved_folder_draws_the_same(pipeline: Any, family: Family, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    found = find_family(tmp_path, **OPTIONS)
    theirs, ours = (stock.generator(made, 2)(stock.PROMPTS, stock.SEEDS) for made in (family, found))
    assert (theirs - ours).abs().max() <= 4e-6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [16, 18]}, r"teacher\.size: 18 is not a multiple of 4$"),
        ({"max_sequence_length": 513}, r"teacher\.max_sequence_length: 513, but the pipeline takes at most 512"),
        ({"embedded_guidance": 3.5}, r"teacher\.embedded_guidance: does not apply to Flux2KleinPipeline"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused_by_its_key(pipeline: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^recipe key {said}"):
        find_family(pipeline, **OPTIONS | options)


def test_a_negative_prompt_is_refused(family: Family) -> None:
    with pytest.raises(UserError, match=r"recipe key teacher\.negative_prompt: 'blurry', but the call of Flux2KleinPipeline takes none"):
        family.encode_negative("blurry")


def test_what_stands_before_a_prompt_takes_its_part_of_the_texts_length(family: Family) -> None:
    """The last letter that is said to be read changes what stock's encoders say, the next one nothing."""
    stock.check_cut(family)

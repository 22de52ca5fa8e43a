"""Lumina 2 against the stock Lumina2Pipeline on random weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from pipelines import draw
from tiny_lumina2 import tiny_lumina2
from tiny_parts import kl_vae

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family
from fastgen.families.lumina2 import Lumina2

OPTIONS: dict[str, Any] = {"size": [32, 48], "max_sequence_length": 69}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_lumina2()


@pytest.fixture
def family(pipeline: Any) -> Family:
    return find_family(pipeline, **OPTIONS)


@pytest.mark.parametrize("prompts", [stock.PROMPTS, ["a red cat", "a red car"]], ids=["ragged", "even"])
def test_the_first_network_call_is_stocks(family: Family, pipeline: Any, prompts: list[str]) -> None:
    told = stock.check_first_call(family, pipeline, prompts)
    counts = told["encoder_attention_mask"].sum(1).tolist()
    assert told["timestep"].tolist() == [0.0, 0.0], "it counts from noise to data"
    assert (counts[0] == counts[1]) == (prompts != stock.PROMPTS) and max(counts) < 69


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (3.0, "blurry"), (3.0, None)])
def test_pictures_are_stocks(family: Family, pipeline: Any, steps: int, guidance: float, negative: str | None) -> None:
    stock.check_pictures(family, pipeline, steps=steps, guidance=guidance, negative=negative)


def test_explicit_times_are_stepped_on_exactly(family: Family, pipeline: Any) -> None:
    grid = [1.0, 0.625, 0.25]
    assert family.grid(3, grid).tolist() == grid
    stock.check_pictures(family, pipeline, steps=3, grid=grid)


def test_a_dynamic_shift_goes_by_the_number_of_channels(family: Family) -> None:
    assert family.shift == 2.3
    live = tiny_lumina2(dynamic=True)
    for size in ([32, 48], [16, 16]):
        found = find_family(live, size=size, max_sequence_length=69)
        assert found.shift == pytest.approx(math.exp(0.4 + (5 - 3) * (1.3 - 0.4) / (20 - 3)), rel=1e-9)
        draw(live, stock.PROMPTS[:1], stock.SEEDS[:1], **found.call_arguments(4, 1.0))
        torch.testing.assert_close(found.grid(4), live.scheduler.sigmas[:-1].double(), rtol=0, atol=1e-6)
        stock.check_pictures(found, live, steps=2)


def test_negative_prompts_are_read_without_the_system_prompt(family: Family) -> None:
    assert [int(family.encode_negative(text)["encoder_attention_mask"].sum()) for text in (None, "", "dim")] == [1, 1, 4]


def test_a_blocks_feature_is_the_pictures_alone(family: Family) -> None:
    """Which in the joint blocks follows its own text, wherever that ends."""
    network, cond = stock.denoiser(family), family.encode_prompts(stock.PROMPTS)
    x, t = torch.randn(2, *family.latent.shape), torch.full((2,), 0.4)
    joint: list[Any] = []
    network.backbone.get_submodule("layers.1").register_forward_hook(lambda _module, _inputs, output: joint.append(output))
    with torch.no_grad():
        features = network(x, t, cond, taps=range(3)).features
    assert [feature.shape for feature in features] == [(2, 6, 24)] * 3
    for row, length in enumerate(cond["encoder_attention_mask"].sum(1).tolist()):
        assert torch.equal(features[2][row], joint[0][row, length : length + 6])


def test_codec_shapes_and_time_features(family: Family, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_exact_tangents(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.keep_wide_norms(monkeypatch)
    stock.check_exact_tangent(family, monkeypatch)


def test_a_saved_folder_draws_the_same(pipeline: Any, family: Family, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    found = find_family(tmp_path, **OPTIONS)
    assert isinstance(found, Lumina2) and found.own_call == {"num_inference_steps": 30, "guidance_scale": 4.0}
    theirs, ours = (stock.generator(made, 2)(stock.PROMPTS, stock.SEEDS) for made in (family, found))
    assert (theirs - ours).abs().max() <= 4e-6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [32, 40]}, r"teacher\.size: 40 is not a multiple of 16 and at most 128$"),
        ({"size": [144, 32]}, r"teacher\.size: 144 is not a multiple of 16 and at most 128$"),
        ({"max_sequence_length": 70}, r"teacher\.max_sequence_length: 70, but the network has places for at most 69$"),
        ({"embedded_guidance": 3.5}, r"teacher\.embedded_guidance: does not apply to Lumina2Pipeline"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused_by_its_key(pipeline: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^recipe key {said}"):
        find_family(pipeline, **OPTIONS | options)


def test_a_vae_of_another_factor_is_refused(tmp_path: Path) -> None:
    live = tiny_lumina2()
    live.register_modules(vae=kl_vae(5, quant=False, shift_factor=0.1, scaling_factor=0.4))
    with pytest.raises(UserError, match=r"^recipe key teacher\.pretrained: its vae has a factor of 2, but Lumina2Pipeline takes it for 8$"):
        find_family(live, **OPTIONS)


def test_the_longest_text_and_the_largest_picture_have_places(pipeline: Any) -> None:
    family = find_family(pipeline, size=[128, 16], max_sequence_length=69)
    cond = family.encode_prompts(["a" * 100, "b"])
    assert cond["encoder_attention_mask"].sum(1).max() == 69
    with torch.no_grad():
        out = family.call(family.load_backbone(), torch.randn(2, *family.latent.shape), torch.full((2,), 0.4), cond)
    assert out.isfinite().all()


def test_what_stands_before_a_prompt_takes_its_part_of_the_texts_length(family: Family) -> None:
    """The last letter that is said to be read changes what stock's encoders say, the next one nothing."""
    stock.check_cut(family)

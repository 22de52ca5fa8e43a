"""Chroma against the stock ChromaPipeline on random weights."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from pipelines import draw
from tiny_chroma import tiny_chroma

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family
from fastgen.families.chroma import Chroma
from fastgen.surgery.recompute import recompute_blocks

OPTIONS: dict[str, Any] = {"size": [16, 24], "max_sequence_length": 20}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_chroma()


@pytest.fixture
def family(pipeline: Any) -> Family:
    return find_family(pipeline, **OPTIONS)


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    mask = stock.check_first_call(family, pipeline)["attention_mask"]
    assert mask.is_floating_point(), "which attention adds to its logits: true and false would leave tokens out"
    assert mask[:, :20].sum(1).tolist() == [len("a red cat") + 3, 20], "a word's beginning and the text's end are tokens, and one of padding is kept"
    assert mask.shape == (2, 20 + 24) and mask[:, 20:].eq(1).all()


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (3.0, "blurry"), (3.0, None)])
def test_pictures_are_stocks(family: Family, pipeline: Any, steps: int, guidance: float, negative: str | None) -> None:
    stock.check_pictures(family, pipeline, steps=steps, guidance=guidance, negative=negative)


def test_explicit_times_are_stepped_on_exactly(family: Family, pipeline: Any) -> None:
    grid = [1.0, 0.625, 0.25]
    assert family.grid(3, grid).tolist() == grid
    stock.check_pictures(family, pipeline, steps=3, grid=grid)


def test_the_shift_goes_by_the_number_of_tokens(pipeline: Any) -> None:
    for size, tokens in (([16, 24], 24), ([16, 16], 16)):
        given: dict[str, Any] = OPTIONS | {"size": size}
        family = find_family(pipeline, **given)
        assert family.shift == pytest.approx(math.exp(0.4 + (tokens - 10) * (1.3 - 0.4) / (90 - 10)), rel=1e-9)
        draw(pipeline, stock.PROMPTS[:1], stock.SEEDS[:1], **family.call_arguments(4, 1.0))
        torch.testing.assert_close(family.grid(4), pipeline.scheduler.sigmas[:-1].double(), rtol=0, atol=1e-6)


def test_codec_and_shapes(family: Family, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)
    stock.check_shapes(family)


def test_a_blocks_feature_is_the_pictures_alone(family: Family) -> None:
    """Though text and picture are one stream in the single blocks, the text first."""
    network, cond = stock.denoiser(family), family.encode_prompts(stock.PROMPTS)
    into_output: list[torch.Tensor] = []
    network.backbone.get_submodule("norm_out").register_forward_pre_hook(lambda _module, inputs: into_output.append(inputs[0]))
    with torch.no_grad():
        features = network(torch.randn(2, *family.latent.shape), torch.full((2,), 0.4), cond, taps=range(3)).features
    assert [feature.shape for feature in features] == [(2, 24, 32)] * 3
    assert torch.equal(features[2], into_output[0])


def test_blocks_that_compute_again_see_the_mask(family: Family) -> None:
    """Which diffusers gives its single blocks only where they do not."""
    x, t, cond = torch.randn(2, *family.latent.shape), torch.full((2,), 0.4), family.encode_prompts(stock.PROMPTS)
    found = list[tuple[torch.Tensor, torch.Tensor]]()
    for again in (False, True):
        network = family.load_backbone()
        if again:
            network = copy.deepcopy(network)
            recompute_blocks(network)
        weight: Any = network.get_parameter("single_transformer_blocks.0.attn.to_q.weight")
        out = family.call(network, x, t, cond)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), weight)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_exact_tangents(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.check_exact_tangent(family, monkeypatch)


def test_tangents_at_times_that_half_precision_rounds(family: Family) -> None:
    stock.check_half_precision_tangent(family)


def test_a_saved_folder_draws_the_same(pipeline: Any, family: Family, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    found = find_family(tmp_path, **OPTIONS)
    assert isinstance(found, Chroma)
    assert found.own_call == {"num_inference_steps": 35, "guidance_scale": 5.0}
    theirs, ours = (stock.generator(made, 2)(stock.PROMPTS, stock.SEEDS) for made in (family, found))
    assert (theirs - ours).abs().max() <= 4e-6
    assert found.legibility(["a" * 40, "cat"]).cut.keys() == {"a" * 40}


@pytest.mark.parametrize(("option", "value"), [("approximator_layers", 10**6), ("approximator_hidden_dim", 2**40), ("approximator_num_channels", 0)])
def test_sizes_that_no_network_has_are_refused_before_it_is_built(pipeline: Any, tmp_path: Path, option: str, value: int) -> None:
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {option: value}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^recipe key teacher\.pretrained: .*{option}"):
        find_family(tmp_path, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [16, 18]}, r"teacher\.size: 18 is not a multiple of 4$"),
        ({"resolution": 18, "size": None}, r"teacher\.resolution: 18 is not a multiple of 4$"),
        ({"max_sequence_length": 513}, r"teacher\.max_sequence_length: 513, but the pipeline takes at most 512"),
        ({"embedded_guidance": 3.5}, r"teacher\.embedded_guidance: does not apply to ChromaPipeline"),
        ({"frames": 5}, r"teacher\.frames: does not apply to ChromaPipeline"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused_by_its_key(pipeline: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^recipe key {said}"):
        find_family(pipeline, **OPTIONS | options)

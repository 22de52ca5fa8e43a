"""AuraFlow against the stock AuraFlowPipeline on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from tiny_auraflow import tiny_auraflow

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.auraflow import AuraFlow
from fastgen.families.base import Family

OPTIONS: dict[str, Any] = {"size": [16, 24], "max_sequence_length": 19}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_auraflow()


@pytest.fixture
def family(pipeline: Any) -> Family:
    return find_family(pipeline, **OPTIONS)


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    given = stock.check_first_call(family, pipeline)
    assert given["timestep"].tolist() == [1.0, 1.0]
    assert given["encoder_hidden_states"][0, -1].eq(0).all(), "what pads a text is zero, and no mask says so"


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (3.0, "blurry"), (3.0, None)])
def test_pictures_are_stocks(family: Family, pipeline: Any, steps: int, guidance: float, negative: str | None) -> None:
    stock.check_pictures(family, pipeline, steps=steps, guidance=guidance, negative=negative)


def test_explicit_times_are_stepped_on_exactly(family: Family, pipeline: Any) -> None:
    stock.check_pictures(family, pipeline, steps=3, grid=[1.0, 0.625, 0.25])


def test_codec_shapes_and_time_features(family: Family, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_a_blocks_feature_is_the_pictures_alone(family: Family) -> None:
    """Though text and picture are one stream in the single blocks, the text first."""
    network, cond = stock.denoiser(family), family.encode_prompts(stock.PROMPTS)
    into_output: list[torch.Tensor] = []
    network.backbone.get_submodule("norm_out").register_forward_pre_hook(lambda _module, inputs: into_output.append(inputs[0]))
    with torch.no_grad():
        features = network(torch.randn(2, *family.latent.shape), torch.full((2,), 0.4), cond, taps=range(3)).features
    assert [feature.shape for feature in features] == [(2, 24, 32)] * 3
    assert torch.equal(features[2], into_output[0])


def test_exact_tangents(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.check_exact_tangent(family, monkeypatch)


def test_a_saved_folder_draws_the_same(pipeline: Any, family: Family, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    found = find_family(tmp_path, **OPTIONS)
    assert isinstance(found, AuraFlow) and found.shift == 1.9
    assert found.own_call == {"num_inference_steps": 50, "guidance_scale": 3.5}
    theirs, ours = (stock.generator(made, 2)(stock.PROMPTS, stock.SEEDS) for made in (family, found))
    assert (theirs - ours).abs().max() <= 4e-6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [16, 18]}, r"teacher\.size: 18 is not a multiple of 4 and at most 32$"),
        ({"size": [36, 16]}, r"teacher\.size: 36 is not a multiple of 4 and at most 32$"),
        ({"size": None}, r"teacher\.size: the pipeline's own, 1024, is not .* at most 32; give one$"),
        ({"frames": 5}, r"teacher\.frames: does not apply to AuraFlowPipeline"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused_by_its_key(pipeline: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^recipe key {said}"):
        find_family(pipeline, **OPTIONS | options)

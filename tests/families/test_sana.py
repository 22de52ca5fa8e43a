"""The Sana family against the stock SanaPipeline on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from tiny_sana import tiny_sana

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.sana import Sana

OPTIONS: dict[str, Any] = {"max_sequence_length": 18}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_sana()


@pytest.fixture(scope="module")
def family(pipeline: Any) -> Sana:
    return Sana(pipeline, **OPTIONS)


def test_the_first_network_call_is_stocks(family: Sana, pipeline: Any) -> None:
    told = stock.check_first_call(family, pipeline)
    assert told["timestep"].tolist() == [700.0, 700.0]  # its time scale of .7
    assert told["encoder_attention_mask"].sum(1).tolist()[0] < 18 == told["encoder_hidden_states"].shape[1]


@pytest.mark.parametrize(
    ("steps", "guidance", "negative", "size"),
    [(1, 1.0, None, None), (2, 4.5, None, [32, 64]), (4, 4.5, stock.NEGATIVE, [64, 32]), (3, 1.0, None, [64, 32])],
)
def test_pictures_are_stocks(pipeline: Any, steps: int, guidance: float, negative: str | None, size: Any) -> None:
    stock.check_pictures(Sana(pipeline, size=size, **OPTIONS), pipeline, steps=steps, guidance=guidance, negative=negative)


def test_explicit_times_are_stocks(family: Sana, pipeline: Any) -> None:
    stock.check_pictures(family, pipeline, steps=3, guidance=4.5, grid=[1.0, 0.625, 0.25])


def test_latents_are_scaled_as_the_pipeline_scales_them(family: Sana, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)
    pixels = torch.rand(1, 3, 32, 32)
    assert torch.allclose(family.encode_latents(pixels), 0.37 * pipeline.vae.encode(pixels).latent, atol=1e-6)


def test_what_the_plan_counts_with_is_what_there_is(family: Sana) -> None:
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_the_exact_tangent_is_that_of_finite_differences(family: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.check_exact_tangent(family, monkeypatch)


def test_a_folder_is_found_and_its_parts_fit(family: Sana, pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    found = find_family(tmp_path, **OPTIONS)
    assert isinstance(found, Sana)
    assert (found.shift, found.size, found.latent.shape) == (family.shift, (32, 32), (6, 16, 16)) and found.shift == 2.6
    network: Any = found.load_backbone(meta=True)
    assert network.config["timestep_scale"] == 0.7
    assert found.own_call == {"num_inference_steps": 20, "guidance_scale": 4.5}


@pytest.mark.parametrize("options", [{"resolution": 48}, {"size": [32, 40]}])
def test_a_size_that_the_call_refuses_is_refused(pipeline: Any, options: Any) -> None:
    with pytest.raises(UserError, match=r"recipe key teacher\.(resolution|size): 4[08] is not a multiple of 32"):
        Sana(pipeline, **options)

"""DDPM against the stock DDPMPipeline on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from tiny_ddpm import tiny_ddpm

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family
from fastgen.families.ddpm import DDPM


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_ddpm(size=(16, 24))


@pytest.fixture(scope="module")
def family(pipeline: Any) -> Family:
    return find_family(pipeline)


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    given = stock.check_first_call(family, pipeline)
    assert given["timestep"].tolist() == 699


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_pictures_are_stocks(family: Family, pipeline: Any, steps: int) -> None:
    assert stock.check_pictures(family, pipeline, steps=steps).shape == (2, 3, 16, 24)


@pytest.mark.parametrize(("prediction_type", "beta_end"), [("epsilon", 0.001), ("v_prediction", 0.03)])
@pytest.mark.parametrize("steps", [1, 4])
def test_pictures_of_other_networks_are_stocks(prediction_type: str, beta_end: float, steps: int) -> None:
    """Of which more is clipped to black and white: half of each picture is told apart."""
    live = tiny_ddpm(prediction_type=prediction_type, beta_end=beta_end)
    found = find_family(live)
    expected = stock.drawn_by_stock(found, live, steps=steps)
    ours = stock.generator(found, steps)(stock.PROMPTS, stock.SEEDS)
    assert (ours - expected).abs().max() <= 4 * stock.allowed(found, steps, 1.0)
    assert ((ours > 0) & (ours < 1)).float().mean() > 0.5


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_stochastic_sampler_is_stocks_seed_by_seed(family: Family, pipeline: Any, steps: int) -> None:
    own, pipeline.scheduler = pipeline.scheduler, family.sampling_scheduler(steps, None, "stochastic")
    generators = [torch.Generator().manual_seed(seed) for seed in stock.SEEDS]
    drawn = pipeline(**family.call_inputs(stock.PROMPTS), generator=generators, output_type="np", **family.call_arguments(steps, 1.0))[0]
    pipeline.scheduler = own
    ours = stock.generator(family, steps, sampler="stochastic")(stock.PROMPTS, stock.SEEDS)
    assert (ours - torch.from_numpy(drawn).movedim(-1, 1)).abs().max() <= 2 * stock.TOLERANCE


def test_pixels_are_latents(family: Family) -> None:
    pixels = 2 * torch.rand(2, 3, 16, 24) - 1
    assert torch.equal(family.encode_latents(pixels), pixels)
    assert torch.equal(family.decode(pixels), pixels / 2 + 0.5)
    assert family.decode_latents(3 * pixels).aminmax() == (0, 1)


def test_shapes_and_time_features(family: Family) -> None:
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_exact_tangents(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.check_exact_tangent(family, monkeypatch)


def test_a_saved_folder_draws_the_same(pipeline: Any, family: Family, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    found = find_family(tmp_path)
    assert isinstance(found, DDPM) and found.size == (16, 24) and found.options == {}
    theirs, ours = (stock.generator(made, 2)(stock.PROMPTS, stock.SEEDS) for made in (family, found))
    assert (theirs - ours).abs().max() <= 4e-6


def test_a_scheduler_that_clips_teaches_without(family: Family, pipeline: Any) -> None:
    assert pipeline.scheduler.config.clip_sample and not family.export_scheduler().config.get("thresholding")
    assert family.kind == "x0" and find_family(tiny_ddpm(prediction_type="epsilon")).kind == "eps"


@pytest.mark.parametrize(("options", "said"), [({"size": [16, 16]}, "size"), ({"max_sequence_length": 8}, "max_sequence_length")])
def test_options_that_it_has_not_are_refused(pipeline: Any, options: Any, said: str) -> None:
    with pytest.raises(UserError, match=rf"recipe key teacher\.{said}: does not apply to DDPMPipeline; it has no options"):
        find_family(pipeline, **options)


@pytest.mark.parametrize(
    ("config", "said"),
    [({"num_class_embeds": 10}, "its unet takes classes"), ({"time_embedding_type": "learned", "num_train_timesteps": 700}, "a table of times")],
)
def test_other_unets_are_refused(config: dict[str, Any], said: str) -> None:
    live = tiny_ddpm()
    live.unet.register_to_config(**config)
    with pytest.raises(UserError, match=rf"^recipe key teacher\.pretrained: .*{said}"):
        find_family(live)

"""Sana-Sprint against the stock SanaSprintPipeline on random weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from cells import recipe
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_sana import tiny_sana, tiny_sprint

from fastgen.config import Recipe, validate
from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family
from fastgen.families.sana_sprint import SanaSprint
from fastgen.path import TrigFlow
from fastgen.plan import plan

OPTIONS: dict[str, Any] = {"size": [32, 64], "max_sequence_length": 18}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_sprint()


@pytest.fixture
def family(pipeline: Any) -> Family:
    return find_family(pipeline, **OPTIONS)


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    told = stock.check_first_call(family, pipeline)
    assert told["guidance"].tolist() == pytest.approx([4.5 * 0.7] * 2)
    assert told["timestep"].tolist() == pytest.approx([1.0, 1.0], abs=2e-7)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("strength", [4.5, 1.0])
def test_pictures_are_stocks_seed_by_seed(pipeline: Any, steps: int, strength: float) -> None:
    stock.check_pictures(find_family(pipeline, embedded_guidance=strength, **OPTIONS), pipeline, steps=steps)


@pytest.mark.parametrize("grid", [[1.0, 0.5], [0.9, 0.6], [0.9]])
def test_explicit_times_are_shares_of_half_pi(family: Family, pipeline: Any, grid: list[float]) -> None:
    assert family.grid(len(grid), grid).tolist() == pytest.approx([share * math.pi / 2 for share in grid], rel=1e-12)
    stock.check_pictures(family, pipeline, steps=len(grid), grid=grid)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_grid_is_stocks_own_but_for_where_that_starts(family: Family, pipeline: Any, steps: int) -> None:
    own = {"num_inference_steps": steps, "intermediate_timesteps": 1.3 if steps == 2 else None}
    pipeline(prompt="a cat", output_type="latent", height=32, width=32, use_resolution_binning=False, **own)
    torch.testing.assert_close(family.path_times(pipeline.scheduler.timesteps, torch.zeros(0)), family.grid(steps), rtol=0, atol=4e-6)


def test_embedded_guidance_changes_the_picture(family: Family, pipeline: Any) -> None:
    other = find_family(pipeline, embedded_guidance=1.0, **OPTIONS)
    one, two = (stock.generator(each, 2)(stock.PROMPTS, stock.SEEDS) for each in (family, other))
    assert (one - two).abs().max() > 1e-3


def test_samplers_differ(family: Family) -> None:
    one, two = (stock.generator(family, 2, sampler=sampler)(stock.PROMPTS, stock.SEEDS) for sampler in ("stochastic", "euler"))
    assert family.samplers == ("stochastic",) and (one - two).abs().max() > 1e-3


def test_its_prediction_is_the_velocity_of_trigflow(family: Family) -> None:
    """At its first time that is minus data, and x0 of it is what the scheduler makes of it at all others."""
    assert isinstance(family, SanaSprint) and family.path == TrigFlow()
    network, cond = stock.denoiser(family), family.encode_prompts(stock.PROMPTS)
    x, t = torch.randn(2, *family.latent.shape), torch.tensor([0.4, 1.3])
    with torch.no_grad():
        out = network(x, t, cond).prediction
    expected = t.cos().view(-1, 1, 1, 1) * x - t.sin().view(-1, 1, 1, 1) * out
    torch.testing.assert_close(family.path.convert(out, x, t, "velocity", "x0"), expected, rtol=0, atol=1e-6)


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
    assert found.own_call == {"num_inference_steps": 2, "guidance_scale": 1.0} and found.options["embedded_guidance"] == 4.5
    theirs, ours = (stock.generator(made, 2)(stock.PROMPTS, stock.SEEDS) for made in (family, found))
    assert (theirs - ours).abs().max() <= 4e-6


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"teacher": {"guidance": 2.0}}, r"teacher\.guidance: 2, but .* has no classifier-free guidance; remove it; .* teacher\.embedded_guidance$"),
        ({"teacher": {"negative_prompt": "dim"}}, r"teacher\.negative_prompt: 'dim', but the call of SanaSprintPipeline takes none"),
        ({"teacher": {"shift": 2.0}}, r"teacher\.shift: does not apply to SanaSprintPipeline"),
        ({"student": {"steps": 3, "grid": [1.0, 0.5, 0.2]}}, r"student\.grid: \[1\.0, 0\.5, 0\.2\] cannot be exported: the scheduler would step on"),
        ({"student": {"sampler": "euler"}}, r"student\.sampler: euler, but SanaSprintPipeline renoises; allowed: stochastic$"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused_by_its_key(pipeline: Any, keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "teacher")
    data = recipe(tmp_path / "teacher", "dmd2", tmp_path, max_sequence_length=18).dump()
    for block, values in keys.items():
        data[block] |= values
    with pytest.raises(UserError, match=f"^recipe key {said}"):
        plan(validate(Recipe, data))


def test_other_networks_and_schedulers_are_refused(pipeline: Any) -> None:
    live = tiny_sprint()
    live.register_modules(scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UserError, match=r"its scheduler is FlowMatchEulerDiscreteScheduler, but SanaSprintPipeline takes an SCMScheduler"):
        find_family(live, **OPTIONS)
    live = tiny_sprint()
    live.register_modules(transformer=tiny_sana().transformer)
    with pytest.raises(UserError, match=r"its transformer takes no guidance scale \(guidance_embeds\)"):
        find_family(live, **OPTIONS)

"""The Sana family against the stock SanaPipeline on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from diffusers import SanaPipeline
from pipelines import same_interpreter as same_interpreter
from pipelines import student_info, student_role
from tiny_sana import tiny_sana

from fastgen.errors import UserError
from fastgen.export import export_student, verify
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


@pytest.mark.parametrize(("steps", "grid"), [(1, None), (2, [1.0, 0.783]), (2, None), (4, None)])
def test_the_stochastic_sampler_is_stocks_seed_by_seed(family: Sana, pipeline: Any, steps: int, grid: Any) -> None:
    live = SanaPipeline(**pipeline.components | {"scheduler": family.sampling_scheduler(steps, grid, "stochastic")})
    live.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in stock.SEEDS]
    drawn = live(**family.call_inputs(stock.PROMPTS), generator=generators, output_type="np", **family.call_arguments(steps, 1.0, grid))[0]
    ours = stock.generator(family, steps, sampler="stochastic", grid=grid)
    assert (ours(stock.PROMPTS, stock.SEEDS) - torch.from_numpy(drawn).movedim(-1, 1)).abs().max() <= stock.TOLERANCE
    torch.testing.assert_close(ours.times(), family.path_times(live.scheduler.timesteps, live.scheduler.sigmas), rtol=0, atol=1e-7)
    if steps > 1:
        difference = stock.generator(family, steps, grid=ours.times().tolist())(stock.PROMPTS, stock.SEEDS) - torch.from_numpy(drawn).movedim(-1, 1)
        assert difference.abs().max() > 1e-3, "the samplers must differ"


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("grid", [None, [1.0, 0.783]])
def test_a_student_of_it_is_exported_and_verified(pipeline: Any, tmp_path: Path, grid: Any) -> None:
    pipeline.save_pretrained(tmp_path / "teacher")
    family = Sana(tmp_path / "teacher", **OPTIONS)
    info = student_info(tmp_path / "teacher", steps=2, grid=grid, sampler="stochastic")
    result = verify(export_student(student_role(family), family, info, tmp_path / "student"))
    assert result.passed, result


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

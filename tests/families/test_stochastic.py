"""The sampler that draws its noise anew: a stock pipeline that hands its generators to its scheduler draws the same; others are refused."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from pipelines import same_interpreter as same_interpreter
from pipelines import sd3_folder as sd3_folder
from pipelines import student_info, student_role
from tiny_pixart import tiny_pixart
from tiny_sd15 import tiny_sd15
from tiny_sdxl import tiny_sdxl
from torch import Tensor

from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.export import export_student, verify
from fastgen.families import family_class, family_names, find_family
from fastgen.families.base import Family
from fastgen.families.sd3 import SD3
from fastgen.generator import SeededDraws, load_student, noise_from_seeds, read_manifest
from fastgen.plan import plan

MAKERS = {"sd15": tiny_sd15, "sdxl": tiny_sdxl, "pixart": tiny_pixart}


def by_stock(family: Family, pipeline: Any, steps: int, grid: Any = None) -> Tensor:
    """The documented call with the stochastic sampler's scheduler and a list of generators."""
    call, scheduler = family.call_arguments(steps, 1.0, grid), family.sampling_scheduler(steps, grid, "stochastic")
    pipeline.register_modules(scheduler=scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in stock.SEEDS]
    pixels = pipeline(**family.call_inputs(stock.PROMPTS), generator=generators, output_type="np", **call)[0]
    return torch.from_numpy(pixels).movedim(-1, 1)


@pytest.mark.parametrize("name", MAKERS)
def test_pictures_are_stocks_seed_by_seed(name: str) -> None:
    pipeline = MAKERS[name]()
    family, live = find_family(pipeline), MAKERS[name]()
    for steps in (4, 3, 1):
        expected = by_stock(family, live, steps)
        ours = stock.generator(family, steps, sampler="stochastic")
        bound = stock.TOLERANCE * family.amplification(ours.times()[0].item())
        assert (ours(stock.PROMPTS, stock.SEEDS) - expected).abs().max() <= bound
        times = family.path_times(live.scheduler.timesteps, torch.zeros(0))
        torch.testing.assert_close(ours.times(), times, rtol=0, atol=1e-12)
        if steps > 1:
            assert (stock.generator(family, steps)(stock.PROMPTS, stock.SEEDS) - expected).abs().max() > 1e-3, "the samplers must differ"


def test_each_generator_goes_on_where_it_stood() -> None:
    draws = SeededDraws([3, 4])
    first, second = (draws.normal(name, (4, 2)) for name in ("noise", "noise"))
    assert torch.equal(first, noise_from_seeds([3, 4], (4, 2)))
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    for expected in (first, second):
        assert torch.equal(expected, torch.cat([torch.randn((1, 4, 2), generator=generator) for generator in generators]))


@pytest.mark.usefixtures("same_interpreter")
def test_a_student_of_it_is_exported_and_verified(tmp_path: Path) -> None:
    tiny_sdxl().save_pretrained(tmp_path / "teacher")
    family = find_family(tmp_path / "teacher", size=[32, 48])
    info = student_info(tmp_path / "teacher", steps=4, sampler="stochastic")
    folder = export_student(student_role(family), family, info, tmp_path / "student")
    assert read_manifest(folder)["sampler"] == "stochastic"
    result = verify(folder)
    assert result.passed, result
    student = load_student(folder)
    assert (student.sampler, type(student.family).__name__) == ("stochastic", "SDXL")


def test_only_pipelines_that_hand_on_their_generators_have_it() -> None:
    """Their own code says so: it gives `generator` to `scheduler.step`, most by `prepare_extra_step_kwargs`."""
    import diffusers

    def hands_on(pipeline: Any) -> bool:
        direct = re.search(r"scheduler\.step\([^)]*generator=generator", inspect.getsource(pipeline.__call__))
        return hasattr(pipeline, "prepare_extra_step_kwargs") or direct is not None

    for family in map(family_class, family_names()):
        if "stochastic" in family.samplers and family.exportable:
            assert all(hands_on(getattr(diffusers, name)) for name in family.pipeline_classes)
    having = {name for name in family_names() if "stochastic" in family_class(name).samplers}
    assert having == {"ddpm", "pixart", "sana", "sana_sprint", "sd", "sdxl", "toy"}


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "a pipeline": ("digits_scm_2step", [], r"student\.sampler: stochastic, but StableDiffusion3Pipeline hands .* no generator.*; allowed: euler$"),
    "a method": ("digits_meanflow_2step", [], r"student\.sampler: stochastic, but mean_flow trains steps of the euler sampler alone"),
    "a phase": ("digits_phased_dmd_4step", [], r"student\.sampler: stochastic, but phased_dmd trains"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drawn_again_is_refused_in_the_plan(name: str) -> None:
    recipe, overrides, said = REFUSED[name]
    with pytest.raises(UserError, match=f"^recipe key {said}"):
        plan(Recipe.load(recipe, ["student.sampler=stochastic", *overrides]))


def test_rollouts_move_as_the_sampler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SD3, "samplers", ("euler", "stochastic"))
    monkeypatch.setattr(SD3, "stochastic_grid", lambda self, steps, grid=None: self.grid(steps, grid))
    four = ["student.sampler=stochastic", "student.steps=4"]
    with pytest.raises(UserError, match=r"distiller\.renoise: euler, but the student is sampled and exported with stochastic steps"):
        plan(Recipe.load("digits_dmd2_4step", four))
    planned = plan(Recipe.load("digits_dmd2_4step", [*four, "distiller.renoise=stochastic"]))
    assert planned.resolved()["student"]["sampler"] == "stochastic"
    with pytest.raises(UserError, match=r"distiller\.renoise: stochastic, but the student is sampled and exported with euler steps"):
        plan(Recipe.load("digits_dmd2_4step", ["distiller.renoise=stochastic"]))

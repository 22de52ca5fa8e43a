"""EDM networks against the stock ConsistencyModelPipeline on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from diffusers import CMStochasticIterativeScheduler
from tiny_consistency import tiny_consistency

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family
from fastgen.families.consistency import ConsistencyModel

PROMPTS = ["3", "0"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_consistency()


@pytest.fixture(scope="module")
def family(pipeline: Any) -> Family:
    return find_family(pipeline)


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    given = stock.check_first_call(family, pipeline, PROMPTS)
    assert given["class_labels"].tolist() == [3, 0]


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_pictures_are_stocks(family: Family, pipeline: Any, steps: int) -> None:
    stock.check_pictures(family, pipeline, PROMPTS, steps=steps)


@pytest.mark.parametrize("options", [{"classes": None}, {"prediction_type": "v_prediction"}])
def test_other_networks_too(options: dict[str, Any]) -> None:
    live = tiny_consistency(**options)
    found = find_family(live)
    assert ("class_labels" in found.call_inputs(PROMPTS)) == ("classes" not in options)
    stock.check_pictures(found, live, PROMPTS, steps=3)


def test_classes_differ(family: Family) -> None:
    one, two = (stock.generator(family, 2)([label], [3]) for label in PROMPTS)
    assert (one - two).abs().max() > 1e-3


def test_the_last_step_has_work_to_do(family: Family) -> None:
    """Karras's grid of one step more, without its last."""
    times, stock_times = family.grid(4), tiny_consistency().scheduler
    stock_times.set_timesteps(5)
    torch.testing.assert_close(times.float(), stock_times.sigmas[:4], rtol=1e-6, atol=0)
    assert family.grid(1).tolist() == pytest.approx([80.0], rel=1e-12)
    assert family.sampling_scheduler(4).config.sigma_min == pytest.approx(times[-1].item())


@pytest.mark.parametrize("grid", [[1.0, 0.01], [0.5, 0.01], [0.25]])
def test_explicit_ends_are_shares_of_80(family: Family, pipeline: Any, grid: list[float]) -> None:
    assert family.sampling_times(len(grid), grid).tolist() == pytest.approx([80 * share for share in grid], rel=1e-9)
    own, pipeline.scheduler = pipeline.scheduler, family.sampling_scheduler(len(grid), grid)
    generators = [torch.Generator().manual_seed(seed) for seed in stock.SEEDS]
    call = family.call_arguments(len(grid), 1.0)
    drawn = pipeline(**family.call_inputs(PROMPTS), generator=generators, output_type="np", **call)[0]
    pipeline.scheduler = own
    ours = stock.generator(family, len(grid), grid=grid)(PROMPTS, stock.SEEDS)
    assert (ours - torch.from_numpy(drawn).movedim(-1, 1)).abs().max() <= stock.allowed(family, len(grid), 1.0)


def test_shapes_and_time_features(family: Family) -> None:
    stock.check_shapes(family, PROMPTS)
    stock.check_time_features(family, PROMPTS)


def test_exact_tangents(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.check_exact_tangent(family, monkeypatch, PROMPTS)


def test_a_saved_folder_draws_the_same(pipeline: Any, family: Family, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    found = find_family(tmp_path)
    assert isinstance(found, ConsistencyModel) and found.kind == "x0"
    theirs, ours = (stock.generator(made, 2)(PROMPTS, stock.SEEDS) for made in (family, found))
    assert (theirs - ours).abs().max() <= 4e-6


@pytest.mark.parametrize("prompt", ["5", "-1", "a cat"])
def test_what_is_no_class_is_refused(family: Family, prompt: str) -> None:
    with pytest.raises(UserError, match=rf"^prompts: '{prompt}' \(is no class 0 to 4"):
        family.encode_prompts(["1", prompt])


@pytest.mark.parametrize("scheduler", [CMStochasticIterativeScheduler(), None])
def test_other_schedulers_are_refused(scheduler: Any) -> None:
    live = tiny_consistency() if scheduler else tiny_consistency(sigma_schedule="exponential")
    if scheduler:
        live.register_modules(scheduler=scheduler)
    with pytest.raises(UserError, match=r"^recipe key teacher\.pretrained: its scheduler is .*; fastgen follows EDMEulerScheduler, karras"):
        find_family(live)

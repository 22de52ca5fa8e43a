"""PRXPixel against the stock PRXPixelPipeline on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from pipelines import student_info, student_role, verifying_here
from tiny_prx import tiny_prx

from fastgen.errors import UserError
from fastgen.export import Expert, export_student, verify
from fastgen.families import draws_singly, find_family
from fastgen.families.base import Family
from fastgen.families.prx_pixel import PRXPixel

OPTIONS: dict[str, Any] = {"size": [16, 24]}
ONE = stock.PROMPTS[1:]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_prx()


@pytest.fixture
def family(pipeline: Any) -> Family:
    return find_family(pipeline, **OPTIONS)


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    """Of one prompt: of two, stock's time has one row for both."""
    given = stock.check_first_call(family, pipeline, stock.PROMPTS[:1])
    assert given["attention_mask"].dtype == torch.bool and 0 < given["attention_mask"].sum() < 30
    noise = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(stock.SEEDS[0]))
    assert torch.equal(given["hidden_states"], 1.5 * noise)


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_pictures_are_stocks(family: Family, pipeline: Any, steps: int) -> None:
    stock.check_pictures(family, pipeline, steps=steps)


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("negative", [None, "blurry"])
def test_guided_pictures_are_stocks_one_by_one(family: Family, pipeline: Any, steps: int, negative: str | None) -> None:
    stock.check_pictures(family, pipeline, ONE, steps=steps, guidance=3.0, negative=negative)


@pytest.mark.parametrize("grid", [[1.0, 0.625, 0.25], [1.0, 0.4, 0.03], [1.0, 0.04, 0.02]])
def test_explicit_times_are_stepped_on_exactly_below_the_clamp_too(family: Family, pipeline: Any, grid: list[float]) -> None:
    torch.testing.assert_close(family.grid(3, grid), torch.tensor(grid, dtype=torch.float64), rtol=0, atol=1e-7)
    stock.check_pictures(family, pipeline, steps=3, grid=grid)


def test_latents_are_pixels_over_the_scale_of_noise(family: Family) -> None:
    pixels = 2 * torch.rand(2, 3, 16, 24) - 1
    assert torch.equal(family.encode_latents(pixels), pixels / 1.5)
    torch.testing.assert_close(family.decode(pixels / 1.5), pixels / 2 + 0.5, rtol=0, atol=1e-6)


def test_shapes_and_time_features(family: Family) -> None:
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_exact_tangents(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.keep_wide_norms(monkeypatch)
    stock.check_exact_tangent(family, monkeypatch)


def test_a_saved_folder_draws_the_same(pipeline: Any, family: Family, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    found = find_family(tmp_path, **OPTIONS)
    assert isinstance(found, PRXPixel) and found.shift == 1.8 and found.own_call == {"num_inference_steps": 28, "guidance_scale": 4.0}
    theirs, ours = (stock.generator(made, 2)(stock.PROMPTS, stock.SEEDS) for made in (family, found))
    assert (theirs - ours).abs().max() <= 4e-6
    assert found.legibility(["a" * 40, "cat"]).cut.keys() == {"a" * 40}


@pytest.mark.parametrize("ends", [(0.0,), (0.8, 0.0)], ids=["one network", "two, which callers change between steps"])
def test_a_guided_student_of_several_prompts_verifies(ends: tuple[float, ...], pipeline: Any, tmp_path: Path) -> None:
    """Stock cannot draw two with guidance, so verify has it draw one at a time, each call from the first network on."""
    pipeline.save_pretrained(tmp_path / "teacher")
    found = find_family(tmp_path / "teacher", **OPTIONS)
    experts = [Expert(student_role(found, seed=seed), end) for seed, end in enumerate(ends)]
    info = student_info(tmp_path / "teacher", steps=2, guidance=3.0, prompts=stock.PROMPTS)
    export_student(experts, found, info, tmp_path / "student")
    with verifying_here():
        result = verify(tmp_path / "student", seeds=(0, 1, 2))
    assert result.passed and result.pictures == 3, result


def test_stock_itself_fails_on_two_prompts_with_guidance(family: Family, pipeline: Any) -> None:
    """If this passes one day, `guides_singly` can go."""
    with pytest.raises(RuntimeError):
        stock.drawn_by_stock(family, pipeline, steps=2, guidance=3.0)
    assert [draws_singly(cls, 3.0) for cls in ("PRXPixelPipeline", "StableDiffusion3Pipeline", "NobodysPipeline")] == [True, False, False]
    assert not draws_singly("PRXPixelPipeline", 1.0) and not draws_singly("PRXPixelPipeline", None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [16, 18]}, r"teacher\.size: 18 is not a multiple of 4$"),
        ({"max_sequence_length": 20}, r"teacher\.max_sequence_length: does not apply to PRXPixelPipeline"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused_by_its_key(pipeline: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^recipe key {said}"):
        find_family(pipeline, **OPTIONS | options)

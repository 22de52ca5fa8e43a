"""DiT against the stock DiTPipeline on random weights."""

from __future__ import annotations

from typing import Any

import pytest
import stock
from tiny_dit import tiny_dit

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family

PROMPTS = ["golden retriever", "7"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_dit()


@pytest.fixture(scope="module")
def family(pipeline: Any) -> Family:
    return find_family(pipeline)


def test_the_first_network_call_is_stocks(family: Family, pipeline: Any) -> None:
    given = stock.check_first_call(family, pipeline, PROMPTS)
    assert (given["timestep"].tolist(), given["class_labels"].tolist()) == ([699, 699], [207, 7])


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (2, 4.0), (4, 4.0), (3, 1.0)])
def test_pictures_are_stocks(family: Family, pipeline: Any, steps: int, guidance: float) -> None:
    stock.check_pictures(family, pipeline, PROMPTS, steps=steps, guidance=guidance)


def test_latents_are_scaled_as_the_pipeline_scales_them(family: Family, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)


def test_what_the_plan_counts_with_is_what_there_is(family: Family) -> None:
    stock.check_shapes(family, PROMPTS)


def test_the_exact_tangent_is_that_of_finite_differences(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.check_exact_tangent(family, monkeypatch, PROMPTS)


@pytest.mark.parametrize(("prompt", "label"), [("tench", 0), ("Tinca tinca", 0), ("tench, Tinca tinca", 0), ("999", 999), ("", 1000)])
def test_classes_are_said_by_number_or_name(family: Family, prompt: str, label: int) -> None:
    assert family.encode_prompts([prompt])["class_labels"].tolist() == [label]


@pytest.mark.parametrize("prompt", ["golden retreiver", "1000", "-1", "a photo of a dog"])
def test_what_is_no_class_is_refused(family: Family, prompt: str) -> None:
    with pytest.raises(UserError, match=rf"^recipe key data\.prompts: '{prompt}' \(is neither a class 0 to 999 nor one's name"):
        family.legibility(["tench", prompt]).check("recipe key data.prompts")
    with pytest.raises(UserError, match=r"^prompts: "):
        family.encode_prompts([prompt])


def test_what_the_call_takes_not_is_refused(family: Family, pipeline: Any) -> None:
    assert not family.takes_times and not family.loads_lora
    with pytest.raises(UserError, match=r"recipe key teacher\.size: does not apply to DiTPipeline"):
        find_family(pipeline, size=[16, 24])
    with pytest.raises(UserError, match=r"recipe key teacher\.negative_prompt: 'goldfish', but the call of DiTPipeline takes none"):
        family.encode_negative("goldfish")

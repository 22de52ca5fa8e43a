"""What a family is told beside its source: one dictionary with which it is made again, and refusals that name the recipe key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PROMPTS, draw, tiny_sd3
from pipelines import sd3_folder as sd3_folder

from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import OPTIONS
from fastgen.generator import load_teacher

TOKENS, SEEDS = 16, [3, 4, 5]
GIVEN: dict[str, Any] = {"max_sequence_length": TOKENS, "size": [24, 16], "shift": 2.0}


def test_a_family_is_made_again_from_its_options(sd3_folder: Path) -> None:
    family = find_family(sd3_folder, **GIVEN)
    assert family.options == GIVEN
    again = find_family(sd3_folder, "sd3", **family.options)
    assert (again.options, again.latent, again.picture_shape, again.shift) == (GIVEN, family.latent, (3, 24, 16), 2.0)
    assert find_family(sd3_folder).options == {"max_sequence_length": 256, "size": [16, 16]}  # the scheduler's own shift is not stated
    assert find_family(sd3_folder, resolution=24).options["size"] == [24, 24]
    assert find_family("toy:ring").options == {}


@pytest.mark.parametrize("steps", [1, 3])
def test_pictures_that_are_not_square_equal_the_stock_pipelines(sd3_folder: Path, steps: int) -> None:
    teacher = load_teacher(sd3_folder, steps=steps, guidance=3.0, negative_prompt="blurry", **GIVEN)
    pipeline = teacher.family.load_pipeline(None, teacher.family.export_scheduler())
    expected = draw(pipeline, PROMPTS, SEEDS, negative_prompt=["blurry"] * 3, **teacher.family.call_arguments(steps, 3.0))
    pictures = teacher(PROMPTS, SEEDS)
    assert pictures.shape == expected.shape == (3, 3, 24, 16)
    assert (pictures - expected).abs().max() <= 1e-5
    latents = teacher.family.encode_latents(2 * pictures - 1)
    assert latents.shape == (3, *teacher.family.latent.shape) == (3, 4, 12, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frames": 5}, r"teacher\.frames: does not apply to StableDiffusion3Pipeline; its options are max_sequence_length, size, shift"),
        ({"embedded_guidance": 3.5}, r"teacher\.embedded_guidance: does not apply to StableDiffusion3Pipeline"),
        ({"length": 3}, r"teacher\.length: does not apply"),
        ({"size": [24, 18]}, r"teacher\.size: 18 is not a multiple of 4 and at most 64"),
        ({"size": [68, 16]}, r"teacher\.size: 68 is not a multiple of 4 and at most 64"),
        ({"size": [24, 24], "resolution": 24}, r"teacher\.resolution: teacher\.size says it already; remove one of them"),
    ],
)
def test_an_option_that_a_family_does_not_have_is_refused_by_its_key(sd3_folder: Path, options: dict[str, Any], said: str) -> None:
    for source in (sd3_folder, tiny_sd3()):
        with pytest.raises(UserError, match=f"^recipe key {said}"):
            find_family(source, **options)


@pytest.mark.parametrize("name", [*OPTIONS, "resolution"])
def test_a_closed_form_teacher_has_no_options(name: str) -> None:
    given: dict[str, Any] = {name: 3}
    with pytest.raises(UserError, match=rf"recipe key teacher\.{name}: does not apply to a closed-form teacher"):
        find_family("toy:ring", **given)


def test_the_recipes_teacher_block_holds_them_and_null_is_the_pipelines_own() -> None:
    stated = ["teacher.size=[24, 16]", "teacher.frames=5", "teacher.embedded_guidance=3.5", "teacher.max_sequence_length=9", "teacher.shift=2"]
    recipe = Recipe.load("digits_dmd2_1step", stated)
    expected = {"max_sequence_length": 9, "size": [24, 16], "frames": 5, "embedded_guidance": 3.5, "shift": 2.0}
    assert recipe.teacher.options == expected
    assert Recipe.load("digits_dmd2_1step").teacher.options == {}
    assert Recipe.load("digits_dmd2_1step", ["teacher.resolution=24"]).teacher.options == {"resolution": 24}
    for value in ("24", "[24]", "[24, 16, 8]", "[24, 0]", "[24, x]"):
        with pytest.raises(UserError, match=r"recipe key teacher\.size"):
            Recipe.load("digits_dmd2_1step", [f"teacher.size={value}"])
    for value, few in (("[24]", "at least"), ("[24, 16, 8]", "at most")):
        with pytest.raises(UserError, match=rf"^recipe key teacher\.size: a list of {few} 2 is needed \(given: \[24"):
            Recipe.load("digits_dmd2_1step", [f"teacher.size={value}"])


def test_latents_of_the_asked_aspect_come_back_as_pictures_of_it(sd3_folder: Path) -> None:
    family = find_family(sd3_folder, size=[16, 24])
    pixels = 2 * torch.rand((2, 3, 16, 24), generator=torch.Generator().manual_seed(0)) - 1
    assert family.decode_latents(family.encode_latents(pixels)).shape == (2, *family.picture_shape)

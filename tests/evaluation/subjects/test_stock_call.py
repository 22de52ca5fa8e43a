"""What a stock call is passed, and what is refused from its signature alone, before any weight is read."""

from __future__ import annotations

from typing import Any

import pytest

from fastgen.errors import UserError
from fastgen.evaluation.subjects.stock_call import CallSettings, StockCall, class_number


def call(name: str, **asked: Any) -> StockCall:
    import diffusers

    return StockCall(getattr(diffusers, name), CallSettings(**asked))


@pytest.mark.parametrize(
    ("name", "asked", "expected", "guidance"),
    [
        ("StableDiffusionPipeline", {}, {}, 7.5),
        ("StableDiffusionPipeline", {"steps": 4, "guidance": 0.0}, {"num_inference_steps": 4, "guidance_scale": 0.0}, 0.0),
        (
            "StableDiffusionXLPipeline",
            {"more": {"timesteps": [999, 749, 499, 249]}},
            {"timesteps": [999, 749, 499, 249], "num_inference_steps": 4},
            5.0,
        ),
        ("FluxPipeline", {"more": {"guidance_scale": 3.0}}, {"guidance_scale": 3.0}, 1.0),  # an input of its network
        ("FluxPipeline", {"more": {"true_cfg_scale": 2.0, "negative_prompt": "fog"}}, {"true_cfg_scale": 2.0, "negative_prompt": "fog"}, 2.0),
        ("QwenImagePipeline", {}, {}, 1.0),  # 4 without a negative prompt
        ("QwenImagePipeline", {"guidance": 3.0}, {"true_cfg_scale": 3.0, "negative_prompt": ""}, 3.0),
        ("QwenImagePipeline", {"guidance": 1.0}, {"true_cfg_scale": 1.0}, 1.0),
        ("SanaSprintPipeline", {"steps": 1}, {"num_inference_steps": 1, "intermediate_timesteps": None}, 4.5),
        ("SanaSprintPipeline", {"steps": 2}, {"num_inference_steps": 2}, 4.5),
        ("DDPMPipeline", {"steps": 9}, {"num_inference_steps": 9}, None),
    ],
)
def test_arguments_and_guidance(name: str, asked: dict[str, Any], expected: dict[str, Any], guidance: float | None) -> None:
    made = call(name, **asked)
    assert made.arguments == expected and made.guidance == guidance
    assert made.told(2) == expected | ({"negative_prompt": [expected["negative_prompt"]] * 2} if "negative_prompt" in expected else {})


def test_default_steps_are_the_signatures() -> None:
    assert [call(name).steps for name in ("StableDiffusion3Pipeline", "SanaSprintPipeline", "DDPMPipeline")] == [28, 2, 1000]
    assert call("StableDiffusion3Pipeline").record["num_inference_steps"] == 28


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("WanPipeline", {}, "^WanPipeline draws videos, and only pictures are measured$"),
        ("SanaVideoPipeline", {}, "draws videos"),
        ("StableDiffusionImageVariationPipeline", {}, "needs image, so it does not draw pictures of prompts alone$"),
        ("KandinskyV22Pipeline", {}, "needs image_embeds and negative_image_embeds, so"),
        ("DiTPipeline", {"size": (256, 256)}, "^--size: the call of DiTPipeline takes no height; allowed: "),
        (
            "StableDiffusionPipeline",
            {"max_sequence_length": 7},
            "^--max-sequence-length: the call of .* takes no max_sequence_length",
        ),
        ("DDPMPipeline", {"guidance": 2.0}, "^--guidance: the call of DDPMPipeline takes neither guidance_scale nor true_cfg_scale$"),
        ("FluxPipeline", {"guidance": 3.5}, "^--guidance: FluxPipeline has two, .*: --call guidance_scale=3.5$"),
        ("StableDiffusionPipeline", {"guidance": 2.0, "more": {"guidance_scale": 3.0}}, "--call guidance_scale says it already"),
        ("StableDiffusionPipeline", {"more": {"gidance_rescale": 1.0}}, "takes no gidance_rescale; did you mean 'guidance_rescale'"),
        ("StableDiffusionPipeline", {"more": {"num_inference_steps": 3}}, "^--call num_inference_steps: use --steps$"),
        ("StableDiffusionPipeline", {"more": {"generator": 3}}, "^--call generator: the evaluation itself passes it$"),
        ("StableDiffusionPipeline", {"steps": 3, "more": {"timesteps": [9, 4]}}, "^--steps: 3, but --call timesteps has 2 times$"),
        ("StableDiffusionPipeline", {"more": {"timesteps": 9}}, "^--call timesteps: 9 is no list of times$"),
        ("UnCLIPPipeline", {"steps": 3}, "^--steps: the call of UnCLIPPipeline takes no num_inference_steps"),
    ],
)
def test_what_is_refused(name: str, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(name, **asked)


def test_classes_by_number_and_by_name() -> None:
    names = {"cock": 7, "rooster": 7, "hen": 8}
    given = ["7", " 8 ", "cock", "cock, rooster", "cock, hen", "9", "-1", "", "duck"]
    assert [class_number(prompt, 9, names) for prompt in given] == [7, 8, 7, 7, None, None, None, None, None]

"""The Wan family against the stock WanPipeline on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from pipelines import student_info, student_role
from safetensors.torch import load_file
from tiny_wan import BOUNDARY, tiny_wan

from fastgen import load_teacher
from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.export import export_student
from fastgen.families import find_family
from fastgen.families.wan import Wan
from fastgen.plan import plan

OPTIONS: dict[str, Any] = {"size": [16, 16], "frames": 5, "max_sequence_length": 19}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_wan()


@pytest.fixture(scope="module")
def family(pipeline: Any) -> Wan:
    return Wan(pipeline, **OPTIONS)


def test_the_first_network_call_is_stocks(family: Wan, pipeline: Any) -> None:
    told = stock.check_first_call(family, pipeline)
    assert told["timestep"].tolist() == [1000.0, 1000.0]
    text = told["encoder_hidden_states"]
    assert text.shape == (2, 19, 28) and not text[0, 11:].any() and text[0, :11].all()  # ten characters and an end, then zeros


@pytest.mark.parametrize(
    ("steps", "guidance", "negative", "more"),
    [
        (1, 1.0, None, {}),
        (2, 5.0, None, {"size": [32, 16]}),
        (4, 5.0, stock.NEGATIVE, {"frames": 9}),
        (3, 1.0, None, {"frames": 1, "size": [16, 32]}),
    ],
)
def test_videos_are_stocks(pipeline: Any, steps: int, guidance: float, negative: str | None, more: Any) -> None:
    family = Wan(pipeline, **OPTIONS | more)
    frames = more.get("frames", 5)
    assert family.latent.shape == (6, (frames - 1) // 4 + 1, family.size[0] // 4, family.size[1] // 4)
    videos = stock.check_pictures(family, pipeline, steps=steps, guidance=guidance, negative=negative)
    assert videos.shape == (2, 3, frames, *family.size)


def test_latents_are_normalised_by_channel(family: Wan, pipeline: Any) -> None:
    stock.check_codec(family, pipeline)


def test_what_the_plan_counts_with_is_what_there_is(family: Wan) -> None:
    stock.check_shapes(family)
    stock.check_time_features(family)


def test_the_exact_tangent_is_that_of_finite_differences(family: Wan, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.check_exact_tangent(family, monkeypatch)


def test_prompts_are_cleaned_as_ftfy_cleans_them(family: Wan) -> None:
    written, meant = (family.encode_prompts([text])["encoder_hidden_states"] for text in ("l&#39;homme  donâ€™t ", "l'homme don't"))
    assert torch.equal(written, meant)


def test_a_folder_is_found_and_its_parts_fit(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    found = find_family(tmp_path, **OPTIONS)
    assert isinstance(found, Wan)
    assert (found.shift, found.own_call) == (2.4, {"num_inference_steps": 50, "guidance_scale": 5.0})
    network: Any = found.load_backbone(meta=True)
    assert network.config["text_dim"] == 28
    assert not found.has("transformer_2")
    assert Wan(pipeline, **OPTIONS, shift=5.0).grid(4).tolist() == pytest.approx([1.0, 0.9375, 5 / 6, 0.625])  # as its few-step papers list them
    plain = Wan(pipeline, size=[480, 832])
    assert plain.options == {"max_sequence_length": 512, "size": [480, 832], "frames": 81}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [16, 24]}, r"teacher\.size: 24 is not a multiple of 16"),
        ({"frames": 6}, r"teacher\.frames: 6 is not 1 more than a multiple of 4"),
    ],
)
def test_what_the_call_would_change_is_refused(pipeline: Any, options: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"recipe key {said}"):
        Wan(pipeline, **OPTIONS | options)


def test_wan_22_has_a_second_network(tmp_path: Path) -> None:
    two: Any = tiny_wan(two_networks=True)
    two.save_pretrained(tmp_path)
    assert WanPipeline.from_pretrained(tmp_path).config["boundary_ratio"] == BOUNDARY
    assert find_family(tmp_path, **OPTIONS).has("transformer_2")


def test_a_pipeline_of_two_networks_cannot_teach_yet(tmp_path: Path) -> None:
    two = tiny_wan(two_networks=True)
    with pytest.raises(
        UserError, match=r"^the live WanPipeline is a pipeline of two networks, transformer and transformer_2, which cannot teach yet"
    ):
        load_teacher(two, **OPTIONS)
    two.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^recipe key teacher\.pretrained: .* is a pipeline of two networks, .* which cannot teach yet"):
        plan(recipe(tmp_path))


def recipe(teacher: Path, *overrides: str, name: str = "digits_dmd2_1step") -> Recipe:
    here = [f"teacher.pretrained={teacher}", "teacher.size=[16, 16]", "teacher.frames=5", "teacher.max_sequence_length=19"]
    return Recipe.load(name, [*here, "evaluate.protocol=null", *overrides])


def test_what_videos_have_not_is_refused_by_its_key(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^recipe key student\.grid: the call of WanPipeline takes no explicit times"):
        plan(recipe(tmp_path, "student.grid=[0.9]"))
    with pytest.raises(UserError, match=r"^recipe key data\.images: the teacher makes videos, and fastgen does not read videos yet"):
        plan(recipe(tmp_path, name="digits_lcm_2step"))


def test_a_network_with_a_time_for_every_token_draws_the_same(pipeline: Any) -> None:
    """Wan 2.2's 5B: the pipeline gives each token the same time, which is the time of the sample."""
    tokens = WanPipeline(**pipeline.components, expand_timesteps=True)
    tokens.set_progress_bar_config(disable=True)
    stock.check_pictures(Wan(tokens, **OPTIONS), tokens, steps=2, guidance=5.0)


def test_half_precision_keeps_in_fp32_what_diffusers_keeps(family: Wan, tmp_path: Path) -> None:
    folder = export_student(student_role(family), family, student_info("wan"), tmp_path / "student", dtype="bf16")
    written = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    loaded: Any = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in written.items()} == {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert {tensor.dtype for tensor in written.values()} == {torch.float32, torch.bfloat16}

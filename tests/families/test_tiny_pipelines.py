"""The tiny pipelines are fit to test families with: pictures depend on what they should, and a saved folder draws the same ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_auraflow
import tiny_chroma
import tiny_consistency
import tiny_ddpm
import tiny_dit
import tiny_flux
import tiny_flux2
import tiny_lumina2
import tiny_pixart
import tiny_prx
import tiny_qwen
import tiny_sana
import tiny_sd15
import tiny_sdxl
import tiny_wan
import tiny_zimage
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from tiny_parts import qwen_tokenizer
from torch import Tensor, nn

Built = tuple[Callable[[], Any], dict[str, Any]]
GUIDED = {"guidance_scale": 3.0, "negative_prompt": "blurry"}
TRUE_CFG = {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}
PIPELINES: dict[str, Built] = {
    "flux": (tiny_flux.tiny_flux, tiny_flux.CALL | TRUE_CFG),
    "schnell": (lambda: tiny_flux.tiny_flux(schnell=True), tiny_flux.CALL),
    "sd15": (tiny_sd15.tiny_sd15, tiny_sd15.CALL | GUIDED),
    "sd21": (lambda: tiny_sd15.tiny_sd15(prediction_type="v_prediction"), tiny_sd15.CALL | GUIDED),
    "sdxl": (tiny_sdxl.tiny_sdxl, tiny_sdxl.CALL | GUIDED),
    "pixart": (tiny_pixart.tiny_pixart, tiny_pixart.CALL | GUIDED),
    "sana": (tiny_sana.tiny_sana, tiny_sana.CALL | GUIDED),
    "dit": (tiny_dit.tiny_dit, tiny_dit.CALL | {"guidance_scale": 3.0}),
    "qwen": (tiny_qwen.tiny_qwen, tiny_qwen.CALL | TRUE_CFG),
    "zimage": (tiny_zimage.tiny_zimage, tiny_zimage.CALL | GUIDED),
    "wan": (tiny_wan.tiny_wan, tiny_wan.CALL | GUIDED),
    "auraflow": (tiny_auraflow.tiny_auraflow, tiny_auraflow.CALL | GUIDED),
    "chroma": (tiny_chroma.tiny_chroma, tiny_chroma.CALL | GUIDED),
    "lumina2": (tiny_lumina2.tiny_lumina2, tiny_lumina2.CALL | GUIDED),
    "flux2": (tiny_flux2.tiny_flux2, tiny_flux2.CALL | {"guidance_scale": 3.0}),
    "flux2_dev": (tiny_flux2.tiny_flux2_dev, tiny_flux2.DEV_CALL | {"guidance_scale": 3.0}),
    "sprint": (tiny_sana.tiny_sprint, tiny_sana.CALL | {"guidance_scale": 3.0}),
    "ddpm": (tiny_ddpm.tiny_ddpm, {}),
    "prx": (tiny_prx.tiny_prx, tiny_prx.CALL | GUIDED),
    "edm": (tiny_consistency.tiny_consistency, {}),
    "wan22": (lambda: tiny_wan.tiny_wan(two_networks=True), tiny_wan.CALL | GUIDED),
}
# A change of these arguments must change the picture too.
MORE: dict[str, list[dict[str, Any]]] = {
    "flux": [{"guidance_scale": 1.5}, {"max_sequence_length": 8}],
    "sdxl": [{"original_size": (64, 48)}, {"crops_coords_top_left": (8, 0)}],
    "pixart": [{"max_sequence_length": 8}],
    "sana": [{"max_sequence_length": 8}],
    "wan22": [{"guidance_scale_2": 1.5}],
}


UNPROMPTED = (DDPMPipeline,)  # which draw what they like


def draw(pipeline: Any, prompt: str | int, seed: int, **call: Any) -> Tensor:
    """(1, [T,] H, W, 3) in [0, 1]: two steps."""
    given: Any = {"prompt": prompt} if isinstance(prompt, str) else {"class_labels": [prompt]}
    if isinstance(pipeline, UNPROMPTED):
        given = {}
    pictures = pipeline(**given, generator=torch.Generator().manual_seed(seed), num_inference_steps=2, output_type="np", **call)[0]
    return torch.as_tensor(pictures)


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_depend_on_what_they_should_and_survive_a_folder(name: str, tmp_path: Path) -> None:
    build, call = PIPELINES[name]
    pipeline = build()
    first, second = (1, 207) if name == "dit" else (1, 3) if name == "edm" else ("a red cat", "two boats at sea")
    picture = draw(pipeline, first, 3, **call)
    assert torch.isfinite(picture).all()
    # Clipped pixels hide what changes them.
    assert ((picture > 0) & (picture < 1)).float().mean() > 0.9 and picture.std() > 0.01
    changes = {"seed": draw(pipeline, first, 4, **call)}
    if not isinstance(pipeline, UNPROMPTED):
        changes["prompt"] = draw(pipeline, second, 3, **call)
    for key in ("guidance_scale", "true_cfg_scale"):
        if key in call:
            changes[key] = draw(pipeline, first, 3, **call | {key: 2.0})
    if "negative_prompt" in call:
        changes["negative_prompt"] = draw(pipeline, first, 3, **call | {"negative_prompt": "dark"})
    for other in MORE.get(name, []):
        changes[str(other)] = draw(pipeline, first, 3, **call | other)
    unmoved = {key: difference(changed, picture) for key, changed in changes.items() if difference(changed, picture) < 1e-3}
    assert not unmoved
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipeline)
    # Weights from a file lie elsewhere in memory, where sums may round differently.
    assert difference(draw(loaded, first, 3, **call), picture) <= 4e-6


@pytest.mark.parametrize("name", PIPELINES)
def test_no_parameter_is_constant_and_the_seed_alone_decides(name: str) -> None:
    build, _ = PIPELINES[name]
    torch.manual_seed(5)
    before, (first, second) = torch.get_rng_state(), (build(), build())
    assert torch.equal(torch.get_rng_state(), before)
    for key, module in first.components.items():
        if isinstance(module, nn.Module):
            other = second.components[key].state_dict()
            assert all(torch.equal(value, other[part]) for part, value in module.state_dict().items())
            assert not [part for part, value in module.named_parameters() if value.numel() > 1 and value.eq(value.flatten()[0]).all()]
            assert not [part for part, child in module.named_modules() if child.training]
            assert {value.dtype for value in module.parameters()} == {torch.float32}


def test_seeds_give_different_weights() -> None:
    first, second = (tiny_dit.tiny_dit(seed).transformer.proj_out_2.weight for seed in (0, 1))
    assert difference(first, second) > 0.01


def test_qwens_template_is_as_long_as_the_pipeline_takes_it_for() -> None:
    pipeline = tiny_qwen.tiny_qwen()
    before, _ = pipeline.prompt_template_encode.split("{}")
    assert len(qwen_tokenizer()(before).input_ids) == pipeline.prompt_template_encode_start_idx == 34
    assert len(qwen_tokenizer()("red fox").input_ids) == 7

"""What the UNet families share: blocks and features in order, their public sizes, times told exactly in half precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from diffusers import UNet2DConditionModel
from pipelines import same_interpreter as same_interpreter
from pipelines import student_info, student_role
from tiny_dit import tiny_dit
from tiny_pixart import tiny_pixart
from tiny_sd15 import tiny_sd15
from tiny_sdxl import tiny_sdxl

from fastgen.export import export_student, verify
from fastgen.families import find_family

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(("config", "count"), [(SD15, 859_520_964), (SDXL, 2_567_463_684)], ids=["sd15", "sdxl"])
def test_the_public_configurations_have_the_public_sizes(config: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        network: Any = UNet2DConditionModel(**config)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize(("build", "sides"), [(tiny_sd15, (4, 4, 4, 8, 8)), (tiny_sdxl, (4, 4, 4, 8, 8))])
def test_features_are_those_of_the_blocks_on_the_way_down_in_the_middle_and_up(build: Callable[[], Any], sides: tuple[int, ...]) -> None:
    family = find_family(build())
    denoiser = stock.denoiser(family)
    network: Any = denoiser.backbone
    outputs: list[torch.Tensor] = []
    for block in (*network.down_blocks, network.mid_block, *network.up_blocks):
        block.register_forward_hook(lambda _module, _inputs, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        cond = family.encode_prompts(["a red cat"])
        features = denoiser(torch.randn(1, *family.latent.shape), torch.tensor([0.5]), cond, taps=range(5)).features
    assert [output.shape[-2:] for output in outputs] == [(side, side) for side in sides]
    for feature, output, width in zip(features, outputs, family.feature_widths(network), strict=True):
        assert feature.shape == (1, output.shape[-2] * output.shape[-1], width)
        assert torch.equal(feature[0, output.shape[-1] + 2], output[0, :, 1, 2])


@pytest.mark.parametrize("build", [tiny_sd15, tiny_sdxl, tiny_pixart, tiny_dit])
def test_tangents_in_half_precision_are_those_of_single(build: Callable[[], Any]) -> None:
    """At times that bf16 rounds."""
    family = find_family(build())
    stock.check_half_precision_tangent(family, ["7", "207"] if build is tiny_dit else stock.PROMPTS)


@pytest.mark.slow
@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("build", [tiny_sd15, tiny_sdxl, tiny_pixart, tiny_dit])
def test_students_of_half_precision_are_verified(build: Callable[[], Any], dtype: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "teacher")
    family = find_family(tmp_path / "teacher")
    info = student_info(tmp_path / "teacher", steps=2, prompts=["7", "207"] if build is tiny_dit else stock.PROMPTS)
    folder = export_student(student_role(family), family, info, tmp_path / "student", dtype=dtype)
    for drawn_in in ("fp32", dtype):
        result = verify(folder, seeds=(3, 4), dtype=drawn_in)
        assert result.passed, result


def test_a_network_without_a_block_in_the_middle() -> None:
    pipeline = tiny_sd15()
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(pipeline.unet.config, mid_block_type=None))
    family = find_family(pipeline)
    stock.check_shapes(family)
    assert len(family.blocks(family.load_backbone())) == 4
    stock.check_pictures(family, pipeline, steps=2)

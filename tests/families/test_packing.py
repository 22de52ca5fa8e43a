"""What families with packed latents share: the packing itself, and exact times in half precision. And how large public networks are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from pipelines import same_interpreter as same_interpreter
from pipelines import student_info, student_role
from tiny_flux import tiny_flux
from tiny_qwen import tiny_qwen

from fastgen.export import export_student, verify
from fastgen.families import find_family, packing


def test_packing_is_the_pipelines_and_comes_back() -> None:
    x = torch.arange(2 * 5 * 6 * 8.0).view(2, 5, 6, 8)
    tokens = packing.pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 5, 6, 8))
    assert torch.equal(packing.unpack(tokens, x.shape), x)


@pytest.mark.parametrize(("build", "side", "length"), [(tiny_flux, 16, 20), (tiny_qwen, 32, 40)], ids=["flux", "qwen"])
def test_tangents_in_half_precision_are_those_of_single(build: Callable[[], Any], side: int, length: int) -> None:
    """At times that bf16 rounds; with the rounded times that the networks embed by themselves this is off by 55 and 80 %."""
    family = find_family(build(), size=[side, side], max_sequence_length=length)
    stock.check_half_precision_tangent(family)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("build", "side", "length"), [(tiny_flux, 16, 20), (tiny_qwen, 32, 40)], ids=["flux", "qwen"])
def test_students_in_half_precision_draw_what_stock_draws(
    build: Callable[[], Any], side: int, length: int, dtype: str, tmp_path: Path, same_interpreter: None
) -> None:
    """Stock rounds times there, we do not; pictures differ by no more than rounding elsewhere makes them."""
    build().save_pretrained(tmp_path / "teacher")
    family = find_family(tmp_path / "teacher", size=[side, side], max_sequence_length=length)
    export_student(student_role(family), family, student_info(tmp_path / "teacher"), tmp_path / "student", dtype=dtype)
    assert verify(tmp_path / "student", seeds=(0, 1)).picture_error <= 1e-6
    assert 1e-4 < verify(tmp_path / "student", seeds=(0, 1), dtype=dtype).picture_error <= 0.03


@pytest.mark.parametrize(
    ("network", "config", "count"),
    [
        (FluxTransformer2DModel, {"guidance_embeds": True}, 11_901_408_320),
        (
            SD3Transformer2DModel,
            {
                "sample_size": 128,
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
            8_056_627_520,
        ),
    ],
    ids=["FLUX.1-dev", "SD3.5-large"],
)
def test_public_configurations_have_their_published_numbers_of_parameters(network: Any, config: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in network(**config).parameters()) == count

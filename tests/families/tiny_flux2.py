"""A tiny random Flux2KleinPipeline: 16x16 pixels (16 tokens), 3 latent channels in squares of 2x2 with statistics of their own, three layers of
Qwen3's text, of which the pipeline takes the ninth at the earliest; klein base, or the distilled one. And FLUX.2 dev with Pixtral and Mistral3."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import from_seed, mistral3_encoder, pixtral_processor, qwen3_encoder, qwen_tokenizer, stirred

CALL = {"height": 16, "width": 16, "max_sequence_length": 40}
DEV_CALL = CALL | {"max_sequence_length": 70}  # of which 37 are the instruction's


def tiny_flux2(seed: int = 0, *, distilled: bool = False, dynamic: bool = True) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone. dynamic: shifted as the pipeline says, else by 2.1."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    with from_seed(seed):
        tokenizer = qwen_tokenizer()
        return stirred(
            Flux2KleinPipeline(
                transformer=_network(guidance=False), vae=_vae(), tokenizer=tokenizer, text_encoder=qwen3_encoder(tokenizer, 8, 28, head=True),
                scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=2.1), is_distilled=distilled,
            )
        )  # fmt: skip


def tiny_flux2_dev(seed: int = 0, *, guidance: bool = True) -> Any:
    """Flux2Pipeline: Mistral's text, of which it takes the thirtieth layer at the latest. guidance: its network is told one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline

    with from_seed(seed):
        processor = pixtral_processor()
        return stirred(
            Flux2Pipeline(
                transformer=_network(guidance=guidance), vae=_vae(), tokenizer=processor, text_encoder=mistral3_encoder(processor.tokenizer, 8, 31),
                scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=2.1),
            )
        )  # fmt: skip


def _network(*, guidance: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        patch_size=1, in_channels=12, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip


def _vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    vae: Any = AutoencoderKLFlux2(
        sample_size=16, block_out_channels=(8, 12), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=3, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False, batch_norm_eps=0.01,
    )  # fmt: skip
    with torch.no_grad():
        vae.bn.running_mean.normal_(std=0.4)
        vae.bn.running_var.uniform_(0.3, 2.0)
    return vae

"""A tiny random AuraFlowPipeline: 16x16 pixels, 5 latent channels, positions for 8x8 patches, UMT5's text, a shift of 1.9."""

from __future__ import annotations

from typing import Any

import torch
from pipelines import t5_tokenizer
from tiny_parts import from_seed, kl_vae, stirred, umt5_encoder

CALL = {"height": 16, "width": 16, "max_sequence_length": 19}


def tiny_auraflow(seed: int = 0) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    with from_seed(seed):
        t5 = t5_tokenizer()
        transformer = AuraFlowTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=5, out_channels=5, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=28, caption_projection_dim=32, pos_embed_max_size=64,
        )  # fmt: skip
        with torch.no_grad():  # without biases what starts small stays small: texts would hardly be seen through the gates, rounding would
            transformer.register_tokens.mul_(15)
            for blocks in (transformer.joint_transformer_blocks, transformer.single_transformer_blocks):
                for weight in blocks.parameters():
                    weight.mul_(2.0)
        return stirred(
            AuraFlowPipeline(
                transformer=transformer, vae=kl_vae(5, scaling_factor=0.33), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.9), tokenizer=t5,
                text_encoder=umt5_encoder(t5, 28),
            )
        )  # fmt: skip

"""A tiny random ChromaPipeline: 16x16 pixels (16 tokens), 5 latent channels, a shift that depends on the size."""

from __future__ import annotations

from typing import Any

from pipelines import t5_encoder, t5_tokenizer
from tiny_parts import from_seed, kl_vae, stirred

CALL = {"height": 16, "width": 16, "max_sequence_length": 20}


def tiny_chroma(seed: int = 0) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    with from_seed(seed):
        t5 = t5_tokenizer()
        transformer = ChromaTransformer2DModel(
            patch_size=1, in_channels=20, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=40, axes_dims_rope=(4, 6, 6), approximator_num_channels=24, approximator_hidden_dim=28, approximator_layers=3,
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=2.7, base_shift=0.4, max_shift=1.3, base_image_seq_len=10, max_image_seq_len=90
        )
        vae = kl_vae(5, quant=False, shift_factor=0.13, scaling_factor=0.41)
        return stirred(ChromaPipeline(transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=t5, text_encoder=t5_encoder(t5)))

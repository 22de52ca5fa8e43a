"""A tiny random ZImagePipeline: 16x16 pixels, 6 latent channels, a network that reads the time of data times 900 and gives x0 - eps."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import from_seed, kl_vae, qwen3_encoder, qwen_tokenizer, stirred

CALL = {"height": 16, "width": 16, "max_sequence_length": 60}


def tiny_zimage(seed: int = 0) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    with from_seed(seed):
        tokenizer = qwen_tokenizer()
        transformer: Any = ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=6, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            norm_eps=1e-5, qk_norm=True, cap_feat_dim=24, rope_theta=128.0, t_scale=900.0, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
        )  # fmt: skip
        with torch.no_grad():  # which diffusers leaves at zero or, before 0.42, uninitialised
            for token in (transformer.x_pad_token, transformer.cap_pad_token):
                token.normal_(std=0.3)
        return stirred(
            ZImagePipeline(
                transformer=transformer, vae=kl_vae(6, quant=False, shift_factor=0.09, scaling_factor=0.47),
                scheduler=FlowMatchEulerDiscreteScheduler(shift=2.2), tokenizer=tokenizer, text_encoder=qwen3_encoder(tokenizer, 24),
            )
        )  # fmt: skip

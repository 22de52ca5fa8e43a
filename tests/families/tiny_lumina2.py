"""A tiny random Lumina2Pipeline: 32x32 pixels through a VAE of factor 8, which the pipeline takes it for, 5 latent channels, Gemma's text behind
the system prompt, a constant shift of 2.3 or a dynamic one."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import from_seed, gemma_encoder, gemma_tokenizer, kl_vae, stirred

CALL = {"height": 32, "width": 32, "max_sequence_length": 69}
SYSTEM = "You are an assistant designed to generate superior images with the superior degree of image-text alignment based on textual prompts or user"


def tiny_lumina2(seed: int = 0, *, dynamic: bool = False) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone. dynamic: a shift by the number of what the pipeline counts."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    with from_seed(seed):
        gemma = gemma_tokenizer([f"▁{word}" for word in SYSTEM.split()])
        transformer = Lumina2Transformer2DModel(
            sample_size=4, patch_size=2, in_channels=5, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
            multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(70, 8, 8), cap_feat_dim=20,
        )  # fmt: skip
        shift: dict[str, Any] = {"shift": 2.3} if not dynamic else {
            "use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.3, "base_image_seq_len": 3, "max_image_seq_len": 20,
        }  # fmt: skip
        vae = kl_vae(5, widths=(8, 8, 8, 8), quant=False, shift_factor=0.13, scaling_factor=0.39)
        with torch.no_grad():  # four levels enlarge rounding too
            vae.decoder.conv_out.weight.mul_(0.5)
        return stirred(
            Lumina2Pipeline(
                transformer=transformer, vae=vae,
                scheduler=FlowMatchEulerDiscreteScheduler(**shift), tokenizer=gemma, text_encoder=gemma_encoder(gemma, 20, layers=2),
            )
        )  # fmt: skip

"""A tiny random FluxPipeline: 16x16 pixels (16 tokens), 5 latent channels, a shift that depends on the size; FLUX.1-dev, or schnell."""

from __future__ import annotations

from typing import Any

from pipelines import clip_tokenizer, t5_encoder, t5_tokenizer
from tiny_parts import clip_text_model, from_seed, kl_vae, stirred

CALL = {"height": 16, "width": 16, "max_sequence_length": 20}


def tiny_flux(seed: int = 0, *, schnell: bool = False) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone. schnell: no embedded guidance, no shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with from_seed(seed):
        clip, t5 = clip_tokenizer(), t5_tokenizer()
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=20, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=40, pooled_projection_dim=24, guidance_embeds=not schnell, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        shift: dict[str, Any] = {"shift": 1.0} if schnell else {
            "use_dynamic_shifting": True, "shift": 2.7, "base_shift": 0.4, "max_shift": 1.3, "base_image_seq_len": 10, "max_image_seq_len": 90,
        }  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(**shift)
        return stirred(
            FluxPipeline(
                transformer=transformer, vae=kl_vae(5, quant=False, shift_factor=0.13, scaling_factor=0.41), scheduler=scheduler,
                tokenizer=clip, tokenizer_2=t5, text_encoder=clip_text_model(clip, 24), text_encoder_2=t5_encoder(t5),
            )
        )  # fmt: skip

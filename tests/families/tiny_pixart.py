"""A tiny random PixArtSigmaPipeline: 16x16 pixels, 6 latent channels, 12 outputs of which half is a variance, 800 training steps."""

from __future__ import annotations

from typing import Any

from pipelines import t5_encoder, t5_tokenizer
from tiny_parts import from_seed, kl_vae, stirred

CALL = {"use_resolution_binning": False, "max_sequence_length": 22}


def tiny_pixart(seed: int = 0) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    with from_seed(seed):
        t5 = t5_tokenizer()
        transformer = PixArtTransformer2DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, caption_channels=40, in_channels=6,
            out_channels=12, cross_attention_dim=32, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, interpolation_scale=2,
        )  # fmt: skip
        scheduler: Any = DPMSolverMultistepScheduler(num_train_timesteps=800, beta_start=0.0002, beta_end=0.025, beta_schedule="linear")
        return stirred(
            PixArtSigmaPipeline(
                transformer=transformer, vae=kl_vae(6, scaling_factor=0.17), scheduler=scheduler, tokenizer=t5, text_encoder=t5_encoder(t5)
            )
        )

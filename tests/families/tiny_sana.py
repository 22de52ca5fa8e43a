"""A tiny random SanaPipeline: 32x32 pixels, a deep-compression VAE of factor 2, 6 latent channels, Gemma's text, a time scale of .7."""

from __future__ import annotations

from typing import Any

from tiny_parts import from_seed, gemma_encoder, gemma_tokenizer, stirred

CALL = {
    "height": 32, "width": 32, "use_resolution_binning": False, "max_sequence_length": 18, "complex_human_instruction": None,
}  # fmt: skip


def tiny_sana(seed: int = 0) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    with from_seed(seed):
        gemma = gemma_tokenizer()
        transformer = SanaTransformer2DModel(
            patch_size=1, in_channels=6, out_channels=6, num_layers=2, num_attention_heads=4, attention_head_dim=8, num_cross_attention_heads=4,
            cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=28, sample_size=16, timestep_scale=0.7,
        )  # fmt: skip
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=2.6)
        return stirred(
            SanaPipeline(
                transformer=transformer, vae=deep_compression_vae(), scheduler=scheduler, tokenizer=gemma,
                text_encoder=gemma_encoder(gemma, 28),
            )
        )  # fmt: skip


def tiny_sprint(seed: int = 0) -> Any:
    """Sana-Sprint: a network that is told its guidance, on a scheduler whose data have a deviation of .25, which no picture shows."""
    from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

    with from_seed(seed):
        gemma = gemma_tokenizer()
        transformer = SanaTransformer2DModel(
            patch_size=1, in_channels=6, out_channels=6, num_layers=2, num_attention_heads=4, attention_head_dim=8, num_cross_attention_heads=4,
            cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=28, sample_size=16, qk_norm="rms_norm_across_heads",
            guidance_embeds=True, guidance_embeds_scale=0.7,
        )  # fmt: skip
        scheduler: Any = SCMScheduler(sigma_data=0.25)
        return stirred(
            SanaSprintPipeline(
                transformer=transformer, vae=deep_compression_vae(), scheduler=scheduler, tokenizer=gemma,
                text_encoder=gemma_encoder(gemma, 28),
            )
        )  # fmt: skip


def deep_compression_vae() -> Any:
    from diffusers import AutoencoderDC

    sides: dict[str, Any] = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (12, 12), "layers_per_block": (1, 1),
            "qkv_multiscales": ((), (5,)),
        }.items()
    }  # fmt: skip
    return AutoencoderDC(
        in_channels=3, latent_channels=6, attention_head_dim=2, **sides, downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.37,
    )  # fmt: skip

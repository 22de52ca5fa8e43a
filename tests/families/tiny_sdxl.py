"""A tiny random StableDiffusionXLPipeline: 32x32 pixels, VAE of factor 4, 6 latent channels, two CLIPs of different widths."""

from __future__ import annotations

from typing import Any

from pipelines import clip_encoder, clip_tokenizer
from tiny_parts import clip_text_model, from_seed, kl_vae, stirred

CALL: dict[str, Any] = {}


def tiny_sdxl(seed: int = 0) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    with from_seed(seed):
        clip = clip_tokenizer()
        per_block: dict[str, Any] = {"attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2)}
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=6, out_channels=6, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True, cross_attention_dim=24 + 16, addition_embed_type="text_time", addition_time_embed_dim=6,
            projection_class_embeddings_input_dim=6 * 6 + 12, **per_block,
        )  # fmt: skip
        scheduler: Any = EulerDiscreteScheduler(
            num_train_timesteps=1000, beta_start=0.0009, beta_end=0.0125, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading",
        )  # fmt: skip
        return stirred(
            StableDiffusionXLPipeline(
                unet=unet, vae=kl_vae(6, widths=(8, 12, 12), scaling_factor=0.29), scheduler=scheduler, tokenizer=clip, tokenizer_2=clip,
                text_encoder=clip_text_model(clip, 24), text_encoder_2=clip_encoder(clip, 12), add_watermarker=False,
            )
        )  # fmt: skip

"""A tiny random StableDiffusionPipeline: 16x16 pixels, 5 latent channels, 900 training steps; SD 1.x, or 2.x with `v_prediction`."""

from __future__ import annotations

from typing import Any, Literal

from pipelines import clip_tokenizer
from tiny_parts import clip_text_model, from_seed, kl_vae, stirred

CALL: dict[str, Any] = {}


def tiny_sd15(seed: int = 0, *, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon") -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    with from_seed(seed):
        clip = clip_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=5, out_channels=5, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24, attention_head_dim=4,
        )  # fmt: skip
        scheduler = PNDMScheduler(
            num_train_timesteps=900, beta_start=0.0011, beta_end=0.013, beta_schedule="scaled_linear", prediction_type=prediction_type,
            skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1,
        )  # fmt: skip
        pipeline: Any = StableDiffusionPipeline  # pyright takes no None for the parts that may be missing
        return stirred(
            pipeline(
                unet=unet, vae=kl_vae(5, scaling_factor=0.23), scheduler=scheduler, tokenizer=clip, text_encoder=clip_text_model(clip, 24),
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            )
        )  # fmt: skip

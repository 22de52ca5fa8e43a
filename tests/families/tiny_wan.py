"""A tiny random WanPipeline for text to video: 16x16 pixels, 5 frames, a mean and deviation per latent channel; Wan 2.1, or like 2.2 with
two networks that divide the time between them."""

from __future__ import annotations

from typing import Any

from pipelines import t5_tokenizer
from tiny_parts import from_seed, stirred, umt5_encoder

CALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 19}
BOUNDARY = 0.8  # of the time that the first network serves


def tiny_wan(seed: int = 0, *, two_networks: bool = False) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    with from_seed(seed):
        t5 = t5_tokenizer()
        vae = AutoencoderKLWan(
            base_dim=3, z_dim=6, dim_mult=[1, 2, 1], num_res_blocks=1, temperal_downsample=[True, True], scale_factor_temporal=4,
            scale_factor_spatial=4, latents_mean=[-0.2, 0.3, 0.1, -0.4, 0.5, 0.2], latents_std=[1.4, 0.7, 1.1, 1.9, 0.8, 2.3],
        )  # fmt: skip
        scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.4)
        second = {"transformer_2": wan_network(), "boundary_ratio": BOUNDARY} if two_networks else {}
        return stirred(
            WanPipeline(
                transformer=wan_network(), vae=vae, scheduler=scheduler, tokenizer=t5, text_encoder=umt5_encoder(t5, 28),
                **second,
            )
        )  # fmt: skip


def wan_network() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=6, out_channels=6, text_dim=28, freq_dim=64,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip

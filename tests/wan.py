"""A tiny random WanPipeline of the kind of Wan 2.1 or 2.2, and its family at the size that it draws: to export experts into its two networks."""

from __future__ import annotations

from typing import Any

import torch
from pipelines import t5_tokenizer

from fastgen.families.wan import Wan

OPTIONS: dict[str, Any] = {"size": [16, 16], "frames": 5, "max_sequence_length": 16}


def wan(*, two_networks: bool = False) -> Wan:
    """Latents are (16, 2, 2, 2)."""
    return Wan(tiny_wan(two_networks=two_networks), **OPTIONS)


def wan_network(seed: int) -> Any:
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=64,
            ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ).eval()  # fmt: skip


def tiny_wan(*, two_networks: bool = False) -> Any:
    """16x16 pixels, 5 frames. Without `two_networks` it is of the kind of Wan 2.1, with them of Wan 2.2."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = t5_tokenizer()
        config = UMT5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu",
            is_encoder_decoder=False, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        encoder = UMT5EncoderModel(config).eval()
        vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]).eval()
    scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    second = {"transformer_2": wan_network(2), "boundary_ratio": 0.875} if two_networks else {}
    return WanPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=vae, scheduler=scheduler, transformer=wan_network(1), **second)

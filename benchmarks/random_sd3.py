"""Stable Diffusion 3.5-medium without its weights: the real sizes, random numbers, made on the device that it will run on.

Speed and memory do not depend on what the weights say, and nothing is downloaded. It has no text encoders: `Untexted` gives conditioning
of the real shape directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastgen.conditioning import Conditioning
from fastgen.families.sd3 import SD3
from fastgen.rng import SampleRng


@dataclass(frozen=True)
class Sizes:
    """transformer, vae: configurations of SD3Transformer2DModel and AutoencoderKL; text_tokens: of T5, beside the 77 of the CLIPs."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_tokens: int


def vae_config(channels: Sequence[int], *, layers: int, groups: int, side: int) -> dict[str, Any]:
    """Of an AutoencoderKL as Stable Diffusion 3 has it, of any width."""
    return {
        "block_out_channels": tuple(channels),
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "latent_channels": 16,
        "sample_size": side,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    }


# 2.24 B parameters; pictures of 1024 x 1024 pixels from latents of 128 x 128, 4096 tokens. The model's own config.json.
MEDIUM = Sizes(
    transformer={
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    vae=vae_config((128, 256, 512, 512), layers=2, groups=32, side=1024),
    text_tokens=256,
)
# The same blocks, as small as they can be, for rehearsals.
TINY = Sizes(
    transformer=MEDIUM.transformer
    | {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 24,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
    },
    vae=vae_config((8, 8, 8, 8), layers=1, groups=4, side=64),
    text_tokens=8,
)


def live_pipeline(sizes: Sizes, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A StableDiffusion3Pipeline without text encoders, all of it on `device` in `dtype`, the same for the same device."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    with torch.random.fork_rng(), torch.device(device), _default_dtype(dtype):
        torch.manual_seed(0)
        transformer, vae = SD3Transformer2DModel(**sizes.transformer), AutoencoderKL(**sizes.vae)
    networks: Any = {"transformer": transformer, "vae": vae}
    for network in networks.values():
        nn.Module.to(network, dtype).eval().requires_grad_(False)  # buffers do not follow the default; diffusers' own `to` warns of what it keeps
    return without_texts(transformer, vae)


def without_texts(transformer: Any, vae: Any) -> Any:
    """A pipeline of these networks that has no text encoders, and the published time shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    absent: Any = dict.fromkeys(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    pipeline = StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Untexted(SD3):
    """The family of a live pipeline without text encoders: a prompt is conditioned on random numbers of its own, of the shape that text has."""

    _CLIP_TOKENS = 77

    @torch.no_grad()
    def encode_texts(self, prompts: Sequence[str]) -> Conditioning:
        live: Any = self.source.live
        config = live.transformer.config
        tokens = (self._CLIP_TOKENS + (self.max_sequence_length or 0), config.joint_attention_dim)
        streams = [SampleRng(0, ("text", prompt), [0]) for prompt in prompts]
        return {
            "encoder_hidden_states": torch.cat([stream.normal("tokens", tokens) for stream in streams]),
            "pooled_projections": torch.cat([stream.normal("pooled", (config.pooled_projection_dim,)) for stream in streams]),
        }

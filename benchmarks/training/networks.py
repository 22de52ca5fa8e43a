"""Random networks of real sizes: SD3 transformers from their configurations, and a few of FLUX.1's blocks.

A network is made where it is used, on a GPU without passing through the CPU; its weights are what its constructors draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.random_sd3 import MEDIUM, vae_config, without_texts
from fastgen.families import find_family
from fastgen.families.base import Family


@dataclass(frozen=True)
class Network:
    """family: around a network without weights; make: the network, on the default device; texts: shapes of one prompt's conditioning;
    overrides: of the recipes that it is trained by."""

    name: str
    family: Callable[[], Family]
    make: Callable[[], nn.Module]
    texts: Mapping[str, tuple[int, ...]]
    overrides: tuple[str, ...] = ()


# About 450 million parameters, at 512 x 512 pixels.
SD3_SMALL = MEDIUM.transformer | {
    "sample_size": 64, "num_layers": 12, "num_attention_heads": 16, "caption_projection_dim": 1024, "pos_embed_max_size": 64,
    "dual_attention_layers": (),
}  # fmt: skip
SD3_TINY = SD3_SMALL | {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
    "caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 32, "pos_embed_max_size": 8,
}  # fmt: skip
# black-forest-labs/FLUX.1-dev, transformer/config.json, with 2 of 19 double and 4 of 38 single blocks.
FLUX_BLOCKS = {
    "in_channels": 64, "num_layers": 2, "num_single_layers": 4, "num_attention_heads": 24, "attention_head_dim": 128,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
FLUX_TINY = FLUX_BLOCKS | {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 32,
    "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def sd3(name: str, config: Mapping[str, Any], *, tokens: int = 333) -> Network:
    """tokens: 77 of CLIP and 256 of T5."""
    from diffusers import SD3Transformer2DModel

    texts = {"encoder_hidden_states": (tokens, config["joint_attention_dim"]), "pooled_projections": (config["pooled_projection_dim"],)}
    return Network(name, lambda: _sd3_family(config), lambda: SD3Transformer2DModel(**config), texts)


def _sd3_family(config: Mapping[str, Any]) -> Family:
    """Of a live pipeline without weights and text encoders, its VAE as small as one of factor 8 can be."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**config)
    vae = vae_config((4,) * 4, layers=1, groups=2, side=64) | {"latent_channels": config["in_channels"]}
    return find_family(without_texts(transformer, AutoencoderKL(**vae).requires_grad_(False)))


def flux(name: str, config: Mapping[str, Any], *, side: int = 1024, tokens: int = 512) -> Network:
    """side: pixels of a square picture. Its teacher's guidance is an input of the network: no second pass."""
    from diffusers import FluxTransformer2DModel

    texts = {"encoder_hidden_states": (tokens, config["joint_attention_dim"]), "pooled_projections": (config["pooled_projection_dim"],)}
    options = {"size": [side, side], "max_sequence_length": tokens}
    return Network(name, lambda: _flux_family(config, options), lambda: FluxTransformer2DModel(**config), texts, ("teacher.guidance=1.0",))


def _flux_family(config: Mapping[str, Any], options: Mapping[str, Any]) -> Family:
    """Of a live pipeline without weights and text encoders, its VAE as small as one of factor 8 can be."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**config)
    vae = AutoencoderKL(**vae_config((4,) * 4, layers=1, groups=2, side=64) | {"latent_channels": config["in_channels"] // 4})
    absent: Any = dict.fromkeys(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = FluxPipeline(transformer=transformer, vae=vae.requires_grad_(False), scheduler=scheduler, **absent)
    return find_family(pipeline, **options)

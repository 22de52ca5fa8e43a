"""Random networks of real sizes: SD3 transformers from their configurations, and a few of FLUX.1's blocks.

A network is made where it is used, on a GPU without passing through the CPU; its weights are what its constructors draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.random_sd3 import MEDIUM, vae_config, without_texts
from fastgen.conditioning import Conditioning
from fastgen.families import find_family
from fastgen.families.base import Family, LatentSpec
from fastgen.families.toy import Toy
from fastgen.path import Flow


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
    "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 32,
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


def flux(name: str, config: Mapping[str, Any], *, side: int = 64, tokens: int = 512) -> Network:
    """side: of the square of packed latents, 64 for 1024 x 1024 pixels. Its teacher's guidance is an input of the network: no second pass."""
    from diffusers import FluxTransformer2DModel

    def make() -> nn.Module:
        return FluxTransformer2DModel(**config)

    texts = {"encoder_hidden_states": (tokens, config["joint_attention_dim"]), "pooled_projections": (config["pooled_projection_dim"],)}
    return Network(name, lambda: FluxBlocks(make, config["in_channels"], side), make, texts, ("teacher.guidance=1.0",))


class FluxBlocks(Toy):
    """FLUX's transformer without its pipeline, until there is a family: latents (B, C, H, W) that are packed already, one a token, at an
    embedded guidance of 3.5. What a network without a pipeline has beside it, such as an even grid, is that of the closed-form teachers."""

    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    time_projection = "time_text_embed.timestep_embedder.linear_2"
    kind = "velocity"

    def __init__(self, make: Callable[[], nn.Module], channels: int, side: int) -> None:
        self.make, self.path, self.latent = make, Flow(), LatentSpec(channels, (side, side))

    def load_backbone(self, *, meta: bool = False) -> nn.Module:
        with torch.device("meta" if meta else "cpu"):
            return self.make().eval()

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        rows, columns = (index.flatten() for index in torch.meshgrid(*(torch.arange(n, device=x.device) for n in x.shape[2:]), indexing="ij"))
        positions = torch.stack([torch.zeros_like(rows), rows, columns], 1).float()
        texts = positions.new_zeros(cond["encoder_hidden_states"].shape[1], 3)
        guidance = torch.full_like(t, 3.5)
        out = backbone(tokens, timestep=t, guidance=guidance, img_ids=positions, txt_ids=texts, **cond, return_dict=False)[0]
        return out.transpose(1, 2).unflatten(2, x.shape[2:])

    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        network: Any = backbone
        return [*network.transformer_blocks, *network.single_transformer_blocks]

    def feature_widths(self, backbone: nn.Module) -> list[int]:
        network: Any = backbone
        return [network.inner_dim] * len(self.blocks(backbone))

    def encode_texts(self, prompts: Sequence[str]) -> Conditioning:
        raise AssertionError("its conditioning is random")

"""The denoiser of fifteen diffusers pipelines, tiny and random, called as the pipeline calls it (two prompts, one of them shorter).

Shapes, masks, ids and units of time are those that were recorded at the denoiser while the pipeline ran; only integer times became
floating-point ones, so that they can have a tangent. (FLUX.3 has no pipeline in diffusers yet: it is called as its class says.) Weights that
start at zero (output layers, modulations) are random here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BATCH = 2
LENGTHS = (7, 16)  # prompt lengths behind a padding mask


class Denoiser(NamedTuple):
    """network; call(x, t): its output for x (B, ...) and t (B,) in the pipeline's own unit of time; x, t: a point to call it at."""

    network: nn.Module
    call: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    t: Tensor


def build(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Denoiser:
    """From a fixed seed: the same weights and inputs in every dtype. config: what the network has otherwise, such as more layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, shape, time, call = BUILDERS[name]()
        if config:
            kind: Any = type(network)
            network = kind.from_config({**network.config, **config})  # type: ignore[dict-item]
        network.eval().requires_grad_(False)
        for parameter in network.parameters():
            if not parameter.any() or parameter.eq(1).all():  # initial zeros and ones hide the layers behind them
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        x, t = torch.randn(BATCH, *shape), time * torch.tensor([0.31, 0.68])

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)

        network.to(dtype)
        return Denoiser(network, lambda x, t: call(network, x, t, random), x.to(dtype), t.to(dtype))


Random = Callable[..., Tensor]
Built = tuple[nn.Module, tuple[int, ...], float, Callable[[Any, Tensor, Tensor, Random], Tensor]]


def padding_mask(length: int = 16) -> Tensor:
    """Tokenizer's attention mask (B, length), int64: ones, then zeros."""
    return (torch.arange(length) < torch.tensor(LENGTHS)[:, None]).long()


def dit() -> Built:
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )  # fmt: skip
    return network, (4, 8, 8), 1000, lambda net, x, t, random: net(x, timestep=t, class_labels=torch.tensor([1, 1000])).sample


def _unet_blocks() -> dict[str, Any]:
    return {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip


def sd15() -> Built:
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(**_unet_blocks(), cross_attention_dim=32, attention_head_dim=4)
    return network, (4, 8, 8), 1000, lambda net, x, t, random: net(x, t, encoder_hidden_states=random(2, 77, 32), return_dict=False)[0]


def sdxl() -> Built:
    from diffusers import UNet2DConditionModel

    per_block: dict[str, Any] = {"attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 1)}
    network = UNet2DConditionModel(
        **_unet_blocks(), **per_block, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32, cross_attention_dim=64,
    )  # fmt: skip

    def call(net: Any, x: Tensor, t: Tensor, random: Random) -> Tensor:
        added = {"text_embeds": random(2, 32), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2).to(x.dtype)}
        return net(x, t, encoder_hidden_states=random(2, 77, 64), added_cond_kwargs=added, return_dict=False)[0]

    return network, (4, 8, 8), 1000, call


def sd3() -> Built:
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=16,
    )  # fmt: skip

    def call(net: Any, x: Tensor, t: Tensor, random: Random) -> Tensor:
        text = {"encoder_hidden_states": random(2, 109, 32), "pooled_projections": random(2, 32)}
        return net(hidden_states=x, timestep=t, **text, return_dict=False)[0]

    return network, (4, 8, 8), 1000, call


def _ids(height: int, width: int, axes: int, first: int) -> Tensor:
    """Position ids (height * width, axes): row and column from axis `first` on, zeros elsewhere."""
    ids = torch.zeros(height, width, axes)
    ids[..., first] = torch.arange(height)[:, None]
    ids[..., first + 1] = torch.arange(width)
    return ids.reshape(-1, axes)


def flux() -> Built:
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip

    def call(net: Any, x: Tensor, t: Tensor, random: Random) -> Tensor:
        text = {"encoder_hidden_states": random(2, 32, 32), "pooled_projections": random(2, 32), "guidance": torch.full((2,), 3.5).to(x.dtype)}
        ids = {"txt_ids": torch.zeros(32, 3).to(x.dtype), "img_ids": _ids(4, 4, 3, 1).to(x.dtype)}
        return net(hidden_states=x, timestep=t, **text, **ids, joint_attention_kwargs={}, return_dict=False)[0]

    return network, (16, 16), 1, call


def _sana(time: float, **config: Any) -> Built:
    from diffusers import SanaTransformer2DModel

    network = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4, attention_head_dim=8, num_cross_attention_heads=4,
        cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=32, sample_size=8, **config,
    )  # fmt: skip

    def call(net: Any, x: Tensor, t: Tensor, random: Random) -> Tensor:
        text = {"encoder_hidden_states": random(2, 16, 32), "encoder_attention_mask": padding_mask()}
        guidance = {"guidance": torch.full((2,), 0.45).to(x.dtype)} if config else {}
        return net(x, **text, **guidance, timestep=t, return_dict=False)[0]

    return network, (4, 16, 16), time, call


def sana() -> Built:
    return _sana(1000)


def sprint() -> Built:
    return _sana(1, qk_norm="rms_norm_across_heads", guidance_embeds=True)


def pixart() -> Built:
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, caption_channels=32, in_channels=4,
        cross_attention_dim=32, out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip

    def call(net: Any, x: Tensor, t: Tensor, random: Random) -> Tensor:
        text = {"encoder_hidden_states": random(2, 32, 32), "encoder_attention_mask": padding_mask(32)}
        return net(x, **text, timestep=t, added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False)[0]

    return network, (4, 8, 8), 1000, call


def wan() -> Built:
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=256,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip

    def call(net: Any, x: Tensor, t: Tensor, random: Random) -> Tensor:
        return net(hidden_states=x, timestep=t, encoder_hidden_states=random(2, 16, 32), return_dict=False)[0]

    return network, (16, 2, 4, 2), 1000, call


def qwen() -> Built:
    from diffusers import QwenImageTransformer2DModel

    network = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3, joint_attention_dim=16,
        guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip

    def call(net: Any, x: Tensor, t: Tensor, random: Random) -> Tensor:
        text = {"encoder_hidden_states": random(2, 16, 16), "encoder_hidden_states_mask": padding_mask()}
        return net(hidden_states=x, timestep=t, **text, img_shapes=[[(1, 4, 4)]] * 2, attention_kwargs={}, return_dict=False)[0]

    return network, (16, 16), 1, call


def flux2klein() -> Built:
    from diffusers import Flux2Transformer2DModel

    network = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        timestep_guidance_channels=256, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip

    def call(net: Any, x: Tensor, t: Tensor, random: Random) -> Tensor:
        txt_ids = torch.cat([torch.zeros(64, 3), torch.arange(64)[:, None]], 1)
        ids = {"txt_ids": txt_ids.long().expand(2, -1, -1), "img_ids": _ids(4, 4, 4, 1).long().expand(2, -1, -1)}
        return net(hidden_states=x, timestep=t, encoder_hidden_states=random(2, 64, 16), **ids, return_dict=False)[0]

    return network, (16, 16), 1, call


def flux3() -> Built:
    from diffusers import Flux3Transformer2DModel

    network = Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        timestep_channels=256, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip

    def call(net: Any, x: Tensor, t: Tensor, random: Random) -> Tensor:
        ids = {"txt_ids": torch.cat([torch.zeros(24, 3), torch.arange(24)[:, None]], 1), "img_ids": _ids(4, 4, 4, 1)}
        return net(hidden_states=x, timestep=t, encoder_hidden_states=random(2, 24, 16), **ids, return_dict=False)[0]

    return network, (16, 16), 1, call


def ovis() -> Built:
    from diffusers import OvisImageTransformer2DModel

    network = OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip

    def call(net: Any, x: Tensor, t: Tensor, random: Random) -> Tensor:
        ids = {"txt_ids": torch.zeros(24, 3).to(x.dtype), "img_ids": _ids(4, 4, 3, 1).to(x.dtype)}
        return net(hidden_states=x, timestep=t, encoder_hidden_states=random(2, 24, 16), **ids, return_dict=False)[0]

    return network, (16, 16), 1, call


def prx() -> Built:
    from diffusers import PRXTransformer2DModel

    network = PRXTransformer2DModel(
        in_channels=3, patch_size=4, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8], bottleneck_size=12,
        resolution_embeds=True,
    )  # fmt: skip

    def call(net: Any, x: Tensor, t: Tensor, random: Random) -> Tensor:
        return net(x, timestep=t, encoder_hidden_states=random(2, 16, 24), attention_mask=padding_mask().bool(), return_dict=False)[0]

    return network, (3, 16, 16), 1, call


def zimage() -> Built:
    from diffusers import ZImageTransformer2DModel

    network = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        norm_eps=1e-5, qk_norm=True, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():  # left uninitialised by diffusers
        network.x_pad_token.normal_(std=0.02)
        network.cap_pad_token.normal_(std=0.02)

    def call(net: Any, x: Tensor, t: Tensor, random: Random) -> Tensor:
        captions = [random(length, 16) for length in (16, 40)]  # padded to 32 and 64 inside
        return torch.stack(net(list(x), t, captions, return_dict=False)[0])

    return network, (16, 1, 8, 8), 1, call


BUILDERS: dict[str, Callable[[], Built]] = {
    builder.__name__: builder for builder in (dit, sd15, sdxl, sd3, flux, sana, sprint, pixart, wan, qwen, flux2klein, flux3, ovis, prx, zimage)
}

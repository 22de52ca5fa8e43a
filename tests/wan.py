"""A tiny random WanPipeline, and just enough of a family around it to export experts into its two networks. No family of the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pipelines import t5_tokenizer
from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.families.base import Family, LatentSpec
from fastgen.path import Flow

TOKENS = 16


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


class Wan(Family):
    """source: a live pipeline or a folder. Latents are (16, 2, 2, 2): what `call_arguments` asks for."""

    pipeline_classes = ("WanPipeline",)
    second_component = "transformer_2"
    lora_targets = ("to_q", "to_v")
    path = Flow()
    kind = "velocity"
    latent = LatentSpec(16, (2, 2, 2))

    def __init__(self, source: Any, **options: Any) -> None:
        from diffusers import WanPipeline

        self.pipeline = WanPipeline.from_pretrained(source) if isinstance(source, (str, Path)) else source

    @property
    def options(self) -> dict[str, Any]:
        return {}

    @property
    def shift(self) -> float:
        return 3.0

    @property
    def own_call(self) -> dict[str, Any]:
        return {"num_inference_steps": 50, "guidance_scale": 5.0}

    def has(self, component: str) -> bool:
        return getattr(self.pipeline, component, None) is not None

    def load_backbone(self, *, meta: bool = False) -> nn.Module:
        return self.pipeline.transformer

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return backbone(hidden_states=x, timestep=1000 * t, **cond, return_dict=False)[0]

    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        return list(backbone.blocks)  # type: ignore[arg-type]

    def feature_widths(self, backbone: nn.Module) -> list[int]:
        return [24] * len(self.blocks(backbone))

    @torch.no_grad()
    def encode_texts(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=TOKENS)
        return {"encoder_hidden_states": embeds}

    def free_encoders(self) -> None:
        pass

    def encode_latents(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def export_scheduler(self, grid: Sequence[float] | None = None) -> Any:
        from diffusers import FlowMapEulerDiscreteScheduler

        return FlowMapEulerDiscreteScheduler(shift=self.shift)

    def grid(self, steps: int, grid: Sequence[float] | None = None) -> Tensor:
        scheduler = self.export_scheduler()
        scheduler.set_timesteps(steps)
        return scheduler.sigmas[:-1].double()

    def call_arguments(self, steps: int, guidance: float, grid: Sequence[float] | None = None) -> dict[str, Any]:
        size = {"height": 16, "width": 16, "num_frames": 5}
        return {"num_inference_steps": steps, "guidance_scale": guidance, "max_sequence_length": TOKENS, **size}

    def load_pipeline(self, backbone: nn.Module | None, scheduler: Any) -> Any:
        from diffusers import WanPipeline

        components = {**self.pipeline.components, "scheduler": scheduler}
        if backbone is not None:
            components["transformer"] = backbone
        return WanPipeline(**components, boundary_ratio=self.pipeline.config["boundary_ratio"])

"""Wan 2.1 and the networks of 2.2 (Wan team 2025, arXiv:2503.20314): flow matching on video latents, time as 1000 sigma, UMT5's text with zeros
behind it and no mask. Students are trained from prompts alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.families.pipelined import Pipelined


class Wan(Pipelined):
    """WanPipeline, text to video. Latents are (16, 1 + (frames - 1)/4, H/8, W/8)."""

    pipeline_classes = ("WanPipeline",)
    second_component = "transformer_2"
    network, vae_network = "WanTransformer3DModel", "AutoencoderKLWan"
    normalised_by = ("latents_mean", "latents_std")
    own: ClassVar = {"num_inference_steps": 50, "guidance_scale": 5.0}
    own_size, own_frames, side_unit = (480, 832), 81, 16
    text_length = 512
    text_widths: ClassVar = {"text_dim": ("text_encoder.d_model",)}
    block_lists = ("blocks",)
    grid_argument = None
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    time_projection = "condition_embedder.time_embedder.linear_2"

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return backbone(hidden_states=x, timestep=1000 * t, **cond, return_dict=False)[0]

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length)
        return {"encoder_hidden_states": embeds}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (self.max_sequence_length or 0, self.config.option("text_dim"))}

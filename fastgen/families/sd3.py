"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): flow matching, time passed as 1000 sigma, two CLIP encoders and T5."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.families.pipelined import Pipelined


class SD3(Pipelined):
    """StableDiffusion3Pipeline: SD3-medium, SD3.5 medium and large, and the bundled teachers of digits and scenes."""

    pipeline_classes = ("StableDiffusion3Pipeline",)
    network = "SD3Transformer2DModel"
    own: ClassVar = {"num_inference_steps": 28, "guidance_scale": 7.0}
    normalised_by = ("scaling_factor", "shift_factor")
    text_length, longest_text = 256, 512
    text_widths: ClassVar = {
        "joint_attention_dim": ("text_encoder_3.d_model",),
        "pooled_projection_dim": ("text_encoder.projection_dim", "text_encoder_2.projection_dim"),
    }
    optional = ("text_encoder_3", "tokenizer_3")
    mu: ClassVar = {**Pipelined.mu, "max_shift": 1.16}
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    time_projection = "time_text_embed.timestep_embedder.linear_2"

    def largest_side(self) -> int:
        return self.config.option("pos_embed_max_size") * self.pixels_per_latent * self.patch

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return backbone(hidden_states=x, timestep=1000 * t, **cond, return_dict=False)[0]

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        if pipeline.transformer is None and not self.has("text_encoder_3"):  # it fills in zeros, as wide as its network's configuration says
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=self.config.option("joint_attention_dim")))
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        tokens = self.readers()[0].length + (self.max_sequence_length or 0)
        return {
            "encoder_hidden_states": (tokens, self.config.option("joint_attention_dim")),
            "pooled_projections": (self.config.option("pooled_projection_dim"),),
        }

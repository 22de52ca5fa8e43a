"""AuraFlow (fal 2024): flow matching, time as sigma, UMT5's text with zeros behind it and no mask, learned positions on a square."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.families import one_stream
from fastgen.families.pipelined import Pipelined


class AuraFlow(Pipelined):
    """AuraFlowPipeline: AuraFlow .1 to .3."""

    pipeline_classes = ("AuraFlowPipeline",)
    network = "AuraFlowTransformer2DModel"
    own: ClassVar = {"num_inference_steps": 50, "guidance_scale": 3.5}
    own_size = (1024, 1024)
    text_length = 256
    text_widths: ClassVar = {"joint_attention_dim": ("text_encoder.d_model",)}
    block_lists = ("joint_transformer_blocks", "single_transformer_blocks")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    time_projection = "time_step_proj.linear_2"
    _picture: int  # tokens of a picture in the call that is running, for `block_feature`

    def largest_side(self) -> int:
        return math.isqrt(self.config.option("pos_embed_max_size")) * self.pixels_per_latent * self.patch

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self._picture = self.tokens_of(x)
        return backbone(hidden_states=x, timestep=t, **cond, return_dict=False)[0]

    def block_feature(self, output: Any) -> Tensor:
        return one_stream.last(output, self._picture)

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length)
        return {"encoder_hidden_states": embeds}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (self.max_sequence_length or 0, self.config.option("joint_attention_dim"))}

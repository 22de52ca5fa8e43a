"""FLUX.1 (Black Forest Labs 2024): flow matching on latents packed 2x2 into tokens, time as sigma, CLIP's pooled vector and T5's tokens.

The dev network was distilled from guided predictions and takes the guidance as an input, `teacher.embedded_guidance`; schnell's has no
such input. Classifier-free guidance (`teacher.guidance`) is the pipeline's `true_cfg_scale`, for which it must be given a negative prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.families import packing
from fastgen.families.packing import Packed


class Flux(Packed):
    """FluxPipeline: FLUX.1-dev and FLUX.1-schnell."""

    pipeline_classes = ("FluxPipeline",)
    network = "FluxTransformer2DModel"
    own: ClassVar = {"num_inference_steps": 28, "guidance_scale": 1.0}
    own_size = (1024, 1024)
    own_embedded_guidance = 3.5
    normalised_by = ("scaling_factor", "shift_factor")
    text_length, longest_text = 512, 512
    text_widths: ClassVar = {"joint_attention_dim": ("text_encoder_2.d_model",), "pooled_projection_dim": ("text_encoder.hidden_size",)}
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    time_projection = "time_text_embed.timestep_embedder.linear_2"

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        image_ids = torch.cartesian_prod(*(torch.arange(count, device=x.device) for count in (1, x.shape[-2] // 2, x.shape[-1] // 2))).to(x)
        text_ids = image_ids.new_zeros(cond["encoder_hidden_states"].shape[1], 3)
        strength = self.embedded_guidance
        guidance = None if strength is None else torch.full((len(x),), strength, device=x.device)
        ids = {"img_ids": image_ids, "txt_ids": text_ids, "guidance": guidance}
        told = () if guidance is None else (guidance,)
        with packing.exact_time(backbone.get_submodule("time_text_embed"), t, 1000, *told):
            out: Any = backbone(hidden_states=packing.pack(x), timestep=t, **ids, **cond, return_dict=False)
        return packing.unpack(out[0], x.shape)

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, pooled, _ = pipeline.encode_prompt(prompts, None, max_sequence_length=self.max_sequence_length)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": (self.max_sequence_length or 0, self.config.option("joint_attention_dim")),
            "pooled_projections": (self.config.option("pooled_projection_dim"),),
        }

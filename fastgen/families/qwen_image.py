"""Qwen-Image (Qwen team 2025, arXiv:2508.02324): flow matching on latents packed 2x2 into tokens, time as sigma, texts of any length.

Its tokenizer's reading is put into a template, of which the pipeline drops the first tokens. Its VAE is one for videos.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen import conditioning
from fastgen.conditioning import Conditioning
from fastgen.errors import UserError
from fastgen.families import packing
from fastgen.families.packing import Packed


class QwenImage(Packed):
    """QwenImagePipeline. Its stock grid is stretched to end at `shift_terminal`, ours and a student's are not."""

    pipeline_classes = ("QwenImagePipeline",)
    network = "QwenImageTransformer2DModel"
    own: ClassVar = {"num_inference_steps": 50, "guidance_scale": 4.0}
    own_size = (1024, 1024)
    vae_network = "AutoencoderKLQwenImage"
    normalised_by = ("latents_mean", "latents_std")
    text_length, longest_text = 512, 1024
    text_widths: ClassVar = {"joint_attention_dim": ("text_encoder.hidden_size",)}
    grid_ends = ("shift_terminal",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    guidance_kind = "velocity"
    time_projection = "time_text_embed.timestep_embedder.linear_2"

    def check_network(self) -> None:
        if self.config.option("guidance_embeds"):
            what = "its transformer takes a guidance scale (guidance_embeds), which fastgen does not give it"
            raise UserError(f"recipe key teacher.pretrained: {what}")

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        lengths = conditioning.lengths(cond)
        text = cond["text"][:, : max(lengths)]
        mask = None if min(lengths) == max(lengths) else torch.arange(max(lengths), device=x.device) < cond["length"][:, None]
        shapes = [[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x)
        texts = {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}
        with packing.exact_time(backbone.get_submodule("time_text_embed"), t, 1):
            out: Any = backbone(hidden_states=packing.pack(x), timestep=t, img_shapes=shapes, **texts, return_dict=False)
        return packing.unpack(out[0], x.shape)

    def guidance_rule(self, cond: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
        """Each token's guided velocity is as long as the one without guidance: of no other kind would it be the same."""
        guided = packing.pack(super().guidance_rule(cond, negative, scale))
        length = torch.linalg.vector_norm(packing.pack(cond), dim=-1, keepdim=True)
        return packing.unpack(guided * (length / torch.linalg.vector_norm(guided, dim=-1, keepdim=True)), cond.shape)

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        text, mask = pipeline.encode_prompt(prompts, max_sequence_length=self.max_sequence_length)
        rows = text if mask is None else [row[:length] for row, length in zip(text, mask.sum(1).tolist(), strict=True)]
        return conditioning.ragged(rows, self.max_sequence_length or 0)

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"text": (self.max_sequence_length or 0, self.config.option("joint_attention_dim")), "length": ()}

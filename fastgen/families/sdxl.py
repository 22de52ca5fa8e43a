"""SDXL (Podell et al. 2023): a UNet on a discrete schedule, two CLIP encoders, the picture's size as a condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.families.unet import UNet


class SDXL(UNet):
    """StableDiffusionXLPipeline: SDXL base and what was tuned from it. Where its call is given no negative prompt, that is zeros, unless
    its `force_zeros_for_empty_prompt` says no."""

    pipeline_classes = ("StableDiffusionXLPipeline",)
    own: ClassVar = {"num_inference_steps": 50, "guidance_scale": 5.0}
    normalised_by = ("scaling_factor", "latents_mean", "latents_std")
    text_widths: ClassVar = {"cross_attention_dim": ("text_encoder.hidden_size", "text_encoder_2.hidden_size")}

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        height, width = (side * self.pixels_per_latent for side in x.shape[-2:])
        # As stock: a picture that was never cropped or resized.
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=x.dtype, device=x.device).expand(len(x), -1)
        added = {"text_embeds": cond["text_embeds"], "time_ids": sizes}
        return backbone(x, self.path.step(t), cond["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False)[0]

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def encode_negative(self, text: str | None) -> Conditioning:
        cond = self.encode_prompts([text or ""])
        zeros = text is None and self.source.setting("force_zeros_for_empty_prompt")
        return {key: torch.zeros_like(value) for key, value in cond.items()} if zeros else cond

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        pooled = self.config.option("projection_class_embeddings_input_dim") - 6 * self.config.option("addition_time_embed_dim")
        return {
            "encoder_hidden_states": (self.readers()[0].length, self.config.option("cross_attention_dim")),
            "text_embeds": (pooled,),
        }

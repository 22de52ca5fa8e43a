"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022): a UNet on a discrete schedule, one CLIP encoder; eps, or v in most of 2.x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.families.unet import UNet
from fastgen.manifest import Sampler


class StableDiffusion(UNet):
    """StableDiffusionPipeline: SD 1.x and 2.x, and what was tuned from them."""

    pipeline_classes = ("StableDiffusionPipeline",)
    own: ClassVar = {"num_inference_steps": 50, "guidance_scale": 7.5}
    after_drawing = ("safety_checker", "feature_extractor")
    text_widths: ClassVar = {"cross_attention_dim": ("text_encoder.hidden_size",)}

    def sampling_scheduler(self, steps: int, grid: Sequence[float] | None = None, sampler: Sampler = "euler") -> Any:
        scheduler = super().sampling_scheduler(steps, grid, sampler)
        scheduler.register_to_config(steps_offset=1)  # of which the pipeline warns otherwise; neither of them looks at it
        return scheduler

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return backbone(x, self.path.step(t), **cond, return_dict=False)[0]

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(prompts, pipeline._execution_device, 1, False)
        return {"encoder_hidden_states": embeds}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (self.readers()[0].length, self.config.option("cross_attention_dim"))}

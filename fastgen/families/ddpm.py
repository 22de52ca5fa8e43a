"""DDPM (Ho et al. 2020) and what was trained like it: a UNet on RGB in [-1, 1] and a discrete schedule, without labels.

Its scheduler's `clip_sample`, which is on in most of them, is of its sampler: steps here, and students, leave the network's x0 as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.errors import UserError
from fastgen.families.codec import Pixels
from fastgen.families.unet import UNet
from fastgen.legibility import Legibility


class DDPM(UNet):
    """DDPMPipeline. Nothing is read of a prompt; there are as many pictures as prompts."""

    pipeline_classes = ("DDPMPipeline",)
    network = "UNet2DModel"
    codec_class, normalised_by = Pixels, ()
    own: ClassVar = {"num_inference_steps": 1000, "guidance_scale": 1.0}
    unfollowed = ("clip_sample",)
    side_unit = 1
    sized = False
    grid_argument = None
    loads_lora = takes_negative = takes_guidance = False

    def check_network(self) -> None:
        if self.config.option("class_embed_type") is not None or self.config.option("num_class_embeds") is not None:
            raise UserError("recipe key teacher.pretrained: its unet takes classes, which DDPMPipeline does not give it")
        if self.config.option("time_embedding_type") == "learned":
            raise UserError("recipe key teacher.pretrained: its unet has a table of times (time_embedding_type), with nothing between two of them")

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return backbone(x, self.path.step(t), return_dict=False)[0][:, : x.shape[1]]  # without a learned variance

    def legibility(self, prompts: Sequence[str]) -> Legibility:
        return Legibility(len(prompts))

    def encode_texts(self, prompts: Sequence[str]) -> Conditioning:
        return {"nothing": torch.zeros(len(prompts), 1)}

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        raise AssertionError("there is nothing to encode")

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"nothing": (1,)}

    def call_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        return {"batch_size": len(prompts)}

    def call_arguments(self, steps: int, guidance: float, grid: Sequence[float] | None = None) -> dict[str, Any]:
        return {"num_inference_steps": steps}

"""Z-Image (Tongyi 2025, arXiv:2511.22699): flow matching whose network is told the time of data, 1 - sigma, and predicts x0 - eps.

Samples and texts, of any length, are lists. The pipeline's guidance_scale is what guidance adds: c + w (c - n) for `teacher.guidance` 1 + w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen import conditioning
from fastgen.conditioning import Conditioning
from fastgen.errors import UserError
from fastgen.families.pipelined import Pipelined, before_in_chat


class ZImage(Pipelined):
    """ZImagePipeline: Z-Image and Z-Image-Turbo."""

    pipeline_classes = ("ZImagePipeline",)
    network = "ZImageTransformer2DModel"
    own: ClassVar = {"num_inference_steps": 50, "guidance_scale": 6.0}
    own_size = (1024, 1024)
    normalised_by = ("scaling_factor", "shift_factor")
    text_length = 512
    text_widths: ClassVar = {"cap_feat_dim": ("text_encoder.hidden_size",)}
    gives_sigmas = True
    block_lists = ("noise_refiner", "layers")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    time_projection = "t_embedder.mlp.2"
    _picture: int  # tokens of a picture in the call that is running, for `block_feature`

    @property
    def patch(self) -> int:
        return 2

    def largest_side(self) -> int:
        return min(self.config.option("axes_lens")[1:]) * self.patch * self.pixels_per_latent

    def _text_length(self, given: Mapping[str, Any]) -> int | None:
        length = super()._text_length(given) or 0
        most = (self.config.option("axes_lens")[0] - 2) // 32 * 32  # texts are padded to 32 tokens; places 1 to there, and the picture's, are theirs
        if length > most:
            raise UserError(f"recipe key teacher.max_sequence_length: {length}, but the network has places for at most {most}")
        return length

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self._picture = self.tokens_of(x)
        texts = [text[:length] for text, length in zip(cond["text"], conditioning.lengths(cond), strict=True)]
        out: Any = backbone(list(x[:, :, None]), 1 - t, texts, return_dict=False)
        return -torch.stack(out[0])[:, :, 0]

    def block_feature(self, output: Tensor) -> Tensor:
        return output[:, : self._picture]  # after the picture's tokens come padding and text

    def feature_widths(self, backbone: nn.Module) -> list[int]:
        return [self.config.option("dim")] * len(self.blocks(backbone))

    def before(self, pipeline: Any, tokenizer: Any) -> str:
        return before_in_chat(tokenizer, thinking=True)

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        rows, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length)
        return conditioning.ragged(rows, self.max_sequence_length or 0)

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"text": (self.max_sequence_length or 0, self.config.option("cap_feat_dim")), "length": ()}

    def call_arguments(self, steps: int, guidance: float, grid: Sequence[float] | None = None) -> dict[str, Any]:
        return super().call_arguments(steps, guidance, grid) | {"guidance_scale": guidance - 1}

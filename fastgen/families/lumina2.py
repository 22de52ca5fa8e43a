"""Lumina-Image 2.0 (Qin et al. 2025, arXiv:2503.21758): flow matching whose network is told the time of data, 1 - sigma, and predicts x0 - eps.

Text and picture are one stream, in which a picture follows its own text's last token. Prompts are read behind the pipeline's system prompt,
negative ones without it. Guided predictions get back the length that they had without guidance, row by row of the latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.errors import UserError
from fastgen.families import one_stream
from fastgen.families.pipelined import Pipelined


class Lumina2(Pipelined):
    """Lumina2Pipeline. Its dynamic shift, which the published scheduler does not use, counts channels where others count tokens."""

    pipeline_classes = ("Lumina2Pipeline",)
    network = "Lumina2Transformer2DModel"
    own: ClassVar = {"num_inference_steps": 30, "guidance_scale": 4.0}
    side_unit = 16
    normalised_by = ("scaling_factor", "shift_factor")
    text_length = 256
    text_widths: ClassVar = {"cap_feat_dim": ("text_encoder.hidden_size",)}
    gives_sigmas = True
    block_lists = ("noise_refiner", "layers")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    guidance_kind = "velocity"
    time_projection = "time_caption_embed.timestep_embedder.linear_2"
    _lengths: Tensor  # (B,) of the texts of the call that is running, for `block_feature`
    _picture: int  # tokens of a picture in it

    def check_network(self) -> None:
        if self.codec.stride != 8:
            raise UserError(f"recipe key teacher.pretrained: its vae has a factor of {self.codec.stride}, but Lumina2Pipeline takes it for 8")

    @property
    def tokens(self) -> int:
        return self.config.option("in_channels")

    def largest_side(self) -> int:
        return min(self.config.option("axes_lens")[1:]) * self.patch * self.pixels_per_latent

    def _text_length(self, given: Mapping[str, Any]) -> int | None:
        length, places = super()._text_length(given) or 0, self.config.option("axes_lens")[0]
        if length >= places:  # the last of which is the picture's
            raise UserError(f"recipe key teacher.max_sequence_length: {length}, but the network has places for at most {places - 1}")
        return length

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self._picture = self.tokens_of(x)
        self._lengths = cond["encoder_attention_mask"].sum(1)
        with one_stream.counted(backbone.get_submodule("rope_embedder")):
            return -backbone(hidden_states=x, timestep=1 - t, **cond, return_dict=False)[0]

    def block_feature(self, output: Tensor) -> Tensor:
        return one_stream.behind_texts(output, self._lengths, self._picture)

    def feature_widths(self, backbone: nn.Module) -> list[int]:
        return [self.config.option("hidden_size")] * len(self.blocks(backbone))

    def guidance_rule(self, cond: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
        own = super().guidance_rule(cond, negative, scale)
        return own * (cond.norm(dim=-1, keepdim=True) / own.norm(dim=-1, keepdim=True))

    def before(self, pipeline: Any, tokenizer: Any) -> str:
        return f"{pipeline.system_prompt} <Prompt Start>"  # the space behind is of the first word

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        encoded = pipeline.encode_prompt(prompts, False, max_sequence_length=self.max_sequence_length)
        return dict(zip(("encoder_hidden_states", "encoder_attention_mask"), encoded, strict=False))

    def encode_negative(self, text: str | None) -> Conditioning:
        given = {"negative_prompt": [text or ""], "max_sequence_length": self.max_sequence_length}
        names = ("encoder_hidden_states", "encoder_attention_mask")
        return self.by_encoders(lambda pipeline: dict(zip(names, pipeline.encode_prompt([""], **given)[2:], strict=True)))

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        shape = (self.max_sequence_length or 0, self.config.option("cap_feat_dim"))
        return {"encoder_hidden_states": shape, "encoder_attention_mask": shape[:1]}

"""Chroma (lodestones 2025): FLUX.1's latents and blocks, each modulated by its place through one small network; T5's tokens with a mask.

The pipeline gives its mask as numbers, so attention adds it to its logits: what is kept stands 1 above what is not, and nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.families import one_stream, packing
from fastgen.families.pipelined import Pipelined


class Chroma(Pipelined):
    """ChromaPipeline: Chroma1 HD and Base."""

    pipeline_classes = ("ChromaPipeline",)
    network = "ChromaTransformer2DModel"
    own: ClassVar = {"num_inference_steps": 35, "guidance_scale": 5.0}
    own_size = (1024, 1024)
    pack = 2
    gives_sigmas = True
    normalised_by = ("scaling_factor", "shift_factor")
    text_length, longest_text = 512, 512
    text_widths: ClassVar = {"joint_attention_dim": ("text_encoder.d_model",)}
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    _picture: int  # tokens of a picture in the call that is running, for `block_feature`

    @property
    def patch(self) -> int:
        return 1  # its configuration's patch_size is what `pack` does already

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self._picture = self.tokens_of(x)
        image_ids = torch.cartesian_prod(*(torch.arange(count, device=x.device) for count in (1, x.shape[-2] // 2, x.shape[-1] // 2))).to(x)
        text, kept = cond["encoder_hidden_states"], cond["attention_mask"].to(x)
        ids = {"img_ids": image_ids, "txt_ids": image_ids.new_zeros(text.shape[1], 3)}
        mask = torch.cat([kept, kept.new_ones(len(x), len(image_ids))], 1)
        with packing.exact_time(backbone.get_submodule("time_text_embed.time_proj"), t, 1000), _masked_again(backbone, mask):
            given = {"timestep": t, "encoder_hidden_states": text, "attention_mask": mask, **ids}
            out: Any = backbone(hidden_states=packing.pack(x), **given, return_dict=False)
        return packing.unpack(out[0], x.shape)

    def block_feature(self, output: Any) -> Tensor:
        return one_stream.last(output, self._picture)

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, _, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length)
        return {"encoder_hidden_states": embeds, "attention_mask": mask.long()}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        tokens = self.max_sequence_length or 0
        return {"encoder_hidden_states": (tokens, self.config.option("joint_attention_dim")), "attention_mask": (tokens,)}


@contextmanager
def _masked_again(backbone: Any, mask: Tensor) -> Iterator[None]:
    """Within it, single blocks that will compute again (`train.checkpointing`) are given the mask, which diffusers 0.42 leaves out there."""
    again = backbone._gradient_checkpointing_func

    def masked(block: nn.Module, *args: Any) -> Any:
        return again(block, *args, *([mask] if len(args) == 3 else []))

    backbone._gradient_checkpointing_func = masked
    try:
        yield
    finally:
        backbone._gradient_checkpointing_func = again

"""FLUX.2 klein (Black Forest Labs 2025): flow matching on 2x2 latents of a normalised VAE, time as sigma, three layers of Qwen3's text.

The call makes the shift of the number of tokens and of its own number of steps. Its scheduler says only whether to take it, and so does a
student's, which is shifted for the steps that it is called with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.families import one_stream, packing
from fastgen.families.codec import PatchedCodec
from fastgen.families.components import read_component
from fastgen.families.pipelined import Pipelined, before_in_chat


class Flux2Klein(Pipelined):
    """Flux2KleinPipeline: klein, and klein base. The distilled one's call takes no notice of guidance (`is_distilled`)."""

    pipeline_classes = ("Flux2KleinPipeline",)
    network, vae_network = "Flux2Transformer2DModel", "AutoencoderKLFlux2"
    own: ClassVar = {"num_inference_steps": 50, "guidance_scale": 4.0}
    own_size = (1024, 1024)
    codec_class = PatchedCodec
    normalised_by = ()
    takes_negative = False
    text_length = longest_text = 512
    text_widths: ClassVar = {"joint_attention_dim": ("text_encoder.hidden_size",) * 3}
    gives_sigmas = True
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj")
    time_projection = "time_guidance_embed.timestep_embedder.linear_2"
    _picture: int  # tokens of a picture in the call that is running, for `block_feature`

    @property
    def own_call(self) -> dict[str, Any]:
        return super().own_call | ({"guidance_scale": 1.0} if self.source.setting("is_distilled") else {})

    def mu_at(self, steps: int) -> float:
        """Linear in the steps between lines in the tokens for 10 and for 200 of them; above 4300 tokens that of 200 alone."""
        of_10, of_200 = 8.73809524e-05 * self.tokens + 1.89833333, 0.00016927 * self.tokens + 0.45666666
        return of_200 if self.tokens > 4300 else of_200 + (steps - 200) * (of_200 - of_10) / 190

    def export_scheduler(self, grid: Sequence[float] | None = None) -> Any:
        scheduler = super().export_scheduler(grid)
        own = read_component(self.source.place, "scheduler") if grid is None and self._stated_shift is None else None
        if own is not None and own.option("use_dynamic_shifting"):
            scheduler.register_to_config(use_dynamic_shifting=True, time_shift_type=own.option("time_shift_type"))
        return scheduler

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        def places(*counts: int) -> Tensor:
            return torch.cartesian_prod(*(torch.arange(count, device=x.device) for count in counts)).expand(len(x), -1, -1)

        self._picture = self.tokens_of(x)
        ids: dict[str, Any] = {"img_ids": places(1, *x.shape[-2:], 1), "txt_ids": places(1, 1, 1, cond["encoder_hidden_states"].shape[1])}
        told = () if self.embedded_guidance is None else (torch.full((len(x),), self.embedded_guidance, device=x.device),)
        ids["guidance"] = told[0] if told else None
        with packing.exact_time(backbone.get_submodule("time_guidance_embed"), t, 1000, *told):
            out: Any = backbone(hidden_states=x.flatten(2).transpose(1, 2), timestep=t, **ids, **cond, return_dict=False)
        return out[0].transpose(1, 2).reshape(x.shape)

    def block_feature(self, output: Any) -> Tensor:
        return one_stream.last(output, self._picture)

    def before(self, pipeline: Any, tokenizer: Any) -> str:
        return before_in_chat(tokenizer, thinking=False)

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        return {"encoder_hidden_states": pipeline.encode_prompt(prompts, max_sequence_length=self.max_sequence_length)[0]}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (self.max_sequence_length or 0, self.config.option("joint_attention_dim"))}

"""Sana (Xie et al. 2024): flow matching with linear attention, Gemma's text behind a long instruction, deep-compression latents."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen import timesteps
from fastgen.conditioning import Conditioning
from fastgen.families.pipelined import Pipelined


class Sana(Pipelined):
    """SanaPipeline: Sana and Sana 1.5. Prompts are read behind the call's own `complex_human_instruction`, negative ones without it."""

    pipeline_classes = ("SanaPipeline",)
    network, vae_network = "SanaTransformer2DModel", "AutoencoderDC"
    own: ClassVar = {"num_inference_steps": 20, "guidance_scale": 4.5}
    side_unit = 32
    text_length = 300
    text_widths: ClassVar = {"caption_channels": ("text_encoder.hidden_size",)}
    fixed_call: ClassVar = {"use_resolution_binning": False}  # which draws another size and resizes it
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    time_projection = "time_embed.emb.timestep_embedder.linear_2"
    samplers = ("euler", "stochastic")
    grid_ends = ("shift_terminal",)  # of the stochastic sampler's own scheduler

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        timestep = 1000 * t * self.config.option("timestep_scale")
        return backbone(hidden_states=x, timestep=timestep, **cond, return_dict=False)[0][:, : x.shape[1]]  # without a learned variance

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        return self._read(pipeline, prompts, complex_human_instruction=instruction)

    def encode_negative(self, text: str | None) -> Conditioning:
        return self.by_encoders(lambda pipeline: self._read(pipeline, [text or ""]))

    def _read(self, pipeline: Any, prompts: list[str], **instruction: Any) -> Conditioning:
        embeds, mask, _, _ = pipeline.encode_prompt(prompts, False, max_sequence_length=self.max_sequence_length, **instruction)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        tokens = self.max_sequence_length or 0
        return {"encoder_hidden_states": (tokens, self.config.option("caption_channels")), "encoder_attention_mask": (tokens,)}

    def stochastic_scheduler(self, steps: int, grid: Sequence[float] | None = None) -> Any:
        from diffusers import FlowMatchLCMScheduler

        # On times of its own it is right without a shift alone: it shifts the end of its grid twice, as FlowMatchEuler does.
        return FlowMatchLCMScheduler(shift=1.0, shift_terminal=1 / steps if grid is None and steps > 1 else None)

    def stochastic_grid(self, steps: int, grid: Sequence[float] | None = None) -> Tensor:
        return timesteps.grid(steps) if grid is None else torch.tensor(list(grid), dtype=torch.float64)

"""Sana-Sprint (Chen et al. 2025, arXiv:2503.09641): Sana's network on TrigFlow, which renoises between its few steps and is told its guidance.

Latents here have unit variance: the pipeline's are these times its scheduler's sigma_data, which it divides out again before each call. The
network itself sees the flow that the sample is on, at time s = sin t/(cos t + sin t), in unit variance times sqrt(s^2 + (1 - s)^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.errors import UserError
from fastgen.families.components import read_component
from fastgen.families.sana import Sana
from fastgen.path import Path, TrigFlow, expand_time


class SanaSprint(Sana):
    """SanaSprintPipeline: Sana-Sprint. Its guidance is the network's own input. Its first time is pi/2, which stock's default 1.57080 exceeds."""

    pipeline_classes = ("SanaSprintPipeline",)
    own: ClassVar = {"num_inference_steps": 2, "guidance_scale": 1.0}
    own_size = (1024, 1024)
    own_embedded_guidance = 4.5
    takes_negative = takes_guidance = False
    samplers = ("stochastic",)
    grid_argument = "intermediate_timesteps"  # its `timesteps` fail in diffusers 0.42
    time_projection = "time_embed.timestep_embedder.linear_2"

    def check_network(self) -> None:
        found = read_component(self.source.place, "scheduler").classes
        if found != ("SCMScheduler",):
            raise UserError(f"recipe key teacher.pretrained: its scheduler is {' and '.join(found)}, but SanaSprintPipeline takes an SCMScheduler")
        if not self.config.option("guidance_embeds"):
            raise UserError("recipe key teacher.pretrained: its transformer takes no guidance scale (guidance_embeds), which the pipeline gives it")

    def own_path(self) -> Path:
        return TrigFlow()

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        config: Any = backbone.config
        t = t.float()  # as stock has it
        s = t.sin() / (t.cos() + t.sin())
        wide = expand_time(s, x)
        length = (wide**2 + (1 - wide) ** 2).sqrt()
        guidance = torch.full((len(x),), self.embedded_guidance or 0.0, device=x.device) * config.guidance_embeds_scale
        x = x * length
        out = backbone(hidden_states=x.to(cond["encoder_hidden_states"]), timestep=s, guidance=guidance, **cond, return_dict=False)[0]
        return ((1 - 2 * wide) * x + (1 - 2 * wide + 2 * wide**2) * out[:, : x.shape[1]]) / length

    def _read(self, pipeline: Any, prompts: list[str], **instruction: Any) -> Conditioning:
        embeds, mask = pipeline.encode_prompt(prompts, max_sequence_length=self.max_sequence_length, **instruction)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def export_scheduler(self, grid: Sequence[float] | None = None) -> Any:
        from diffusers import SCMScheduler

        return SCMScheduler(sigma_data=read_component(self.source.place, "scheduler").option("sigma_data"))

    def stochastic_scheduler(self, steps: int, grid: Sequence[float] | None = None) -> Any:
        return self.export_scheduler(grid)

    def grid(self, steps: int, grid: Sequence[float] | None = None) -> Tensor:
        """Even, but for two steps, of which the second is at 1.3. grid: shares of pi/2, of which the call takes the first, and a second of two."""
        shares = [1.0, 1.3 / self.path.t_max] if grid is None else list(grid)
        even = torch.linspace(shares[0], 0, steps + 1, dtype=torch.float64)[:-1]
        return self.path.t_max * (torch.tensor(shares, dtype=torch.float64) if steps == 2 else even)

    def stochastic_grid(self, steps: int, grid: Sequence[float] | None = None) -> Tensor:
        return self.grid(steps, grid)

    def path_times(self, timesteps: Tensor, sigmas: Tensor) -> Tensor:
        return timesteps[:-1].double()

    def call_arguments(self, steps: int, guidance: float, grid: Sequence[float] | None = None) -> dict[str, Any]:
        first, *others = self.grid(steps, grid).tolist()
        times = {"max_timesteps": first, "intermediate_timesteps": others[0] if steps == 2 else None}
        return super().call_arguments(steps, guidance) | {"guidance_scale": self.embedded_guidance, **times}

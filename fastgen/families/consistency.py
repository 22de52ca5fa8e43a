"""EDM networks (Karras et al. 2022) in diffusers' ConsistencyModelPipeline: a UNet on RGB, preconditioned by an EDMEulerScheduler; classes, or none.

The scheduler's grid is Karras's from sigma_max to its sigma_min, and then data. A student's few times are the first of one step more down to
.002, so that its last step has work to do, and its scheduler's sigma_min is the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.errors import UserError
from fastgen.families.components import read_component
from fastgen.families.ddpm import DDPM
from fastgen.legibility import Legibility
from fastgen.manifest import Sampler
from fastgen.path import EDM, Path, expand_time


class ConsistencyModel(DDPM):
    """ConsistencyModelPipeline with an EDMEulerScheduler. A prompt is the number of a class; the empty one, of no negative prompt, is 0."""

    pipeline_classes = ("ConsistencyModelPipeline",)
    own: ClassVar = {"num_inference_steps": 18, "guidance_scale": 1.0}  # EDM's own for small pictures; the call's 1 is of another network
    samplers = ("euler",)

    def check_network(self) -> None:
        self.edm = read_component(self.source.place, "scheduler")
        if self.edm.classes != ("EDMEulerScheduler",) or self.edm.option("sigma_schedule") != "karras" or self.edm.option("sigma_max") > 80:
            what = f"{' and '.join(self.edm.classes)} with {self.edm.given.get('sigma_schedule')} times to {self.edm.given.get('sigma_max')}"
            raise UserError(f"recipe key teacher.pretrained: its scheduler is {what}; fastgen follows EDMEulerScheduler, karras, to 80 at most")
        self.classes = self.config.option("num_class_embeds")

    def own_path(self) -> Path:
        self.kind = "x0"
        return EDM()

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        data, t = self.edm.option("sigma_data"), t.float()
        sigma = expand_time(t, x)
        length = (sigma**2 + data**2) ** 0.5
        labels = {name: value for name, value in cond.items() if name == "class_labels"}
        out = backbone((x * (1 / length)).to(x), 0.25 * torch.log(t.clamp(min=1e-5)), **labels, return_dict=False)[0]
        sign = -1 if self.edm.option("prediction_type") == "v_prediction" else 1
        return data**2 / length**2 * x + sign * sigma * data / length * out

    def amplification(self, t: float) -> float:
        """Stock's steps subtract samples as large as t."""
        return max(1.0, t / 2)

    def legibility(self, prompts: Sequence[str]) -> Legibility:
        known = {"", *map(str, range(self.classes or 0))}
        why = f"is no class 0 to {(self.classes or 0) - 1}"
        return Legibility(len(prompts), {prompt: why for prompt in prompts if self.classes and prompt not in known})

    def encode_texts(self, prompts: Sequence[str]) -> Conditioning:
        self.legibility(prompts).check("prompts")
        return {"class_labels": torch.tensor([int(prompt or 0) for prompt in prompts])} if self.classes else super().encode_texts(prompts)

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"class_labels": ()} if self.classes else super().text_shapes()

    def call_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        labels = {"class_labels": [int(prompt or 0) for prompt in prompts]} if self.classes else {}
        return super().call_inputs(prompts) | labels

    def sampling_scheduler(self, steps: int, grid: Sequence[float] | None = None, sampler: Sampler = "euler") -> Any:
        from diffusers import EDMEulerScheduler

        first, last = self.grid(steps, grid)[[0, -1]].tolist()
        same = {name: self.edm.option(name) for name in ("sigma_data", "rho", "prediction_type")}
        return EDMEulerScheduler(sigma_max=first, sigma_min=last, **same)

    def grid(self, steps: int, grid: Sequence[float] | None = None) -> Tensor:
        """grid: shares of 80, of which the first and the last count."""
        power = 1 / self.edm.option("rho")
        ends = (80.0, 0.002) if grid is None else (80 * grid[0], 80 * grid[-1])
        points = torch.linspace(ends[0] ** power, ends[1] ** power, steps + (grid is None), dtype=torch.float64)
        return (points ** self.edm.option("rho"))[:steps]

    def path_times(self, timesteps: Tensor, sigmas: Tensor) -> Tensor:
        return sigmas[:-1].double()

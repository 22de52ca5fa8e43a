"""What families on a discrete schedule share: the path and the kind of prediction that their scheduler says, and its exported place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.families import betas, stock_samplers
from fastgen.families.pipelined import Pipelined
from fastgen.path import DiscreteVP, Path


class Discrete(Pipelined):
    """A network that is told its training step: `path.step(t)`."""

    path: DiscreteVP
    grid_argument = "timesteps"
    unfollowed: ClassVar[tuple[str, ...]] = ()  # options of a teacher's scheduler that steps here and students go without

    def own_path(self) -> Path:
        path, self.kind = betas.teacher_path(self.source.place, self.unfollowed)
        return path

    def path_times(self, timesteps: Tensor, sigmas: Tensor) -> Tensor:
        return (timesteps.double() + 1) / self.path.num_steps

    def export_scheduler(self, grid: Sequence[float] | None = None) -> Any:
        return stock_samplers.trailing_solver(self.path, self.kind)

    def grid(self, steps: int, grid: Sequence[float] | None = None) -> Tensor:
        if grid is None:
            return stock_samplers.trailing_times(self.path, steps)
        return (torch.tensor(self.told_times(grid), dtype=torch.float64) + 1) / self.path.num_steps

    def stochastic_scheduler(self, steps: int, grid: Sequence[float] | None = None) -> Any:
        return stock_samplers.consistency_sampler(self.path, self.kind, steps)

    def stochastic_grid(self, steps: int, grid: Sequence[float] | None = None) -> Tensor:
        return stock_samplers.consistency_times(self.path, steps) if grid is None else self.grid(steps, grid)

    def told_times(self, grid: Sequence[float]) -> list[int]:
        return stock_samplers.training_steps(self.path, grid)

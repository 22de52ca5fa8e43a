"""Closed-form networks and fixed draws for the tests of distribution matching, whose expectations then are finite sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from oracle import SCHEDULES, Schedule, kind_of
from torch import Tensor

from fastgen.denoiser import Output, Predictor
from fastgen.distillers.base import Batch
from fastgen.families.toy import Toy
from fastgen.path import Flow, Kind, Path, VarianceExploding, VariancePreserving

PATHS: dict[str, Path] = {path.__class__.__name__: path for path in (Flow(), VariancePreserving(), VarianceExploding())}
# (x_t (B, D), t (B,)) -> (x0, eps), the two conditional means
Means = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def double(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def schedule_of(path: Path) -> Schedule:
    return SCHEDULES[type(path).__name__]


def network(path: Path, kind: Kind, means: Means) -> Predictor:
    """A network of `kind` that outputs what (x0, eps) come to."""

    def denoiser(x: Tensor, t: Tensor, cond: Any) -> Output:
        return Output(kind_of(kind, *means(x, t), t, schedule_of(path)))

    return Predictor(denoiser, Toy("toy:gaussian", path=path, kind=kind))


def gaussian_network(path: Path, kind: Kind, noisy_mean: Tensor, noisy_covariance: Tensor) -> Predictor:
    """The exact network at one noise level, where the noisy samples are N(noisy_mean, noisy_covariance); Tweedie's formula."""

    def means(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule_of(path).at(t, x)
        score = -torch.linalg.solve(noisy_covariance, (x - noisy_mean).T).T
        return (x + sigma**2 * score) / alpha, -sigma * score

    return network(path, kind, means)


def affine_network(path: Path, kind: Kind, a: Tensor, b: Tensor, scale: float) -> Predictor:
    """A student that makes x0 = A z + b of the noise z, which it sees as scale z."""

    def means(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule_of(path).at(t, x)
        x0 = x / scale @ a.T + b
        return x0, (x - alpha * x0) / sigma

    return network(path, kind, means)


class Draws:
    """Stands in for SampleRng: given normal numbers by name (`...` for all other names), one uniform number, one exit."""

    device = "cpu"

    def __init__(self, normals: Mapping[Any, Tensor], *, uniform: float | Tensor = 0.5, exit_at: int = 0) -> None:
        self.normals, self.exit_at = normals, exit_at
        count = len(next(iter(normals.values())))
        self.uniforms = uniform if isinstance(uniform, Tensor) else torch.full((count,), uniform, dtype=torch.float64)

    def normal(self, name: str, shape: Any) -> Tensor:
        return self.normals[name] if name in self.normals else self.normals[...]

    def uniform(self, name: str, shape: Any = ()) -> Tensor:
        return self.uniforms

    def shared_index(self, name: str, count: int) -> int:
        assert self.exit_at < count
        return self.exit_at


def draws(normals: Mapping[Any, Tensor], *, uniform: float | Tensor = 0.5, exit_at: int = 0) -> Any:
    return Draws(normals, uniform=uniform, exit_at=exit_at)


def batch_of(count: int, component: int = -1, latents: Tensor | None = None) -> Batch:
    return Batch(count, {"component": torch.full((count,), component)}, latents)


def corners(dim: int) -> Tensor:
    """2 dim points +-sqrt(dim) e_i, fp64 (2 dim, dim), with mean 0 and covariance 1: the expectation of anything affine squared."""
    return dim**0.5 * torch.cat([torch.eye(dim), -torch.eye(dim)]).double()


def first_coordinate(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward, for recipes to name."""
    return pixels[:, 0]

"""Closed-form teachers: Gaussian mixtures in D dimensions, on any path and of any prediction kind, for proofs and quick studies.

The network is the exact prediction plus a residual MLP that starts at zero, so that a student or a fake score "initialised from
the teacher" is exact too and can be trained. Prompt "k" conditions on component k, "" on the whole mixture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import timesteps
from fastgen.conditioning import Conditioning
from fastgen.errors import UserError, nearest
from fastgen.families.base import Family, LatentSpec
from fastgen.legibility import Legibility
from fastgen.path import Flow, Kind, Path, expand_time


class Mixture(nn.Module):
    """sum_k w_k N(m_k, diag(v_k)); weights (K,), means (K, D), variances (K, D), fp64 buffers."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __init__(self, weights: Sequence[float], means: Sequence[Sequence[float]], variances: Sequence[Sequence[float]]) -> None:
        super().__init__()
        for name, value in (("weights", weights), ("means", means), ("variances", variances)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, component: Tensor) -> Tensor:
        """E[x0 | x_t = x], fp64 (B, D); component (B,) int64, -1 for the whole mixture; stable as alpha or sigma goes to 0."""
        alpha, sigma = alpha[:, None, None], sigma[:, None, None]
        x = x.double()[:, None]
        variance = alpha**2 * self.variances + sigma**2
        residual = x - alpha * self.means
        logits = self.weights.log() - 0.5 * (residual**2 / variance + variance.log()).sum(-1)
        other = (component[:, None] >= 0) & (component[:, None] != torch.arange(len(self.weights), device=x.device))
        share = logits.masked_fill(other, -math.inf).softmax(-1)[..., None]
        return (share * (self.means + alpha * self.variances / variance * residual)).sum(1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Exact samples (count, D), fp64."""
        index = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[index] + self.variances[index].sqrt() * noise


class Backbone(nn.Module):
    """Exact prediction of a mixture plus a zero-initialised MLP on (x, t): three hidden layers of `width`."""

    def __init__(self, mixture: Mixture, path: Path, kind: Kind, width: int) -> None:
        super().__init__()
        self.mixture, self.path = mixture, path
        self.kind: Kind = kind
        dim = mixture.means.shape[1]
        self.layers = nn.ModuleList([nn.Linear(dim + 3, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def exact(self, x: Tensor, t: Tensor, component: Tensor) -> Tensor:
        """The prediction from (x0, eps) = (mean, (x - alpha mean)/sigma)."""
        alpha, sigma = self.path.coeffs(t.double())
        x0 = self.mixture.posterior_mean(x, alpha, sigma, component)
        eps = (x - expand_time(alpha, x) * x0) / expand_time(sigma, x).clamp(min=1e-12)
        return self.path.predict(x0, eps, t.double(), self.kind)

    def forward(self, x: Tensor, t: Tensor, component: Tensor) -> Tensor:
        phase = (t / self.path.t_max * (math.pi / 2)).to(x)[:, None]
        hidden = torch.cat([x, phase, phase.sin(), phase.cos()], 1)
        for layer in self.layers:
            hidden = nn.functional.silu(layer(hidden))
        return self.exact(x, t, component).to(x) + self.out(hidden)


def _ring() -> Mixture:
    angles = [2 * math.pi * k / 8 for k in range(8)]
    return Mixture([1 / 8] * 8, [[1.5 * math.cos(a), 1.5 * math.sin(a)] for a in angles], [[0.06**2] * 2] * 8)


MIXTURES = {
    "gaussian": lambda: Mixture([1.0], [[0.5, -0.3]], [[0.49, 0.16]]),
    "mixture": lambda: Mixture([0.3, 0.5, 0.2], [[-1.0, 0.0], [0.8, 0.6], [0.4, -1.0]], [[0.09, 0.04], [0.06, 0.12], [0.05, 0.05]]),
    "ring": _ring,
}


class Toy(Family):
    """`toy:gaussian`, `toy:mixture`, `toy:ring`, or a live Mixture; path, kind and width as options for studies."""

    exportable = False
    samplers = ("euler", "stochastic")
    lora_targets = ("layers.0", "layers.1", "layers.2", "out")
    time_projection = "layers.0"

    def __init__(
        self,
        source: str | Mixture,
        *,
        path: Path | None = None,
        kind: Kind = "velocity",
        width: int = 64,
        **options: Any,
    ) -> None:
        for name in (name for name, value in options.items() if value is not None):
            raise UserError(f"recipe key teacher.{name}: does not apply to a closed-form teacher")
        self.mixture = source if isinstance(source, Mixture) else self._named(source)
        self.path, self.kind, self.width = path or Flow(), kind, width
        self.latent = LatentSpec(self.mixture.means.shape[1])

    @staticmethod
    def _named(source: str) -> Mixture:
        name = source.removeprefix("toy:")
        if name not in MIXTURES:
            raise UserError(f"recipe key teacher.pretrained: no closed-form teacher {source!r}; {nearest(name, MIXTURES)}")
        return MIXTURES[name]()

    @property
    def options(self) -> dict[str, Any]:
        return {}

    @property
    def shift(self) -> float:
        return 1.0

    @property
    def own_call(self) -> dict[str, Any]:
        return {"num_inference_steps": 25, "guidance_scale": 1.0}

    def load_backbone(self, *, meta: bool = False) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Backbone(self.mixture, self.path, self.kind, self.width).eval()

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        component = cond.get("component", torch.full((len(x),), -1, device=x.device))
        return backbone(x, t, component)

    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        return list(backbone.layers)  # type: ignore[arg-type]

    def feature_widths(self, backbone: nn.Module) -> list[int]:
        return [layer.out_features for layer in backbone.layers]  # type: ignore[union-attr]

    def encode_texts(self, prompts: Sequence[str]) -> Conditioning:
        self.legibility(prompts).check("prompts")
        return {"component": torch.tensor([int(prompt) if prompt else -1 for prompt in prompts])}

    def meta_conditioning(self, count: int) -> Conditioning:
        return {"component": torch.empty(count, dtype=torch.long, device="meta")}

    def legibility(self, prompts: Sequence[str]) -> Legibility:
        components = ["", *map(str, range(len(self.mixture.weights)))]
        why = f"a closed-form teacher's prompt is '' or a component 0..{components[-1]}"
        return Legibility(len(prompts), {prompt: why for prompt in prompts if prompt not in components})

    def free_encoders(self) -> None:
        pass

    def encode_latents(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latents  # vectors are no pixels: nothing bounds them

    def export_scheduler(self, grid: Sequence[float] | None = None) -> Any:
        raise UserError("a closed-form teacher has no diffusers pipeline to export; train it with --only train")

    def grid(self, steps: int, grid: Sequence[float] | None = None) -> Tensor:
        fractions = timesteps.grid(steps) if grid is None else torch.tensor(list(grid), dtype=torch.float64)
        return fractions * self.path.t_max

    def call_arguments(self, steps: int, guidance: float, grid: Sequence[float] | None = None) -> dict[str, Any]:
        return {"num_inference_steps": steps, "guidance_scale": guidance}

    def load_pipeline(self, backbone: nn.Module | None, scheduler: Any) -> Any:
        return self.export_scheduler()

"""Scalar inputs beside the time: a second time r (MeanFlow's interval) or a guidance scale (LCM), without touching the network's code.

Each input is a small network of its own, whose output is added to that of the last linear layer of the time embedding (the family
names it: `Family.time_projection`). Its last layer starts at zero, so a student with inputs starts as the teacher. Its features are
polynomials and sines of at most `_OCTAVE` half periods, because methods differentiate through them along t, and it always computes in
fp32 or wider, outside autocast.

Values travel in the conditioning under reserved keys (`given`), one number a sample: the second time as a noise fraction
sigma/(alpha + sigma), which is the flow-matching time and means the same on every path, and the guidance scale as it is. A value that
is not given takes its default: the next time of the student's sampling grid, and the teacher's guidance. With defaults the inputs are
functions of the time alone, N vectors on a grid of N times, which `fold` moves into the linear layer: the plain architecture again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.errors import UserError
from fastgen.path import Path
from fastgen.rng import seeded

Input = Literal["second_time", "guidance"]

_PREFIX = "input."
_OCTAVE = 4
_FEATURES = 1 + 2 * _OCTAVE
_HIDDEN = 128
# Guidance enters as its logarithm over this, which puts scales of 1 to 20 into [0, 1].
_LOG_GUIDANCE = math.log(20.0)
# Two times of a grid closer than this are one: sampling times come in fp32 too.
_SAME_TIME = 1e-5


@dataclass(frozen=True)
class Defaults:
    """What an input is when a call does not give it. grid: (N,) descending noise fractions; guidance: the teacher's scale."""

    grid: Tensor
    guidance: float

    @staticmethod
    def on(path: Path, times: Tensor, guidance: float) -> Defaults:
        """From the path times (N,) that the student is sampled at."""
        return Defaults(noise_fraction(path, times.double()), guidance)


def noise_fraction(path: Path, t: Tensor) -> Tensor:
    """sigma/(alpha + sigma) in [0, 1], shaped like t: the flow-matching time at equal noise ratio; differentiable."""
    alpha, sigma = path.coeffs(t)
    return sigma / (alpha + sigma)


def given(cond: Conditioning, **values: Tensor) -> Conditioning:
    """`cond` with values (B,) of scalar inputs, by name."""
    return {**cond, **{_PREFIX + name: value for name, value in values.items()}}


def split(cond: Conditioning) -> tuple[Conditioning, dict[str, Tensor]]:
    """(what the family's network takes, given values of scalar inputs by name)."""
    values = {key.removeprefix(_PREFIX): value for key, value in cond.items() if key.startswith(_PREFIX)}
    return {key: value for key, value in cond.items() if not key.startswith(_PREFIX)}, values


def smooth_features(value: Tensor) -> Tensor:
    """(B,) in about [0, 1] -> (B, 2 n + 1): the value, and sines and cosines of 1..n half periods over [0, 1]."""
    phase = value[:, None] * (math.pi * torch.arange(1, _OCTAVE + 1, device=value.device, dtype=value.dtype))
    return torch.cat([value[:, None], phase.sin(), phase.cos()], 1)


class ScalarInputs(nn.Module):
    """The inputs of one role. width: that of the time embedding; seed: of the hidden layers; dtype: of the parameters, fp32 or wider.

    The second time sees t and t - r; the guidance network sees the scale alone, so a constant scale is a constant vector.
    """

    def __init__(self, names: Sequence[Input], width: int, *, defaults: Defaults | None = None, seed: object, dtype: torch.dtype) -> None:
        super().__init__()
        self.defaults = defaults
        with seeded("scalar inputs", seed):
            self.networks = nn.ModuleDict({name: _network(_FEATURES * (1 + (name == "second_time")), width) for name in names})
        self.to(dtype)

    def forward(self, fraction: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """What is added to the time embedding, (B, width); fraction: (B,) noise fractions of the call's times; values: (B,) each."""
        unknown = values.keys() - self.networks.keys()
        if unknown:
            raise ValueError(f"this network has no scalar input {sorted(unknown)[0]!r}; it has {', '.join(self.networks) or 'none'}")
        with torch.autocast(fraction.device.type, enabled=False):
            return torch.stack([self._one(name, fraction, values.get(name)) for name in self.networks]).sum(0)

    def _one(self, name: str, fraction: Tensor, value: Tensor | None) -> Tensor:
        network = self.networks[name]
        if name == "second_time":
            interval = fraction - (self._next(fraction) if value is None else value)
            features = torch.cat([smooth_features(fraction), smooth_features(interval)], 1)
        else:
            scale = torch.full_like(fraction, self._defaults.guidance) if value is None else value.clamp(min=1e-3)
            features = smooth_features(scale.log() / _LOG_GUIDANCE)
        return network(features.to(next(network.parameters()).dtype))

    @property
    def _defaults(self) -> Defaults:
        if self.defaults is None:
            raise ValueError(f"scalar inputs {', '.join(self.networks)} have no defaults here and must be given")
        return self.defaults

    def _next(self, fraction: Tensor) -> Tensor:
        """The largest time of the grid below each of (B,), 0 below the last."""
        grid = self._defaults.grid.to(fraction)
        return torch.where(grid < fraction[:, None] - _SAME_TIME, grid, 0).amax(1)


def _network(features: int, width: int) -> nn.Module:
    last = nn.Linear(_HIDDEN, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(features, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.SiLU(), last)


@torch.no_grad()
def fold(layer: nn.Linear, hidden: Tensor, added: Tensor) -> None:
    """Change `layer` so that its output at the inputs `hidden` (N, F) grows by `added` (N, width), and its other weights as little
    as possible.

    The mean of `added` goes into the bias, which alone serves a constant; the rest is the least-norm solution of
    [H 1] [dW db]^T = C, in fp64; where the layer has no bias, all of it is that of H dW^T = C. UserError when rounding leaves more than
    1e-5 of it, as on grids whose times lie too close together.
    """
    hidden, added = hidden.double().cpu(), added.double().cpu()
    has_bias = layer.bias is not None
    mean = added.mean(0) if has_bias else torch.zeros_like(added[0])
    ones = torch.ones(len(hidden), int(has_bias), dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat([hidden, ones], 1), added - mean, driver="gelsd").solution
    before = _outputs(layer, hidden)
    layer.weight += solution[: hidden.shape[1]].T.to(layer.weight)
    if has_bias:
        layer.bias += (solution[-1] + mean).to(layer.bias)
    after = _outputs(layer, hidden)
    left = (after - before - added).abs().max().item()
    if left > 1e-5 * max(1.0, before.abs().max().item()):
        raise UserError(f"recipe key student.steps: {len(hidden)} times lie too close for the second time to be folded in (error {left:.1e})")


def _outputs(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """In fp64, on the CPU."""
    bias = None if layer.bias is None else layer.bias.double().cpu()
    return nn.functional.linear(hidden, layer.weight.double().cpu(), bias)

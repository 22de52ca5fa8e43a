"""Few-step and ODE samplers: the same code rolls out training samples, draws validation grids, and checks an export's parity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.path import Kind, Path

Renoise = Literal["euler", "stochastic", "fixed"]


class Draws(Protocol):
    """What fresh noise comes from: `SampleRng`, or each sample's own generator, which goes on."""

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers (B, *shape), fp32."""
        ...


class Predict(Protocol):
    """What a sampler needs of a model: its path, and predictions of any kind."""

    @property
    def path(self) -> Path: ...

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: Path | None = None) -> Tensor: ...


def initial(path: Path, noise: Tensor, times: Tensor) -> Tensor:
    """The sample that a sampler starts from: unit noise (B, ...) at the path's scale."""
    return noise * path.prior_scale(times[:1]).to(noise).squeeze()


def few_step(
    predict: Predict,
    noise: Tensor,
    times: Tensor,
    cond: Conditioning,
    rng: Draws | None = None,
    *,
    renoise: Renoise,
    grad_at: int | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Run x0 predictions at `times` (N,), descending, in the predictor's path time; returns x0 (B, ...) in the noise's dtype.

    Between two evaluations the sample moves as `walk` says. With `grad_at=j` this is backward simulation (Yin et al. 2024b, sec. 4.5):
    evaluations before j run without gradients and the x0 of evaluation j is returned, the only one in the graph. Without it the
    caller's gradient mode holds and all N run. start: as for `walk`.
    """
    last = len(times) - 1 if grad_at is None else grad_at
    assert 0 <= last < len(times), f"grad_at {grad_at} is none of the {len(times)} evaluations"
    with torch.no_grad() if grad_at is not None else nullcontext():
        x = walk(predict, noise, times[: last + 1], cond, rng, renoise=renoise, start=start)
    return predict(x, times[last].expand(len(x)), cond).to(noise.dtype)


def walk(
    predict: Predict,
    noise: Tensor,
    times: Tensor,
    cond: Conditioning,
    rng: Draws | None = None,
    *,
    renoise: Renoise,
    start: Tensor | None = None,
) -> Tensor:
    """The sample (B, ...) that stands at times[-1] after evaluations at all times (N,) before it, started from unit noise.

    Each prediction is moved to the next noise level: `euler` keeps its own eps (deterministic; on Flow exactly x + (t' - t) velocity,
    i.e. DDIM on any path), `stochastic` draws fresh noise from `rng` (consistency sampling, Song et al. 2023, alg. 1), `fixed` reuses
    the first evaluation's eps, which is the initial noise where the path reaches it (Lee et al. 2024, arXiv:2405.20320, section 4.3). start: the
    sample (B, ...) at times[0] where something else has brought it there, from that noise; unit noise at the path's scale if None.
    """
    if renoise == "stochastic" and rng is None:
        raise ValueError("stochastic renoising needs an rng")
    path = predict.path
    x = initial(path, noise, times) if start is None else start
    kept = None if renoise == "fixed" and start is None else noise
    for i in range(len(times) - 1):
        t = times[i].expand(len(x))
        x0 = predict(x, t, cond)
        if renoise == "euler" or kept is None:
            eps = kept = path.convert(x0, x, t, "x0", "eps")
        else:
            eps = kept if renoise == "fixed" or rng is None else rng.normal(f"renoise/{i}", noise.shape[1:])
        x = path.mix(x0, eps, times[i + 1].expand(len(x))).to(noise.dtype)
    return x


class Experts:
    """Predictors that share one path and divide its time: each serves the times above its `end` and up to the one before it.

    ends: descending path times, the last of them 0. All samples of a call are at one time range: their times are equal in samplers.
    """

    def __init__(self, predictors: Sequence[Predict], ends: Sequence[float]) -> None:
        assert len(predictors) == len(ends) and list(ends) == sorted(ends, reverse=True)
        self.predictors, self.ends = list(predictors), list(ends)

    @property
    def path(self) -> Path:
        return self.predictors[0].path

    def at(self, t: float) -> Predict:
        """The expert that serves time t; a boundary itself belongs to the expert below it, which starts there."""
        # Grids and ends reach this point through fp32 and JSON.
        return next((predict for predict, end in zip(self.predictors, self.ends, strict=True) if t > end + 1e-6), self.predictors[-1])

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: Path | None = None) -> Tensor:
        own = t if path is None or path == self.path else path.retime(x, t, self.path)[1]
        assert bool((own == own[0]).all()), "one expert serves one time"
        return self.at(own[0].item())(x, t, cond, kind, path)


def ode(
    predict: Predict,
    x: Tensor,
    times: Tensor,
    cond: Conditioning,
    *,
    solver: Literal["euler", "heun"] = "heun",
) -> Tensor:
    """Integrate the probability-flow ODE dx/dt = velocity along `times` (N + 1,), end included; x: (B, ...) at times[0].

    `euler` has order 1 and N evaluations, `heun` order 2 and 2N; both need the velocity to be finite at the times given, so on
    VP and VE end above 0. Not what pictures are drawn with: `walk` and `few_step` jump through x0, which off Flow and VE are other steps
    than `euler` here, and `few_step` ends at data.
    """
    for _, after in ode_steps(predict, x, times, cond, solver=solver):
        x = after
    return x


def ode_steps(
    predict: Predict,
    x: Tensor,
    times: Tensor,
    cond: Conditioning,
    *,
    solver: Literal["euler", "heun"] = "heun",
) -> Iterator[tuple[Tensor, Tensor]]:
    """The steps of `ode`, one by one: the velocity at each one's start, and the sample at its end, both (B, ...)."""
    for t, t_next in pairwise(times):
        step = (t_next - t).to(x)
        velocity = slope = predict(x, t.expand(len(x)), cond, "velocity")
        ahead = x + step * slope
        if solver == "heun":
            slope = 0.5 * (slope + predict(ahead, t_next.expand(len(x)), cond, "velocity"))
            ahead = x + step * slope
        x = ahead.to(x.dtype)
        yield velocity, x

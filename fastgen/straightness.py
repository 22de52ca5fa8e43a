"""How straight a model's flow is: what reflow would have to gain (Liu et al. 2022, arXiv:2209.03003, section 2).

Everything is on Flow, whatever path the model is on: x_t = (1 - t) x0 + t z, velocities are d/dt of it. Z_t is the model's own guided
ODE from its noise end, flow time e (1 where its path reaches pure noise), to data, and Z_1 is where the line through Z_0 and Z_e passes
t = 1: the noise that it starts from where e = 1, and (x_e - alpha_e x0)/sigma_e of the sampler's own start x_e elsewhere. So

    S = 1/e int_0^e E||(Z_1 - Z_0) - dZ_t/dt||^2 dt,

0 exactly where every trajectory is a straight line, which one Euler step follows to its end.

What of this is the data's doing is measured with a second draw: x0' are the model's samples, z' is noise drawn anew, u = z' - x0', and
v is the field at x_t = (1 - t) x0' + t z'. With v* = E[u | x_t] and V = 1/e int E||u - v*||^2, how much the lines of independent pairs cross,

    1/e int E||u - v||^2 = V + 1/e int E||v - v*||^2                                          (`crossing`)
    crossing + S - (E||u||^2 - E||Z_1 - Z_0||^2) = 1/e int (E||v - v*||^2 + E||v(Z_t)||^2 - E||v*(x_t)||^2)     (`residual`).

Where the field is exact for its own samples, v = v*, crossing is V and residual 0: E||u||^2 - E||Z_1 - Z_0||^2 = S + V (if e < 1, but for
what the path leaves of data in x_e, which the sampler's start lacks). Else neither V nor the fit error E||v - v*||^2 can be had alone: v* is
unknown. The residual shows that there is one, but is not its size. It is twice the fit error where Z_t and x_t have the same laws (v - v*
then is orthogonal to v*, a gradient), of first order in v - v* with either sign where they have not, and 0 for the straight flow that
scales a centred Gaussian, though that one is exact for another coupling alone. With guidance v is no conditional mean and both are left
out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastgen import timesteps
from fastgen.conditioning import Conditioning
from fastgen.data.pairs import drawn_prompts
from fastgen.errors import NotFinite, UserError
from fastgen.generator import ImageGenerator
from fastgen.path import Flow, Kind, Path
from fastgen.progress import Progress
from fastgen.rng import SampleRng
from fastgen.sampling import Predict, initial, ode_steps

FEWEST_STEPS = 2
# Of `straightness`, where the sentence changes; see `verdict`.
STRAIGHT, CURVED = 0.02, 0.05
_CLEAN = 1e-3  # flow time: below it, rounding of a prediction of x0 would be most of its velocity


@dataclass(frozen=True)
class Measured:
    """Of B samples, (B,) fp64 each, squared norms over all dimensions. drawn (B, ...): Z_0.

    curvature: S. displacement: ||Z_1 - Z_0||^2. one_step: between the sample of one Euler step and Z_0. crossing, independent: as the module
    says, of u - v and u; None with guidance.
    """

    drawn: Tensor
    curvature: Tensor
    displacement: Tensor
    one_step: Tensor
    crossing: Tensor | None
    independent: Tensor | None

    @classmethod
    def of(cls, parts: Sequence[Measured]) -> Measured:
        """All samples of several batches."""
        joined: dict[str, Any] = {}
        for each in fields(cls):
            values = [getattr(part, each.name) for part in parts]
            joined[each.name] = None if values[0] is None else torch.cat(values)
        return cls(**joined)


@dataclass(frozen=True)
class Straightness:
    """straightness: S / E||Z_1 - Z_0||^2, and its standard error. displacement: E||Z_1 - Z_0||^2 for each dimension.

    one_step: mean squared error of one Euler step, relative to the variance of the samples: 1 is what their mean would be off by.
    crossing, residual: relative to E||Z_1 - Z_0||^2 as well; None with guidance. noise_end: flow time. evaluations: of the field, a sample.
    """

    straightness: float
    straightness_error: float
    displacement: float
    one_step: float
    one_step_error: float
    crossing: float | None
    crossing_error: float | None
    residual: float | None
    residual_error: float | None
    noise_end: float
    guidance: float
    samples: int
    steps: int
    evaluations: int


def straightness(
    generator: ImageGenerator,
    prompts: Mapping[str, float],
    *,
    samples: int = 128,
    steps: int = 32,
    seed: int = 0,
    batch: int = 16,
    progress: Progress | None = None,
) -> Straightness:
    """Of a model's guided flow, over `samples` draws of its prompts (with these weights) and noise, along `steps` steps.

    Sample i depends on seed, prompts and i alone, whatever the batch. UserError for less than 2 samples or steps, NotFinite where a
    trajectory is.
    """
    for name, value, least in (("samples", samples, 2), ("steps", steps, FEWEST_STEPS), ("batch", batch, 1)):
        if value < least:
            raise UserError(f"--{name}: {value}; allowed: {least} and more")
    progress = progress or Progress()
    texts = drawn_prompts(prompts, range(samples), seed=seed)
    predict, guided = generator.predict, generator.guidance != 1
    times = flow_times(predict.path, steps).to(generator.device)
    progress.start("following the flow", samples)
    try:
        parts: list[Measured] = []
        for start in range(0, samples, batch):
            ids = range(start, min(start + batch, samples))
            rng = SampleRng(seed, ("straightness",), ids, generator.device)
            cond = generator.conditioning(texts[ids.start : ids.stop])
            shape = generator.family.latent.shape
            part = follow(predict, rng.normal("noise", shape), times, cond, None if guided else rng.normal("independent", shape))
            _require_finite(part, generator.name)
            parts.append(part)
            progress.update(ids.stop, {})
    finally:
        progress.finish()
    return summary(Measured.of(parts), noise_end=times[0].item(), guidance=generator.guidance, steps=steps)


def flow_times(path: Path, steps: int) -> Tensor:
    """Flow times (steps + 1,) fp64 from the path's noise end to 0, evenly spaced, but that none between is below what the network serves."""
    ends = torch.tensor([path.t_max, path.t_min], dtype=torch.float64)
    end, least = Flow().time(path.ratio(ends)).tolist()
    last = max(end / steps, least, _CLEAN)
    return torch.cat([timesteps.between(end, last, steps - 1), torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def follow(predict: Predict, noise: Tensor, times: Tensor, cond: Conditioning, other: Tensor | None = None) -> Measured:
    """Follow the flow from unit noise (B, ...) along flow times (N + 1,) from the noise end to 0; other: noise of independent pairs.

    Heun's steps, the last one Euler's, as Karras et al. 2022, algorithm 1: no velocity is asked for at clean data, where networks
    are given what they were hardly trained on. Integrals are the trapezoidal rule on the same times, the last interval
    at its velocity: order 2, as the solver. The field is evaluated 2 N - 1 times, and N times more with `other`.
    """
    field, (start, end) = _OnFlow(predict), _start(predict.path, noise)
    weights, velocities, x = _weights(times), _Spread(), start
    for (velocity, after), weight in zip(_steps(field, x, times, cond), weights, strict=True):
        velocities.add(velocity.double(), weight)
        x = after
    chord = (start.double() - x.double()) / end
    one_step = end * (chord - velocities.first)
    crossing = independent = None
    if other is not None:
        line, crossing = other - x, torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for t, weight in zip(times[:-1], weights, strict=True):
            crossing += weight * _squared(line - field(x + t.to(x) * line, t.expand(len(x)), cond))
        independent = _squared(line)
    return Measured(x, velocities.about(chord), _squared(chord), _squared(one_step), crossing, independent)


def summary(measured: Measured, *, noise_end: float, guidance: float, steps: int) -> Straightness:
    """Means with their standard errors, as ratios."""
    drawn, displacement = measured.drawn.double().flatten(1), measured.displacement
    count = len(drawn)
    from_mean = _squared(drawn - drawn.mean(0)) * (count / (count - 1))
    straight, one_step = _ratio(measured.curvature, displacement), _ratio(measured.one_step, from_mean)
    crossing = residual = (None, None)
    if measured.crossing is not None and measured.independent is not None:
        crossing = _ratio(measured.crossing, displacement)
        residual = _ratio(measured.crossing + measured.curvature - measured.independent + displacement, displacement)
    return Straightness(
        straightness=straight[0],
        straightness_error=straight[1],
        displacement=displacement.mean().item() / drawn.shape[1],
        one_step=one_step[0],
        one_step_error=one_step[1],
        crossing=crossing[0],
        crossing_error=crossing[1],
        residual=residual[0],
        residual_error=residual[1],
        noise_end=noise_end,
        guidance=guidance,
        samples=count,
        steps=steps,
        evaluations=2 * steps - 1 + (0 if measured.crossing is None else steps),
    )


def verdict(found: Straightness) -> str:
    """Whether reflow has something to straighten, as a sentence.

    The thresholds lie between what was measured (32 steps, 128 to 2,000 samples). Not reflowed: fastgen:digits .083, at its guidance 1.5 .079, at 5
    .25; fastgen:scenes .115, at its guidance 3 .143; toy:gaussian .58, toy:mixture 1.4, toy:ring 2.4 (their samples lie near their noise, which
    makes E||Z_1 - Z_0||^2 small), toy:mixture and toy:ring by component at guidance 2 .26 and .28. Straight: toy:ring by component, a dot
    of deviation .06 each, .008; fastgen:digits after one reflow (2,048 pairs at guidance 1.5, 1,500 steps of 64, one run) .010, whose one
    Euler step is off by 7.6 %. What reflow is worth beyond S: it makes distillation that regresses on samples work from a curved teacher
    (InstaFlow, arXiv:2309.06380); from a straight one it is not known to beat distilling directly.
    """
    if found.straightness < STRAIGHT:
        return "almost straight: reflow has nothing left to straighten; distil directly (dmd2, scm)"
    off = f"one Euler step alone is off by {found.one_step:.0%} of the samples' variance"
    if found.straightness < CURVED:
        return f"slightly curved: {off}; reflow straightens it, but distilling directly (dmd2, scm) can do without"
    return f"curved: {off}; reflow pays before anything that regresses on samples (dmd2, scm do without)"


class _OnFlow:
    """Velocities of a predictor on Flow, whatever its own path."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict

    @property
    def path(self) -> Path:
        return Flow()

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "velocity", path: Path | None = None) -> Tensor:
        return self.predict(x, t, cond, kind, self.path)


class _Spread:
    """Weighted squared distances of velocities (B, ...) from a point that is known only after them, in fp64 and about the first of them: of equal
    ones exactly 0."""

    def __init__(self) -> None:
        self.weight, self.squares = torch.zeros(()), torch.zeros(())

    def add(self, velocity: Tensor, weight: Tensor) -> None:
        if self.weight.ndim == 0 and not bool(self.weight):
            self.first, self.sum = velocity, torch.zeros_like(velocity)
        change = velocity - self.first
        self.weight, self.squares = self.weight + weight, self.squares + weight * _squared(change)
        self.sum += weight * change

    def about(self, point: Tensor) -> Tensor:
        """(B,), about point (B, ...)."""
        away = point - self.first
        return self.squares - 2 * (away * self.sum).flatten(1).sum(1) + self.weight * _squared(away)


def _start(path: Path, noise: Tensor) -> tuple[Tensor, float]:
    """The sampler's own start on Flow (B, ...), in the noise's dtype, and its flow time."""
    time = torch.tensor([path.t_max], dtype=torch.float64, device=noise.device)
    x, end = path.retime(initial(path, noise, time), time.expand(len(noise)), Flow())
    return x.to(noise.dtype), end[0].item()


def _steps(field: Predict, x: Tensor, times: Tensor, cond: Conditioning) -> Iterator[tuple[Tensor, Tensor]]:
    """Heun's to the last time but one, and Euler's to the last."""
    for velocity, after in ode_steps(field, x, times[:-1], cond, solver="heun"):
        x = after
        yield velocity, x
    yield from ode_steps(field, x, times[-2:], cond, solver="euler")


def _weights(times: Tensor) -> Tensor:
    """Of velocities at times[:-1], (N,), summing to 1."""
    widths = times[:-1] - times[1:]
    weights = torch.zeros_like(widths)
    weights[:-1] += widths[:-1] / 2
    weights[1:] += widths[:-1] / 2
    weights[-1] += widths[-1]
    return weights / times[0]


def _squared(x: Tensor) -> Tensor:
    """(B,) fp64 of (B, ...)."""
    return x.double().flatten(1).square().sum(1)


def _ratio(above: Tensor, below: Tensor) -> tuple[float, float]:
    """E above / E below of samples (B,), and its standard error to first order (the delta method). Where below is nothing, 0 or infinity."""
    mean = below.mean()
    if mean == 0:
        return (math.inf if bool(above.any()) else 0.0), 0.0
    ratio = above.mean() / mean
    return ratio.item(), ((above - ratio * below).std() / math.sqrt(len(above)) / mean).item()


def _require_finite(measured: Measured, name: str) -> None:
    if not bool((measured.curvature + measured.one_step).isfinite().all()):
        raise NotFinite(f"trajectories of {name} are not finite: its network is damaged or overflows")

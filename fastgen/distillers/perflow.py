"""Piecewise rectified flow (Yan et al. 2024, PeRFlow, arXiv:2405.07510): inside each of a few windows of time the student goes straight.

The range of times is cut into windows. For a time t in the window from s down to e a sample stands at s: noised data, as in the paper, or a
point of the teacher's own trajectory from noise. The teacher's ODE takes it to e in `solver_steps`, and the two ends determine one constant
pair (x0, eps) (`Path.through`): on Flow their difference over e - s is the paper's velocity, and on a variance-preserving path eps is the
target of its `ddim_eps`, (x_e - lambda x_s)/eta with lambda = alpha_e/alpha_s and eta = sigma_e - lambda sigma_s. The student is regressed
on that pair's prediction, in its own kind, at x_t. One step of any stock sampler that keeps eps then takes it from s to e.

Interpolants. `constant`: x_t = alpha_t x0 + sigma_t eps, so that an exact student is exact at every step inside a window too, on every path.
`linear`: the paper's straight line between x_s and x_e. On Flow, and on VE, the two are the same. Elsewhere a student on the straight line
needs the paper's own sampler between the ends of a window (`student.sampler: linear_windows`, which no pipeline has: windows.py), so without it
more steps than windows are refused. The paper's other target,
`diff_eps`, whose prediction is no eps to a stock scheduler even at a window's start, is left out.

Windows begin at the student's own sampling times, the first at the noise end: its steps must hit their ends, for across one the target
jumps. Extra steps lie inside. Evenly spaced training steps (Stable Diffusion), or flow times with the teacher's shift, make them the paper's
uniform windows. A network that is smooth in t is slow to learn the jump, and sampling asks for just the times at it: after 300 steps on the
bundled digits a student's four steps at the edges were no nearer to real digits than the teacher's (FD 4.5), the same student's .02 below
them were (3.3). One that is trained at the sampling times alone (`at: grid`; 3.3 again) learns no jump, but is made for its own number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fastgen import conditioning
from fastgen.conditioning import Conditioning
from fastgen.distillers import losses
from fastgen.distillers.base import Batch, Distiller, Facts, Loss, MethodConfig, Models, Setting, Update
from fastgen.distillers.solver import FLOW, integrate, shortcut, sub_times
from fastgen.errors import UserError
from fastgen.path import Flow, VarianceExploding, expand_time
from fastgen.rng import SampleRng
from fastgen.roles import RoleSpec, frozen, student
from fastgen.sampling import Predict
from fastgen.timesteps import TimeSampling
from fastgen.unused import UsedWith

_TOLERANCE = 2e-3  # recipes round the times of a shifted grid
_DROP = 0.1


class PeRFlowConfig(MethodConfig):
    """windows: how many, each of as many of the student's steps; null: one a step. edges: instead, where they begin and end, as fractions of
    the path's range from 1 down to 0. points: where windows are entered, at noised `data` or on the `teacher_trajectory` from noise, which takes
    as many of the teacher's steps for each sample as all windows have. solver, solver_steps: of the teacher's ODE through one window.

    guidance: `fixed`, the teacher's steps have teacher.guidance and the student is sampled without; `synchronised`, the teacher's steps have
    none and the student is sampled with teacher.guidance. drop: share of prompts replaced by the negative prompt, which guided sampling
    asks for; null: .1 where the student is guided, otherwise none. at: where a student trains, at `times` drawn from the whole range as in the
    paper, or at its own sampling times alone, the `grid`. huber: c of the pseudo-Huber distance, a grey value or latent unit; null for squared
    error. weight: `reciprocal` is the paper's 1/(2.3 max(1 - t, .1)), t = 1 noise."""

    used_with: ClassVar[UsedWith] = {"times": ("at", ("times",))}
    windows: int | None = Field(default=None, ge=1, le=1000)
    edges: tuple[float, ...] | None = None
    points: Literal["data", "teacher_trajectory"] = "data"
    solver: Literal["euler", "heun"] = "euler"
    solver_steps: int = Field(default=8, ge=1, le=1000)
    interpolant: Literal["constant", "linear"] = "constant"
    guidance: Literal["fixed", "synchronised"] = "fixed"
    drop: float | None = Field(default=None, ge=0, le=1)
    at: Literal["times", "grid"] = "times"
    times: TimeSampling = TimeSampling()
    huber: float | None = Field(default=None, gt=0, le=1e6)
    weight: Literal["none", "reciprocal"] = "none"

    @field_validator("edges")
    @classmethod
    def _tiling(cls, edges: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if edges is not None and not (len(edges) > 1 and edges[0] == 1 and edges[-1] == 0 and all(a > b for a, b in pairwise(edges))):
            raise ValueError("windows must tile the range: their edges descend from 1 to 0")
        return edges

    @model_validator(mode="after")
    def _one_way(self) -> PeRFlowConfig:
        if self.windows is not None and self.edges is not None:
            raise ValueError("windows and edges say the same; remove one of them")
        return self

    @property
    def share_dropped(self) -> float:
        if self.drop is None:
            return _DROP if self.guidance == "synchronised" else 0.0
        return self.drop


class PeRFlow(Distiller):
    """Roles: student (trained), teacher (frozen). Needs latents, unless its points are the teacher's own."""

    Config = PeRFlowConfig
    samplers = ("euler", "linear_windows")
    roles: ClassVar[dict[str, RoleSpec]] = {"student": student(), "teacher": frozen()}
    config: PeRFlowConfig

    def __init__(self, config: PeRFlowConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.edges = window_edges(config, setting.grid.tolist(), setting.path.t_max)  # K + 1 descending path times
        windows = [sub_times(setting, start, end, config.solver_steps) for start, end in pairwise(self.edges)]
        self._steps = torch.stack(windows)  # (K, solver_steps + 1) flow times of the teacher

    @classmethod
    def leaves_a_flow(cls, config: PeRFlowConfig) -> bool:
        return config.at == "times"

    @classmethod
    def student_is_guided(cls, config: PeRFlowConfig) -> bool:
        return config.guidance == "synchronised"

    @classmethod
    def needs_latents(cls, config: PeRFlowConfig) -> bool:
        return config.points == "data"

    @classmethod
    def check(cls, config: PeRFlowConfig, facts: Facts) -> None:
        _check_windows(config, facts)
        starts = window_edges(config, facts.grid, facts.end)[:-1]
        one_step_each = len(starts) == facts.steps and abs(facts.grid[0] - facts.end) <= 1e-6 * facts.end
        apart = config.interpolant == "linear" and not isinstance(facts.path, (Flow, VarianceExploding)) and not one_step_each
        if apart and facts.own_sampler is None:
            raise UserError(
                f"recipe key distiller.interpolant: linear, but {facts.path} is curved, and a stock sampler does not go along a straight line "
                "between the ends of a window; use constant, or windows of one step each, or student.sampler: linear_windows, which no pipeline has"
            )
        if facts.own_sampler == "linear_windows" and not apart:
            raise UserError(
                "recipe key student.sampler: linear_windows, but this student's windows are what a stock sampler goes through; use euler: "
                "linear_windows is for distiller.interpolant: linear, on a curved path, with more steps than windows"
            )

    def updates(self, step: int) -> list[Update]:
        return [Update(("student",), (self.straighten,))]

    def windows(self) -> list[float]:
        return self.edges

    def window(self, t: Tensor) -> Tensor:
        """Which window (B,) path times t (B,) are in, 0 the noisiest; an edge belongs to the window below it, which starts there."""
        inner = torch.tensor(self.edges[1:-1], dtype=torch.float64, device=t.device)
        return (t[:, None] <= inner + 1e-9).sum(1)

    def straighten(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """Distance of the student's prediction from that of the constant pair of its window."""
        student, path = models["student"], self.setting.path
        t = self._times(rng)
        cond = conditioning.drop(batch.cond, self.setting.negative, rng.uniform("drop") < self.config.share_dropped)
        x0, eps = self.pair(models["teacher"], batch, cond, rng, self.window(t))
        prediction = student(self.interpolated(x0, eps, t), t, cond, student.kind)
        difference = prediction - path.predict(x0, eps, t, student.kind)
        distance = difference.square() if self.config.huber is None else losses.charbonnier(difference, self.config.huber)
        return Loss((self._weight(t) * losses.per_sample_mean(distance)).mean())

    def _times(self, rng: SampleRng) -> Tensor:
        """Path times (B,) fp64 to train at."""
        uniform = rng.uniform("time").double()
        if self.config.at == "grid":
            grid = self.setting.grid.to(uniform)
            return grid[(uniform * len(grid)).long()]
        # From (0, 1]: at t = 0 a network may be singular.
        return self.setting.draw_times(self.config.times, 1 - uniform)

    @torch.no_grad()
    def pair(self, teacher: Predict, batch: Batch, cond: Conditioning, rng: SampleRng, window: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps), each (B, ...), of the teacher's way through each sample's `window` (B,)."""
        guided = self.setting.guide(teacher) if self.config.guidance == "fixed" else teacher
        steps = self._steps.to(window.device)
        times = steps[window].T
        noise = rng.normal("noise", self.setting.shape)
        if self.config.points == "data":
            assert batch.latents is not None
            x = FLOW.mix(batch.latents, noise, times[0])
        else:
            before = torch.cat([steps[:-1, :-1].flatten(), steps[-1, :1]])
            # A sample that has reached its window waits there for the others.
            x = integrate(guided, self._noisiest(noise), torch.maximum(before[:, None], times[0]), cond, self.config.solver)
        return shortcut(guided, x, times, cond, self.config.solver)

    def interpolated(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (B, ...) of a pair at path times t (B,): on the pair's own line, or on the straight one between its window's ends."""
        path = self.setting.path
        if self.config.interpolant == "constant":
            return path.mix(x0, eps, t)
        edges, window = torch.tensor(self.edges, dtype=torch.float64, device=t.device), self.window(t)
        s, e = edges[window], edges[window + 1]
        share = expand_time((s - t) / (s - e), x0)
        return (1 - share) * path.mix(x0, eps, s) + share * path.mix(x0, eps, e)

    def _noisiest(self, noise: Tensor) -> Tensor:
        """What sampling starts from, on Flow, of unit noise (B, ...)."""
        path = self.setting.path
        end = torch.full((len(noise),), path.t_max, dtype=torch.float64, device=noise.device)
        return path.retime(expand_time(path.prior_scale(end), noise) * noise, end, FLOW)[0]

    def _weight(self, t: Tensor) -> Tensor:
        if self.config.weight == "none":
            return torch.ones_like(t)
        return 1 / (2.3 * (1 - t / self.setting.path.t_max).clamp(min=0.1))


def window_edges(config: PeRFlowConfig, grid: Sequence[float], end: float) -> list[float]:
    """Path times (K + 1,) at which windows begin, from `end` down, the inner ones among the student's own `grid`, and 0."""
    if config.edges is None:
        each = len(grid) // (config.windows or len(grid))
        return [end, *grid[each::each], 0.0]
    inner = [min(grid, key=lambda t, edge=edge * end: abs(t - edge)) for edge in config.edges[1:-1]]
    return [end, *inner, 0.0]


def _check_windows(config: PeRFlowConfig, facts: Facts) -> None:
    """UserError where windows do not begin at sampling times of the student."""
    if config.edges is None:
        if facts.steps % (config.windows or 1):
            raise UserError(f"recipe key distiller.windows: {config.windows}, of which student.steps {facts.steps} is not a multiple")
        return
    times: list[Any] = [round(t / facts.end, 4) for t in facts.grid]
    edges = window_edges(config, facts.grid, facts.end)
    for edge, found in zip(config.edges[1:-1], edges[1:-1], strict=True):
        if abs(found / facts.end - edge) > _TOLERANCE:
            raise UserError(f"recipe key distiller.edges: {edge} is none of the student's times {times}, at which a window can begin")
    if any(a <= b for a, b in pairwise(edges)):
        raise UserError(f"recipe key distiller.edges: two of {list(config.edges)} are at one of the student's times {times}")

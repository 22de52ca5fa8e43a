"""Phased DMD (arXiv:2510.27684): progressive distribution matching over signal-to-noise intervals, with an expert for each.

Phase k trains an expert on its own steps of the student's grid to reach noise level s_k with the teacher's law p_s there, not with
finished samples; the last phase ends at data and is ordinary DMD. Matching in phase k happens at noise levels above s_k up to 1, so the
matching intervals nest while the step intervals tile [0, 1]. A finished expert is replaced by its average, frozen, and rolled out
without gradients in front of the next one. Fake scores start from the teacher in every phase.

Why: with random exits a multi-step student is asked for finished samples at every step, and its first step commits to few modes. Here
the first expert is asked for the teacher's law at high noise, where every divergence covers modes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, full_like

from fastgen.data import weighted
from fastgen.distillers import regression
from fastgen.distillers.base import Facts, Update
from fastgen.distillers.dmd2 import DMD2, DMD2Config
from fastgen.distillers.rollout import Segment
from fastgen.errors import UserError
from fastgen.roles import RoleSpec
from fastgen.timesteps import TimeSampling

KEY = "recipe key distiller.phases"
_TOLERANCE = 2e-3  # recipes round the times of a shifted grid


class Phase(BaseModel):
    """The steps from noise level `start` down to `end`, fractions in [0, 1] of the path's time, on Flow its times; share: of the run's
    student steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    start: float = Field(ge=0, le=1)
    end: float = Field(ge=0, le=1)
    share: float = Field(default=1.0, ge=1e-6, le=1e6)


class PhasedDMDConfig(DMD2Config):
    """dmd2's keys, and: phases: their step intervals, from noise to data. first_phase: where this run begins; later ones than 1 need the
    experts before them from `student.init`. margin: least distance of a matching level from the phase's end, as a share of the range."""

    phases: tuple[Phase, ...] = Field(min_length=1, max_length=64)
    first_phase: int = Field(default=1, ge=1, le=64)
    margin: float = Field(default=0.02, gt=0, lt=1)


def expert_name(base: str, phase: int) -> str:
    """`student`, `student_2`, ...: the role of phase 1, 2, ..."""
    return base if phase == 1 else f"{base}_{phase}"


class PhasedDMD(DMD2):
    """Roles: student, student_2, ... (an expert for each phase), fake_score, fake_score_2, ..., discriminator (with `gan`), teacher."""

    samplers = ("euler",)
    phased = True
    Config = PhasedDMDConfig
    config: PhasedDMDConfig  # type: ignore[assignment]

    def __init__(self, config: Any, setting: Any) -> None:
        super().__init__(config, setting)
        self._ends = _ends(config, setting.grid.tolist(), setting.path.t_max)
        self._spans = _spans(config, setting.train_steps)

    @classmethod
    def roles_for(cls, config: PhasedDMDConfig) -> dict[str, RoleSpec]:  # type: ignore[override]
        roles = super().roles_for(config)
        for k in range(2, len(config.phases) + 1):
            roles |= {expert_name(base, k): roles[base] for base in ("student", "fake_score")}
        return roles

    @classmethod
    def check(cls, config: PhasedDMDConfig, facts: Facts) -> None:  # type: ignore[override]
        _check_phases(config, facts)
        _check_experts(config, facts)
        if config.renoise != "euler":
            raise UserError(f"recipe key distiller.renoise: {config.renoise}, but a phase ends at a noise level, which only euler steps reach")
        if config.rollout.times != "grid":
            raise UserError("recipe key distiller.rollout.times: sampled, but phases divide the student's own grid; use grid")
        super().check(config, facts)

    @classmethod
    def inherited(cls, config: PhasedDMDConfig) -> list[str]:  # type: ignore[override]
        """With first_phase > 1 the experts before it; its own start from the teacher, as their fake scores do."""
        names = super().inherited(config)
        return names[: config.first_phase - 1] or names

    def finished(self, role: str, step: int) -> bool:
        return self.span(role) is None or super().finished(role, step)

    def trained(self, role: str, step: int) -> tuple[int, int]:
        return (0, 0) if self.span(role) is None else super().trained(role, step)

    def period(self, role: str) -> str:
        return f"phase {[name for name, _ in self.students()].index(role) + 1}"

    @classmethod
    def matching_steps(cls, config: PhasedDMDConfig, facts: Facts) -> int:  # type: ignore[override]
        return min(stop - start for start, stop in _spans(config, facts.train_steps).values()) - regression.steps_alone(config.regression)

    def phase_at(self, step: int) -> int:
        """1, 2, ...: the phase of student step `step`."""
        return next(k for k, (start, stop) in self._spans.items() if start <= step < stop)

    def span(self, role: str) -> tuple[int, int] | None:
        base = re.fullmatch(r"(.*)_(\d+)", role)
        phase = int(base[2]) if base else 1
        whole = super().span(base[1] if base else role)
        if role == "discriminator" or phase not in self._spans:
            return whole
        start, stop = self._spans[phase]
        late, _ = whole or (0, 0)  # of a fake score, behind a regression alone
        return start + late, stop - start - late

    def needed(self, role: str, step: int) -> bool:
        """A finished expert is rolled out in front of the others; its fake score has no more to say."""
        ahead = [expert_name("fake_score", k) for k, (_, stop) in self._spans.items() if step < stop]
        return not role.startswith("fake_score") or role in ahead

    def students(self) -> list[tuple[str, float]]:
        return [(expert_name("student", k), end) for k, end in enumerate(self._ends, 1)]

    def student_at(self, step: int) -> str:
        return expert_name("student", self.phase_at(step))

    def fake_at(self, step: int) -> str:
        return expert_name("fake_score", self.phase_at(step))

    def segment(self, step: int) -> Segment:
        k = self.phase_at(step)
        grid, ends = self.setting.grid.tolist(), [float("inf"), *self._ends]
        own = [i for i, t in enumerate(grid) if ends[k] < t <= ends[k - 1]]
        first = 1 if self.config.anchor and k == 1 else own[0]
        return Segment(first, own[-1] + 1, self._ends[k - 1])

    def updates(self, step: int) -> list[Update]:
        first, *others = super().updates(step)
        k = self.phase_at(step)
        if step == self._spans[k][0] and k > self.config.first_phase:
            first = Update(first.trains, first.terms, first.blends, settles=(expert_name("student", k - 1),))
        return [first, *others]

    def _times(self, times: TimeSampling, uniform: Tensor, step: int, below: Tensor | None = None) -> tuple[Tensor, Tensor]:
        end, t_max = self.segment(step).end, self.setting.path.t_max
        if end == 0:
            return super()._times(times, uniform, step, below)
        floor = end / t_max + self.config.margin
        if below is not None:
            times = times.up_to(max(below.item() / t_max, floor + self.config.margin))
        t = times.above(uniform, floor, teacher_shift=self.setting.shift) * t_max
        return t, full_like(t, end)


def _ends(config: PhasedDMDConfig, grid: Sequence[float], t_max: float) -> list[float]:
    """Path times at which the phases end: the grid's own, to its precision, and 0 for the last."""
    return [*(min(grid[1:], key=lambda t, end=phase.end * t_max: abs(t - end)) for phase in config.phases[:-1]), 0.0]


def _spans(config: PhasedDMDConfig, train_steps: int) -> dict[int, tuple[int, int]]:
    """(first, one past the last) student step of each phase that this run trains."""
    phases = range(config.first_phase, len(config.phases) + 1)
    shares = weighted.scaled(config.phases[k - 1].share for k in phases)
    edges = [0, *(round(train_steps * done / sum(shares)) for done in accumulate(shares))]
    return dict(zip(phases, pairwise(edges), strict=True))


def _check_experts(config: PhasedDMDConfig, facts: Facts) -> None:
    """The experts before the first phase are there, finished, and were trained for what this recipe asks of them."""
    if facts.started:
        return
    needed = [expert_name("student", k) for k in range(1, config.first_phase)]
    missing = [name for name in needed if facts.origin is None or name not in facts.origin.trained]
    if missing:
        raise UserError(
            f"recipe key distiller.first_phase: {config.first_phase} starts after an expert that has not been trained ({missing[0]}); "
            "give student.init the folder of a run that trained it to its phase's end"
        )
    if not needed or facts.origin is None:
        return
    ends = [phase["end"] for phase in facts.origin.method.get("phases", [{"end": 0.0}])]
    for name, phase, end in zip(needed, config.phases, ends, strict=False):
        if abs(phase.end - end) > _TOLERANCE:
            raise UserError(f"{KEY}: {name} of {facts.origin.folder!r} was trained to end at {end}, here its phase ends at {phase.end}")
    if facts.origin.differs:
        raise UserError(f"recipe key student.init: the experts of {facts.origin.folder!r} were trained with {facts.origin.differs[0]}")


def _check_phases(config: PhasedDMDConfig, facts: Facts) -> None:
    phases, grid = config.phases, [t / facts.end for t in facts.grid]
    if phases[0].start != 1 or phases[-1].end != 0:
        raise UserError(f"{KEY}: they run from {phases[0].start} to {phases[-1].end}; together they must tile [0, 1], from 1 down to 0")
    for before, after in pairwise(phases):
        if before.end != after.start:
            raise UserError(
                f"{KEY}: one ends at {before.end} and the next starts at {after.start}; together they must tile [0, 1] without gap or overlap"
            )
        if min(abs(before.end - t) for t in grid[1:] or [-1]) > _TOLERANCE:
            raise UserError(
                f"{KEY}: boundary {before.end} is none of the student's times {[round(t, 4) for t in grid[1:]]}, at which a phase can end"
            )
    for phase, (before, after) in zip(phases[1:], pairwise(_ends(config, facts.grid, facts.end)), strict=True):
        if before == after:
            raise UserError(f"{KEY}: the one from {phase.start} to {phase.end} has none of the student's times {[round(t, 4) for t in grid]}")
    for phase in phases:
        if not phase.start > phase.end:
            raise UserError(f"{KEY}: start {phase.start} must be above end {phase.end}")
    if config.first_phase > len(phases):
        raise UserError(f"recipe key distiller.first_phase: {config.first_phase}, but there are {len(phases)} phases")
    for k, (start, stop) in _spans(config, facts.train_steps).items():
        if start == stop:
            raise UserError(f"recipe key train.steps: {facts.train_steps} leaves phase {k} no student step")
    others = (block.times for block in (config.gan, config.decoupled) if block is not None)
    hi = min(times.hi for times in (config.match_times, config.critic_times, *others))
    if any(hi <= phase.end + config.margin for phase in phases):
        raise UserError(f"recipe key distiller.margin: no noise level between {phases[0].end} + {config.margin} and {hi} is left to match at")
    if config.anchor is not None and config.first_phase > 1:
        raise UserError(f"recipe key distiller.anchor: it anchors the first phase, but first_phase is {config.first_phase}; remove it")
    if config.anchor is not None and sum(t > phases[0].end + _TOLERANCE for t in grid) < 2:
        raise UserError("recipe key distiller.anchor: the first phase has one step, which the anchor would take; it needs two")

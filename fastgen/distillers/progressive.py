"""Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512): a student of n steps learns to make two steps of its teacher's 2n in one.

From noised data z_t, at a time t of the student's own grid, the teacher takes two DDIM steps to z_t'', the student's next time. The student's
x0 is regressed on the one whose single DDIM step leads there (`Path.through`; algorithm 2). On Flow it is that of the average velocity
(z_t - z_t'')/(t - t'').

One run halves `halvings` times, each time with a student of its own that starts as the one before, whose average is its teacher. The first
teacher is the recipe's with its guidance, and no student has any: so guidance is distilled in the first halving, at one fixed scale, where
Meng et al. (2023) give it a stage of its own and the network an input. Grids of more steps divide each step of the student's own evenly in
the teacher's unshifted time. Where memory holds no such row of students, halve once a run, with the student before as the teacher:
teacher.pretrained: RUN/student, teacher.guidance: 1.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fastgen.data import weighted
from fastgen.distillers import losses
from fastgen.distillers.base import Batch, Blend, Distiller, Facts, Loss, MethodConfig, Models, Setting, Update
from fastgen.distillers.solver import FLOW, shortcut, sub_times
from fastgen.errors import UserError
from fastgen.rng import SampleRng
from fastgen.roles import RoleSpec, frozen, student


class ProgressiveConfig(MethodConfig):
    """halvings: how many the run makes; the teacher begins with student.steps times two to their power. shares: of the run's student steps that
    each takes, relative to the others'; null: all the same. weight: of the squared error of x0, with SNR = alpha^2/sigma^2: `truncated` is
    max(SNR, 1), `snr_plus_one` SNR + 1."""

    halvings: int = Field(default=1, ge=1, le=16)
    shares: tuple[float, ...] | None = None
    weight: Literal["truncated", "snr_plus_one"] = "truncated"

    @field_validator("shares")
    @classmethod
    def _positive(cls, shares: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if shares is not None and not all(1e-6 <= share <= 1e6 for share in shares):
            raise ValueError("shares must be between 1e-6 and 1e6")
        return shares

    @model_validator(mode="after")
    def _one_each(self) -> ProgressiveConfig:
        if self.shares is not None and len(self.shares) != self.halvings:
            raise ValueError(f"halvings: {self.halvings}, but {len(self.shares)} shares")
        return self

    @property
    def names(self) -> list[str]:
        """The students in the order in which they are trained: `student_4`, `student_2`, `student`, by how many times the last one's steps."""
        return [f"student_{2**k}" if k else "student" for k in reversed(range(self.halvings))]


class Progressive(Distiller):
    """Roles: a student for each halving (trained, the last of them exported), teacher (frozen). Needs latents."""

    Config = ProgressiveConfig
    samplers = ("euler",)
    roles: ClassVar[dict[str, RoleSpec]] = {"student": student(), "teacher": frozen()}
    config: ProgressiveConfig

    def __init__(self, config: ProgressiveConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self._spans = _spans(config, setting.train_steps)
        self._steps = {name: self._grid(2**k) for k, name in enumerate(reversed(config.names))}

    @classmethod
    def roles_for(cls, config: ProgressiveConfig) -> dict[str, RoleSpec]:
        return {**{name: student() for name in config.names}, "teacher": frozen()}

    @classmethod
    def needs_latents(cls, config: ProgressiveConfig) -> bool:
        return True

    @classmethod
    def check(cls, config: ProgressiveConfig, facts: Facts) -> None:
        if facts.origin is not None and config.halvings > 1:
            raise UserError(
                f"recipe key student.init: {facts.origin.folder!r}, but with distiller.halvings {config.halvings} the student starts as the one "
                "before it; halve once a run, or remove it"
            )
        if any(count < 1 for _, count in _spans(config, facts.train_steps).values()):
            raise UserError(f"recipe key train.steps: {facts.train_steps} leaves a halving of {config.halvings} no student step")

    def span(self, role: str) -> tuple[int, int] | None:
        return self._spans.get(role)

    def needed(self, role: str, step: int) -> bool:
        """A student is the teacher of the next, and is not asked after that."""
        names = self.config.names
        if role not in names[:-1]:
            return True
        first, count = self._spans[names[names.index(role) + 1]]
        return step < first + count

    def period(self, role: str) -> str:
        return f"the halving to {len(self._steps[role])} steps"

    def updates(self, step: int) -> list[Update]:
        name, before = self._at(step)
        begins = before is not None and step == self._spans[name][0]
        blends = (Blend(name, before, 1.0),) if begins and before else ()
        return [Update((name,), (self.halve,), blends, settles=(before,) if begins and before else ())]

    def halve(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """Weighted squared error of the student's x0 at a time of its grid."""
        assert batch.latents is not None
        name, before = self._at(step)
        teacher = self.setting.guide(models["teacher"]) if before is None else models[before]
        flow_times = self._steps[name].to(batch.latents.device)
        times = flow_times[(rng.uniform("time").double() * len(flow_times)).long()].T
        x = FLOW.mix(batch.latents, rng.normal("noise", self.setting.shape), times[0])
        x0 = shortcut(teacher, x, times, batch.cond)[0]
        error = losses.per_sample_mean((models[name](x, times[0], batch.cond, "x0", FLOW) - x0).square())
        return Loss((self._weight(times[0]) * error).mean())

    def _at(self, step: int) -> tuple[str, str | None]:
        """(the student that student step `step` trains, the one before it, its teacher; None: the run's)."""
        names = self.config.names
        index = next(i for i, name in enumerate(names) if step < sum(self._spans[name]))
        return names[index], names[index - 1] if index else None

    def _grid(self, parts: int) -> Tensor:
        """Flow times (n, 3) of t, t' and t'' for each step of a student with `parts` times as many as the last, noisiest first."""
        times = [*self.setting.grid.tolist(), 0.0]
        fine = torch.cat([sub_times(self.setting, start, end, 2 * parts)[:-1] for start, end in pairwise(times)])
        return torch.cat([fine, fine.new_zeros(1)]).unfold(0, 3, 2)

    def _weight(self, t: Tensor) -> Tensor:
        """Of flow times t (B,), at which SNR is that of any path."""
        snr = FLOW.ratio(t) ** -2
        return snr.clamp(min=1) if self.config.weight == "truncated" else snr + 1


def _spans(config: ProgressiveConfig, train_steps: int) -> dict[str, tuple[int, int]]:
    """(first, count) of the student steps in which each student trains."""
    shares = weighted.scaled(config.shares or [1.0] * config.halvings)
    edges = [0, *(round(train_steps * done / sum(shares)) for done in accumulate(shares))]
    return {name: (first, stop - first) for name, (first, stop) in zip(config.names, pairwise(edges), strict=True)}

"""One method at several sizes: a distiller for each, of which every batch goes to that of its own size.

Shape, grid and time shift are a size's own and all of a method's that depends on them is made of its Setting, so a method needs to know of one
size alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import wraps

from fastgen.distillers.base import Batch, Distiller, Loss, Models, Term, Update
from fastgen.rng import SampleRng
from fastgen.sampling import Predict


class BySize(Distiller):
    """each: the same method with the same Config, with the Setting of each of the run's sizes, in their order. What its terms keep from step to
    step is one for all."""

    def __init__(self, each: Sequence[Distiller]) -> None:
        first = each[0]
        super().__init__(first.config, first.setting)
        self.each, self.statistics = tuple(each), first.statistics
        for other in each:
            other.statistics = self.statistics

    def updates(self, step: int) -> list[Update]:
        alike = zip(*(distiller.updates(step) for distiller in self.each), strict=True)
        return [replace(same[0], terms=tuple(map(_by_size, zip(*(update.terms for update in same), strict=True)))) for same in alike]

    def span(self, role: str) -> tuple[int, int] | None:
        return self.each[0].span(role)

    def finished(self, role: str, step: int) -> bool:
        return self.each[0].finished(role, step)

    def needed(self, role: str, step: int) -> bool:
        return self.each[0].needed(role, step)

    def trained(self, role: str, step: int) -> tuple[int, int]:
        return self.each[0].trained(role, step)

    def period(self, role: str) -> str:
        return self.each[0].period(role)

    def windows(self) -> list[float]:
        return self.each[0].windows()

    def students(self) -> list[tuple[str, float]]:
        return self.each[0].students()

    def sampler(self, models: Models) -> Predict:
        return self.each[0].sampler(models)


def _by_size(terms: tuple[Term, ...]) -> Term:
    """One term of the method, by the size of its batch; it keeps its name, by which it draws and is logged."""

    @wraps(terms[0])
    def term(models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        return terms[batch.place](models, batch, rng, step)

    return term

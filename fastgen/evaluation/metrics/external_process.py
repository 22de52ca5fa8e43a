"""Metrics that a program in another environment measures (`fastgen.evaluation.external`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation.external import OPTION, Answer, External, ask
from fastgen.evaluation.metrics.base import Heading, Measured, Metric, Needs, Resources, Unavailable, Value
from fastgen.evaluation.metrics.picture_scores import mean_value


class ExternalMetric(Metric):
    """`shows` has one row, whose name is that of the program on the command line. install: what the program's environment needs, for the
    message where no program was named."""

    install: ClassVar[str] = ""
    convention = "by an external program"

    def __init__(self, config: Any, sets: Sequence[str], resources: Resources = Resources()) -> None:  # noqa: B008
        super().__init__(config, sets, resources)
        self._answers: dict[Path, Answer] = {}

    @property
    def name(self) -> str:
        return next(iter(self.shows))

    def needs(self) -> Needs:
        self._program()
        return Needs({}, pictures=(self.set,))

    def measure(self, measured: Measured) -> list[Value]:
        answer = self._answer(measured)
        if answer.scores is None:
            return [Value(self.name, answer.value, answer.n)]
        return [mean_value(self.name, answer.scores, measured.sets[self.set])]

    def scores(self, measured: Measured) -> dict[str, Tensor]:
        scores = self._answer(measured).scores
        return {} if scores is None else {self.name: scores}

    def _program(self) -> External:
        if (program := self.resources.external.get(self.name)) is None:
            needed = f": {self.install}" if self.install else ""
            raise Unavailable(f"needs a program in an environment of its own{needed}; name it with {OPTION} {self.name}='COMMAND'")
        return program

    def _answer(self, measured: Measured) -> Answer:
        """The program's answer on these pictures; it is asked once."""
        program, folders = self._program(), measured.pictures or {}
        if (folder := folders.get(self.set)) is None:
            raise Unavailable(f"needs the pictures of the set {self.set} as PNGs")
        if folder not in self._answers:
            log = folder.with_name(f"{folder.name}.{self.name}.log")
            self._answers[folder] = ask(program, folder, len(measured.sets[self.set]), log)
        return self._answers[folder]


def further_metrics(sets: Sequence[str], resources: Resources) -> dict[str, Metric]:
    """A metric for each program that has no metric of ours: a user's own, measured on the protocol's first set beside what the protocol asks
    for. UserError for a program whose name is that of a metric that fastgen measures itself, or of a row of one."""
    from fastgen.evaluation.headings import COSTS

    found: dict[str, Metric] = {}
    for name in resources.external:
        kind = _kinds().get(name)
        if name in COSTS or (kind is not None and not issubclass(kind, ExternalMetric)):
            raise UserError(f"{OPTION} {name}: fastgen measures that itself; give the program another name")
        if kind is None:
            kind = named(name)
            found[name] = kind(kind.Config(), sets, resources)
    return found


def named(name: str) -> type[ExternalMetric]:
    """The metric of a user's own program."""
    shows = {name: Heading(name.replace("_", " "), "", -1)}
    return type(f"External_{name}", (ExternalMetric,), {"shows": shows, "convention": "by an external program of the user's own"})


def _kinds() -> dict[str, type[Metric]]:
    """Our metrics by their names and by those of their rows."""
    from fastgen.evaluation.metrics import find_metric, metric_names

    kinds = {name: find_metric(name) for name in metric_names()}
    return kinds | {row: kind for kind in kinds.values() for row in kind.shows}

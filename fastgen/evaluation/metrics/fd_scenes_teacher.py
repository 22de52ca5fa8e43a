"""How far a student's scenes are from its teacher's, as distributions: what distillation should match."""

from __future__ import annotations

from functools import cached_property

from pydantic import Field

from fastgen.evaluation.extractors import find_extractor
from fastgen.evaluation.frechet import frechet_distance, table_statistics
from fastgen.evaluation.metrics.base import Heading, Measured, Metric, Needs, Unavailable, Value, feature
from fastgen.evaluation.metrics.scenes import OTHER_PROMPTS
from fastgen.evaluation.teacher_statistics import TeacherStatistics, read_statistics
from fastgen.evaluation.worlds import scenes as world

FEATURES = feature("scenes_classifier", "features")


class FdScenesTeacher(Metric):
    """Fréchet distance of classifier features (128-d) of open prompts to 5,000 pictures that the bundled teacher drew of them in 28 steps from
    other noise. Its floor is what the teacher itself scores in 28 steps."""

    class Config(Metric.Config):
        """teacher: SHA-256 of the teacher that the bundled statistics must be of, by default the one that they are of; another's are refused,
        and so are its students."""

        set: str | None = "open"
        teacher: str = Field(default_factory=lambda: _bundled())

    shows = {"fd_scenes_teacher": Heading("FD-teacher", "↓")}  # noqa: RUF012

    def needs(self) -> Needs:
        if self._known.teacher != self.config.teacher:
            raise Unavailable(f"the bundled statistics are of the teacher {self._known.teacher[:12]}…, not of {self.config.teacher[:12]}…")
        kind = find_extractor("scenes_classifier")
        if kind(kind.Config(), self.resources).hash != self._known.extractor:
            raise Unavailable("the bundled statistics are of another classifier: python -m fastgen.assets.build scenes statistics")
        return Needs({self.set: (FEATURES,)})

    def measure(self, measured: Measured) -> list[Value]:
        samples = measured.sets[self.set]
        if not set(world.open_prompts()).issuperset(samples.prompts):
            raise Unavailable(OTHER_PROMPTS)
        if measured.taught_by not in (None, self._known.teacher):
            raise Unavailable("compares with fastgen:scenes as it is bundled, and this model is, or was distilled from, another teacher")
        if len(samples) < 2:
            raise Unavailable("needs two pictures or more")
        table = measured.tables[self.set, FEATURES]
        return [Value("fd_scenes_teacher", frechet_distance(table_statistics(table), self._known.fit), len(samples))]

    @cached_property
    def _known(self) -> TeacherStatistics:
        return read_statistics()


def _bundled() -> str:
    """The teacher of the bundled statistics; empty where there are none."""
    try:
        return read_statistics().teacher
    except Unavailable:
        return ""

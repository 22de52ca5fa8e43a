"""Measuring the student while it is trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.evaluation.extraction import WHOLE, Part
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.places import temporary
from fastgen.evaluation.protocol import Protocol
from fastgen.evaluation.runner import Evaluation
from fastgen.evaluation.settings import Settings
from fastgen.evaluation.sharing import draw_parts
from fastgen.evaluation.unkept import evaluated
from fastgen.files import PARTIAL
from fastgen.generator import ImageGenerator
from fastgen.progress import Progress
from fastgen.run.building import Run
from fastgen.trainer import Metrics


@dataclass(frozen=True)
class Measuring:
    """Measures the averaged student, as scalars `eval/<metric>`. Each process draws a part of the pictures, and the main one measures them.
    Features of real pictures are kept in `references` from one time to the next, those of the student's in `shared`, a folder that several
    processes see, until they are measured."""

    run: Run
    student: ImageGenerator
    protocol: Protocol
    resources: Resources
    references: Path
    shared: Path
    progress: Progress

    @classmethod
    def of(cls, run: Run, protocol: Protocol, resources: Resources, references: Path, run_dir: Path, progress: Progress) -> Measuring:
        return cls(run, run.generator("student"), protocol, resources, references, run_dir / f"{PARTIAL}evaluation", progress)

    def draw(self) -> None:
        """Collective: have each process draw its part; one alone draws when it measures. TrainingFailed for weights that have left their range."""
        trainer, members = self.run.trainer, self.run.parallel.members
        trainer.check_weights()
        if members.world_size > 1:
            members.lone(self._clear)  # of a kill
            with trainer.ema.applied():
                draw_parts(members, lambda part: self._evaluated(self.shared, part), self.progress)

    def measure(self) -> Metrics:
        """The main process, once all have drawn. UserError where nothing can be measured, NotFinite for pictures that are none."""
        with self._folder() as root, self.run.trainer.ema.applied():
            rows = self._evaluated(root).rows()
        return {f"eval/{row['name']}": row["value"] for row in rows}

    def _evaluated(self, root: Path, part: Part = WHOLE) -> Evaluation:
        asked: Any = {"model": "student", "steps": [self.student.steps], "guidance": self.student.guidance}
        settings = Settings(root, part, references=self.references)
        progress = self.progress if part == WHOLE else Progress()
        return evaluated(self.protocol, self.student, **asked, settings=settings, resources=self.resources, progress=progress)

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        if self.run.parallel.world_size == 1:
            with temporary() as root:
                yield root
            return
        try:
            yield self.shared
        finally:
            self._clear()

    def _clear(self) -> None:
        shutil.rmtree(self.shared, ignore_errors=True)

"""Evaluations of which nothing is kept: of a model that is being trained, and of what is known without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.places import temporary
from fastgen.evaluation.protocol import Protocol
from fastgen.evaluation.results import Missing, Row
from fastgen.evaluation.runner import Evaluation
from fastgen.evaluation.settings import Settings
from fastgen.evaluation.subjects import Subject
from fastgen.progress import Progress

Generate = Callable[[list[str], list[int], int], Tensor]  # prompts, seeds, steps -> pictures (B, 3, H, W), float in [0, 1]


class _Function(Subject):
    """A `Generate`, such as an ImageGenerator; nothing of it is known that would outlive the process."""

    def __init__(self, generate: Generate, model: Any, steps: int, guidance: float) -> None:
        self.generate, self.name, self.steps, self.guidance = generate, model, steps, guidance

    @property
    def record(self) -> dict[str, Any]:
        return {"steps": self.steps}

    @property
    def content(self) -> str:
        return ""

    def draw(self, prompts: list[str], seeds: list[int], ids: Sequence[int]) -> Tensor:
        assert self.steps is not None
        return self.generate(prompts, seeds, self.steps)


def run_protocol(
    protocol: Protocol,
    generate: Generate,
    *,
    model: str,
    steps: Sequence[int],
    guidance: float,
    batch_size: int | None = None,
    resources: Resources | None = None,
    references: Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """One row for each metric and step count, with seconds_per_1000_images and peak_memory_bytes; nothing is kept but, in the folder
    `references`, the features of real pictures.

    `model` and `guidance` are only recorded: `generate` applies its own guidance. Raises UserError for step counts or batch sizes below 1 and for
    images of a shape that the protocol does not measure, NotFinite for images that are none, ValueError when `generate` returns another number of
    images than asked for.
    """
    if not steps or min(steps) < 1 or (batch_size is not None and batch_size < 1):
        raise UserError(f"step counts and the batch size must be at least 1, got steps {list(steps)} and batch size {batch_size}")
    with temporary() as root:
        settings = Settings(root, batch_size=batch_size, references=references)
        asked: Any = {"model": model, "steps": steps, "guidance": guidance}
        return evaluated(protocol, generate, **asked, settings=settings, resources=resources, progress=progress).rows()


def evaluated(
    protocol: Protocol,
    generate: Generate,
    *,
    model: str,
    steps: Sequence[int],
    guidance: float,
    settings: Settings,
    resources: Resources | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The evaluation behind `run_protocol`, drawn as the settings say. Whoever calls it does away with their folder: another model's pictures go by
    the same names."""
    evaluation = Evaluation(protocol, resources or Resources(), settings, progress=progress, teacher=False)
    for count in steps:
        evaluation.draw(_Function(generate, model, count, guidance))
    return evaluation


class Real(NamedTuple):
    """What real images score, and the SHA-256 of each extractor that says so."""

    floors: list[Row]
    extractors: dict[str, str]


def what_is_real(protocol: Protocol, resources: Resources | None = None) -> Real:
    """The floors of a protocol, without a model."""
    with temporary() as root:
        evaluation = Evaluation(protocol, resources or Resources(), Settings(root), dry=True)
        return Real(evaluation.floors(), evaluation.extractor_hashes)


def missing_at_start(protocol: Protocol, resources: Resources, *, teacher: bool = True) -> list[Missing]:
    """What of a protocol cannot be measured here, with a teacher or without one, before anything is drawn. UserError where nothing can."""
    with temporary() as root:
        return Evaluation(protocol, resources, Settings(root), teacher=teacher, dry=True).missing

"""What a run says of itself: drift from its teacher, TensorBoard's events and warnings, without and with interruptions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_resume import TIMED, short
from test_runlog import assert_same

from fastgen import diagnostics, load_student, load_teacher, run
from fastgen.config import Recipe
from fastgen.plan import plan
from fastgen.report import write_report
from fastgen.run import building, events
from fastgen.runlog import RunLog

SMALL = ("train.batch_size=8", "train.checkpoint_every=2", "train.sample_every=2", "train.ema=0.5", "evaluate.protocol=null")


def digits(output: Path, steps: int = 6, **options: Any) -> Path:
    """A few steps of the bundled teacher's recipe."""
    return run.train(Recipe.load("digits_dmd2_1step", [*SMALL, f"train.steps={steps}"]), output, only="train", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("run") / "run")


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMED} for row in RunLog(run_dir).rows()]


def test_drift_is_that_of_the_exported_student(finished: Path, tmp_path: Path) -> None:
    rows = RunLog(finished).rows()
    names = {"drift/mean", "drift/mean_error", "drift/std", "drift/saturation", "drift/spread"}
    assert [row["step"] for row in rows if names <= row.keys()] == [2, 4, 6]
    assert not any(names & row.keys() for row in rows if row["step"] % 2)
    student, teacher = load_student(run.export(finished, tmp_path / "student")), load_teacher("fastgen:digits", guidance=1.5)
    few = building.spread(list(plan(Recipe.load("digits_dmd2_1step")).prompts or {}), 4)
    prompts = [prompt for prompt in few for _ in range(4)]
    drawn, taught = (generator(prompts, range(16)) for generator in (student, teacher))
    assert {name: rows[-1][name] for name in names} == pytest.approx(diagnostics.drift(drawn, taught, prompts), abs=1e-4)
    assert abs(rows[-1]["drift/std"] - 1) > 1e-3  # the two are not simply the same


def test_drawing_costs_no_evaluations_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = events.Samples._pictures
    monkeypatch.setattr(events.Samples, "_pictures", lambda self, generator: drawn.append(generator.steps) or draw(self, generator))
    digits(tmp_path / "run", steps=4)
    assert drawn == [25, 1, 1]  # the teacher once, then the student at each draw


def test_events_are_the_metrics(finished: Path) -> None:
    assert_same(RunLog(finished))


def test_a_resumed_run_has_the_same_rows_and_each_event_once(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    shutil.rmtree(copy / "checkpoints/step_000006")
    digits(copy, resume=True)
    assert untimed(copy) == untimed(finished)
    assert len(list((copy / "tensorboard").iterdir())) == 2
    assert_same(RunLog(copy))


def test_a_finished_run_resumed_adds_no_events(tmp_path: Path) -> None:
    output = short(tmp_path, tmp_path / "run")
    (before,) = (output / "tensorboard").iterdir()
    short(tmp_path, output, resume=True)
    assert list((output / "tensorboard").iterdir()) == [before]


def test_overwrite_removes_the_old_events(tmp_path: Path) -> None:
    output = short(tmp_path, tmp_path / "run")
    (old,) = (output / "tensorboard").iterdir()
    short(tmp_path, output, "train.seed=1", overwrite=True)
    assert not old.exists()
    assert_same(RunLog(output))


class Recorder(run.Progress):
    """Keeps warnings; interrupts after the step `interrupt`, which is no signal but ends the run at once."""

    def __init__(self, interrupt: int | None = None) -> None:
        self.warnings: list[str] = []
        self.interrupt = interrupt

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        if done == self.interrupt:
            raise KeyboardInterrupt


def test_an_interrupt_closes_the_event_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        short(tmp_path, tmp_path / "run", progress=Recorder(interrupt=3))
    assert [row["step"] for row in RunLog(tmp_path / "run").rows()] == [1, 2, 3]
    assert_same(RunLog(tmp_path / "run"))


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any student is called saturated, at its second draw."""
    monkeypatch.setattr(diagnostics, "SATURATED", -1.0)


@pytest.fixture(scope="module")
def warned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of which `strict` is true, and the warnings it showed."""
    progress, output = Recorder(), tmp_path_factory.mktemp("warned") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnostics, "SATURATED", -1.0)
        run.train(Recipe.load("digits_dmd2_1step", [*SMALL, "train.steps=6", "train.keep=3"]), output, only="train", progress=progress)
    return output, progress.warnings


def test_a_warning_goes_to_terminal_metrics_and_report_once(warned: tuple[Path, list[str]], tmp_path: Path) -> None:
    output = Path(shutil.copytree(warned[0], tmp_path / "run"))
    ((step, warning),) = [(row["step"], text) for row in RunLog(output).rows() for text in row.get("warnings", [])]
    assert step == 4 and warning.startswith("saturation: in the last two draws ") and "teacher.guidance" in warning
    assert warned[1] == [f"warning at step 4: {warning}"]
    assert f"<li>Warning at step 4: {warning.replace(chr(39), '&#39;')}</li>" in write_report(output).read_text()
    assert all(json.loads(line) for line in (output / "metrics.jsonl").open())


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("last", "repeated"), [(4, False), (2, True)], ids=["after the warning", "before the warning"])
def test_a_resumed_run_warns_as_the_whole_one_did(last: int, repeated: bool, warned: tuple[Path, list[str]], tmp_path: Path) -> None:
    (whole, _), cut, progress = warned, tmp_path / "cut", Recorder()
    shutil.copytree(whole, cut)
    for step in range(last + 2, 7, 2):
        shutil.rmtree(cut / f"checkpoints/step_{step:06d}")
    run.train(Recipe.load(whole / "recipe.yaml"), cut, only="train", resume=True, progress=progress)
    assert untimed(cut) == untimed(whole)
    assert [message[:18] for message in progress.warnings] == ["warning at step 4:"] * repeated

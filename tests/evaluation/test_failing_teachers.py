"""A teacher that fails once the student is drawn costs what needs it, and not the student's rows; a student that fails ends in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from synthetic import Painter, install
from torch import Tensor

from fastgen import cli
from fastgen.errors import CannotWrite, NotFinite, UserError
from fastgen.evaluation.subjects import Subject
from fastgen.run import evaluating

METRICS = {"level": None, "to_teacher": None}
Load = Callable[[], Subject]


class Stepped(Painter):
    """Takes any number of steps but 3; at 2 it draws what is no picture."""

    def at(self, steps: int) -> Stepped:
        if steps == 3:
            raise UserError("--steps: 3, but this student was made for 2")
        return Stepped(self.name, steps=steps, of=self._of, spoil=no_picture if steps == 2 else None)


def no_picture(images: Tensor, ids: Sequence[int]) -> Tensor:
    return images * float("nan")


def raising(error: Exception) -> Callable[..., Subject]:
    def fail(*_: object) -> Subject:
        raise error

    return fail


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`fastgen evaluate` of a painter beside a teacher; the exit status."""
    install(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    content = {"name": "small", "size": [8, 8], "sets": {"a": {"prompts": None, "count": 6}}, "metrics": METRICS}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))

    def run(teacher: Load, *words: str, student: Load = lambda: Stepped(steps=1)) -> int:
        monkeypatch.setattr(evaluating, "kind_of", lambda *_, **__: "pipeline")
        monkeypatch.setattr(evaluating, "subject_of", lambda model, *_, **__: teacher() if model == "teacher" else student())
        output = ["--output", str(tmp_path / "results.json"), "--store", str(tmp_path / "store")]
        return cli.main(["evaluate", "student", "--teacher", "teacher", "--protocol", str(tmp_path / "small.yaml"), *output, *words])

    return run


def results(folder: Path) -> tuple[list[tuple[str, str, int]], list[dict[str, str]]]:
    """Rows without costs, and what is missing."""
    content = json.loads((folder / "results.json").read_text())
    rows = [(row["name"], row["model"], row["steps"]) for row in content["metrics"] if row["model"] != "real"]
    return [row for row in rows if row[0] in METRICS], content["missing"]


FAILURES: dict[str, tuple[Load, str]] = {
    "pictures that are none": (lambda: Stepped("teacher", of="e", spoil=no_picture), "6 of 6 images that the generator returned are not finite"),
    "a broken folder": (raising(UserError("cannot read '/home/me/sd35': it is damaged")), "cannot read 'sd35': it is damaged"),
    "too large": (raising(torch.OutOfMemoryError("CUDA out of memory.\nTried")), "CUDA out of memory. Tried"),
    "pictures of another size": (lambda: Stepped("teacher", of="e", side=9), "protocol small measures images of shape (3, 8, 8)"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_students_rows_are_written(name: str, measure: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher, said = FAILURES[name]
    assert measure(teacher) == 0
    rows, missing = results(tmp_path)
    assert rows == [("level", "student", 1)]
    assert [(each["name"], each["model"]) for each in missing] == [("level", "teacher"), ("to_teacher", "student")]
    assert all(each["reason"].startswith(f"drawing by the teacher: {said}") for each in missing)
    err = capfd.readouterr().err
    assert "warning: level of the teacher is not measured: drawing by the teacher: " in err
    assert "warning: to_teacher of the student is not measured: drawing by the teacher: " in err and "Traceback" not in err


def test_a_step_count_that_a_teacher_does_not_take_costs_its_own_rows(measure: Callable[..., int], tmp_path: Path) -> None:
    assert measure(lambda: Stepped("teacher", of="e"), "--teacher-steps", "2,3,4") == 0
    rows, missing = results(tmp_path)
    assert rows == [("level", "student", 1), ("to_teacher", "student", 1), ("level", "teacher", 4)]
    assert [(each["name"], each["model"], each["reason"][:34]) for each in missing] == [
        ("level", "teacher", f"drawing by the teacher, {steps} steps: {first}") for steps, first in ((2, "6"), (3, "-"))
    ]
    (against,) = {row["against"] for row in json.loads((tmp_path / "results.json").read_text())["metrics"] if row["name"] == "to_teacher"}
    assert against == "teacher, 4 steps"


def test_a_disk_that_takes_no_more_is_no_fault_of_the_teachers(measure: Callable[..., int], tmp_path: Path) -> None:
    class Full(Stepped):
        draw = raising(CannotWrite("cannot write 'x': no space left on device; free some space and go on"))  # pyright: ignore[reportAssignmentType]

    assert measure(lambda: Full("teacher", of="e")) == 2
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("student", [lambda: Stepped(spoil=no_picture), raising(NotFinite("no picture"))])
def test_a_failing_student_ends_in_one_line(student: Load, measure: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = Stepped("teacher", of="e")
    assert measure(lambda: teacher, student=student) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("measuring ")]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert teacher.calls == [] and not (tmp_path / "results.json").exists()

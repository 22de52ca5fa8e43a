"""`fastgen.evaluate` of an exported student beside its teacher: what is drawn, what is kept, and what results.json says."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pipelines import PROMPTS, in_a_run, student_info, student_role, tiny_protocol
from pipelines import sd3_folder as sd3_folder
from torch import Tensor

from fastgen import evaluate, load_student, load_teacher_of
from fastgen.errors import UserError
from fastgen.evaluation.extraction import Part
from fastgen.evaluation.settings import Settings
from fastgen.export import export_student
from fastgen.families import source_hash
from fastgen.families.sd3 import SD3
from fastgen.generator import ImageGenerator
from fastgen.progress import Progress
from fastgen.run import PartDone, evaluating

COSTS = ("seconds_per_1000_images", "peak_memory_bytes")


@pytest.fixture(scope="module")
def student(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = SD3(sd3_folder, max_sequence_length=16)
    folder = tmp_path_factory.mktemp("run") / "student"
    return in_a_run(export_student(student_role(family), family, student_info(sd3_folder), folder), sd3_folder)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of a generator draws."""
    counts, call = [], ImageGenerator.__call__

    def counting(self: ImageGenerator, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> Tensor:
        counts.append(len(prompts))
        return call(self, prompts, seeds, steps)

    monkeypatch.setattr(ImageGenerator, "__call__", counting)
    return counts


def measure(student: Path, folder: Path, **more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"teacher_steps": [2]} | more
    return evaluate(student, protocol=tiny_protocol(folder), output=folder / "results.json", **options)


def numbers(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in results["metrics"] if row["name"] not in COSTS]


def test_a_student_is_measured_against_what_its_teacher_draws(student: Path, sd3_folder: Path, tmp_path: Path):
    results = measure(student, tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text())
    seeds = list(range(len(PROMPTS)))
    made, theirs = ((each * 255 + 0.5).floor() / 255 for each in (load_student(student)(PROMPTS, seeds), load_teacher_of(student)(PROMPTS, seeds, 2)))
    (row,) = numbers(results)
    assert (row["name"], row["model"], row["steps"], row["n"]) == ("teacher_error", "student", load_student(student).steps, 3)
    assert row["value"] == pytest.approx(float((made - theirs).double().square().flatten(1).mean(1).sqrt().mean()), rel=1e-3)
    models = [(each["model"], each["steps"], each["name"]) for each in results["metrics"] if each["name"] in COSTS]
    assert models == [(model, steps, name) for model, steps in (("student", row["steps"]), ("teacher", 2)) for name in COSTS]
    assert "missing" not in results or results["missing"] == []
    models = results["provenance"]["models"]
    assert list(models) == [f"student, {row['steps']} steps", row["against"]] and row["against"] == "teacher, 2 steps"
    assert models[row["against"]]["sha256"] == source_hash(str(sd3_folder))
    assert (models[row["against"]]["steps"], models[row["against"]]["guidance"]) == (2, load_teacher_of(student).guidance)
    assert str(tmp_path.parent) not in (tmp_path / "results.json").read_text()


def test_what_is_drawn_once_is_measured_again_without_drawing(student: Path, tmp_path: Path, drawn: list[int]):
    first = measure(student, tmp_path)
    assert drawn == [3, 3] * 2  # a warm-up and a chunk of each model
    again = measure(student, tmp_path)
    assert drawn == [3, 3] * 2 and again["metrics"] == first["metrics"]
    other = measure(student, tmp_path, teacher_steps=[3])
    assert drawn == [3, 3] * 3 and numbers(other) != numbers(first)


def test_parts_of_an_evaluation_give_the_results_of_one(student: Path, tmp_path: Path):
    whole = measure(student, tmp_path, settings=Settings(tmp_path / "one"))
    path = tmp_path / "results.json"
    path.unlink()
    with pytest.raises(PartDone, match="2 chunks of pictures wait for other parts; what is drawn is kept"):
        measure(student, tmp_path, settings=Settings(tmp_path / "two", Part(1, 2)))  # all pictures of this protocol are in one chunk
    assert not path.exists()
    assert numbers(measure(student, tmp_path, settings=Settings(tmp_path / "two", Part(0, 2)))) == numbers(whole)
    assert numbers(measure(student, tmp_path, settings=Settings(tmp_path / "two", Part(1, 2)))) == numbers(whole)


def test_a_quick_look_is_marked_and_kept_apart(student: Path, tmp_path: Path, drawn: list[int]):
    quick = measure(student, tmp_path, settings=Settings(tmp_path / "store", stop_after=2))
    assert quick["partial"] == {"stop_after": 2} and numbers(quick)[0]["n"] == 2
    assert drawn == [2, 2] * 2
    whole = measure(student, tmp_path, settings=Settings(tmp_path / "store"))
    assert "partial" not in whole and numbers(whole)[0]["n"] == 3 and drawn[4:] == [3, 3] * 2


def test_without_a_teacher_what_needs_it_is_missing(student: Path, tmp_path: Path, drawn: list[int]):
    with pytest.raises(UserError, match=r"^--teacher-steps: there is no teacher to measure$"):
        measure(student, tmp_path, teacher=False)
    with pytest.raises(UserError, match=r"nothing can be measured: teacher_error: needs the teacher's pictures, and no teacher is measured here$"):
        measure(student, tmp_path, teacher=False, teacher_steps=None)
    assert drawn == []


def test_several_numbers_of_steps_are_measured_each(student: Path, tmp_path: Path):
    own = load_student(student).steps
    results = measure(student, tmp_path, steps=[own, own + 1])
    assert [row["steps"] for row in numbers(results)] == [own, own + 1]
    assert numbers(results)[0] == numbers(measure(student, tmp_path))[0]
    assert list(results["provenance"]["models"]) == [f"student, {own} steps", f"student, {own + 1} steps", "teacher, 2 steps"]


def test_several_teachers_are_compared_with_by_the_one_of_the_most_steps(student: Path, tmp_path: Path):
    """In whichever order they are named."""
    results = measure(student, tmp_path, teacher_steps=[1, 3, 2])
    assert list(results["provenance"]["models"])[1:] == ["teacher, 1 step", "teacher, 3 steps", "teacher, 2 steps"]
    assert numbers(results)[0]["against"] == "teacher, 3 steps"
    assert numbers(results) == numbers(measure(student, tmp_path, teacher_steps=[3]))


@pytest.mark.filterwarnings("ignore:results could not be cached")
@pytest.mark.parametrize("home", ["file", "none"])
def test_a_home_that_takes_no_features_does_not_cost_the_results(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str):
    """Such as at the end of a training in a container."""
    said: list[str] = []

    class Told(Progress):
        def warn(self, message: str) -> None:
            said.append(message)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "home").touch()
    if home == "none":
        monkeypatch.setattr(Path, "home", homeless)
    results = measure(student, tmp_path, progress=Told())
    assert numbers(results)[0]["name"] == "teacher_error"
    assert sum("features are not kept" in line for line in said) == 1
    with pytest.raises(UserError, match="cannot write"):  # where somebody has asked for that place
        measure(student, tmp_path, settings=Settings(tmp_path / "home" / "store"))


def test_nothing_is_drawn_where_results_cannot_be_had(student: Path, tmp_path: Path, drawn: list[int]):
    class Told(Progress):
        stages: ClassVar[list[str]] = []

        def stage(self, message: str) -> None:
            self.stages.append(message)

    said = Told()
    with pytest.raises(UserError, match=r"^--teacher: no folder"):
        measure(student, tmp_path, teacher_dir=tmp_path / "nowhere", progress=said)
    with pytest.raises(UserError, match=r"^MODEL: no folder '.*nowhere'"):
        measure(tmp_path / "nowhere", tmp_path, progress=said)
    with pytest.raises(UserError, match=r"^unknown protocol 'tyni' \(--protocol\)"):
        evaluate(student, protocol="tyni", progress=said)
    assert drawn == [] and said.stages == []


def test_a_model_leaves_memory_before_its_teacher_comes(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    alive: list[weakref.ref[ImageGenerator]] = []
    load, initialise = evaluating.teacher_subject, ImageGenerator.__init__

    def counting(self: ImageGenerator, *args: Any, **more: Any) -> None:
        initialise(self, *args, **more)
        alive.append(weakref.ref(self))

    def loading(*args: Any, **more: Any) -> Any:
        assert len(alive) == 1 and alive[0]() is None
        return load(*args, **more)

    monkeypatch.setattr(ImageGenerator, "__init__", counting)
    monkeypatch.setattr(evaluating, "teacher_subject", loading)
    measure(student, tmp_path)
    assert len(alive) == 2

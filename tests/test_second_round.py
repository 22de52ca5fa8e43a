"""A student as the teacher of another: its guidance is inside its network already, and a few-step student is right at its own steps alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipelines import edit_json, student_info, student_role

from fastgen import run
from fastgen.caching import cache_pairs
from fastgen.config import Recipe
from fastgen.distillers import distiller_class, distiller_names
from fastgen.errors import UserError
from fastgen.export import export_student
from fastgen.families import resolve_source
from fastgen.families.sd3 import SD3
from fastgen.generator import load_teacher
from fastgen.progress import Progress
from fastgen.second_round import check_guidance, former

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the bundled digits, taught with guidance 3."""
    family = SD3(resolve_source("fastgen:digits"), size=[8, 8])
    taught = {"pretrained": "fastgen:digits", "guidance": 3.0, "negative_prompt": ""}
    info = student_info("fastgen:digits", steps=4, teacher=taught, method="reflow", recipe={"distiller": {"name": "reflow"}})
    return export_student(student_role(family), family, info, tmp_path_factory.mktemp("second") / "student")


@pytest.fixture
def student(original: Path, tmp_path: Path) -> Make:
    def make(**record: Any) -> Path:
        folder = Path(shutil.copytree(original, tmp_path / "student"))
        edit_json(folder / "fastgen.json", **record)
        return folder

    return make


def planned(folder: Path, *keys: str, name: str = "digits_reflow_1step") -> tuple[str, ...]:
    """The dry run's warnings."""
    given = [f"teacher.pretrained={folder}", "evaluate.protocol=null", *keys]
    return run.plan(Recipe.load(name, given), dry=True).warnings


def test_a_second_reflow_without_guidance_is_right(student: Make) -> None:
    folder = student()
    assert not [line for line in planned(folder, "teacher.guidance=1") if "student" in line]
    found = former(folder)
    assert found is not None
    assert (found.guidance, found.taught, found.holds_guidance, found.method, found.steps) == (1, 3, True, "reflow", 4)


@pytest.mark.parametrize("guidance", [3, 4.5])
def test_guidance_that_it_holds_already_is_refused(student: Make, tmp_path: Path, guidance: float) -> None:
    folder = student()
    said = (
        rf"{guidance}, but '{folder}' is a student whose network has its own teacher's guidance 3 inside, so it would be guided twice; set it to 1$"
    )
    with pytest.raises(UserError, match=rf"^recipe key teacher\.guidance: {said}"):
        planned(folder, f"teacher.guidance={guidance}")
    with pytest.raises(UserError, match=rf"^recipe key teacher\.guidance: {said}"):
        cache_pairs(Recipe.load("digits_reflow_1step", [f"teacher.pretrained={folder}", f"teacher.guidance={guidance}"]), tmp_path / "pairs", count=2)
    assert not (tmp_path / "pairs").exists()
    with pytest.raises(UserError, match=rf"^guidance: {said}"):
        load_teacher(folder, guidance=guidance)
    assert load_teacher(folder).guidance == 1


def test_some_guidance_on_top_is_said(student: Make, tmp_path: Path) -> None:
    """Liu et al. 2023 guide their rectified flow, which was taught with 5, by 1.5."""
    folder, told = student(), list[str]()
    said = f"teacher.guidance: 1.5, but '{folder}' is a student whose network has its own teacher's guidance 3 inside: this comes on top of it"
    assert any(line.startswith(said) for line in planned(folder, "teacher.guidance=1.5"))

    class Heard(Progress):
        def warn(self, line: str) -> None:
            told.append(line)

    given = [f"teacher.pretrained={folder}", "teacher.guidance=1.5"]
    cache_pairs(Recipe.load("digits_reflow_1step", given), tmp_path / "pairs", count=2, steps=1, progress=Heard())
    assert any(line.startswith(f"warning: {said}") for line in told)


def test_guiding_what_was_taught_without_is_said(student: Make) -> None:
    folder = student(teacher={"pretrained": "fastgen:digits", "guidance": 1.0, "negative_prompt": ""})
    said = f"teacher.guidance: 4, but '{folder}' is a student that reflow trained without guidance and to be called without; 1 is none"
    assert said in planned(folder, "teacher.guidance=4")


def test_students_that_are_called_with_guidance_take_any(student: Make) -> None:
    folder = student(guidance=3.0, method="dense2moe")
    assert check_guidance(str(folder), folder, 4.0) == []
    assert check_guidance("fastgen:digits", resolve_source("fastgen:digits"), 4.0) == []


def test_a_run_that_has_begun_goes_on(student: Make) -> None:
    """It was planned by a fastgen that said nothing; its students can still be exported."""
    given = [f"teacher.pretrained={student()}", "teacher.guidance=3", "evaluate.protocol=null"]
    run.plan(Recipe.load("digits_reflow_1step", given), started=True)


def test_a_few_step_student_is_not_asked_at_other_times_in_silence(student: Make, tmp_path: Path) -> None:
    folder = student(method="dmd2", recipe={"distiller": {"name": "dmd2"}})
    made = f"teacher.pretrained: '{folder}' is a student that dmd2 made for 4 steps, and right at the times of these alone, but "
    own = ("teacher.guidance=1", "data.pairs={count: 8}")

    def said(*keys: str, name: str = "digits_reflow_1step") -> list[str]:
        return [line.removeprefix(made) for line in planned(folder, *keys, name=name) if line.startswith(made)]

    assert said(*own) == []  # drawn as it is meant to be
    assert said(*own, "data.pairs={count: 8, steps: 4}") == []
    assert said(*own, "data.pairs={count: 8, steps: 25}") == ["pairs are drawn in 25"]
    assert said("teacher.guidance=1", name="digits_dmd2_4step") == ["dmd2 asks it at other times"]
    edit_json(folder / "fastgen.json", sampler="stochastic", grid=[1.0, 0.9, 0.5, 0.2])
    assert said(*own) == [
        "pairs are drawn at its scheduler's own times, not at its explicit ones",
        "pairs are drawn along its flow, which its sampler leaves",
    ]


def test_a_flow_may_be_asked_at_any_times(student: Make) -> None:
    folder = student()
    assert planned(folder, "teacher.guidance=1", name="digits_dmd2_4step") == planned(resolve_source("fastgen:digits"), name="digits_dmd2_4step")
    edit_json(folder / "fastgen.json", recipe={"distiller": {"name": "reflow", "times": {"name": "uniform", "lo": 1.0}}})
    assert any("reflow made for 4 steps" in line for line in planned(folder, "teacher.guidance=1", name="digits_dmd2_4step"))


def test_methods_that_leave_a_flow() -> None:
    flows = {"flow_matching", "reflow", "slimflow", "perflow", "dense2moe"}
    found = set()
    for name in distiller_names():
        method = distiller_class(name)
        given: dict[str, Any] = (
            {"phases": ({"start": 1.0, "end": 0.0},)} if name == "phased_dmd" else {"stages": ({"segments": 2},)} if name == "tscd" else {}
        )
        if method.leaves_a_flow(method.Config.model_validate({"name": name, **given})):
            found.add(name)
    assert found == flows


def test_a_record_that_is_no_students_says_nothing(student: Make) -> None:
    folder = student()
    (folder / "fastgen.json").write_text('{"steps": 4, "guidance": 1.0}', encoding="utf-8")
    assert former(folder) is None
    assert check_guidance(str(folder), folder, 5.0) == []
    (folder / "fastgen.json").write_text('{"steps": 4, "guidance": 1.0, "teacher": "a"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"fastgen\.json': key teacher: must be a JSON object"):
        former(folder)

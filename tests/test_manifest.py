"""What a student is stands in our own words, and never in the names of its pipeline's arguments; former formats are read in these words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pipelines import edit_json, record_hashes, student_info, student_role
from pipelines import sd3_folder as sd3_folder

from fastgen.errors import UserError
from fastgen.export import export_student
from fastgen.families.sd3 import SD3
from fastgen.fingerprints import SEAL, sealed
from fastgen.generator import load_student, load_teacher, load_teacher_of, read_manifest
from fastgen.manifest import upgraded

OPTIONS: dict[str, Any] = {"max_sequence_length": 16, "size": [24, 16], "shift": 2.0}
GRID = [1.0, 0.75, 0.25]


@pytest.fixture(scope="module")
def original(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = SD3(sd3_folder, **OPTIONS)
    info = student_info("fastgen:digits", steps=3, grid=GRID, guidance=1.5)
    return export_student(student_role(family), family, info, tmp_path_factory.mktemp("manifest") / "student")


@pytest.fixture
def student(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "student"))


def former(student: Path, version: int, **teacher: Any) -> None:
    """Write the record as an older fastgen did."""
    record = json.loads((student / "fastgen.json").read_text())
    kept = {key: value for key, value in record.items() if key not in (SEAL, "explicit_grid", "guidance", "options", "sampler", "inputs")}
    kept |= {"format": version, "teacher": record["teacher"] | teacher}
    (student / "fastgen.json").write_text(json.dumps(sealed(kept) if version > 1 else kept))


def settings(student: Path) -> tuple[Any, ...]:
    loaded = load_student(student)
    family: Any = loaded.family
    return loaded.steps, loaded.guidance, loaded.explicit_grid, loaded.times().tolist(), family.max_sequence_length, family.size


def test_the_record_says_what_the_student_is(original: Path) -> None:
    record = read_manifest(original)
    said = {key: record[key] for key in ("format", "steps", "guidance", "explicit_grid", "sampler", "options")}
    assert said == {"format": 3, "steps": 3, "guidance": 1.5, "explicit_grid": GRID, "sampler": "euler", "options": OPTIONS}
    assert settings(original) == (3, 1.5, GRID, GRID, 16, (24, 16))


def test_nothing_is_read_back_out_of_the_call(student: Path, original: Path) -> None:
    """On FLUX `guidance_scale` is what the network is told, and no guidance of ours."""
    before = settings(original)
    edit_json(student / "fastgen.json", call={"num_inference_steps": 9, "guidance_scale": 3.5, "height": 8, "sigmas": [0.5]})
    assert settings(student) == before
    assert load_teacher(student, **OPTIONS).steps == 3


@pytest.mark.parametrize("version", [1, 2])
def test_former_formats_are_read_in_the_same_words(student: Path, original: Path, version: int) -> None:
    former(student, version, shift=2.0)
    record = read_manifest(student)
    assert record["format"] == version
    now = read_manifest(original)
    assert {key: record[key] for key in ("guidance", "explicit_grid", "sampler", "options")} == {
        key: now[key] for key in ("guidance", "explicit_grid", "sampler", "options")
    }
    assert settings(student) == settings(original)
    own: Any = load_teacher(student).family
    assert (own.own_call, own.max_sequence_length) == ({"num_inference_steps": 3, "guidance_scale": 1.5}, 16)


def test_a_former_record_of_squares_and_no_stated_shift() -> None:
    record = {"format": 2, "call": {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 8}, "teacher": {"shift": None}}
    words = {"steps": 4, "guidance": 1.0, "options": {"size": [8, 8]}, "explicit_grid": None, "sampler": "euler", "inputs": {"prompt": []}}
    assert upgraded(record) == record | words


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance": "much"}, r"key guidance: must be a number"),
        ({"options": {"size": [8]}}, r"key options\.size: .*at least 2"),
        ({"sampler": "heun"}, r"key sampler: .*'euler' or 'stochastic'"),
        ({"explicit_grid": 3}, r"key explicit_grid: must be a list"),
        ({"options": {"frames": 5}}, r"recipe key teacher\.frames: does not apply to StableDiffusion3Pipeline"),
    ],
)
def test_a_record_that_says_something_else_is_refused(student: Path, changes: dict[str, Any], said: str) -> None:
    edit_json(student / "fastgen.json", **changes)
    with pytest.raises(UserError, match=said):
        load_student(student)


def test_a_former_record_without_its_call_is_refused(student: Path) -> None:
    former(student, 2)
    edit_json(student / "fastgen.json", call={"guidance_scale": 1.0})
    record_hashes(student)
    with pytest.raises(UserError, match=r"key call\.num_inference_steps: missing"):
        load_student(student)


def test_its_teacher_has_the_same_options(student: Path) -> None:
    edit_json(student / "fastgen.json", options={"max_sequence_length": 5, "size": [4, 8]})
    teacher = load_teacher_of(student)
    assert teacher.family.options == {"max_sequence_length": 5, "size": [4, 8]}
    assert teacher(["a handwritten seven"], [0], 1).shape == (1, 3, 4, 8)

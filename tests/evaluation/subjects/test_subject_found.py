"""What kind of subject something is, and the options that do not apply to that kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastgen.errors import UserError
from fastgen.evaluation.subjects.found import Asked, subject_of
from fastgen.evaluation.subjects.generated import GeneratorSubject
from fastgen.evaluation.subjects.stock import StockPipeline
from fastgen.families import resolve_source


def picture_folder(path: Path) -> Path:
    path.mkdir()
    Image.new("RGB", (4, 4)).save(path / "0.png")
    return path


def test_each_kind_is_found(folder_of: Any, tmp_path: Path) -> None:
    pipeline = subject_of(folder_of("tiny_ddpm"), Asked(dtype="bf16"), steps=3)
    assert isinstance(pipeline, StockPipeline) and (pipeline.name, pipeline.steps, pipeline.dtype) == ("pipeline", 3, "bf16")
    student = subject_of(resolve_source("fastgen:digits"), steps=2)  # a folder with fastgen.json
    assert isinstance(student, GeneratorSubject) and (student.name, student.steps) == ("student", 2)
    teacher = subject_of("fastgen:digits", Asked(guidance=2.0))
    assert isinstance(teacher, GeneratorSubject) and (teacher.name, teacher.steps, teacher.guidance) == ("teacher", 25, 2.0)
    assert subject_of(picture_folder(tmp_path / "drawn")).name == "pictures"
    assert subject_of(folder_of("tiny_ddpm"), steps=1, name="teacher").name == "teacher"


def test_what_is_asked_reaches_the_call(folder_of: Any) -> None:
    asked = Asked(guidance=2.0, size=(24, 16), max_sequence_length=9, call={"negative_prompt": "fog"})
    subject = subject_of(folder_of("tiny_sd3"), asked, steps=1)
    assert isinstance(subject, StockPipeline) and subject.guidance == 2.0
    wanted = {"num_inference_steps": 1, "guidance_scale": 2.0, "height": 24, "width": 16, "max_sequence_length": 9, "negative_prompt": "fog"}
    assert subject.call.arguments == wanted
    assert asked.of_teacher() == Asked(size=(24, 16))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guidance": 2.0}, "^--guidance: does not apply to an exported student, whose fastgen.json says how it is called$"),
        ({"call": {"eta": 1.0}}, "^--call: does not apply to an exported student"),
        ({"captions": Path("x")}, "^--captions: does not apply to an exported student"),
        ({"revision": "main"}, "^--revision: does not apply to an exported student"),
        ({"dtype": "fp8"}, "^--dtype: 'fp8' is no precision; .*allowed: bf16, fp16, fp32$"),
    ],
)
def test_options_of_other_kinds(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        subject_of(resolve_source("fastgen:digits"), Asked(**options))


def test_options_of_pictures(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "drawn")
    for asked, steps, said in [(Asked(guidance=2.0), None, "--guidance"), (Asked(dtype="fp16"), None, "--dtype"), (Asked(), 2, "--steps")]:
        with pytest.raises(UserError, match=f"^{said}: does not apply to a folder of pictures$"):
            subject_of(folder, asked, steps=steps)


def test_what_is_nothing_of_that(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pytorch_lora_weights.safetensors").touch()
    cases = {
        "nowhere": r"^MODEL: no folder '.*nowhere'; needed is an exported student, .*a hub id 'owner/name'$",
        "run/recipe.yaml": r"^MODEL: '.*' is a file; needed is",
        "run": r"^MODEL: '.*run' is a run; its student is '.*run/student'$",
        "other": r"^MODEL: '.*other' is not an exported student, .*: it holds pytorch_lora_weights\.safetensors$",
    }
    for name, said in cases.items():
        with pytest.raises(UserError, match=said):
            subject_of(tmp_path / name)


def test_a_hub_id_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match=r"cannot get 'owner/name' at 'v2' from the hub") as refused:
        subject_of("owner/name", Asked(revision="v2"))
    assert "recipe key" not in str(refused.value)

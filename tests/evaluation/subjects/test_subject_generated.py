"""Students and teachers as subjects: the pictures of our sampler, and everything that they depend on in the identity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PROMPTS, adapter_tuning, in_a_run, student_info, student_role, tiny_sd3
from wan import tiny_wan

from fastgen.denoiser import Denoiser, Predictor
from fastgen.errors import UserError
from fastgen.evaluation.protocol import SampleSet
from fastgen.evaluation.subjects.generated import GeneratorSubject, bundled_subject, student_subject, teacher_subject
from fastgen.export import export_lora, export_student
from fastgen.families import find_family
from fastgen.generator import ImageGenerator, load_student, load_teacher

SEEDS = [3, 4, 5]


@pytest.fixture(scope="module")
def student(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = folder_of("tiny_sd3")
    family = find_family(teacher)
    folder = export_student(student_role(family), family, student_info(teacher), tmp_path_factory.mktemp("run") / "student")
    return in_a_run(folder, teacher)


def test_a_student_draws_what_it_draws(student: Path) -> None:
    subject = student_subject(student)
    assert torch.equal(subject.draw(PROMPTS, SEEDS, range(3)), load_student(student)(PROMPTS, SEEDS))
    two = subject.at(2)
    assert torch.equal(two.draw(PROMPTS, SEEDS, range(3)), load_student(student)(PROMPTS, SEEDS, 2))
    assert (subject.name, subject.steps, two.steps, subject.guidance) == ("student", 4, 2, 1.0)
    assert two.identity == student_subject(student, steps=2).identity != subject.identity


def test_its_teacher_draws_what_it_draws(student: Path, folder_of: Any) -> None:
    subject = teacher_subject(student, steps=2)
    expected = load_teacher(folder_of("tiny_sd3"), guidance=4.0, negative_prompt="blurry")
    assert torch.equal(subject.draw(PROMPTS, SEEDS, range(3)), expected(PROMPTS, SEEDS, 2))
    assert (subject.name, subject.steps, subject.guidance) == ("teacher", 2, 4.0)
    assert subject.record["negative_prompt"] == "blurry" and subject.record["source"] == "tiny_sd3"


def test_the_record(student: Path) -> None:
    record = student_subject(student).record
    assert record == json.loads(json.dumps(record)) and str(student.parent) not in json.dumps(record)
    assert record["source"] == "student" and record["method"] == "dmd2" and record["sampler"] == "euler"
    assert record["scheduler"]["class"] == "FlowMapEulerDiscreteScheduler" and record["scheduler"]["shift"] == 3.0
    assert record["grid"] == load_student(student).times().tolist() and record["steps"] == 4


def test_identity_is_of_weights_and_settings(student: Path, folder_of: Any, tmp_path: Path) -> None:
    subject = student_subject(student)
    moved = Path(shutil.copytree(student, tmp_path / "moved"))
    assert student_subject(moved).identity == subject.identity
    family = find_family(folder_of("tiny_sd3"))
    other = export_student(student_role(family, seed=2), family, student_info(folder_of("tiny_sd3")), tmp_path / "other")
    told: dict[str, Any] = {"content": "a", "source": "s"}
    weights = subject.generator.predict
    found = [subject.identity, student_subject(other).identity, teacher_subject(student).identity, student_subject(student, dtype="bf16").identity]
    for guidance in (1.0, 2.0):
        for grid in (None, [1.0, 0.9, 0.5, 0.2]):
            generator = ImageGenerator(family, weights, steps=4, guidance=guidance, grid=grid)
            found += [GeneratorSubject(generator, "student", **told, told=more).identity for more in ({}, {"negative_prompt": "x"})]
    assert len(set(found)) == len(found)


def test_an_adapter_is_its_teacher_too(folder_of: Any, tmp_path: Path) -> None:
    teachers = [folder_of("tiny_sd3"), tmp_path / "another"]
    tiny_sd3(1).save_pretrained(teachers[1])
    family = find_family(teachers[0])
    role = student_role(family, tuning=adapter_tuning())
    found = []
    for number, teacher in enumerate(teachers):
        folder = export_lora(role, find_family(teacher), student_info(teacher), tmp_path / f"run{number}" / "student")
        subject = student_subject(in_a_run(folder, teacher))
        assert torch.equal(subject.draw(PROMPTS, SEEDS, range(3)), load_student(folder)(PROMPTS, SEEDS))
        found.append(subject.record["teacher"])
    assert found[0] != found[1]


def test_the_bundled_teacher() -> None:
    subject = bundled_subject("fastgen:digits")
    prompts = ["a handwritten seven", "an even digit"]
    assert torch.equal(subject.draw(prompts, [1, 2], range(2)), load_teacher("fastgen:digits")(prompts, [1, 2]))
    assert (subject.name, subject.steps, subject.guidance) == ("teacher", 25, 1.5)


def test_videos_are_refused() -> None:
    family = find_family(tiny_wan())
    generator = ImageGenerator(family, Predictor(Denoiser(family.load_backbone(), family), family), steps=1, name="student 'x'")
    with pytest.raises(UserError, match=r"^student 'x' draws videos of \d+ frames, and only pictures are measured$"):
        GeneratorSubject(generator, "student", content="a", source="x").check({}, whole=True)


def test_prompts_of_which_nothing_is_read(student: Path) -> None:
    samples = {"main": SampleSet("main", ("a cat", "猫"), (1, 2))}
    with pytest.raises(
        UserError, match=r"^prompts: '猫': tokenizer_3 knows none of its tokens, so it conditions on nothing$|^prompts: .*猫.*conditions on nothing"
    ):
        student_subject(student).check(samples, whole=True)
    long = {"main": SampleSet("main", ("a cat " * 90,), (1,))}
    assert any("the end is cut off 1 of 1 prompts" in line for line in student_subject(student).check(long, whole=True))

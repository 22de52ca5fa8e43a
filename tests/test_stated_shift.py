"""`teacher.shift` holds wherever a recipe's teacher is loaded again: plan, student, its teacher, cached results and pairs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pair_sets import loaded, samples_of
from pipelines import NEGATIVE, PROMPTS, adapter_tuning, card_snippet, edit_json, in_a_run, student_info, student_role
from pipelines import same_interpreter as same_interpreter
from pipelines import sd3_folder as sd3_folder

from fastgen import checkpoint, cli, inputs, run
from fastgen.caching import cache_pairs
from fastgen.config import Recipe
from fastgen.data.pair_folder import check, open_folder
from fastgen.errors import UserError
from fastgen.evaluation.subjects.generated import GeneratorSubject, bundled_subject
from fastgen.export import export_lora, export_student, verify
from fastgen.families import source_hash
from fastgen.families.sd3 import SD3
from fastgen.generator import load_student, load_teacher, load_teacher_of, read_manifest
from fastgen.outlook import dry_run
from fastgen.plan import _origin, plan
from fastgen.timesteps import down_to

TOKENS, SHIFT = 16, 2.0
TEACHER = {"guidance": 1.5, "max_sequence_length": TOKENS}
RECIPE: dict[str, Any] = {
    "student": {"steps": 2},
    "distiller": {"name": "dmd2"},
    "optimizer": {"student": {"lr": 1e-4}, "fake_score": {"lr": 1e-4}},
    "train": {"steps": 1, "batch_size": 2, "device": "cpu", "sample_every": 0},
}


@pytest.fixture
def foreign(sd3_folder: Path, tmp_path: Path) -> Path:
    """A teacher whose scheduler no diffusers can load."""
    folder = shutil.copytree(sd3_folder, tmp_path / "foreign")
    edit_json(folder / "model_index.json", scheduler=["my_schedules", "MyScheduler"])
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name="MyScheduler")
    return folder


@pytest.fixture
def recipe(foreign: Path, tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    path = tmp_path / "recipe.yaml"
    blocks = {"teacher": TEACHER | {"pretrained": str(foreign)}, "data": {"prompts": str(tmp_path / "prompts.txt")}}
    path.write_text(yaml.safe_dump(RECIPE | blocks))
    return path


def test_the_plan_refuses_a_foreign_scheduler_and_takes_a_stated_shift(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SD3, "load_backbone", lambda self, **_: pytest.fail("nothing is loaded before"))
        assert cli.main(["train", str(recipe), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: recipe key teacher.pretrained: its scheduler is my_schedules.MyScheduler, whose schedule fastgen does not know")
    assert said.count("\n") == 1
    assert dry_run(Recipe.load(recipe, ["teacher.shift=2"]))["grid"] == [1.0, round(2 / 3, 6)]
    for value, what in (
        ("0", "greater than or equal to 0.001"),
        ("-1", "greater than or equal to 0.001"),
        (".inf", "finite"),
        ("true", "boolean"),
        ("much", "number"),
    ):
        with pytest.raises(UserError, match=rf"recipe key teacher\.shift: .*{what}"):
            Recipe.load(recipe, [f"teacher.shift={value}"])


def test_a_run_records_a_stated_shift_and_only_that(recipe: Path, sd3_folder: Path) -> None:
    for overrides, stated in (([f"teacher.pretrained={sd3_folder}"], None), (["teacher.shift=2"], 2.0)):
        built = run.build(plan(Recipe.load(recipe, overrides)), run.Progress())
        recorded = built.info().teacher
        assert recorded["pretrained"] == built.plan.resolved()["teacher"]["pretrained"]
        assert {key: recorded[key] for key in recorded if key not in ("pretrained", "revision", "sha256")} == {
            "guidance": 1.5,
            "negative_prompt": "",
        }
        assert built.plan.family.options.get("shift") == stated
        assert built.trainer.distiller.setting.shift == (stated or 3.0)


def test_a_resumed_run_must_state_the_same_shift(recipe: Path, tmp_path: Path) -> None:
    before, now = (plan(Recipe.load(recipe, [f"teacher.shift={shift}"])) for shift in (2, 4))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(before.resolved()))
    inputs.check_same(run_dir, before, None)
    with pytest.raises(UserError, match=r"--resume: recipe key teacher\.shift is 4\.0, the run in .* has 2\.0"):
        inputs.check_same(run_dir, now, None)


def test_an_expert_of_another_shift_is_another_expert(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan(Recipe.load(recipe, ["teacher.shift=2"])).resolved()
    monkeypatch.setattr(checkpoint, "trained_students", lambda run_dir: (("student",), before))
    monkeypatch.setattr(checkpoint, "latest", lambda run_dir: run_dir)
    monkeypatch.setattr(checkpoint, "read_state", lambda saved: {"inputs": {}})
    for shift, differs in ((2, ()), (4, ("teacher.shift 2.0, here 4.0",))):
        assert _origin(Recipe.load(recipe, [f"teacher.shift={shift}", "student.init=before"])).differs == differs


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("as_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("grid", [None, [1.0, 0.25]], ids=["own grid", "explicit grid"])
def test_a_student_and_its_teacher_go_by_the_stated_shift(
    foreign: Path, tmp_path: Path, as_lora: bool, grid: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = SD3(foreign, max_sequence_length=TOKENS, shift=SHIFT)
    teacher = {"pretrained": str(foreign), "guidance": 4.0, "negative_prompt": NEGATIVE}
    role, info = student_role(family, tuning=adapter_tuning() if as_lora else None), student_info(foreign, steps=2, teacher=teacher, grid=grid)
    folder = in_a_run((export_lora if as_lora else export_student)(role, family, info, tmp_path / "student"), foreign)
    assert read_manifest(folder)["options"]["shift"] == SHIFT
    assert verify(folder).passed
    assert ("scheduler=None" in card_snippet(folder)) == as_lora
    student, own = load_student(folder), load_teacher_of(folder, guidance=1.0)
    assert student.times().tolist() == pytest.approx(grid or [1, 2 / 3], abs=1e-12)
    assert own.family.shift == SHIFT
    assert own.times(4).tolist() == pytest.approx([1, 6 / 7, 2 / 3, 0.4], abs=1e-12)

    combined = student.with_first_step(own, 3)
    seen: list[float] = []
    call = own.family.call
    monkeypatch.setattr(own.family, "call", lambda network, x, t, cond: (seen.append(t[0].item()), call(network, x, t, cond))[1])
    combined.latents(PROMPTS[:1], [0])
    assert seen == pytest.approx(down_to(student.times()[1].item(), 3, shift=SHIFT)[:-1].tolist(), abs=1e-12)


def test_a_student_without_a_stated_shift_follows_its_teachers_scheduler(sd3_folder: Path, tmp_path: Path) -> None:
    family = SD3(sd3_folder, max_sequence_length=TOKENS)
    role = student_role(family, tuning=adapter_tuning())
    folder = in_a_run(export_lora(role, family, student_info(sd3_folder), tmp_path / "student"), sd3_folder)
    assert "scheduler=None" not in card_snippet(folder)
    assert (load_student(folder).family.shift, load_teacher_of(folder).family.shift) == (3, 3)
    edit_json(folder / "fastgen.json", options=read_manifest(folder)["options"] | {"shift": "two"})
    for load in (load_student, load_teacher_of):
        with pytest.raises(UserError, match=r"key options\.shift: must be a number, not .two.; export the student again"):
            load(folder)


def test_features_of_a_teacher_are_told_apart_by_its_grid() -> None:
    """The same weights in the same number of steps."""
    subjects = [bundled_subject("fastgen:digits", steps=4)] + [
        GeneratorSubject(
            load_teacher("fastgen:digits", shift=shift), "teacher", content=source_hash("fastgen:digits"), source="fastgen:digits", steps=4
        )
        for shift in (None, 2.0, 3.0)
    ]
    bundled, plain, *shifted = [subject.identity for subject in subjects]
    assert bundled == plain and len({plain, *shifted}) == 3
    assert subjects[0].record["grid"] == [1.0, 0.75, 0.5, 0.25]


def test_pairs_follow_a_stated_shift_and_are_told_apart_by_it(recipe: Path, tmp_path: Path) -> None:
    stated = Recipe.load(recipe, ["teacher.shift=2"])
    store, _ = cache_pairs(stated, tmp_path / "pairs", count=2, steps=4)
    assert store.manifest.origin["teacher.shift"] == 2
    assert store.manifest.origin["the sampling grid"] == pytest.approx([1, 6 / 7, 2 / 3, 0.4], abs=1e-12)
    again, _ = cache_pairs(stated, tmp_path / "pairs", count=3, steps=4)
    assert len(again) == 3
    other = Recipe.load(recipe, ["teacher.shift=4"])
    with pytest.raises(UserError, match=r"data\.pairs: .* was drawn with teacher\.shift 2\.0, this recipe needs 4\.0; choose another folder"):
        cache_pairs(other, tmp_path / "pairs", count=3, steps=4)
    pairs = open_folder(tmp_path / "pairs")
    block, shape = dict(pairs.teacher), pairs.drawn["shape"]
    check(pairs, block, shape, "fp32")
    for shift, now in ((4.0, r"4\.0"), (None, "None")):
        with pytest.raises(UserError, match=rf"data\.pairs: .* was drawn with teacher\.shift 2\.0, this recipe has {now}"):
            check(pairs, block | {"shift": shift}, shape, "fp32")


def test_pairs_drawn_at_another_shift_are_other_samples(recipe: Path, tmp_path: Path) -> None:
    for shift in (2, 4):
        cache_pairs(Recipe.load(recipe, [f"teacher.shift={shift}"]), tmp_path / f"{shift}", count=1, steps=3)
    drawn = [samples_of(loaded(tmp_path / f"{shift}")) for shift in (2, 4)]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3
    assert torch.isfinite(drawn[0]).all()

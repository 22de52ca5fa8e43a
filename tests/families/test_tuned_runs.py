"""Runs whose teacher has adapters: what is exported, what its card loads, what `verify` runs together, and what a continuation must still have."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import PROMPTS, recipe
from pipelines import assert_shows, in_a_run, run_snippet, student_info, tiny_sd3
from pipelines import same_interpreter as same_interpreter
from safetensors.torch import load_file, save_file
from tiny_sd15 import tiny_sd15
from tiny_sdxl import tiny_sdxl
from tuned import factors, kohya, saved, stock_with

from fastgen import inputs, load_student, load_teacher_of, run
from fastgen.config import Recipe, validate
from fastgen.errors import UserError
from fastgen.evaluation.subjects.generated import student_subject, teacher_subject
from fastgen.export import Expert, export_lora, verify
from fastgen.families import adapters, find_family, source_hash
from fastgen.generator import ADAPTER_FILE, open_student, read_manifest
from fastgen.plan import _origin, plan
from fastgen.roles import LoraTuning, build_roles, student

torch.set_num_threads(1)
BUILD = {"sd": (tiny_sd15, {}), "sdxl": (tiny_sdxl, {"size": [16, 24]}), "sd3": (tiny_sd3, {"max_sequence_length": 16})}
SEEDS = [0, 1]


def tuned_recipe(name: str, root: Path, *, tune: bool, parts: Sequence[str | None] = (None,)) -> Recipe:
    """Of two steps of dmd2, whose teacher has an adapter for each of `parts` (None: all that take one), the first in kohya's keys for UNets."""
    build, options = BUILD[name]
    pipeline = build()
    pipeline.save_pretrained(root / "teacher")
    lora = []
    for i, part in enumerate(parts):
        state = factors(pipeline, seed=i, parts=None if part is None else (part,))
        file = saved(kohya(state) if i == 0 and name != "sd3" else state, root / f"style {i}.safetensors")
        lora.append({"path": str(file), "weight": 0.8 - i})
    (root / "data").mkdir()
    data = recipe(root / "teacher", "dmd2", root / "data", lora=tune, **options).dump()
    data["teacher"]["lora"] = lora
    data["export"] = {"weights": "lora" if tune else "full"}
    data["train"] |= {"checkpoint_every": 1, "sample_every": 0}
    data["evaluate"] = {"protocol": None}
    return validate(Recipe, data)


def files_of(given: Recipe) -> list[tuple[Path, float]]:
    return [(Path(each["path"]), each["weight"]) for each in given.teacher.adapters]


@pytest.mark.parametrize(
    ("name", "tune", "parts"),
    [("sd", True, (None,)), ("sdxl", True, ("text_encoder_2", "unet")), ("sd3", True, (None,)), ("sdxl", False, (None, None))],
    ids=["sd lora", "sdxl lora", "sd3 lora", "sdxl full"],
)
@pytest.mark.usefixtures("same_interpreter")
def test_a_run_verifies_and_says_what_its_teacher_was(name: str, tune: bool, parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tuned_recipe(name, tmp_path, tune=tune, parts=parts)
    folder = run.train(given, tmp_path / "run") / "student"  # which verifies
    manifest, files = read_manifest(folder), files_of(given)
    recorded = manifest["teacher"]["lora"]
    assert [(each["name"], each["weight"]) for each in recorded] == [(file.name, weight) for file, weight in files]
    assert manifest["teacher"]["sha256"] == source_hash(str(tmp_path / "teacher"), None, given.teacher.adapters)
    assert str(tmp_path) not in (folder / "fastgen.json").read_text()
    card = (folder / "README.md").read_text()
    assert f"`style 0.safetensors` at weight 0.8 (SHA-256 {recorded[0]['sha256'][:16]}" in card
    assert ("merged into these weights" in card) == (not tune)
    assert ("pipe.set_adapters(" in card) == tune
    pictures = load_student(folder)(manifest["prompts"][:1], [0])
    assert_shows(run_snippet(monkeypatch, folder), pictures)
    if tune:
        assert [load_file(folder / each["file"]).keys() for each in recorded] == [load_file(file).keys() for file, _ in files]
        bare = manifest | {"teacher": {key: value for key, value in manifest["teacher"].items() if key not in ("lora", "sha256")}}
        alone = open_student(folder, bare, teacher_dir=tmp_path / "teacher")
        assert (alone(manifest["prompts"][:1], [0]) - pictures).abs().max() > 1e-3, "the teacher's adapter must show in its student"


def test_the_teacher_beside_its_student_is_the_tuned_one(tmp_path: Path) -> None:
    given = tuned_recipe("sd", tmp_path, tune=False)
    run_dir = run.train(given, tmp_path / "run", only="train")
    folder = run.export(run_dir, run_dir / "student")
    teacher = load_teacher_of(folder, guidance=1.0)
    stock = stock_with(tmp_path / "teacher", *files_of(given))
    stock.scheduler = teacher.family.export_scheduler()
    call = teacher.family.call_arguments(teacher.steps, 1.0)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = torch.from_numpy(stock(PROMPTS, generator=generators, output_type="np", **call).images).movedim(-1, 1)
    assert (teacher(PROMPTS, SEEDS) - theirs).abs().max() <= 1e-6 * teacher.family.amplification(1.0)
    subject = teacher_subject(folder, steps=1)
    assert (
        subject.content == student_subject(folder).taught_by == read_manifest(folder)["teacher"]["sha256"] != source_hash(str(tmp_path / "teacher"))
    )
    assert subject.record["lora"] == read_manifest(folder)["teacher"]["lora"]
    (tmp_path / "run/recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"its teacher's adapter 'style 0\.safetensors' is not there, nor does a run around the student say where"):
        load_teacher_of(folder, teacher_dir=tmp_path / "teacher")
    shutil.copy(tmp_path / "style 0.safetensors", run_dir)
    load_teacher_of(folder, teacher_dir=tmp_path / "teacher")
    save_file({key: 2 * value for key, value in load_file(tmp_path / "style 0.safetensors").items()}, run_dir / "style 0.safetensors")
    with pytest.raises(UserError, match=r"its teacher's adapter '.*style 0\.safetensors' has changed since the student was trained"):
        load_teacher_of(folder, teacher_dir=tmp_path / "teacher")


@pytest.mark.usefixtures("same_interpreter")
def test_experts_change_under_the_teachers_adapter(tmp_path: Path) -> None:
    pipeline = tiny_sd3()
    pipeline.save_pretrained(tmp_path / "teacher")
    lora = [{"path": str(saved(factors(pipeline), tmp_path / "style.safetensors")), "weight": 0.6}]
    family = find_family(tmp_path / "teacher", lora=lora, max_sequence_length=16)
    roles = build_roles(
        dict.fromkeys(["student", "student_2"], student()), family, family.load_backbone(), tuning=LoraTuning(4, 12.0, family.lora_targets)
    )
    noises = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role in roles.values():
            for parameter in role.parameters().values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noises))
    info = student_info(tmp_path / "teacher")
    info.teacher["lora"] = [each.record for each in adapters.find(lora)]
    folder = export_lora([Expert(roles["student"], 0.75), Expert(roles["student_2"])], family, info, tmp_path / "student")
    in_a_run(folder, tmp_path / "teacher")
    assert 'pipe.set_adapters(["teacher_1", experts[step + 1]], [0.6, 1.0])' in (folder / "README.md").read_text()
    assert verify(folder).passed


def test_a_continuation_needs_the_same_adapters(tmp_path: Path) -> None:
    given = tuned_recipe("sd", tmp_path, tune=True)
    run_dir = run.train(given, tmp_path / "run", only="train")
    moved = shutil.copy(tmp_path / "style 0.safetensors", tmp_path / "moved.safetensors")

    def go_on(*lora: tuple[Any, float]) -> Any:
        data = given.dump()
        data["teacher"]["lora"] = [{"path": str(path), "weight": weight} for path, weight in lora] or None
        return inputs.check_same(run_dir, plan(validate(Recipe, data), only="train"), None)

    go_on((moved, 0.8))
    other = saved(factors(tiny_sd15(), seed=5), tmp_path / "other.safetensors")
    for changed in ([(moved, 0.7)], [(other, 0.8)], [(moved, 0.8), (other, 0.1)], []):
        with pytest.raises(UserError, match=r"^--resume: recipe key teacher\.lora") as error:
            go_on(*changed)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^--allow-change: teacher\.lora decides what is trained"):
        inputs.check_same(run_dir, plan(given, only="train"), None, ["teacher.lora"])
    shutil.copy(other, tmp_path / "style 0.safetensors")
    with pytest.raises(UserError, match=r"^recipe key teacher\.lora: one of the teacher's adapters has changed since the run began"):
        run.export(run_dir, tmp_path / "student")


def test_a_run_without_adapters_does_not_go_on_with_some(tmp_path: Path) -> None:
    given = tuned_recipe("sd", tmp_path, tune=True)
    data = given.dump()
    data["teacher"]["lora"] = None
    run_dir = run.train(validate(Recipe, data), tmp_path / "run", only="train")
    with pytest.raises(UserError, match=r"^--resume: recipe key teacher\.lora is \[\{.*the run in .* has None"):
        inputs.check_same(run_dir, plan(given, only="train"), None)


def test_a_student_of_another_adapter_is_taken_over_from_another_teacher(tmp_path: Path) -> None:
    given = tuned_recipe("sd", tmp_path, tune=True)
    run_dir = run.train(given, tmp_path / "run", only="train")
    data = given.dump()
    data["student"]["init"] = str(run_dir)
    assert _origin(validate(Recipe, data)).differs == ()
    data["teacher"]["lora"][0]["weight"] = 0.5
    (differs,) = _origin(validate(Recipe, data)).differs
    assert re.match(r"teacher\.lora \[\{.*0\.8.*\}\], here \[\{.*0\.5.*\}\]", differs)


def test_the_adapter_of_a_tuned_teacher_is_right_on_its_sum(tmp_path: Path) -> None:
    """The file that is exported is the student's own adapter: on the base and the teacher's it is the network that was trained."""
    given = tuned_recipe("sd", tmp_path, tune=True)
    running = run.build(plan(given), run.Progress())
    for _ in range(2):
        running.trainer.train_step()
    family = running.plan.family
    folder = export_lora(running.averaged(), family, running.info(), tmp_path / "student")
    stock = stock_with(tmp_path / "teacher", *files_of(given), (folder / ADAPTER_FILE, 1.0))
    x, t, cond = torch.randn(2, *family.latent.shape), torch.tensor([0.9, 0.4]), family.encode_prompts(PROMPTS)
    with torch.no_grad():
        ours = running.roles["student"].denoiser(x, t, cond).prediction
        assert (ours - family.call(stock.unet, x, t, cond)).abs().max() <= 2e-6
    assert json.loads((folder / "fastgen.json").read_text())["teacher"]["lora"][0]["file"] == "teacher_lora/teacher_1.safetensors"

"""The commands on the bundled teacher, with budgets of a few steps: what they print, what they write, and that the pieces fit together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pipelines import assert_shows, verifying_here
from pipelines import same_interpreter as same_interpreter

import fastgen
from fastgen import cli, generator, load_student
from fastgen.config import Recipe, shipped_recipes
from fastgen.families import source_hash
from fastgen.families.sd3 import SD3
from fastgen.generator import read_manifest
from fastgen.legibility import Legibility

RECIPE = "digits_dmd2_1step"
SMALL = ("train.batch_size=8", "evaluate.protocol=null", "train.checkpoint_every=0", "train.sample_every=2")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def run_dir(work: Path) -> Path:
    """A whole run of three steps, shared by the tests below."""
    folder = work / "run"
    with verifying_here():
        assert cli.main(["train", RECIPE, *SMALL, "train.steps=3", "--output", str(folder)]) == 0
    return folder


def test_recipes_list_names_every_recipe_with_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(shipped_recipes())
    assert all(line.split()[1] in ("fastgen", "python") for line in lines)


def test_recipes_show_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "show", RECIPE]) == 0
    assert capsys.readouterr().out.strip() == shipped_recipes()[RECIPE].read_text().strip()


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("train", "export", "verify", "sample", "evaluate", "report", "recipes", "doctor"))


def parameters() -> int:
    return sum(p.numel() for p in SD3("fastgen:digits").load_backbone(meta=True).parameters())


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["train.micro_batch=32"], ["student full {all:,} trained", "fake_score full {all:,} trained", "in 4 micro-batches"]),
        (["student.tune.lora.rank=2"], ["student LoRA rank 2", "fake_score LoRA rank 2"]),
        (["student.steps=2", "student.grid=[1.0, 0.25]"], ["grid [1.0, 0.25] (2 network evaluations)"]),
    ],
    ids=["full", "lora", "grid"],
)
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    overrides: list[str], lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", RECIPE, *overrides, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    printed = " ".join(out.split())
    always = ["method dmd2", "teacher fastgen:digits (SD3)", "role teacher frozen 0 trained parameters", " MiB ", "grid [1.0"]
    for line in [*always, *lines]:
        assert line.format(all=parameters()) in printed
    assert err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_holds_everything(run_dir: Path) -> None:
    assert {path.name for path in run_dir.iterdir()} == {
        ".lock",
        "run.json",
        "recipe.yaml",
        "inputs.json",
        "metrics.jsonl",
        "samples",
        "checkpoints",
        "student",
        "report.html",
        "tensorboard",
    }
    resolved = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    assert resolved["train"]["steps"] == 3
    assert resolved["distiller"]["weight"] == "normalised"  # the method's defaults are filled in
    assert Recipe.load(run_dir / "recipe.yaml").train.batch_size == 8
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"loss/critic", "loss/match", "grad_norm/student", "lr/fake_score", "seconds"} <= rows[0].keys()
    assert [path.name for path in sorted((run_dir / "samples").iterdir())] == ["step_000002.png", "step_000003.png"]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000003"]
    assert (run_dir / "report.html").read_text().startswith("<!")


def test_the_student_is_a_pipeline_with_its_call(run_dir: Path) -> None:
    manifest = read_manifest(run_dir / "student")
    assert manifest["call"] == {"num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 8, "height": 8, "width": 8}
    origin = {"pretrained": "fastgen:digits", "revision": None, "guidance": 1.5, "negative_prompt": ""}
    assert manifest["teacher"] == origin | {"sha256": source_hash("fastgen:digits")}
    assert json.loads((run_dir / "student/model_index.json").read_text())["_class_name"] == "StableDiffusion3Pipeline"
    assert not list((run_dir / "student").rglob("*.bin"))


@pytest.mark.usefixtures("same_interpreter")
def test_verify_says_how_close_plain_diffusers_is(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(run_dir / "student")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("verified: 4 pictures differ by at most ")
    assert err == ""


@pytest.mark.parametrize(("options", "steps"), [([], None), (["--steps", "2"], 2)], ids=["own steps", "2 steps"])
def test_sample_draws_what_load_student_draws(
    options: list[str], steps: int | None, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts, file = ["the digit two", "an odd digit"], tmp_path / "row.png"
    arguments = [word for prompt in prompts for word in ("--prompt", prompt)]
    capfd.readouterr()
    assert cli.main(["sample", str(run_dir / "student"), *arguments, "--seed", "5", *options, "--output", str(file)]) == 0
    assert capfd.readouterr() == (f"picture: {file}\n", "")
    expected = load_student(run_dir / "student")(prompts, [5, 6], steps)
    assert_shows(np.asarray(Image.open(file)), torch.cat(list(expected), dim=2)[None])


def test_the_teacher_takes_the_first_step(run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompts, file = ["the digit two", "any digit"], tmp_path / "row.png"
    options = ["--steps", "3", "--first-step-from-teacher", "4"]
    arguments = [word for prompt in prompts for word in ("--prompt", prompt)]
    student = load_student(run_dir / "student")
    shown = []
    for guidance in (None, 3.0):
        given = [] if guidance is None else ["--first-step-guidance", str(guidance)]
        capfd.readouterr()
        assert cli.main(["sample", str(run_dir / "student"), *arguments, "--seed", "5", *options, *given, "--output", str(file)]) == 0
        assert capfd.readouterr() == (f"picture: {file}\n", "")
        teacher = fastgen.load_teacher("fastgen:digits", guidance=guidance or 1.0)
        expected = student.with_first_step(teacher, 4)(prompts, [5, 6], 3)
        assert_shows(np.asarray(Image.open(file)), torch.cat(list(expected), dim=2)[None])
        shown.append(expected)
    alone = student(prompts, [5, 6], 3)
    assert min((shown[0] - alone).abs().max(), (shown[1] - alone).abs().max(), (shown[0] - shown[1]).abs().max()) > 1e-2


def test_a_student_of_one_step_has_no_place_for_the_teachers(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastgen.generator.load_teacher", lambda *_, **__: pytest.fail("the teacher was loaded first"))
    arguments = ["sample", str(run_dir / "student"), "--prompt", "any digit", "--output", str(tmp_path / "new.png")]
    capfd.readouterr()
    assert cli.main([*arguments, "--first-step-from-teacher", "4"]) == 2
    out, err = capfd.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("error: --first-step-from-teacher: a student that takes 1 step")
    assert "--steps 2 or more" in err
    assert list(tmp_path.iterdir()) == []


def test_report_is_written_where_it_is_told(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run_dir), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text()
    assert "dmd2" in page
    assert "The student has not been evaluated." in page


def test_report_of_two_runs_is_a_comparison(run_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints", "student")))
    assert cli.main(["report", str(run_dir), str(other), "--output", str(tmp_path / "both.html")]) == 0
    assert "Comparison of 2 runs" in (tmp_path / "both.html").read_text()


def test_export_again_gives_the_same_student(run_dir: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert cli.main(["export", str(run_dir), "--output", str(again)]) == 0
    files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(run_dir / "student") for path in (run_dir / "student").rglob("*") if path.is_file())
    assert all((again / file).read_bytes() == (run_dir / "student" / file).read_bytes() for file in files)


def test_a_finished_run_resumed_changes_no_number(run_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    arguments = ["train", RECIPE, *SMALL, "train.steps=3", "--output", str(copy), "--only", "train"]
    assert cli.main([*arguments, "--resume"]) == 0
    assert (copy / "metrics.jsonl").read_text() == (run_dir / "metrics.jsonl").read_text()
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert not (copy / "student").exists()
    again, before = ([json.loads(line)["loss/match"] for line in (folder / "metrics.jsonl").open()] for folder in (copy, run_dir))
    assert again == before


@pytest.mark.usefixtures("same_interpreter")
def test_a_lora_run_exports_its_adapter_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, student, merged = tmp_path / "run", tmp_path / "student", tmp_path / "merged"
    overrides = ["train.steps=2", "student.tune.lora.rank=2", "optimizer.student.lr=0.05", "optimizer.fake_score.lr=0.05"]
    assert cli.main(["train", RECIPE, *SMALL, *overrides, "--output", str(run), "--only", "train"]) == 0
    assert cli.main(["export", str(run), "--output", str(student), "--lora"]) == 0
    assert cli.main(["export", str(run), "--output", str(merged)]) == 0
    assert {path.name for path in student.iterdir()} == {"README.md", "fastgen.json", "pytorch_lora_weights.safetensors", "scheduler"}
    capfd.readouterr()
    assert cli.main(["verify", str(student)]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("verified: 4 pictures")
    assert err == ""
    prompts, seeds = ["any digit", "the digit two"], [0, 1]
    adapter, whole = (load_student(folder)(prompts, seeds) for folder in (student, merged))
    assert (adapter - whole).abs().max() <= 1e-5
    teacher = fastgen.load_teacher("fastgen:digits", steps=1, guidance=1.0)
    assert (teacher(prompts, seeds) - whole).abs().max() > 1e-4


def test_python_m_fastgen_is_the_program() -> None:
    root = Path(fastgen.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "TERM": "dumb", "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-m", "fastgen", "--help"], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "fastgen" in done.stdout
    assert "evaluate" in done.stdout


def test_sample_writes_a_film_strip_and_a_moving_file_of_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Student:
        family = SimpleNamespace(legibility=lambda prompts: Legibility(len(prompts)), frame_rate=16)

        def with_own_sampler(self) -> Student:
            return self

        def __call__(self, prompts: list[str], seeds: list[int], steps: int | None) -> torch.Tensor:
            frames = torch.arange(5)[:, None, None] / 100
            return torch.stack([(seed / 10 + frames).expand(3, 5, 4, 6) for seed in seeds])

    monkeypatch.setattr(generator, "load_student", lambda folder, **_: Student())
    out = tmp_path / "boat.png"
    assert cli.main(["sample", str(tmp_path), "--prompt", "a boat", "--prompt", "a cat", "--seed", "2", "--output", str(out)]) == 0
    with Image.open(out) as strip, Image.open(tmp_path / "boat.webp") as moving:
        assert strip.size == (4 * 6, 2 * 4)
        assert (moving.n_frames, moving.size) == (5, (12, 4))  # type: ignore[attr-defined]
        assert strip.getpixel((0, 0)) == (51, 51, 51) and strip.getpixel((0, 7)) == (77, 77, 77)

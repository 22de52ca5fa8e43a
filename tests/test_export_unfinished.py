"""`fastgen export` of a run that has not come to its end: what is refused, what is recorded, and what the student is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pipelines import PROMPTS, tiny_protocol
from pipelines import same_interpreter as same_interpreter
from pipelines import sd3_folder as sd3_folder
from safetensors.torch import load_file

from fastgen import checkpoint, cli, report, run
from fastgen.config import Recipe, validate
from fastgen.generator import load_student, read_manifest
from fastgen.plan import plan

STEPS = 4  # two a phase
TWO_PHASES = {"name": "phased_dmd", "critic_updates": 1, "phases": [{"start": 1.0, "end": 0.75}, {"start": 0.75, "end": 0.0}]}
FULL, LORA = "full", {"lora": {"rank": 2, "alpha": 3.0}}


def recipe(teacher: Path, folder: Path, distiller: dict[str, Any], tune: Any) -> dict[str, Any]:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return {
        "teacher": {"pretrained": str(teacher), "guidance": 1.5, "max_sequence_length": 16},
        "student": {"steps": 4, "tune": tune},
        "distiller": distiller,
        "data": {"prompts": str(folder / "prompts.txt")},
        "optimizer": {"student": {"lr": 0.01}, "fake_score": {"lr": 0.01}},
        "train": {"steps": STEPS, "batch_size": 2, "ema": 0.5, "checkpoint_every": 0, "sample_every": 0, "device": "cpu"},
        "evaluate": {"protocol": None},
    }


def run_folders(folder: Path, data: dict[str, Any]) -> dict[int, Path]:
    """The run folders that interruptions after 0, 1, ... steps leave, and the finished one's."""
    planned = plan(validate(Recipe, data))
    made, folders = run.build(planned, run.Progress()), {}
    for step in range(STEPS + 1):
        folders[step] = folder / str(step)
        checkpoint.save(folders[step] / "checkpoints", made.trainer, planned.resolved(), keep=1)
        (folders[step] / "recipe.yaml").write_text(yaml.safe_dump(planned.resolved()))
        (folders[step] / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        if step < STEPS:
            made.trainer.train_step()
    return folders


@pytest.fixture(scope="module", params=[FULL, LORA], ids=["full", "lora"])
def phased(request: Any, sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, Path], list[str]]:
    """Run folders of two phases by their step, and the options of their export."""
    folder = tmp_path_factory.mktemp("phased")
    return run_folders(folder, recipe(sd3_folder, folder, TWO_PHASES, request.param)), [] if request.param == FULL else ["--lora"]


def export(run_dir: Path, output: Path, *options: str) -> int:
    return cli.main(["export", str(run_dir), "--output", str(output), *options])


@pytest.mark.parametrize(
    ("step", "options", "named"),
    [
        (1, [], ("phase 2", "not begun", "student_2", "step 1")),
        (1, ["--unfinished"], ("phase 2", "not begun", "student_2", "step 1")),
        (2, ["--unfinished"], ("phase 2", "not begun", "student_2", "step 2")),
        (0, ["--unfinished"], ("phase 1", "not begun", "student ", "step 0")),
        (3, [], ("phase 2", "not over", "student_2", "step 3", "1 of its 2 steps", "--unfinished")),
    ],
)
def test_what_is_still_the_teacher_is_refused(
    step: int,
    options: list[str],
    named: tuple[str, ...],
    phased: tuple[dict[int, Path], list[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folders, form = phased
    assert export(folders[step], tmp_path / "student", *form, *options) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all(text in line for text in named), line
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("same_interpreter")
def test_a_phase_that_has_begun_is_exported_on_demand_and_recorded(
    phased: tuple[dict[int, Path], list[str]], sd3_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folders, form = phased
    folder = tmp_path / "student"
    assert export(folders[3], folder, *form, "--unfinished") == 0
    assert "`student_2` had trained 1 of its 2 steps" in capfd.readouterr().out
    assert read_manifest(folder)["unfinished"] == {"student_2": {"step": 1, "of": 2}}
    card = (folder / "README.md").read_text()
    assert "Exported before the end of training: `student_2` had trained 1 of its 2 steps." in card
    assert cli.main(["verify", str(folder), "--teacher", str(sd3_folder)]) == 0
    # The picture is that of the checkpoint's averages, experts in turn.
    state = checkpoint.read_state(checkpoint.latest(folders[3]))
    made = run.build(plan(validate(Recipe, state["recipe"]), started=True), run.Progress())
    checkpoint.load(checkpoint.latest(folders[3]), made.trainer)
    with made.trainer.ema.applied():
        expected = made.generator("student")(PROMPTS[:2], [0, 1])
    assert (load_student(folder, teacher_dir=sd3_folder)(PROMPTS[:2], [0, 1]) - expected).abs().max() <= 1e-5


def test_a_finished_run_is_exported_without_a_flag_or_a_word(phased: tuple[dict[int, Path], list[str]], tmp_path: Path) -> None:
    folders, form = phased
    for name, options in (("plain", []), ("flagged", ["--unfinished"])):
        assert export(folders[STEPS], tmp_path / name, *form, *options) == 0
        assert "unfinished" not in read_manifest(tmp_path / name)
        assert "before the end" not in (tmp_path / name / "README.md").read_text()


@pytest.fixture(scope="module")
def single(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("single")
    return run_folders(folder, recipe(sd3_folder, folder, {"name": "dmd2", "critic_updates": 1}, FULL))


def test_a_single_student_is_exported_where_it_stands_and_the_card_says_where(single: dict[int, Path], tmp_path: Path) -> None:
    folder = tmp_path / "student"
    assert export(single[1], folder) == 0
    assert read_manifest(folder)["unfinished"] == {"student": {"step": 1, "of": STEPS}}
    assert f"`student` had trained 1 of its {STEPS} steps" in (folder / "README.md").read_text()
    average = load_file(checkpoint.latest(single[1]) / "ema_student.safetensors")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    exported = load_file(weights)
    assert all(torch.equal(exported[name], value) for name, value in average.items() if name in exported)
    assert export(single[STEPS], tmp_path / "finished") == 0
    assert "unfinished" not in read_manifest(tmp_path / "finished")


def test_a_run_without_a_step_has_no_student(single: dict[int, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert export(single[0], tmp_path / "student", "--unfinished") == 2
    assert "training has not begun at step 0, so student is still" in capfd.readouterr().err


def test_results_and_report_say_that_a_student_is_unfinished(single: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = Path(shutil.copytree(single[1], tmp_path / "run"))
    run.export(run_dir, run_dir / "student")
    monkeypatch.setenv("HOME", str(tmp_path))
    results = run.evaluate(run_dir / "student", protocol=tiny_protocol(tmp_path), output=run_dir / "results.json", teacher_steps=[1])
    assert results["provenance"]["unfinished"] == {"student": {"step": 1, "of": STEPS}}
    assert json.loads((run_dir / "results.json").read_text())["provenance"] == results["provenance"]
    assert f"`student` had trained 1 of its {STEPS} steps" in report.write_report(run_dir).read_text()

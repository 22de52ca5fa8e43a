"""What a run logs of how straight its flows are, before and after: `fastgen straightness`'s own number, and nothing of it in what is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgen import run
from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.plan import plan
from fastgen.report import write_report
from fastgen.runlog import read_rows
from fastgen.straightness import Measured, flow_times, follow, summary

SMALL = ["train.batch_size=4", "train.steps=2", "train.checkpoint_every=1", "evaluate.protocol=null", "train.device=cpu", "train.sample_every=0"]
LAST = "checkpoints/step_000002/ema_student.safetensors"


def recipe(*overrides: str, name: str = "digits_reflow_1step") -> Recipe:
    return Recipe.load(name, [*SMALL, "data.pairs=8", "distiller.straightness=6", *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.train(recipe(), tmp_path_factory.mktemp("straight") / "run", only="train")


def test_the_last_row_says_both(whole: Path) -> None:
    first, last = read_rows(whole / "metrics.jsonl")
    assert not [name for name in first if name.startswith("straightness")]
    noted = json.loads((whole / "run.json").read_text(encoding="utf-8"))["straightness"]
    assert noted["samples"] == 6 and last["straightness/teacher"] == pytest.approx(noted["straightness"], rel=1e-5)
    assert last["straightness/student"] != last["straightness/teacher"]
    page = write_report(whole).read_text(encoding="utf-8")
    assert f"{last['straightness/student']:.3f}" in page and f"teacher: {last['straightness/teacher']:.3f}; 0 is straight" in page


def test_it_is_the_number_of_the_guided_teacher_from_streams_of_its_own(whole: Path) -> None:
    from fastgen.rng import SampleRng

    running = run.build(plan(recipe("distiller.straightness=0"), only="train"), run.Progress())
    assert running.straightness is None
    setting, teacher = running.trainer.distiller.setting, running.roles["teacher"].predictor
    rng = SampleRng(0, ("straightness",), range(6))  # at once, where the run takes four and two
    cond = running.data.draw(rng.at("data")).cond
    noise, times = rng.normal("noise", setting.shape), flow_times(teacher.path, 16)
    found = summary(Measured.of([follow(setting.guide(teacher), noise, times, cond)]), noise_end=1.0, guidance=1.5, steps=16)
    noted = json.loads((whole / "run.json").read_text(encoding="utf-8"))["straightness"]
    assert noted["straightness"] == pytest.approx(found.straightness, rel=1e-4)
    assert noted["one_step_error"] == pytest.approx(found.one_step_error, rel=1e-4)


def test_what_is_trained_does_not_know_of_it(whole: Path, tmp_path: Path) -> None:
    without = run.train(recipe("distiller.straightness=0"), tmp_path / "run", only="train")
    assert not [name for row in read_rows(without / "metrics.jsonl") for name in row if name.startswith("straightness")]
    got, want = (load_file(folder / LAST) for folder in (without, whole))
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_continuation_knows_what_the_teacher_was(whole: Path, tmp_path: Path) -> None:
    resumed = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(resumed / "checkpoints/step_000002")
    run.train(recipe(), resumed, resume=True, only="train")
    rows = [read_rows(folder / "metrics.jsonl")[-1] for folder in (resumed, whole)]
    for name in ("straightness/teacher", "straightness/student"):
        assert rows[0][name] == rows[1][name]
    shutil.rmtree(resumed / "checkpoints/step_000002")
    run.train(recipe("distiller.straightness=0"), resumed, resume=True, only="train")  # no number that is trained


def test_a_smaller_student_is_compared_with_its_whole_teacher(whole: Path) -> None:
    running = run.build(plan(recipe("distiller.name=slimflow", "student.shrink.depth=0.5"), only="train"), run.Progress())
    noted = json.loads((whole / "run.json").read_text(encoding="utf-8"))["straightness"]
    assert running.straightness == noted


def test_one_step_alone_has_no_flow_and_one_sample_no_error() -> None:
    planned = plan(recipe("distiller.times.lo=1"), only="train")
    assert planned.method.straightness_of(planned.method_config) == 0
    with pytest.raises(UserError, match=r"^recipe key distiller\.straightness: of 1 sample there is no error to tell"):
        plan(recipe("distiller.straightness=1"))

"""Interrupted runs, with real signals to real processes: what is resumed ends as if nothing had happened, and nothing is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastgen import cli, run, tensor_files
from fastgen.config import Recipe
from fastgen.errors import CannotWrite, TrainingFailed

STEPS, EVERY = 400, 25
OVERRIDES = ["student.grid=[0.9, 0.5]", "optimizer.student.schedule=cosine"]
# Free of timings, so equal in equal runs
TIMED = ("seconds", "samples_per_second")


def write_recipe(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("0\n")
    path = folder / "toy recipe.yaml"
    path.write_text(
        f"""
teacher: {{pretrained: "toy:gaussian"}}
student: {{steps: 2}}
distiller: {{name: dmd2, critic_updates: 1}}
data: {{prompts: "{folder / "prompts.txt"}"}}
optimizer: {{student: {{lr: 1.0e-3}}, fake_score: {{lr: 2.0e-3, betas: [0.5, 0.9]}}}}
train: {{steps: {STEPS}, batch_size: 8, ema: 0.99, checkpoint_every: {EVERY}, device: cpu}}
"""
    )
    return path


def arguments(recipe: Path, output: Path, *more: str) -> list[str]:
    return ["train", str(recipe), *OVERRIDES, "--output", str(output), "--only", "train", *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs in a folder with spaces")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An uninterrupted run."""
    output = folder / "whole"
    assert cli.main(arguments(write_recipe(folder), output)) == 0
    return output


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.is_file() else 0


def digest(run_dir: Path) -> dict[str, str]:
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in run_dir.rglob("*") if path.is_file()}


def assert_same_end(resumed: Path, whole: Path) -> None:
    """Equal final weights, averages and moments, bit for bit, and the same metrics, each step once."""
    end = f"checkpoints/step_{STEPS:06d}"
    files = sorted(path.name for path in (whole / end).glob("*.safetensors"))
    assert {"ema_student.safetensors", "role_student.safetensors", "role_fake_score.safetensors", "optimizer_student.safetensors"} <= set(files)
    assert sorted(path.name for path in (resumed / end).glob("*.safetensors")) == files
    for name in files:
        got, want = load_file(resumed / end / name), load_file(whole / end / name)
        assert got.keys() == want.keys()
        assert not [key for key in want if not torch.equal(got[key], want[key])], name
    logs = [[{key: value for key, value in line.items() if key not in TIMED} for line in metrics(path)] for path in (resumed, whole)]
    assert [line["step"] for line in logs[0]] == list(range(1, STEPS + 1))
    assert logs[0] == logs[1]


@pytest.fixture
def started(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A training process that is well past its second checkpoint, and its run folder."""
    output = folder / request.node.name
    environment = {**os.environ, "PYTHONPATH": str(Path(run.__file__).parents[2])}
    command = [sys.executable, "-m", "fastgen", *arguments(write_recipe(folder), output)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 240
            while num_lines(output / "metrics.jsonl") < 2 * EVERY + 5:
                assert process.poll() is None, f"ended too early: {process.communicate()}"
                assert time.monotonic() < deadline, "did not start to train"
                time.sleep(0.01)
            yield process, output
        finally:
            process.kill()


def test_a_killed_run_resumes_bit_for_bit(started: tuple[subprocess.Popen[str], Path], folder: Path, whole: Path) -> None:
    process, output = started
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 2 * EVERY < num_lines(output / "metrics.jsonl") < STEPS
    assert not (output / f"checkpoints/step_{STEPS:06d}").exists()
    assert cli.main(arguments(write_recipe(folder), output, "--resume")) == 0
    assert_same_end(output, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_says_how_to_go_on_and_loses_nothing(started: tuple[subprocess.Popen[str], Path], whole: Path, number: signal.Signals) -> None:
    process, output = started
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Traceback" not in out + err
    lines = out.strip().splitlines()
    step = metrics(output)[-1]["step"]
    assert step < STEPS
    assert lines[-2] == f"stopped at step {step} by {number.name}; checkpoint saved. To go on:"
    assert (output / f"checkpoints/step_{step:06d}/state.json").is_file()
    program, *words = shlex.split(lines[-1])
    assert program == "fastgen"
    assert cli.main(words) == 0  # the printed command itself
    assert_same_end(output, whole)


def short(folder: Path, output: Path, *overrides: str, **options: Any) -> Path:
    """A short run in this process."""
    recipe = Recipe.load(write_recipe(folder), ["train.steps=6", "train.checkpoint_every=2", *overrides])
    return run.train(recipe, output, only="train", **options)


def final(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints/step_000006/ema_student.safetensors")


def test_saving_beside_training_changes_no_number(tmp_path: Path) -> None:
    plain, beside = short(tmp_path, tmp_path / "plain"), short(tmp_path, tmp_path / "beside", "train.save_beside=true")
    names = [sorted(path.relative_to(run_dir) for path in run_dir.glob("checkpoints/*/*")) for run_dir in (plain, beside)]
    assert names[0] == names[1] and len(names[0]) == 2 * 6
    tensors = {name: (plain / name).read_bytes() for name in names[0] if name.suffix == ".safetensors"}
    assert all((beside / name).read_bytes() == content for name, content in tensors.items())
    assert short(tmp_path, beside, resume=True) == beside  # and the key may change


def test_a_disk_that_is_full_when_a_run_is_stopped_is_not_said_to_hold_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # while the first checkpoint is written
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(CannotWrite, match=r"cannot write .*step_00000\d': no space left on device"):
        short(tmp_path, tmp_path / "run", "train.save_beside=true")


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    output = short(tmp_path, tmp_path / "run")
    want = final(output)
    shutil.rmtree(output / "checkpoints")
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[:3]))
    short(tmp_path, output, resume=True)
    assert [line["step"] for line in metrics(output)] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(value, want[key]) for key, value in final(output).items())


def test_a_line_torn_by_the_kill_is_dropped(tmp_path: Path) -> None:
    output = short(tmp_path, tmp_path / "run")
    shutil.rmtree(output / "checkpoints/step_000006")
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    short(tmp_path, output, resume=True)
    assert [line["step"] for line in metrics(output)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_resumes_to_itself_and_may_keep_fewer_checkpoints(tmp_path: Path) -> None:
    output = short(tmp_path, tmp_path / "run")
    before = digest(output)
    short(tmp_path, output, "train.keep=1", "train.checkpoint_every=3", resume=True)
    after = digest(output)
    assert {key for key in before if before[key] != after[key]} == {"recipe.yaml", "run.json"}


def test_overwrite_replaces_the_run(tmp_path: Path) -> None:
    output = short(tmp_path, tmp_path / "run")
    (output / "report.html").write_text("of the old run")
    short(tmp_path, output, "train.seed=1", overwrite=True)
    assert not (output / "report.html").exists()
    assert [line["step"] for line in metrics(output)] == [1, 2, 3, 4, 5, 6]


def test_refused_commands_change_nothing(whole: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, before = write_recipe(folder), digest(whole)
    (folder / "bad.txt").write_text("7\n")
    refused = [
        ([], "already holds a run; pass --resume"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--resume", "train.seed=1"], "--resume: recipe key train.seed is 1,"),
        (["--resume", "train.steps=600"], "--resume: recipe key train.steps is 600,"),
        (["--resume", "optimizer.fake_score.lr=1"], "--resume: recipe key optimizer.fake_score.lr is 1.0,"),
        (["--resume", "distiller.critic_updates=2"], "--resume: recipe key distiller.critic_updates is 2,"),
        (["--resume", "distiller.weight=kl"], "--resume: recipe key distiller.weight is 'kl',"),
        (["--overwrite", "train.stepz=5"], "recipe key train.stepz: unknown key"),
        (["--overwrite", "distiller.name=dmd22"], "recipe key distiller.name: 'dmd22' is not a method"),
        (["--overwrite", "data.prompts=nowhere.txt"], "recipe key data.prompts: no file 'nowhere.txt'"),
        (["--overwrite", f"data.prompts={folder / 'bad.txt'}"], "a closed-form teacher's prompt is"),
        (["--overwrite", "train.device=tpu"], "recipe key train.device: "),
    ]
    for more, message in refused:
        assert cli.main(arguments(recipe, whole, *more)) == 2, more
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
        assert digest(whole) == before, more


def test_folders_that_are_not_runs_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, mine = write_recipe(tmp_path), tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for more, message in [([], "holds other files and no run"), (["--overwrite"], "holds other files"), (["--resume"], "holds no run to resume")]:
        assert cli.main(arguments(recipe, mine, *more)) == 2
        assert message in capsys.readouterr().err
    assert cli.main(arguments(recipe, tmp_path / "new", "--resume")) == 2
    assert not (tmp_path / "new").exists()
    assert digest(mine) == {"thesis.tex": hashlib.sha256(b"years of work").hexdigest()}


class Finishing(run.Progress):
    """Counts how often counted work began and ended: a bar left running hides the terminal's cursor."""

    started = finished = 0

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.started += 1

    def finish(self) -> None:
        self.finished += 1


def test_a_diverging_run_ends_its_bar_and_writes_no_checkpoint_of_it(tmp_path: Path) -> None:
    progress = Finishing()
    with pytest.raises(TrainingFailed, match=r"role 'student' has diverged: .* newest sound checkpoint: none; start again"):
        short(tmp_path, tmp_path / "run", "optimizer.student.lr=1.0e+18", "train.checkpoint_every=1", progress=progress)
    assert (progress.started, progress.finished) == (1, 1)
    assert not (tmp_path / "run/checkpoints").exists()


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("0\n")
    mine = tmp_path / "run"
    command = ["train", "digits_dmd2_1step", "teacher.pretrained=toy:gaussian", "teacher.guidance=1", f"data.prompts={prompts}"]
    command += ["train.steps=1", "train.batch_size=2", "evaluate.protocol=null", "--only", "train"]
    assert cli.main([*command, "--output", str(mine)]) == 0
    (mine / "notes.txt").write_text("mine")
    assert cli.main([*command, "--output", str(mine), "--overwrite"]) == 0
    assert (mine / "notes.txt").read_text() == "mine"
    before = (mine / "recipe.yaml").read_text()
    capsys.readouterr()
    assert cli.main(["train", str(mine / "recipe.yaml"), "--output", str(mine), "--overwrite", "--only", "train"]) == 2
    assert "holds the recipe itself" in capsys.readouterr().err
    assert (mine / "recipe.yaml").read_text() == before

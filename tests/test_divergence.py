"""Runs that diverge: who did, from which checkpoint to go on, and that none is written with weights that are not finite."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pipelines import sd3_folder as sd3_folder
from safetensors.torch import load_file, save_file
from toy_runs import optimizer_block, toy_method, toy_setting, toy_trainer

from fastgen import cli, run
from fastgen.data.rows import Held
from fastgen.distillers.dmd2 import DMD2
from fastgen.distillers.flow_matching import FlowMatching
from fastgen.distillers.scm import SCM
from fastgen.errors import TrainingFailed
from fastgen.families.toy import Toy
from fastgen.trainer import Trainer

FINE = optimizer_block(lr=1e-3)
NAN = float("nan")


def trainer(method: Any, lrs: dict[str, float], **config: Any) -> Trainer:
    family = Toy("toy:mixture", width=16)
    made = toy_method(method, toy_setting(family, guidance=1.5, negative="1"), **config)
    latents = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) if method.needs_latents(made.config) else None
    names = [name for name, spec in made.roles_for(made.config).items() if spec.trainable]
    optimizers = {name: optimizer_block(lr=1e-3, clip=None).model_copy(update={"lr": lrs.get(name, 1e-3)}) for name in names}
    return toy_trainer(made, family, prompts=["", "0"], latents=latents, optimizers=optimizers, steps=50)


def plant(parameters: Any) -> None:
    with torch.no_grad():
        parameters[-1].view(-1)[0] = NAN


def failure(trained: Trainer) -> TrainingFailed:
    with pytest.raises(TrainingFailed) as caught:
        trained.run([])
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("lr", [1e30, 1e5, 300.0])
def test_the_fake_scores_learning_rate_is_named_where_the_students_term_fails(lr: float) -> None:
    found = failure(trainer(DMD2, {"fake_score": lr}, critic_updates=1))
    assert found.role == "fake_score"
    assert re.search(r"^step \d+: .*; role 'fake_score' has( probably)? diverged: its weights reach \S+, \S+ times what they began with$", str(found))


def test_at_once_it_is_the_students_term_that_shows_it() -> None:
    found = failure(trainer(DMD2, {"fake_score": 1e30}, critic_updates=1))
    assert str(found).startswith("step 0: the loss of term 'match', which trains role 'student', is ")


@pytest.mark.parametrize(("method", "config"), [(SCM, {}), (DMD2, {"critic_updates": 1})], ids=["scm", "dmd2"])
def test_a_students_own_learning_rate_is_named(method: Any, config: dict[str, Any]) -> None:
    found = failure(trainer(method, {"student": 1e25}, **config))
    assert found.role == "student"
    assert "role 'student' has diverged" in str(found)


def test_a_discriminator_with_a_number_that_is_none_is_named() -> None:
    trained = trainer(DMD2, {}, critic_updates=1, gan={})
    plant(trained.parameters["discriminator"])
    found = failure(trained)
    assert found.role == "discriminator"
    assert re.search(r"role 'discriminator' has diverged: its weight 'heads\.\S+' is not finite", str(found))


def spoil_latents(trained: Trainer) -> None:
    assert isinstance(trained.data.parts[0].latents, Held)
    trained.data.parts[0].latents.tensors["latents"][:] = NAN


def spoil_teacher(trained: Trainer) -> None:
    plant(list(trained.roles["teacher"].denoiser.backbone.parameters()))


@pytest.mark.parametrize(
    ("method", "spoil", "said"),
    [
        (FlowMatching, spoil_latents, "; no role is at fault, but the data: the latents of data.images hold numbers that are not finite"),
        (DMD2, spoil_teacher, "; no trained role is at fault: role 'teacher' has frozen weights that are not finite, the teacher's own"),
    ],
)
def test_what_no_role_has_done_is_laid_on_none(method: Any, spoil: Callable[[Trainer], None], said: str) -> None:
    trained = trainer(method, {})
    spoil(trained)
    found = failure(trained)
    assert found.role is None
    assert str(found).endswith(said)


def test_a_sound_run_passes_its_check() -> None:
    trained = trainer(DMD2, {}, critic_updates=1)
    trained.train_step()
    trained.check_weights()


def test_a_step_that_leaves_the_range_of_its_weights_is_found_by_the_check() -> None:
    """Gradient and loss were finite; nobody has asked the role since."""
    trained = trainer(DMD2, {"student": 1e36}, critic_updates=1)
    trained.train_step()
    with pytest.raises(TrainingFailed, match=r"^after step 1: role 'student' has diverged: its weights reach 1e\+36") as caught:
        trained.check_weights()
    assert caught.value.role == "student"
    trained.roles["fake_score"].load_state_dict({key: value * NAN for key, value in trained.roles["fake_score"].state_dict().items()})
    with pytest.raises(TrainingFailed, match=r"^after step 1: role 'fake_score' has diverged: its weight 'layers\.0\.weight' is not finite"):
        trained.check_weights()


def test_an_average_is_checked_too() -> None:
    trained = trainer(DMD2, {}, critic_updates=1)
    plant(list(trained.ema["student"].shadow.values()))
    with pytest.raises(TrainingFailed, match=r"^after step 0: the average of role 'student' has diverged: its weight 'out\.bias' is not finite"):
        trained.check_weights()


def command(folder: Path, *more: str) -> list[str]:
    recipe = {
        "teacher": {"pretrained": "toy:gaussian"},
        "student": {"steps": 1},
        "distiller": {"name": "dmd2", "critic_updates": 1},
        "data": {"prompts": str(folder / "prompts.txt")},
        "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 2e-3}},
        "train": {"steps": 9, "batch_size": 4, "checkpoint_every": 2, "keep": 9, "device": "cpu"},
    }
    (folder / "prompts.txt").write_text("0\n")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["train", str(folder / "recipe.yaml"), "--output", str(folder / "run"), "--only", "train", *more]


def failing_after(step: int, spoil: Callable[[Trainer], None], monkeypatch: pytest.MonkeyPatch) -> None:
    take = Trainer.train_step

    def train_step(trained: Trainer) -> dict[str, float]:
        metrics = take(trained)
        if trained.step == step:
            spoil(trained)
        return metrics

    monkeypatch.setattr(Trainer, "train_step", train_step)


def spoil_student(trained: Trainer) -> None:
    plant(trained.parameters["student"])


def spoil_average(trained: Trainer) -> None:
    plant(list(trained.ema["student"].shadow.values()))


def spoil_fake_score(trained: Trainer) -> None:
    plant(trained.parameters["fake_score"])


def said(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert cli.main(arguments) == 1
    *warnings, line = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(warning.startswith("warning") for warning in warnings)
    return line


@pytest.mark.parametrize(
    ("spoil", "at", "what"),
    [
        (spoil_student, 4, "after step 4: role 'student' has diverged: its weight 'out.bias' is not finite"),
        (spoil_average, 4, "after step 4: the average of role 'student' has diverged: its weight 'out.bias' is not finite"),
        (spoil_average, 9, "after step 9: the average of role 'student' has diverged: its weight 'out.bias' is not finite"),
        (spoil_student, 3, "step 3: the loss of term 'critic', which trains role 'fake_score', is nan; role 'student' has diverged: "),
    ],
)
def test_no_checkpoint_holds_what_diverged_and_the_newest_is_named(
    spoil: Callable[[Trainer], None], at: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failing_after(at, spoil, monkeypatch)
    line = said(command(tmp_path), capfd)
    assert what in line
    last = f"step_{2 * ((at - 1) // 2):06d}"
    way = "fastgen train RECIPE optimizer.student.lr=0.0001 --resume --allow-change optimizer.student.lr"
    assert line.endswith(f"; newest sound checkpoint: {last}; go on from it with {way}")
    saved = sorted((tmp_path / "run/checkpoints").iterdir())
    assert saved[-1].name == last
    assert all(bool(value.isfinite().all()) for folder in saved for file in folder.glob("*.safetensors") for value in load_file(file).values())


def test_without_a_checkpoint_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    failing_after(1, spoil_fake_score, monkeypatch)
    assert said(command(tmp_path), capfd).endswith(
        "; newest sound checkpoint: none; start again with a lower learning rate, such as optimizer.fake_score.lr=0.0002"
    )


def test_checkpoints_that_are_not_sound_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Such as an older fastgen has written."""

    def spoil(trained: Trainer) -> None:
        for step, factor in ((6, NAN), (8, 1e30)):
            file = tmp_path / f"run/checkpoints/step_{step:06d}/ema_student.safetensors"
            save_file({key: value * factor if value.is_floating_point() else value for key, value in load_file(file).items()}, file)
        spoil_student(trained)

    failing_after(9, spoil, monkeypatch)
    line, way = said(command(tmp_path), capfd), "fastgen train RECIPE optimizer.student.lr=0.0001 --resume-from step_000004"
    assert f"newest sound checkpoint: step_000004; go on from it with {way} --allow-change optimizer.student.lr" in line


def test_a_run_whose_average_diverged_writes_it_nowhere_when_it_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(trained: Trainer) -> None:
        spoil_average(trained)
        os.kill(os.getpid(), signal.SIGTERM)

    failing_after(3, interrupted, monkeypatch)
    with pytest.raises(TrainingFailed, match=r"after step 3: the average .*newest sound checkpoint: step_000002"):
        run.train(command(tmp_path)[1], tmp_path / "run", only="train")


def test_a_teacher_with_weights_that_are_not_finite_is_refused(sd3_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = Path(shutil.copytree(sd3_folder, tmp_path / "teacher"))
    (file,) = (teacher / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights["proj_out.bias"][0] = NAN
    save_file(weights, file, {"format": "pt"})
    arguments = command(tmp_path, f"teacher.pretrained={teacher}", "teacher.guidance=1")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    capfd.readouterr()
    assert cli.main(arguments) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == f"error: recipe key teacher.pretrained: '{teacher}' has weights that are not finite, so it cannot teach"


def test_a_checkpoint_on_the_way_is_not_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Weights a thousand times as large are finite, and were saved."""

    def grow(trained: Trainer) -> None:
        with torch.no_grad():
            for parameter in trained.parameters["fake_score"]:
                parameter *= 1e3

    failing_after(5, grow, monkeypatch)
    with monkeypatch.context() as patch:
        failing_after(9, spoil_fake_score, patch)
        line = said(command(tmp_path, "optimizer.fake_score.lr=1e-9", "optimizer.student.lr=1e-9"), capfd)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())[-2:] == ["step_000006", "step_000008"]
    assert "role 'fake_score' has diverged" in line
    assert (
        "newest sound checkpoint: step_000004; go on from it with fastgen train RECIPE optimizer.fake_score.lr=1e-10 --resume-from step_000004"
        in line
    )

"""What a finished phase leaves in memory and on disk: its expert, and nothing that trained it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_phased_dmd import FOUR, TWO, phased, recipe
from toy_runs import optimizer_block, toy_trainer, weights

from fastgen import checkpoint, outlook
from fastgen.config import Recipe, validate
from fastgen.families.toy import Toy
from fastgen.roles import LoraTuning, Roles, build_roles
from fastgen.surgery import lora
from fastgen.trainer import Trainer

FAMILY = Toy("toy:mixture", width=16)
ADAM = optimizer_block(lr=1e-2, betas=(0.5, 0.9))


def roles_of(method: Any, *, adapters: bool) -> Roles:
    tuning = LoraTuning(rank=3, alpha=6.0, targets=FAMILY.lora_targets) if adapters else None
    return build_roles(method.roles_for(method.config), FAMILY, FAMILY.load_backbone(), tuning=tuning)


def trainer_of(method: Any, *, adapters: bool = False, **options: Any) -> Trainer:
    return toy_trainer(method, FAMILY, optimizers=ADAM, steps=6, roles=roles_of(method, adapters=adapters), **options)


def files(saved: Path) -> set[str]:
    return {file.stem for file in saved.glob("*.safetensors")}


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_finished_phase_leaves_its_expert_alone(tmp_path: Path, adapters: bool) -> None:
    trainer = trainer_of(phased(TWO, gan={}), adapters=adapters, latents=torch.zeros(1, 2))
    gone = [weakref.ref(p) for p in trainer.roles["fake_score"].parameters().values()]
    gone += [weakref.ref(trainer.optimizers[name]) for name in ("student", "fake_score")]
    for _ in range(2):
        trainer.train_step()
    assert trainer.roles.keys() == {"student", "student_2", "fake_score", "fake_score_2", "discriminator", "teacher"}
    trainer.train_step()
    gc.collect()
    assert trainer.roles.keys() == trainer.models.keys() == {"student", "student_2", "fake_score_2", "discriminator", "teacher"}
    assert trainer.optimizers.keys() == trainer.parameters.keys() == {"student_2", "fake_score_2", "discriminator"}
    assert not [reference for reference in gone if reference() is not None]
    if adapters:
        assert not lora.parameters(trainer.roles["teacher"].denoiser.backbone, "fake_score")
    saved = checkpoint.save(tmp_path, trainer, {}, keep=2)
    averages, networks = {"ema_student", "ema_student_2"}, {"role_student", "role_student_2", "role_fake_score_2", "role_discriminator"}
    assert files(saved) == averages | networks | {"optimizer_student_2", "optimizer_fake_score_2", "optimizer_discriminator"}


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_dropping_what_is_over_changes_no_number(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(keep: bool) -> Trainer:
        trainer = trainer_of(phased(FOUR, critic_updates=2, ida=0.1), adapters=adapters)
        if keep:
            monkeypatch.setattr(trainer, "move_to", lambda step: setattr(trainer, "step", step))
        trainer.run([])
        return trainer

    kept, dropped = weights(trained(True)), weights(trained(False))
    assert kept.keys() - dropped.keys() == {key for key in kept if key.startswith(("fake_score/", "fake_score_2/", "fake_score_3/"))}
    assert all(torch.equal(value, kept[key]) for key, value in dropped.items())


@pytest.mark.parametrize("stopped", [2, 3, 4])
def test_a_run_resumes_from_either_side_of_a_phases_end(tmp_path: Path, stopped: int) -> None:
    whole, first, second = (trainer_of(phased(TWO, critic_updates=2)) for _ in range(3))
    whole.run([])
    first.run([], should_stop=lambda: first.step == stopped)
    checkpoint.load(checkpoint.save(tmp_path, first, {}, keep=1), second)
    assert ("fake_score" in second.roles) == ("student" in second.optimizers) == (stopped < 3)
    second.run([])
    ours, theirs = weights(second), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_run_that_is_over_keeps_what_its_last_step_had(tmp_path: Path) -> None:
    """So its last checkpoint holds what a checkpoint one step earlier does, and loads into a new trainer, as for an export."""
    trainer, other = trainer_of(phased(TWO)), trainer_of(phased(TWO))
    trainer.run([], should_stop=lambda: trainer.step == 5)
    before = files(checkpoint.save(tmp_path, trainer, {}, keep=2))
    trainer.run([])
    last = checkpoint.save(tmp_path, trainer, {}, keep=2)
    assert files(last) == before >= {"optimizer_student_2", "role_fake_score_2"}
    checkpoint.load(last, other)
    assert weights(other).keys() == weights(trainer).keys()
    assert all(torch.equal(value, weights(trainer)[key]) for key, value in weights(other).items())


def test_the_plan_counts_the_phase_that_takes_most(tmp_path: Path) -> None:
    """Bytes: 4 a parameter for weights and for each average, 8 more for moments where a role trains, 4 for the gradients of one role at a time."""
    data = recipe(tmp_path)
    found = outlook.dry_run(validate(Recipe, data), only="train")
    size = found["roles"]["student"]["trains"]
    network = Toy(data["teacher"]["pretrained"]).load_backbone()
    frozen = 4 * (found["parameters"] - sum(role["trains"] for role in found["roles"].values()))
    buffers, counters = sum(buffer.nbytes for buffer in network.buffers()), 4 * len(list(network.parameters()))
    training = 8 * size + counters
    # student and fake score train; student_2 and fake_score_2 wait
    assert found["network_bytes"] == frozen + 8 * size + 5 * buffers + 4 * 4 * size + 2 * training + 4 * size
    # in a run that begins with the second phase the first expert is rolled out, and the first fake score never trains
    data["distiller"] = {"name": "dmd2", "critic_updates": 1}
    found = outlook.dry_run(validate(Recipe, data), only="train")
    assert found["network_bytes"] == frozen + 4 * size + 3 * buffers + 2 * 4 * size + 2 * training + 4 * size

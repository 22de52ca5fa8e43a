"""Optimizers beside AdamW in fp32: eight-bit states, and states that lie elsewhere between steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import needs_bitsandbytes
from toy_runs import optimizer_block, toy_method, toy_setting, toy_trainer, weights

from fastgen import checkpoint, optimizers, optional
from fastgen.config import Recipe
from fastgen.distillers.dmd2 import DMD2
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.optimizers import make_optimizer, move_states, state_tensors
from fastgen.plan import plan
from fastgen.trainer import Trainer

BITS = {"name": "adamw8bit", "lr": 1e-2, "betas": (0.5, 0.9)}
RECIPE = {"distiller": {"name": "dmd2"}}


def dmd2(**options: Any) -> Trainer:
    """On a network wide enough for 8-bit states; its biases are not."""
    family = Toy("toy:mixture", width=128)
    method = toy_method(DMD2, toy_setting(family, steps=2), critic_updates=2)
    return toy_trainer(method, family, prompts=["", "1"], **{"steps": 4, "optimizers": optimizer_block(lr=1e-2), **options})


def states(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The student's optimizer's, by `parameter/state`."""
    return state_tensors(trainer.optimizers["student"], list(trainer.roles["student"].parameters()))


def descended(name: str, steps: int) -> torch.Tensor:
    """A matrix fitted to another one, which its entries reach at their own pace."""
    parameter, target = torch.nn.Parameter(torch.zeros(64, 80)), torch.randn(64, 80, generator=torch.Generator().manual_seed(0))
    optimizer = make_optimizer(optimizer_block(**BITS | {"name": name}), [parameter])
    for _ in range(steps):
        optimizer.zero_grad()
        (parameter - target).square().sum().backward()
        optimizer.step()
    return parameter.detach()


@needs_bitsandbytes
def test_eight_bit_states_descend_as_thirty_two_do() -> None:
    ours, plain = descended("adamw8bit", 60), descended("adamw", 60)
    assert 0 < float((ours - plain).norm() / plain.norm()) < 0.03


@needs_bitsandbytes
def test_eight_bit_states_take_a_quarter() -> None:
    trainer = dmd2(optimizers=optimizer_block(**BITS))
    trainer.train_step()
    found = {key: value.dtype for key, value in states(trainer).items() if key.endswith("state1")}
    sizes = {name: parameter.numel() for name, parameter in trainer.roles["student"].parameters().items()}
    assert found == {f"{name}/state1": torch.uint8 if size >= 4096 else torch.float32 for name, size in sizes.items()}
    assert set(found.values()) == {torch.uint8, torch.float32}


@needs_bitsandbytes
def test_a_run_with_eight_bit_states_goes_on_exactly(tmp_path: Path) -> None:
    whole, first, rest = (dmd2(optimizers=optimizer_block(**BITS)) for _ in range(3))
    whole.run([])
    first.run([], should_stop=lambda: first.step == 2)
    checkpoint.load(checkpoint.save(tmp_path, first, RECIPE, keep=1), rest)
    then, now = states(first), states(rest)
    assert then.keys() == now.keys() and all(torch.equal(value, now[key]) for key, value in then.items())
    rest.run([])
    assert weights(rest).keys() == weights(whole).keys()
    assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(rest).items())


@needs_bitsandbytes
@pytest.mark.parametrize("damage", ["missing", "misshapen", "another kind"])
def test_eight_bit_states_of_another_run_are_refused(damage: str) -> None:
    trainer = dmd2(optimizers=optimizer_block(**BITS))
    trainer.train_step()
    optimizer = trainer.optimizers["student"]
    tensors = {key: value.clone() for key, value in states(trainer).items()}
    names = list(trainer.roles["student"].parameters())
    name = next(key for key in tensors if key.endswith("absmax1"))
    tensors |= {"another kind": {f"{names[0]}/momentum": tensors[name]}, "misshapen": {name: tensors[name][1:]}}.get(damage, {})
    if damage == "missing":
        del tensors[name]
    with pytest.raises(ValueError, match="optimizer of role 'student' does not match"):
        optimizers.load_states("student", optimizer, tensors, names)


def test_an_absent_package_is_refused_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^recipe key optimizer\.fake_score\.name: adamw8bit needs the package bitsandbytes, .*pip install"):
        plan(Recipe.load("digits_dmd2_1step", ["optimizer.fake_score.name=adamw8bit"]))


def test_states_that_lie_elsewhere_between_steps_change_no_number(tmp_path: Path) -> None:
    here, there, rest = dmd2(), dmd2(offload_optimizers=True), dmd2(offload_optimizers=True, ema_device="cpu")
    here.run([])
    there.run([], should_stop=lambda: there.step == 2)
    checkpoint.load(checkpoint.save(tmp_path, there, RECIPE, keep=1), rest)
    rest.run([])
    assert all(torch.equal(value, weights(rest)[key]) for key, value in weights(here).items())
    for name, average in here.ema.items():
        assert all(torch.equal(value, rest.ema[name].shadow[key]) for key, value in average.shadow.items())


def test_states_come_for_their_own_roles_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[str, str]] = []
    trainer = dmd2(offload_optimizers=True)
    trainer.parallel.device = torch.device("cpu", 0)  # told from where they lie by its index
    names = {id(optimizer): name for name, optimizer in trainer.optimizers.items()}
    monkeypatch.setattr(optimizers, "move_states", lambda optimizer, device: moves.append((names[id(optimizer)], str(device))))
    trainer.train_step()
    once = lambda name: [(name, "cpu:0"), (name, "cpu")]  # noqa: E731
    assert moves == [*once("fake_score"), *once("fake_score"), *once("student")]


def test_every_tensor_of_the_states_moves() -> None:
    trainer = dmd2()
    trainer.train_step()
    optimizer = trainer.optimizers["student"]
    move_states(optimizer, torch.device("meta"))
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert states and all(value.is_meta for value in states)


@pytest.mark.gpu
def test_on_a_gpu_states_and_averages_lie_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    parameter = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = make_optimizer(optimizer_block(lr=1e-2), [parameter])
    for _ in range(2):
        parameter.sum().backward()
        with optimizers.states_on(optimizer, parameter.device):
            optimizer.step()
        assert {value.device.type for value in optimizer.state[parameter].values()} == {"cpu"}


def test_states_stand_in_one_order_however_they_were_loaded() -> None:
    trainer = dmd2(steps=1)
    trainer.train_step()
    names = list(trainer.roles["student"].parameters())
    saved = states(trainer)
    optimizers.load_states("student", trainer.optimizers["student"], dict(reversed(saved.items())), names)
    assert list(states(trainer)) == list(saved) and len(saved) == 3 * len(names)

"""Experts whose number follows the time: by hand, in every network, computed again, differentiated, refused, and from recipe to stock diffusers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import diffusers_zoo
import pytest
import torch
from diffusers import DiffusionPipeline
from moe_networks import SPLIT, largest, split, stir
from pipelines import same_interpreter as same_interpreter
from tangents import normal, relative
from test_moe_modeling import drawn, options, plain_class
from torch import Tensor

from fastgen import load_student, run
from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.export import export_student, verify
from fastgen.families import find_family
from fastgen.jvp import tangent
from fastgen.outlook import dry_run
from fastgen.plan import plan
from fastgen.surgery import moe
from fastgen.surgery.moe import stored
from fastgen.surgery.moe.capacity import Capacity, capacity_of, told
from fastgen.surgery.recompute import recompute_blocks


def test_the_number_is_linear_in_the_time_that_the_network_is_told() -> None:
    capacity = Capacity(at_noise=1, at_data=3, argument="timestep", noise=1000, data=0)
    assert capacity.active(torch.tensor([1000.0, 500.0, 0.0])) == [1, 2, 3]
    assert capacity.active(torch.tensor([250.0, 250.0])) == 2.5  # one number where all have the same
    assert capacity.active(torch.tensor(750)) == 1.5  # a whole time, of no batch
    assert capacity.active(torch.tensor([[1000.0, 0.0], [0.0, 0.0]])) == [2, 3]  # of several times the mean
    assert capacity.active(torch.tensor([1200.0, -1.0])) == [1, 3]
    assert capacity.active(torch.tensor([1000 * 0.3]).float()) == capacity.active(torch.tensor([1000 * 0.3]).double()) == 2.4
    other = Capacity(at_noise=3, at_data=1, argument="t", noise=0, data=1)
    assert other.active(torch.tensor([0.25])) == 2.5


def at(name: str) -> tuple[diffusers_zoo.Denoiser, list[moe.ExpertLayer], Capacity]:
    """A denoiser whose experts choose, random routers, and a capacity that its two samples' times tell apart."""
    denoiser, layers = split(name, 2, "expert")
    stir(layers)
    argument, noise, data = told(denoiser.network, lambda t: denoiser.call(denoiser.x, t.expand(2) * denoiser.t.max()), (1.0, 0.0))
    return denoiser, layers, Capacity(1, 3, argument, noise, data)


@pytest.mark.parametrize("name", SPLIT)
@torch.no_grad()
def test_each_sample_has_as_many_as_its_time_says_in_every_network_and_in_its_plain_code(name: str) -> None:
    ours, layers, capacity = at(name)
    fixed = ours.call(ours.x, ours.t)
    by_hand = copy.deepcopy(ours.network)
    moe.follow(ours.network, capacity)
    expected = ours.call(ours.x, ours.t)
    assert largest(expected, fixed) > 1e-6
    assert all(layer.now is None for layer in layers)
    moe.set_active(by_hand, [round(3 - 2 * share, 4) for share in (ours.t / ours.t.max()).tolist()])
    assert torch.equal(drawn(name, by_hand, ours), expected)
    network: Any = ours.network
    description = json.loads(json.dumps(stored.describe(network)))
    plain = plain_class(type(network).__name__)(**options(network), experts=description).double().eval()
    again = stored.rebuild(type(network)(**options(network)).double().eval(), description, "config.json")
    assert json.loads(json.dumps(stored.describe(again))) == description
    for other in (plain, again, copied := copy.deepcopy(ours.network)):
        other.load_state_dict(network.state_dict())
        assert largest(drawn(name, other, ours), expected) <= 1e-12
    assert capacity_of(copied) == capacity
    with moe.using(network, 2):
        assert torch.equal(ours.call(ours.x, ours.t), fixed)  # whoever asks for a number has it
    assert torch.equal(ours.call(ours.x, ours.t), expected)
    moe.set_active(network, 2)
    assert torch.equal(ours.call(ours.x, ours.t), fixed)


@torch.no_grad()
def test_no_expert_at_one_end_is_the_pruned_network_there() -> None:
    ours, layers, _ = at("sd3")
    moe.follow(ours.network, Capacity(0, 4, "timestep", 1000, 0))
    times = torch.tensor([1000.0, 1000.0], dtype=torch.float64)
    got = ours.call(ours.x, times)
    with moe.using(ours.network, 0):
        assert torch.equal(got, ours.call(ours.x, times))
    whole = ours.call(ours.x, torch.tensor([1000.0, 0.0], dtype=torch.float64))
    assert largest(whole[:1], got[:1]) <= 1e-12  # one sample alone without
    assert largest(whole[1:], got[1:]) > 1e-6
    assert layers[0].active == 2


def test_blocks_computed_again_have_as_many_as_in_their_forward_pass() -> None:
    grads = []
    for again in (False, True):
        ours, layers, capacity = at("flux")
        moe.follow(ours.network, capacity)
        ours.network.requires_grad_(True)
        if again:
            recompute_blocks(ours.network)
        with moe.recording(ours.network) as routings:
            ours.call(ours.x, ours.t).square().mean().backward()
        assert len(routings) == len(layers)
        grads.append([p.grad for p in ours.network.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) and all(largest(a, b) <= 1e-14 for a, b in zip(*grads, strict=True))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_exact_tangents_hold_the_number_constant(name: str) -> None:
    (network, call, x, t), layers, capacity = at(name)
    moe.follow(network, capacity)
    dx, dt = normal(*x.shape, seed=1), torch.tensor([0.9, -0.7], dtype=torch.float64) * t.max()
    with torch.no_grad():
        found = tangent(call, (x, t), (dx, dt))[1]
        moe.set_active(network, capacity.active(t))
        h = 1e-7
        expected = (call(x + h * dx, t + h * dt) - call(x - h * dx, t - h * dt)) / (2 * h)
    assert relative(found, expected) < 1e-6
    assert len(layers) > 0


class Untold(torch.nn.Module):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x + sigma


def test_a_network_that_is_not_told_the_time_is_refused() -> None:
    network = Untold()
    with pytest.raises(UserError, match=r"^recipe key student\.moe\.capacity: Untold is not told the time by any of timestep, timesteps, t; "):
        told(network, lambda t: network(torch.zeros(1), t), (1.0, 0.0))
    assert network(torch.zeros(1), torch.ones(1)) == 1  # and is as it was


EXPERT = ["student.moe.router=expert", "student.moe.router_std=0.5", "student.moe.calibration=1"]
FOLLOWS = [*EXPERT, "student.moe.capacity={noise: 1, data: 3}"]


def digits(*overrides: str, recipe: str = "digits_dmd2_1step") -> Recipe:
    keys = ["train.batch_size=4", "train.sample_every=0", "train.device=cpu", "evaluate.protocol=null", "train.steps=2"]
    return Recipe.load(recipe, [*keys, *overrides])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["student.moe.capacity={noise: 1, data: 3}"], ": where tokens choose, each uses the same number of experts at all times; set student.moe."),
        ([*EXPERT, "student.moe.capacity={noise: 1, data: 4}"], ": from 1 to 4 is 2.5 on average, student.moe.active says 2 "),
        ([*EXPERT, "student.moe.capacity={noise: -9, data: 13}"], ".noise: Input should be greater than or equal to 0"),
        ([*EXPERT, "student.moe.capacity={noise: 1}"], ".data: missing"),
    ],
)
def test_a_capacity_that_cannot_be_is_refused_by_its_key(keys: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        digits(*keys)
    assert str(caught.value).startswith(f"recipe key student.moe.capacity{message}")


def test_a_capacity_above_all_experts_is_refused_by_the_plan() -> None:
    with pytest.raises(UserError, match=r"^recipe key student\.moe\.capacity: 13 of 12 experts \(transformer_blocks\.0\.ff\); allowed: 0 to 12"):
        plan(digits(*EXPERT, "student.moe.active=7", "student.moe.capacity={noise: 1, data: 13}"))


def test_a_plan_says_it_and_counts_the_mean() -> None:
    fixed, found = (dry_run(digits(*keys))["experts"] for keys in (EXPERT, FOLLOWS))
    assert found.pop("capacity") == {"noise": 1, "data": 3}
    assert found == fixed
    assert plan(digits(*FOLLOWS)).experts.capacity == Capacity(1, 3, "timestep", 1000, 0)  # type: ignore[union-attr]


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("recipe", ["digits_dmd2_4step", "digits_scm_2step"])  # the second checks its exact tangent before the first step
def test_from_recipe_to_stock_diffusers(recipe: str, tmp_path: Path) -> None:
    output = run.train(digits(*FOLLOWS, recipe=recipe), tmp_path / "run") / "student"
    manifest = json.loads((output / "fastgen.json").read_text(encoding="utf-8"))
    assert manifest["surgery"]["moe"]["capacity"] == {"noise": 1, "data": 3}
    assert "2 on average (from 1 at noise to 3 at data) of 12 routed experts" in (output / "README.md").read_text(encoding="utf-8")
    loaded = find_family(output, size=[8, 8]).load_backbone()
    assert capacity_of(loaded) == Capacity(1, 3, "timestep", 1000, 0)
    stock: Any = DiffusionPipeline.from_pretrained(output, trust_remote_code=True)
    call = {**manifest["call"], "output_type": "pt"}

    def draw() -> Tensor:
        return stock(["a handwritten seven", "an even digit"], **call, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)]).images

    pictures = draw()
    torch.testing.assert_close(pictures.float(), load_student(output)(["a handwritten seven", "an even digit"], [0, 1]), rtol=0, atol=1e-5)
    stock.transformer.capacity = {**stock.transformer.capacity, "at_noise": 6}
    assert (draw() - pictures).abs().max() > 1e-5  # that it counts


@pytest.mark.usefixtures("same_interpreter")
def test_the_first_stage_of_dense2moe_prunes_and_its_student_follows_the_time(tmp_path: Path) -> None:
    running = run.build(plan(digits(*FOLLOWS, "distiller.shared=0.5", recipe="digits_dense2moe"), only="train"), run.Progress())
    first, second = (running.trainer.train_step() for _ in range(2))
    assert "experts/student/balance" not in first and second["experts/student/dropped"] > 0
    output = export_student(running.averaged(), running.plan.family, running.info(), tmp_path / "student")
    assert verify(output, seeds=(0, 1)).passed

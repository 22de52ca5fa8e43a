"""When a role trains, told in three ways that must agree: the updates, the span of the learning rate's schedule, and what is counted from the
first matching step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_runs import CPU, optimizer_block, toy_method, toy_setting, toy_trainer

from fastgen.config import Recipe, shipped_recipes, validate
from fastgen.data import training
from fastgen.data.encoded import Keeping
from fastgen.data.pairs import TeacherSampler, make_pairs
from fastgen.distillers import distiller_class, distiller_names
from fastgen.distillers.base import Distiller, Facts
from fastgen.distillers.dmd2 import DMD2
from fastgen.distillers.phased_dmd import PhasedDMD
from fastgen.distillers.rcm import RCM
from fastgen.errors import UserError
from fastgen.families.toy import Toy

torch.set_num_threads(1)
ONE_PHASE = [{"start": 1, "end": 0}]
TWO = [{"start": 1, "end": 0.5}, {"start": 0.5, "end": 0, "share": 2}]
# Those that begin late, beside the shipped recipes: name, student.steps, train.steps, keys.
LATE: list[tuple[str, int, int, dict[str, Any]]] = [
    ("dmd", 1, 9, {"regression": {"warmup": 4}}),
    ("dmd2", 1, 9, {"regression": {"warmup": 1}, "gan": {"start": 3}, "ida": 0.1}),
    ("dmd2", 1, 9, {"regression": {"warmup": 8}, "gan": {"features": "fake_score"}}),
    ("f_distill", 1, 9, {"regression": {"warmup": 5}}),
    ("phased_dmd", 1, 9, {"phases": ONE_PHASE, "regression": {"warmup": 4}, "gan": {"start": 2}, "ida": 0.1}),
    ("phased_dmd", 2, 9, {"phases": TWO, "gan": {}, "ida": 0.1}),
    ("phased_dmd", 2, 9, {"phases": TWO, "gan": {"features": "fake_score"}, "first_phase": 2}),
    ("rcm", 2, 9, {"start": 5}),
    ("rcm", 2, 9, {"start": 8, "replay": 2}),
]


def configured(name: str, steps: int, train_steps: int, keys: dict[str, Any]) -> Any:
    setting = replace(toy_setting(Toy("toy:mixture"), steps=steps), train_steps=train_steps, decode=lambda latents: latents)
    return toy_method(distiller_class(name), setting, **keys)


def shipped() -> list[tuple[str, int, int, dict[str, Any]]]:
    recipes = [Recipe.load(name) for name in shipped_recipes()]
    return [(r.distiller.name, r.student.steps, r.train.steps, r.distiller.model_dump(exclude={"name"})) for r in recipes]


def matched(method: Distiller, step: int) -> set[str]:
    """The critics of a step that matches."""
    updates = method.updates(step)
    assert any(term.__name__ == "match" for update in updates for term in update.terms) or len(updates) == 1
    return {name for update in updates for term in update.terms if term.__name__ == "critic" for name in update.trains}


@pytest.mark.parametrize(("name", "steps", "train_steps", "keys"), [*shipped(), *LATE])
def test_spans_are_where_updates_train(name: str, steps: int, train_steps: int, keys: dict[str, Any]) -> None:
    method = configured(name, steps, train_steps, keys)
    trained: dict[str, list[int]] = {}
    for step in range(train_steps):
        for role in {role for update in method.updates(step) for role in update.trains}:
            trained.setdefault(role, []).append(step)
    specs = method.roles_for(method.config)
    for role, own in trained.items():
        assert own == list(range(own[0], own[-1] + 1))
        assert (method.span(role) or (0, train_steps)) == (own[0], len(own)), role
        if specs[role].averaged:
            assert not method.finished(role, own[0]) and method.finished(role, own[-1] + 1)


@pytest.mark.parametrize(("name", "steps", "train_steps", "keys"), [case for case in LATE if issubclass(distiller_class(case[0]), DMD2)])
def test_matching_is_counted_from_the_first_step_with_a_fake_score(name: str, steps: int, train_steps: int, keys: dict[str, Any]) -> None:
    method = configured(name, steps, train_steps, keys)
    critics: dict[str, list[int]] = {}
    for step in range(train_steps):
        if fake := matched(method, step):
            assert method.fake_at(step) in fake
            critics.setdefault(method.fake_at(step), []).append(step)
            blends = [blend.target for update in method.updates(step) for blend in update.blends]
            assert blends == ([method.fake_at(step)] if method.config.ida and step > critics[method.fake_at(step)][0] else [])
            assert method.first_step(step) == critics[method.fake_at(step)][0]
        else:
            assert method.first_step(step) > step
    facts = Facts(steps, 1.0, tuple(method.setting.grid.tolist()), 1.0, train_steps=train_steps)
    assert method.matching_steps(method.config, facts) == min(len(own) for own in critics.values())


def test_every_method_is_looked_at() -> None:
    assert {name for name, *_ in [*shipped(), *LATE]} == set(distiller_names())


def rates(method: Any, family: Toy) -> dict[str, dict[int, float]]:
    """The learning rates set, by role and student step: linear from 1 to 0 after 2 steps of warm-up."""
    block = optimizer_block(name="sgd", lr=1e-6, betas=(0.0, 0.0), schedule="linear", warmup=2)
    latents = family.mixture.sample(8, torch.Generator().manual_seed(0)).float()
    trainer = toy_trainer(method, family, latents=latents, optimizers=block, steps=method.setting.train_steps)
    teacher = TeacherSampler(trainer.models["teacher"], torch.tensor([1.0, 0.5]), (2,))
    made = make_pairs(teacher, family.encode_prompts, {"": 1.0}, range(8), seed=0)
    trainer.data = training.with_pairs(trainer.data.parts[0], made, family, Keeping(CPU))
    seen: dict[str, dict[int, float]] = {}
    while trainer.step < method.setting.train_steps:
        step = trainer.step
        for name in {key for key in trainer.train_step() if key.startswith("lr/")}:
            (group,) = trainer.optimizers[name.removeprefix("lr/")].param_groups
            seen.setdefault(name.removeprefix("lr/"), {})[step] = group["lr"] / block.lr
    return seen


@pytest.mark.parametrize(
    ("name", "steps", "keys"),
    [
        ("dmd2", 1, {"regression": {"warmup": 3}, "gan": {}, "critic_updates": 1}),
        ("phased_dmd", 1, {"phases": ONE_PHASE, "regression": {"warmup": 3}, "gan": {}, "critic_updates": 1}),
        ("rcm", 2, {"start": 3, "critic_updates": 1}),
    ],
)
def test_learning_rates_of_roles_that_begin_late(name: str, steps: int, keys: dict[str, Any]) -> None:
    """Eight student steps, of which a fake score sees the last five: warm-up and decay are those of its own five."""
    seen = rates(configured(name, steps, 8, keys), Toy("toy:mixture"))
    late = {3: 1 / 2, 4: 1.0, 5: 1.0, 6: 2 / 3, 7: 1 / 3}
    assert seen.pop("student") == pytest.approx({0: 1 / 2, 1: 1.0, 2: 1.0, 3: 5 / 6, 4: 4 / 6, 5: 3 / 6, 6: 2 / 6, 7: 1 / 6})
    assert seen == {role: pytest.approx(late) for role in (("fake_score",) if name == "rcm" else ("fake_score", "discriminator"))}


def test_one_phase_starts_its_discriminator_as_dmd2_does() -> None:
    """gan.start counts matching steps: of 10 steps, 6 of regression alone, 4 are left."""
    keys: dict[str, Any] = {"regression": {"warmup": 6}}
    facts = Facts(1, 1.0, (1.0,), 1.0, train_steps=10)
    kinds: list[tuple[Any, dict[str, Any]]] = [(DMD2, {}), (PhasedDMD, {"phases": ONE_PHASE})]
    for kind, more in kinds:
        late, early = (validate(kind.Config, {"name": "m", **more, **keys, "gan": gan}, "distiller") for gan in ({"start": 4}, {"start": 3}))
        with pytest.raises(UserError, match=r"^recipe key distiller\.gan\.start: 4 leaves none of the 4 student steps in which matching goes on"):
            kind.check(late, facts)
        kind.check(early, facts)


def test_matching_that_never_starts_is_refused() -> None:
    config: Any = validate(RCM.Config, {"name": "rcm", "start": 10}, "distiller")
    RCM.check(config, Facts(2, 1.0, (1.0, 0.5), 1.0, train_steps=11))
    with pytest.raises(UserError, match=r"^recipe key distiller\.start: 10 leaves none of train\.steps 10 for the matching"):
        RCM.check(config, Facts(2, 1.0, (1.0, 0.5), 1.0, train_steps=10))

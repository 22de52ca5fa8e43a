"""Keys that have no effect under another key's value are refused where they differ from their default, and numbers are held within bounds."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from fastgen import run
from fastgen.config import Recipe, shipped_recipes, validate
from fastgen.distillers import distiller_class, distiller_names
from fastgen.errors import UserError

NEEDED: dict[str, dict[str, Any]] = {"phased_dmd": {"phases": [{"start": 1.0, "end": 0.0}]}}


def config(name: str, **keys: Any) -> Any:
    return validate(distiller_class(name).Config, {"name": name, **NEEDED.get(name, {}), **keys}, "distiller")


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("reflow", {"times": {"a": 5.0}}, "times.a: not used with times.name: uniform; remove it (given: 5.0)"),
        ("reflow", {"times": {"name": "u_shaped", "std": 2}}, "times.std: not used with times.name: u_shaped; remove it (given: 2.0)"),
        ("reflow", {"velocity": {"c": 0.1}}, "velocity.c: not used with velocity.metric: l2; remove it (given: 0.1)"),
        (
            "reflow",
            {"velocity": {"metric": "huber"}, "perceptual": {"alone": True}},
            "velocity: not used with perceptual.alone: true from the first step on; ",
        ),
        ("dmd2", {"gan": {"times": {"mean": 1.0}}}, "gan.times.mean: not used with gan.times.name: uniform; remove it"),
        ("dmd2", {"gan": {"r1_noise": 0.2}}, "gan.r1_noise: not used with gan.r1: 0.0; remove it"),
        ("dmd2", {"rollout": {"steps": 2}}, "rollout.steps: not used with rollout.times: grid; remove it (given: 2)"),
        ("rcm", {"rollout": {"sampling": {"lo": 0.1}}}, "rollout.sampling: not used with rollout.times: grid; remove it"),
        (
            "scm",
            {"points": "teacher_trajectory", "trajectory": {"times": {"mean": 1}}},
            "trajectory.times: not used with trajectory.route: stratified; ",
        ),
        ("tbcm", {"trajectory": {"route": "logit_normal", "shift": 3}}, "trajectory.shift: not used with trajectory.route: logit_normal; remove it"),
        ("tbcm", {"times": {"mean": 1.0}}, "times: not used with points: teacher_trajectory; remove it (given: "),
        ("mean_flow", {"drop": 0.2}, "drop: not used with variant: distillation; remove it (given: 0.2)"),
        ("perflow", {"at": "grid", "times": {"lo": 0.1}}, "times: not used with at: grid; remove it"),
    ],
)
def test_a_key_without_effect_is_refused(name: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        config(name, **keys)
    assert str(refused.value).startswith(f"recipe key distiller.{said}")


def test_sgd_has_no_eps() -> None:
    with pytest.raises(
        UserError, match=r"recipe key optimizer\.student\.eps: not used with optimizer\.student\.name: sgd; remove it \(given: 0\.1\)"
    ):
        Recipe.load("digits_reflow_1step", ["optimizer.student.name=sgd", "optimizer.student.eps=0.1"])


def test_a_default_of_the_block_that_has_it_is_no_statement_of_the_users() -> None:
    """mean_flow's own times are logit-normal of mean -.4, which stays behind when the name alone changes."""
    assert config("mean_flow", times={"name": "uniform"}).times.mean == -0.4
    with pytest.raises(UserError, match=r"recipe key distiller\.times\.mean: not used with times\.name: uniform"):
        config("mean_flow", times={"name": "uniform", "mean": -0.3})


@pytest.mark.parametrize("name", distiller_names())
def test_a_resolved_config_reads_back(name: str) -> None:
    whole = config(name)
    assert config(**whole.model_dump(mode="json")) == whole


def test_resolved_recipes_read_back() -> None:
    for name in shipped_recipes():
        read = Recipe.load(name)
        whole = validate(distiller_class(read.distiller.name).Config, read.distiller.model_dump(), "distiller")
        assert validate(Recipe, {**read.dump(), "distiller": whole.model_dump(mode="json")}).dump()["distiller"] == whole.model_dump(mode="json")
    planned = run.plan(Recipe.load("digits_reflow_1step"), dry=True)
    again = run.plan(validate(Recipe, planned.resolved()), dry=True)
    assert again.resolved() == planned.resolved()


def blocks(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for each in model.model_fields.values():
        for inner in within(each.annotation):
            yield from blocks(inner)


def within(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in within(part)]


CONFIGS = sorted({each for name in distiller_names() for each in blocks(distiller_class(name).Config)}, key=lambda each: each.__name__)


@pytest.mark.parametrize("model", CONFIGS, ids=lambda model: model.__name__)
def test_every_real_number_of_a_method_has_bounds(model: type[BaseModel]) -> None:
    """1e9 is nobody's weight, constant or time, and no key takes a negative number where none has a meaning."""
    needed = {
        key: {"name": "digits", "start": 0.5, "end": 0.2, "segments": 2, "steps": 2, "phases": [{"start": 1.0, "end": 0.0}]}.get(key)
        for key, each in model.model_fields.items()
        if each.is_required()
    }
    for key, each in model.model_fields.items():
        if each.annotation not in (float, float | None):
            continue
        for wrong in (1e9, -1e9, float("nan"), float("inf")):
            with pytest.raises(UserError, match=rf"recipe key at\.{key}: "):
                validate(model, {**needed, key: wrong}, "at")


def test_every_key_that_is_ruled_is_a_key() -> None:
    for model in CONFIGS:
        for key, (other, _) in getattr(model, "used_with", {}).items():
            assert {key, other} <= model.model_fields.keys(), (model, key)


@pytest.mark.parametrize(
    "given", ["teacher.guidance=1e9", "optimizer.student.lr=1e31", "optimizer.student.weight_decay=1e9", "optimizer.student.eps=1e9"]
)
def test_numbers_of_the_recipe_have_bounds(given: str) -> None:
    with pytest.raises(UserError, match=rf"^recipe key {given.partition('=')[0]}: .*less than or equal to 1(0{{3}}|0{{30}}) "):
        Recipe.load("digits_reflow_1step", [given])

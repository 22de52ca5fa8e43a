"""The scripts that try recipes out ask for runs that there can be, and read what they keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import data_curve, trials
from fastgen.config import Recipe
from fastgen.data.images import load_images
from fastgen.data.prompts import load_prompts
from fastgen.plan import plan


@pytest.mark.parametrize("asked", trials.asked_for(trials.TRIALS, 0), ids=lambda asked: asked.name)
def test_every_trial_can_be_made(asked: Any) -> None:
    changed = plan(Recipe.load(asked.recipe, asked.keys)).resolved()
    assert not asked.overrides or changed != plan(Recipe.load(asked.recipe, ["train.seed=0"])).resolved()


def test_the_table_of_trials_has_a_line_for_each_that_was_made() -> None:
    first, second, *_ = trials.asked_for(trials.TRIALS, 0)
    names = [*trials.SHOWN, *trials.COSTS]
    values = [(each, seed, name, i + seed) for each in (second, first) for seed in (0, 1) for i, name in enumerate(names)]
    rows = [{"model": each.name, "steps": 1, "seed": seed, "name": name, "value": float(value)} for each, seed, name, value in values]
    heads, _, *lines = trials.table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [f"| {first.name}", f"| {second.name}"]
    assert all(line.count("|") == heads.count("|") for line in lines)
    assert all(line.endswith("| 0.5 | 1.5 | 2.5 | 3.5 | 4 | 6 |") for line in lines)  # means; costs are whole numbers, .5 to even


def test_the_data_of_the_curve_say_what_the_world_says(tmp_path: Path) -> None:
    data_curve.write_scenes(tmp_path, 3)
    world, read = load_images(data_curve.WORLD), load_images(str(tmp_path))
    assert [dict(own) for own in read.captions] == [pytest.approx(dict(own)) for own in world.captions[:3]]
    drawn = load_prompts(str(tmp_path / "prompts.jsonl"))
    wanted: dict[str, float] = {}
    for own in world.captions[:3]:
        for text, share in own.items():
            wanted[text] = wanted.get(text, 0.0) + share / 3
    assert drawn == pytest.approx(wanted)


def test_the_curve_takes_what_the_comparison_of_methods_has() -> None:
    asked = data_curve.asked_for([0, 1])
    of_all = next(each for each in asked if each.name == "scm, all" and each.seed == 1)
    known = {"model": of_all.recipe, "name": data_curve.METRIC, "seed": 1, "value": 2.0, "provenance": {"run": of_all.key(1)}}
    mean = {key: known[key] for key in ("model", "name", "value")}
    other = {**known, "provenance": {"run": "of other keys"}}
    assert data_curve.compared(asked, [mean, known, other], 1) == [{**known, "model": "scm, all"}]
    assert data_curve.compared(asked, [known], 2) == []


def test_runs_of_the_curve_differ_in_their_data_alone() -> None:
    asked = data_curve.asked_for([0])
    assert len({each.name for each in asked}) == len(asked) == 2 * (len(data_curve.COUNTS) + 1)
    for each in asked:
        recipe, shipped = Recipe.load(each.recipe, each.keys).dump(), Recipe.load(each.recipe).dump()
        assert recipe | {"data": shipped["data"]} == shipped
        assert (recipe["data"] == shipped["data"]) == each.name.endswith(", all")

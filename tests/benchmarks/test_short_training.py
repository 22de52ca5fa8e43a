"""The short training trains, verifies and compares as it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import short_training
from benchmarks.measuring.case import Target

CPU = Target("cpu", rehearsal=True)


def test_a_rehearsal_trains_and_verifies() -> None:
    (row,) = short_training.train_and_measure("digits_dmd2_1step", CPU)
    assert (row["recipe"], row["steps"], row["batch"]) == ("digits_dmd2_1step", 3, 4)
    assert row["samples_per_s"] == pytest.approx(12 / row["seconds"])
    assert row["verified_difference"] <= 1e-5


def test_the_same_recipe_twice_gives_the_same_weights() -> None:
    (row,) = short_training.same_again("digits_scm_2step", CPU)
    assert row == {"recipe": "digits_scm_2step", "steps": 2, "difference": 0.0}


def test_a_difference_is_that_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = iter([{"a": torch.tensor([1.0, -4.0]), "b": torch.zeros(2)}, {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([0.0, 0.5])}])
    monkeypatch.setattr(short_training, "trained", lambda recipe: next(weights))
    assert short_training.same_again("digits_scm_2step", CPU)[0]["difference"] == 0.125


def test_what_stands_beside_it_is_the_mean_over_seeds(tmp_path: Path) -> None:
    def line(name: str, value: float, **more: Any) -> str:
        return json.dumps({"name": name, "model": "r", "value": value, **more}) + "\n"

    path = tmp_path / "rows.jsonl"
    names = short_training.METRICS.values()
    path.write_text("".join(line(n, 2.0, std=0.1, std_over="seeds") + line(n, 9.0, seed=0) for n in names) + line("fd_digits", 5.0, model="q"))
    found = short_training.on_a_cpu("r", path)
    assert found == {f"{key}_cpu_{what}": value for key in short_training.METRICS for what, value in (("mean", 2.0), ("std", 0.1))}


@pytest.mark.parametrize("recipe", short_training.RECIPES)
def test_the_repository_has_a_cpus_numbers(recipe: str) -> None:
    found = short_training.on_a_cpu(recipe)
    assert 1 < found["fd_cpu_mean"] < 10 and 0 < found["fd_cpu_std"] < 1 and 0.9 < found["prompt_accuracy_cpu_mean"] <= 1


def test_the_headline_metrics_are_the_students() -> None:
    rows = [
        {"name": name, "model": model, "value": value}
        for name in short_training.METRICS.values()
        for model, value in (("student", 1), ("teacher", 2))
    ]
    assert short_training.measured(rows, "student") == {"fd": 1, "prompt_accuracy": 1, "parity_accuracy": 1}

"""The benchmark scripts keep each seed's rows beside the mean, and what reads their files takes the mean."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgen.config import Recipe
from fastgen.evaluation import results
from fastgen.evaluation.table import markdown_table

ROOT = Path(__file__).parents[2]
RECIPE, OTHER = "digits_dmd2_1step", "digits_scm_2step"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


quality: Any = script("quality")


def own(seed: int, fd: float, seconds: float, model: str = RECIPE) -> list[dict[str, Any]]:
    """What one trained seed gives."""
    shared = {"model": model, "steps": 1, "guidance": 1.0, "seed": seed, "provenance": {"threads": 2, "model_hash": f"student {seed}"}}
    return [{"name": "fd_digits", "value": fd, "n": 1797, **shared}, {"name": "training_seconds", "value": seconds, "n": 1, **shared}]


def test_means_stand_before_the_rows_of_each_seed() -> None:
    runs = [own(0, 4.0, 70.0), own(2, 5.0, 90.0), own(7, 9.0, 80.0)]
    rows = quality.student_rows(runs, {"seeds": [0, 2, 7], "provenance": {"model_hash": "teacher"}})
    shared = {"model": RECIPE, "steps": 1, "guidance": 1.0, "std_over": "seeds", "seeds": [0, 2, 7], "provenance": {"model_hash": "teacher"}}
    assert rows[0] == {"name": "fd_digits", "value": 6.0, "n": 1797, "std": pytest.approx(7**0.5), **shared}
    assert rows[1] == {"name": "training_seconds", "value": 80.0, "n": 1, "std": 10.0, **shared}
    assert rows[2:] == [row for run in runs for row in run]
    (fd, _, *seeds) = quality.student_rows(runs[1:2], {"seeds": [2]})
    assert (fd["value"], "std" in fd, seeds) == (5.0, False, runs[1])


def test_the_table_takes_the_means() -> None:
    runs = [own(0, 4.0, 70.0), own(2, 5.0, 90.0), own(7, 9.0, 80.0)]
    rows = quality.student_rows(runs, {})
    for order in (rows, rows[::-1]):
        assert markdown_table(order).splitlines()[2:] == [f"| {RECIPE} | 1 | 6.00 ± 2.65 | 80 ± 10 |"]


def test_other_recipes_rows_are_kept_with_their_seeds(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = {name: quality.student_rows([own(0, 4.0, 70.0, name), own(1, 5.0, 90.0, name)], {}) for name in (RECIPE, OTHER)}
    teacher = [{"name": "fd_digits", "model": "teacher", "value": 2.0, "n": 1797}]
    path.write_text("".join(json.dumps(row) + "\n" for row in (*teacher, *rows[RECIPE], *rows[OTHER])))
    assert quality.kept_rows([RECIPE], path) == rows[OTHER]
    assert quality.kept_rows([RECIPE, OTHER], path) == []
    assert quality.kept_rows([RECIPE], tmp_path / "none") == []


def test_a_finished_run_gives_its_rows_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the very same recipe and number of threads; anything else is trained."""
    folder, trained = tmp_path / f"{RECIPE}_seed3", []
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe.load(RECIPE, ["train.seed=3"]).to_yaml())
    monkeypatch.setattr(quality, "plan", lambda recipe: SimpleNamespace(resolved=recipe.dump))
    (folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 5.0}\n{"step": 2, "seconds": 11.5}\n')
    student: Any = {"name": "fd_digits", "model": "student", "steps": 1, "guidance": 1.0, "value": 4.25, "n": 1797}
    others: list[Any] = [student, {**student, "model": "teacher"}]
    origin = {"threads": torch.get_num_threads(), "model_hash": "student 3"}
    results.write_results(folder / "results.json", "digits", others, origin)
    monkeypatch.setattr(quality.run, "train", lambda recipe, folder, **options: trained.append((recipe.train.seed, folder.name)))
    rows = quality.train_and_measure(RECIPE, 3, tmp_path, None)
    shared = {"model": RECIPE, "steps": 1, "guidance": 1.0, "seed": 3, "provenance": origin}
    assert rows == [{"name": "fd_digits", "value": 4.25, "n": 1797, **shared}, {"name": "training_seconds", "value": 11.5, "n": 1, **shared}]
    assert trained == []
    results.write_results(folder / "results.json", "digits", [student], {"threads": torch.get_num_threads() + 1})
    quality.train_and_measure(RECIPE, 3, tmp_path, None)
    assert trained == [(3, folder.name)]


def test_tbcm_against_scm_keeps_the_seeds_too() -> None:
    rows = script("tbcm_against_scm").rows_of("tbcm", {0: {"fd_digits": 3.0, "seconds": 1.0}, 4: {"fd_digits": 5.0, "seconds": 1.0}})
    assert rows[:3] == [
        {"model": "tbcm", "name": "fd_digits", "value": 4.0, "std": pytest.approx(2**0.5), "std_over": "seeds"},
        {"model": "tbcm", "name": "fd_digits", "value": 3.0, "seed": 0},
        {"model": "tbcm", "name": "fd_digits", "value": 5.0, "seed": 4},
    ]
    assert [row["name"] for row in rows[3:]] == ["seconds"] * 3

"""The benchmark scripts keep each seed's rows beside the mean, go on where they were stopped, and what reads their files takes the mean."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import quality
from benchmarks.comparing import rows, runs
from benchmarks.comparing.passes import passes_a_step, sample_passes
from benchmarks.comparing.runs import Asked
from benchmarks.comparing.worlds import WORLDS
from benchmarks.training import trainers
from fastgen.caching import cache_pairs
from fastgen.config import Recipe, shipped_recipes
from fastgen.evaluation import results
from fastgen.evaluation.table import markdown_table
from fastgen.fingerprints import sealed, unsealed

ROOT = Path(__file__).parents[2]
RECIPE, OTHER = "digits_dmd2_1step", "digits_scm_2step"
DIGITS = WORLDS["digits"]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own(seed: int, fd: float, seconds: float, model: str = RECIPE, run: str = "") -> list[dict[str, Any]]:
    """What one trained seed gives."""
    shared = {"model": model, "steps": 1, "guidance": 1.0, "seed": seed, "provenance": {"threads": 1, "run": run or f"{model} {seed}"}}
    return [{"name": "fd_digits", "value": fd, "n": 1797, **shared}, {"name": "training_seconds", "value": seconds, "n": 1, **shared}]


def flat(*each: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for some in each for row in some]


def test_means_stand_before_the_rows_of_each_seed() -> None:
    seeds = [own(0, 4.0, 70.0), own(2, 5.0, 90.0), own(7, 9.0, 80.0)]
    made = rows.with_means(flat(seeds[2], seeds[0], seeds[1]), [RECIPE])
    shared = {"model": RECIPE, "steps": 1, "guidance": 1.0, "std_over": "seeds", "seeds": [0, 2, 7]}
    assert made[0] == {"name": "fd_digits", "value": 6.0, "n": 1797, "std": pytest.approx(7**0.5), **shared}
    assert made[1] == {"name": "training_seconds", "value": 80.0, "n": 1, "std": 10.0, **shared}
    assert made[2:] == flat(*seeds)
    (fd, _, *alone) = rows.with_means(seeds[1], [])
    assert (fd["value"], "std" in fd, alone) == (5.0, False, seeds[1])


def test_a_metric_that_one_seed_lacks_is_the_mean_of_the_others() -> None:
    fd, seconds = rows.over_seeds([own(0, 4.0, 70.0), own(1, 6.0, 80.0)[:1]])
    assert (fd["value"], fd["seeds"]) == (5.0, [0, 1]) and (seconds["value"], seconds["seeds"], "std" in seconds) == (70.0, [0], False)


def test_the_table_takes_the_means_in_the_order_of_the_world() -> None:
    seeds = flat(own(0, 4.0, 70.0), own(2, 5.0, 90.0), own(7, 9.0, 80.0))
    for order in (seeds, seeds[::-1]):
        made: Any = rows.with_means(order, [RECIPE])
        assert markdown_table(made).splitlines()[2:] == [f"| {RECIPE} | 1 | 6.00 ± 2.65 | 80 ± 10 |"]
    made = rows.with_means(flat(own(0, 1.0, 1.0, "mine"), own(0, 2.0, 1.0, OTHER), own(0, 3.0, 1.0)), DIGITS.recipes)
    assert [row["model"] for row in made if "seed" not in row and row["name"] == "fd_digits"] == [RECIPE, OTHER, "mine"]


def test_rows_are_measured_again_only_where_something_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that was stopped goes on; what failed is said, and the others are kept."""
    output, asked_of, threads_of = tmp_path / "rows.jsonl", [], []
    teacher = {"name": "fd_digits", "model": "teacher", "value": 2.0, "n": 1797, "provenance": {"run": "teacher"}}
    monkeypatch.setattr(quality, "known_rows", lambda world, found, threads: [teacher, {**teacher, "model": "real"}])
    monkeypatch.setattr(Asked, "key", lambda self, threads: f"{self.name} {self.seed}")

    def side_by_side(todo: Mapping[Asked, str], work: Path, jobs: int, threads: int) -> Iterator[Any]:
        for each, key in todo.items():
            asked_of.append((each.recipe, each.seed))
            threads_of.append((jobs, threads))
            yield each, Exception("diverged") if each.seed == 9 else own(each.seed, 4.0 + each.seed, 1.0, each.recipe, key)

    monkeypatch.setattr(runs, "side_by_side", side_by_side)
    rows.write(output, [*own(0, 4.0, 1.0), *own(1, 7.0, 1.0, run="of another recipe"), *own(0, 3.0, 1.0, OTHER)])
    made, failed = quality.measure(DIGITS, [Asked(RECIPE, seed) for seed in (0, 1, 9)], tmp_path, output, 2, 1)
    assert asked_of == [(RECIPE, 1), (RECIPE, 9)] and set(threads_of) == {(2, 1)}
    assert failed == [f"{RECIPE}, seed 9: diverged"]
    seeds = flat(own(0, 4.0, 1.0), own(1, 5.0, 1.0), own(0, 3.0, 1.0, OTHER))
    assert made == rows.read(output) == [teacher, *rows.with_means(seeds, DIGITS.recipes), {**teacher, "model": "real"}]
    asked_of.clear()
    assert quality.measure(DIGITS, [Asked(RECIPE, 0)], tmp_path, output, 2, 1) == (made, []) and asked_of == []


def test_a_run_is_known_by_all_that_its_rows_depend_on() -> None:
    keys = {
        Asked(RECIPE, 0).key(1), Asked(RECIPE, 1).key(1), Asked(RECIPE, 0).key(2), Asked(OTHER, 0).key(1),
        Asked(RECIPE, 0, ("train.steps=3",)).key(1), Asked(RECIPE, 0, ("teacher.guidance=2.0",)).key(1),
    }  # fmt: skip
    assert len(keys) == 6 and Asked(RECIPE, 0, label="another name").key(1) in keys


def test_pairs_count_by_how_they_were_drawn_and_not_by_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an older fastgen, which recorded less, drew them; and rows that were kept by the path are found."""
    for name, steps in (("here", 2), ("there", 2), ("otherwise", 3)):
        cache_pairs(Recipe.load("digits_reflow_1step", ["data.pairs=null", "train.device=cpu"]), tmp_path / name, count=4, steps=steps)
    record = tmp_path / "there/pairs/store.json"
    content = unsealed(json.loads(record.read_text()))
    content["origin"] = {
        key: value for key, value in content["origin"].items() if key not in ("teacher.dtype", "teacher.quantise", "train.precision")
    }
    record.write_text(json.dumps(sealed(content)))
    here, there, otherwise = (Asked("digits_reflow_1step", 0, (f"data.pairs={tmp_path / name}",), "x") for name in ("here", "there", "otherwise"))
    key = here.key(1)
    fewer = Asked("digits_reflow_1step", 0, (f"data.pairs={{from: {tmp_path / 'here'}, count: 3}}",), "x")
    assert there.key(1) == key and len({key, otherwise.key(1), fewer.key(1)}) == 3
    assert here.key(1, pairs_by_path=True) != there.key(1, pairs_by_path=True)
    monkeypatch.setattr(runs, "side_by_side", lambda todo, *arguments: iter(todo.items()))  # nothing is to be measured
    told: Any = {"work": tmp_path, "jobs": 1, "threads": 1}
    kept, _ = runs.measure([here], own(0, 4.0, 70.0, "x", here.key(1, pairs_by_path=True)), lambda rows: None, **told)
    assert kept == own(0, 4.0, 70.0, "x", key) == runs.measure([there], kept, lambda rows: None, **told)[0]


def test_a_labels_folder_has_a_name_on_every_file_system() -> None:
    assert Asked(RECIPE, 3).folder(Path("runs")) == Path(f"runs/{RECIPE}_seed3")
    assert Asked(RECIPE, 3, label="one step: .7, twice").folder(Path("runs")) == Path("runs/one_step_.7_twice_seed3")


def test_a_finished_run_gives_its_rows_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the very same recipe and number of threads; anything else is trained."""
    asked, trained = Asked(RECIPE, 3), []
    folder = asked.folder(tmp_path)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe.load(RECIPE, ["train.seed=3"]).to_yaml())
    monkeypatch.setattr(runs, "plan", lambda recipe: SimpleNamespace(resolved=recipe.dump))
    monkeypatch.setattr(runs, "passes_of", lambda asked: 10.0)
    (folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 5.0}\n{"step": 2, "seconds": 11.5}\n')
    student: Any = {"name": "fd_digits", "model": "student", "steps": 1, "guidance": 1.0, "value": 4.25, "n": 1797}
    others: list[Any] = [{**student, "interval": [4.0, 5.0], "interval_over": "jackknife"}, {**student, "model": "teacher"}]
    origin = {"threads": torch.get_num_threads(), "model_hash": "student 3"}
    results.write_results(folder / "results.json", "digits", others, {**origin, "conventions": {}})
    monkeypatch.setattr(runs.run, "train", lambda recipe, folder, **options: trained.append((recipe.train.seed, folder.name)))
    shared = {"model": RECIPE, "steps": 1, "guidance": 1.0, "seed": 3, "provenance": {**origin, "run": "the key"}}
    assert runs.train_and_measure(asked, tmp_path, "the key") == [
        {"name": "fd_digits", "value": 4.25, "n": 1797, **shared},
        {"name": "training_seconds", "value": 11.5, "n": 1, **shared},
        {"name": "network_passes", "value": 10.0 * Recipe.load(RECIPE).train.steps, "n": 1, **shared},
    ]
    assert trained == []
    results.write_results(folder / "results.json", "digits", [student], {"threads": torch.get_num_threads() + 1})
    runs.train_and_measure(asked, tmp_path, "the key")
    assert trained == [(3, folder.name)]


def test_passes_are_those_that_a_step_makes() -> None:
    """Flow matching: a forward and a backward pass to the weights. One-step dmd2: a roll-out with its backward pass, the student's predictions by
    teacher (with guidance, twice) and fake score, and the critic's own step, whose roll-out needs no gradient."""
    changes = ["train.batch_size=4", "train.steps=20", "data.pairs=null"]
    matching, _ = trainers.of_recipe("digits_teacher", [*changes, "teacher.pretrained=fastgen:digits"])
    assert passes_a_step(matching, 2) == 4 * 2
    matched, _ = trainers.of_recipe(RECIPE, changes)
    assert passes_a_step(matched, 2) == 4 * ((1 + 1) + 2 + 1) + 4 * (1 + 2)


def test_tangents_count_for_more() -> None:
    one: Any = SimpleNamespace(batch=5, tangents={}, gradients={}, learning=frozenset(), moving=frozenset())
    assert sample_passes([one]) == 5
    assert sample_passes([SimpleNamespace(**{**vars(one), "tangents": {0: None}})]) == 10  # type: ignore[list-item]
    both = SimpleNamespace(**{**vars(one), "gradients": {0: None}, "learning": frozenset("w"), "moving": frozenset([0])})
    assert sample_passes([one, both]) == 5 + 15  # type: ignore[list-item]


@pytest.mark.parametrize("world", WORLDS.values(), ids=list(WORLDS))
def test_worlds_name_recipes_that_there_are(world: Any) -> None:
    assert set(world.recipes) <= set(shipped_recipes()) and len(set(world.recipes)) == len(world.recipes)
    for name in world.recipes:
        recipe = Recipe.load(name)
        assert (recipe.teacher.pretrained, recipe.evaluate.protocol, recipe.teacher.guidance) == (world.teacher, world.name, world.guidance)
        assert name.endswith(f"_{recipe.student.steps}step")
    assert len(world.shown()) > 20


def test_tbcm_against_scm_keeps_the_seeds_too() -> None:
    made = script("tbcm_against_scm").rows_of("tbcm", {0: {"fd_digits": 3.0, "seconds": 1.0}, 4: {"fd_digits": 5.0, "seconds": 1.0}})
    assert made[:3] == [
        {"model": "tbcm", "name": "fd_digits", "value": 4.0, "std": pytest.approx(2**0.5), "std_over": "seeds"},
        {"model": "tbcm", "name": "fd_digits", "value": 3.0, "seed": 0},
        {"model": "tbcm", "name": "fd_digits", "value": 5.0, "seed": 4},
    ]
    assert [row["name"] for row in made[3:]] == ["seconds"] * 3
    assert json.loads(json.dumps(made)) == made


def test_a_run_that_takes_another_over_is_behind_it_and_counts_by_its_key(tmp_path: Path) -> None:
    dense2moe = script("dense2moe")
    split, few = dense2moe.asked_for("digits", ["experts, one step, dmd2"], 3, ["train.steps=5"])
    assert (split.name, split.on, few.on) == (dense2moe.SPLIT, None, split)
    assert few.keys_in(tmp_path) == ["train.steps=5", "train.seed=3", f"student.init={split.folder(tmp_path).resolve()}"]
    assert split.keys_in(tmp_path) == split.keys
    other = few._replace(on=split._replace(overrides=("train.steps=6",)))
    assert len({few.key(1), few._replace(on=None).key(1), other.key(1)}) == 3
    assert few.key(1) == few._replace(on=split._replace()).key(1)
    names = [name for name, variant in dense2moe.variants("scenes").items() if variant.on]
    assert len(names) == 2 and set(dense2moe.variants("scenes")) == set(dense2moe.variants("digits"))

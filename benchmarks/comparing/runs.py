"""One row of a comparison: a recipe trained with a seed as a user would, and measured; several at once, each in a process of its own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.comparing.passes import passes_a_step
from benchmarks.measuring.case import THREADS
from benchmarks.training import trainers
from fastgen import fingerprints, run, terminal
from fastgen.config import Recipe
from fastgen.data.pair_folder import Stored
from fastgen.evaluation import results
from fastgen.evaluation.protocol import load_protocol
from fastgen.families import resolve_source
from fastgen.fingerprints import digest
from fastgen.plan import plan
from fastgen.yaml_files import read_yaml

Rows = list[dict[str, Any]]


class Asked(NamedTuple):
    """overrides: of the recipe's keys, beside the seed. label: what the rows' model is called. on: the run whose student it takes over
    (`student.init`), of the same work folder."""

    recipe: str
    seed: int
    overrides: tuple[str, ...] = ()
    label: str = ""
    on: Asked | None = None

    @property
    def name(self) -> str:
        return self.label or self.recipe

    @property
    def keys(self) -> list[str]:
        return [*self.overrides, f"train.seed={self.seed}"]

    def keys_in(self, work: Path) -> list[str]:
        """With the run that is taken over."""
        return [*self.keys, *([] if self.on is None else [f"student.init={self.on.folder(work).resolve()}"])]

    def folder(self, work: Path) -> Path:
        return work / re.sub(r"[^\w.-]+", "_", f"{self.name}_seed{self.seed}")

    def key(self, threads: int, *, pairs_by_path: bool = False) -> str:
        """All that its rows depend on, but for versions and machine: the recipe, the teacher's weights, the protocol, and threads. Keys at their
        defaults do not count, so that a key that fastgen gets makes no row old; who changes a default deletes the rows that had it. A run that is
        taken over counts by its own key, not by where it lies, and so do pairs by how they were drawn (pairs_by_path: by their folder, as once)."""
        planned = plan(Recipe.load(self.recipe, self.keys))
        recipe = planned.recipe
        teacher = fingerprints.folder_hash(resolve_source(recipe.teacher.pretrained))
        assert recipe.evaluate.protocol is not None
        stated = recipe.model_dump(mode="json", exclude_defaults=True)
        if isinstance(planned.pairs, Stored) and not pairs_by_path:
            stated["data"]["pairs"] = {"count": planned.pairs.count, **drawn_as(planned.pairs)}
        before = [] if self.on is None else [self.on.key(threads)]
        return digest([stated, teacher, load_protocol(recipe.evaluate.protocol).hash(), threads, *before])


def drawn_as(pairs: Stored) -> dict[str, Any]:
    """What decides a folder's pairs, by its record; what was not said when they were drawn, and says nothing else, does not count."""
    manifest = pairs.store.manifest
    return {key: value for key, value in {**manifest.origin, "data.dtype": manifest.dtype}.items() if value not in (None, "", "fp32")}


def train_and_measure(asked: Asked, work: Path, key: str) -> Rows:
    """Rows of one student: the protocol's metrics, training seconds and network passes. A finished run of the very same recipe with as many
    threads is used again."""
    folder, recipe = asked.folder(work), Recipe.load(asked.recipe, asked.keys_in(work))
    if not is_finished(folder, plan(recipe).resolved()) or (asked.on is not None and _is_older(folder, asked.on.folder(work))):
        run.train(recipe, folder, overwrite=folder.exists())
    measured = results.read_results(folder / "results.json")
    rows = [row for row in measured["metrics"] if row["model"] == "student"]
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    costs = {"training_seconds": logged[-1]["seconds"], "network_passes": recipe.train.steps * passes_of(asked), **_of_experts(recipe, logged)}
    rows += [{**rows[0], "name": name, "value": value, "n": 1} for name, value in costs.items()]
    kept = {name: measured["provenance"][name] for name in _ORIGIN if name in measured["provenance"]}
    return [{**_plain(row), "model": asked.name, "seed": asked.seed, "provenance": {**kept, "run": key}} for row in rows]


def _of_experts(recipe: Recipe, logged: Rows) -> dict[str, float]:
    """Of a student of experts the share of the dense feed-forward layers that a token uses, and the balance loss where it was last logged."""
    if recipe.student.moe is None:
        return {}
    ours, theirs = plan(recipe).accounts()
    balances = [row["experts/student/balance"] for row in logged if "experts/student/balance" in row]
    return {"active_share": ours["feed-forward"].active / theirs["feed-forward"].active, **({"balance": balances[-1]} if balances else {})}


def _is_older(folder: Path, other: Path) -> bool:
    """Whether a run was measured before the other was."""
    return (folder / "results.json").stat().st_mtime < (other / "results.json").stat().st_mtime


_ORIGIN = ("date", "versions", "device", "threads", "platform", "protocol_hash", "model_hash")


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without the interval over pictures: of several seeds, the spread between seeds is what counts."""
    return {name: value for name, value in row.items() if name not in ("interval", "interval_over", "std", "std_over", "remark")}


def passes_of(asked: Asked) -> float:
    """Network passes of a training step, a sample each."""
    few = [] if Recipe.load(asked.recipe, asked.keys).data.pairs is None else ["data.pairs=128"]  # drawing them is no training step's cost
    trainer, _ = trainers.of_recipe(asked.recipe, [*asked.keys, *few])
    return passes_a_step(trainer)


def is_finished(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether the folder holds a measured run of this resolved recipe, and of this number of threads."""
    if not (folder / "results.json").is_file() or read_yaml(folder / "recipe.yaml") != recipe:
        return False
    return results.read_results(folder / "results.json")["provenance"].get("threads") == torch.get_num_threads()


def side_by_side(todo: Mapping[Asked, str], work: Path, jobs: int, threads: int) -> Iterator[tuple[Asked, Rows | Exception]]:
    """Each as soon as it is there, `jobs` at a time with so many threads each; an exception in place of the rows of what failed. todo: by what is
    asked the key of its rows."""
    os.environ |= dict.fromkeys(THREADS, str(threads))  # of the children, which import torch anew
    work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures: dict[Future[Rows], Asked] = {pool.submit(_apart, asked, work, key, threads): asked for asked, key in todo.items()}
        for done in as_completed(futures):
            error = done.exception()
            yield futures[done], done.result() if error is None else Exception(f"{type(error).__name__}: {error}")


def measure(asked: Sequence[Asked], rows: Rows, keep: Callable[[Rows], None], *, work: Path, jobs: int, threads: int) -> tuple[Rows, list[str]]:
    """The rows, with those of what was asked for and is not among them; and what failed, a line each. A row that is there of the same name and
    seed, but of another recipe, teacher, protocol or number of threads, goes. keep: given all rows at the start and after each run."""
    terminal.quiet()
    keys = {each: each.key(threads) for each in asked}
    rows = _keyed_anew(keys, rows, threads)
    there = {row["provenance"].get("run") for row in rows}
    todo = {each: key for each, key in keys.items() if key not in there}
    replaced = {(each.name, each.seed) for each in todo}
    rows = [row for row in rows if (row["model"], row["seed"]) not in replaced]
    failed: list[str] = []
    keep(rows)
    for count, (each, made) in enumerate(side_by_side(todo, work, jobs, threads), 1):
        if isinstance(made, Exception):
            failed.append(f"{each.name}, seed {each.seed}: {made}")
            print(f"[{count}/{len(todo)}] failed: {failed[-1]}", flush=True)
            continue
        rows = [*rows, *made]
        keep(rows)
        told = ", ".join(f"{row['name']} {row['value']:.4g}" for row in made)
        print(f"[{count}/{len(todo)}] {each.name}, seed {each.seed}: {told}", flush=True)
    return rows, failed


def _keyed_anew(keys: Mapping[Asked, str], rows: Rows, threads: int) -> Rows:
    """The rows, with the keys of today in place of those by the path of a folder of pairs, where that is asked for by the same path."""
    anew = {each.key(threads, pairs_by_path=True): key for each, key in keys.items() if any(one.startswith("data.pairs=") for one in each.overrides)}

    def renamed(origin: Mapping[str, Any]) -> dict[str, Any]:
        return {**origin, **({"run": anew[origin["run"]]} if origin.get("run") in anew else {})}

    return [{**row, "provenance": renamed(row["provenance"])} for row in rows]


def _apart(asked: Asked, work: Path, key: str, threads: int) -> Rows:
    terminal.quiet()
    torch.set_num_threads(threads)
    return train_and_measure(asked, work, key)

"""What experts are worth: feed-forward layers at 37.5 %, split by three kinds of importance or pruned, and few-step methods on top.

    python benchmarks/dense2moe.py                            # scenes, three seeds; rows go to benchmarks/results/dense2moe_WORLD.jsonl
    python benchmarks/dense2moe.py --world digits
    python benchmarks/dense2moe.py --world digits --seeds 0 --set train.steps=4 --work /tmp/try    # does it run? the table is only printed

Each variant is a shipped recipe with changed keys, trained and measured as a user would, in a process of its own. Few-step methods begin with the
student of experts of the same seed, which is trained before them, also where `--only` leaves it out. What is there of the same recipe, teacher,
protocol and beginning is not made again. The tables in benchmarks/dense2moe.md show means and standard deviations over seeds.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.comparing import rows as kept  # noqa: E402
from benchmarks.comparing.runs import Asked, Rows, measure  # noqa: E402
from benchmarks.comparing.worlds import WORLDS  # noqa: E402
from benchmarks.table import between  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LOG = ROOT / "benchmarks" / "dense2moe.md"
SHOWN = {
    "digits": {"fd_digits": "FD-digits", "prompt_accuracy": "prompt accuracy"},
    "scenes": {"fd_scenes_teacher": "FD-teacher", "fd_scenes": "FD-scenes", "scene_accuracy": "scene accuracy", "mode_entropy": "modes"},
}
COSTS = {"balance": "balance", "active_share": "feed-forward, active", "training_seconds": "training s", "images_per_second": "images/s"}
SPLIT = "experts, by Taylor importance"


class Variant(NamedTuple):
    """keys: that differ from the recipe's. on: the variant whose student it takes over."""

    recipe: str
    keys: tuple[str, ...] = ()
    on: str = ""


def variants(world: str) -> Mapping[str, Variant]:
    """By what is shown. A student without active experts is the pruned network to the bit, with a shared expert of any size: the recipe's own has
    1 of 4 units, what a token uses of experts is 1 + 2 · 0.25."""
    split, first = f"{world}_dense2moe", {"digits": 240, "scenes": 600}[world]
    pruned = ("student.moe={experts: 10, shared: 1.5, routed: 0.25, active: 0}", "distiller.shared=1")
    few = {"one step, dmd2": "dmd2_1step", "two steps, scm": "scm_2step"}
    return {
        "experts, before training": Variant(split, ("train.steps=1", "optimizer.student.lr=1.0e-9", "optimizer.student.warmup=0")),
        "shared expert alone, the first stage's steps": Variant(split, (f"train.steps={first}", "distiller.shared=1", "student.moe.active=0")),
        SPLIT: Variant(split),
        "experts, by magnitude": Variant(split, ("student.moe.importance=magnitude",)),
        "experts, by random numbers": Variant(split, ("student.moe.importance=random",)),
        "pruned to the same size, by Taylor importance": Variant(split, pruned),
        **{f"dense, {shown}": Variant(f"{world}_{name}") for shown, name in few.items()},
        **{f"experts, {shown}": Variant(f"{split}_{name}", on=SPLIT) for shown, name in few.items()},
    }


def asked_for(world: str, names: Sequence[str], seed: int, keys: Sequence[str] = ()) -> list[Asked]:
    """Runs of one seed, each behind the one that it begins with."""
    made: dict[str, Asked] = {}

    def add(name: str) -> Asked:
        if name not in made:
            variant = variants(world)[name]
            on = add(variant.on) if variant.on else None
            made[name] = Asked(variant.recipe, seed, (*variant.keys, *keys), name, on)
        return made[name]

    for name in names:
        add(name)
    return list(made.values())


def in_turn(asked: Sequence[Asked], found: Rows, keep: Any, *, work: Path, jobs: int, threads: int) -> tuple[Rows, list[str]]:
    """First what begins with the teacher, then what begins with one of those, where they are there; also a run whose rows are there, but not its
    folder, is made again where another begins with it."""
    there = {row["provenance"].get("run") for row in found}
    begun = {each.on for each in asked if each.on is not None and each.key(threads) not in there}
    lost = {(each.name, each.seed) for each in begun if not (each.folder(work) / "results.json").is_file()}
    found = [row for row in found if (row["model"], row["seed"]) not in lost]
    found, failed = measure([each for each in asked if each.on is None], found, keep, work=work, jobs=jobs, threads=threads)
    there = {(row["model"], row["seed"]) for row in found}
    after = [each for each in asked if each.on is not None and (each.on.name, each.on.seed) in there]
    found, more = measure(after, found, keep, work=work, jobs=jobs, threads=threads)
    return found, [*failed, *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=list(WORLDS), default="scenes")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "dense2moe", help="where runs are kept")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of every recipe, to try this out; nothing is written but --work"
    )
    arguments = parser.parse_args()
    world = arguments.world
    if unknown := [name for name in arguments.only or () if name not in variants(world)]:
        parser.error(f"no variant {unknown[0]!r}: {', '.join(variants(world))}")
    file = (arguments.work if arguments.set else RESULTS) / f"dense2moe_{world}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    names = arguments.only or list(variants(world))
    asked = [each for seed in arguments.seeds for each in asked_for(world, names, seed, arguments.set)]
    where: Any = {"work": arguments.work / world, "jobs": arguments.jobs, "threads": arguments.threads}
    rows, failed = in_turn(asked, kept.read(file), functools.partial(kept.write, file), **where)
    made = table(world, rows, kept.read(RESULTS / f"quality_{world}.jsonl"))
    if not arguments.set:
        LOG.write_text(between(LOG.read_text(encoding="utf-8"), world, made), encoding="utf-8")
    print(made)
    if failed:
        raise SystemExit("\n".join(["", *failed]))


def table(world: str, rows: Rows, quality: Rows) -> str:
    """The teacher at its own steps, then a line a variant: mean ± standard deviation over its seeds. quality: rows of benchmarks/quality.py."""
    shown = {**SHOWN[world], **COSTS}
    steps = WORLDS[world].teacher_steps[0]
    teacher = [row | {"seed": 0} for row in quality if row["model"] == "teacher" and row["steps"] == steps]
    lines = ["| | " + " | ".join(shown.values()) + " | seeds |", "| --- |" + " ---: |" * (len(shown) + 1)]
    groups = {name: [row for row in rows if row["model"] == name] for name in variants(world)}
    for name, own in {f"dense, the teacher in {steps} steps": teacher, **groups}.items():
        if own:
            dense = not any(row["name"] == "active_share" for row in own)
            cells = [kept.in_words(_values(own, metric, dense=dense)) for metric in shown]
            lines.append(f"| {name} | {' | '.join(cells)} | {len({row['seed'] for row in own})} |")
    return "\n".join(lines)


def _values(rows: Rows, metric: str, *, dense: bool) -> list[float]:
    if metric == "images_per_second":
        return [1000 / value for value in _values(rows, "seconds_per_1000_images", dense=dense)]
    return [1.0] if metric == "active_share" and dense else [row["value"] for row in rows if row["name"] == metric]


if __name__ == "__main__":
    main()

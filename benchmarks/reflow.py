"""What each part of RF++ is worth: the plain 2-rectified flow, each of its changes alone, and all of them, at equal student steps.

    python benchmarks/reflow.py --pairs DIR                   # scenes, three seeds; rows go to benchmarks/results/reflow_WORLD.jsonl
    python benchmarks/reflow.py --pairs DIR --world digits

DIR holds pairs of the world's teacher (`fastgen cache pairs WORLD_reflow_1step data.pairs=null --output DIR --count 8192`), the same for every run.
Each variant is a shipped recipe with changed keys, trained and measured as a user would, in a process of its own. What is there of the same
recipe, teacher, protocol and pairs, by how they were drawn, wherever they lie, is not made again. The tables in benchmarks/reflow.md show means
and standard deviations over seeds.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.comparing import rows as kept  # noqa: E402
from benchmarks.comparing.runs import Asked, Rows, measure  # noqa: E402
from benchmarks.comparing.worlds import WORLDS  # noqa: E402
from benchmarks.table import between  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LOG = ROOT / "benchmarks" / "reflow.md"
SHOWN = {
    "digits": {"fd_digits": "FD-digits", "prompt_accuracy": "prompt accuracy"},
    "scenes": {"fd_scenes_teacher": "FD-teacher", "fd_scenes": "FD-scenes", "scene_accuracy": "scene accuracy", "mode_entropy": "modes"},
}
COSTS = {"training_seconds": "training s"}


def variants(world: str) -> Mapping[str, tuple[str, tuple[str, ...]]]:
    """By what is shown: the recipe and the keys that differ from it."""
    plain, best, perceptual = f"{world}_reflow_1step", f"{world}_rfpp_1step", f"distiller.perceptual={{metric: 'fastgen:{world}', weight: "
    half = ("distiller.name=slimflow", "student.shrink={depth: 0.5}")
    return {
        "2-rectified flow": (plain, ()),
        "with U-shaped times": (plain, ("distiller.times={name: u_shaped, a: 4}",)),
        "with pseudo-Huber": (plain, ("distiller.velocity={metric: huber, weight: one_minus_t}",)),
        "with features": (plain, (f"{perceptual}constant}}",)),
        "with features over t": (plain, (f"{perceptual}inverse_time}}",)),
        "RF++ (all)": (best, ()),
        "half the blocks, 2-rectified flow": (plain, half),
        "half the blocks, annealed (SlimFlow)": (plain, (*half, "distiller.anneal={steps: 300}")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=list(WORLDS), default="scenes")
    parser.add_argument("--pairs", type=Path, required=True, help="a folder made by `fastgen cache pairs`")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "reflow", help="where runs are kept")
    arguments = parser.parse_args()
    file, world = RESULTS / f"reflow_{arguments.world}.jsonl", variants(arguments.world)
    if unknown := [name for name in arguments.only or () if name not in world]:
        parser.error(f"no variant {unknown[0]!r}: {', '.join(world)}")
    keep, given = functools.partial(kept.write, file), f"data.pairs={{from: '{arguments.pairs.resolve()}', count: 8192}}"
    asked = [
        Asked(recipe, seed, (*keys, given), name)
        for seed in arguments.seeds
        for name, (recipe, keys) in world.items()
        if not arguments.only or name in arguments.only
    ]
    rows = kept.read(file)
    rows, failed = measure(asked, rows, keep, work=arguments.work / arguments.world, jobs=arguments.jobs, threads=arguments.threads)
    LOG.write_text(between(LOG.read_text(encoding="utf-8"), arguments.world, table(arguments.world, rows)), encoding="utf-8")
    print(table(arguments.world, rows))
    if failed:
        raise SystemExit("\n".join(["", *failed]))


def table(world: str, rows: Rows) -> str:
    """A line a variant: mean ± standard deviation over its seeds."""
    shown = {**SHOWN[world], **COSTS}
    lines = ["| | " + " | ".join([*shown.values(), "images/s"]) + " | seeds |", "| --- |" + " ---: |" * (len(shown) + 2)]
    for name in variants(world):
        own = [row for row in rows if row["model"] == name]
        if own:
            cells = [kept.in_words([row["value"] for row in own if row["name"] == metric]) for metric in shown]
            cells.append(kept.in_words([1000 / row["value"] for row in own if row["name"] == "seconds_per_1000_images"]))
            lines.append(f"| {name} | {' | '.join(cells)} | {len({row['seed'] for row in own})} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Trials of a recipe on the scenes: which composition of methods brings a student closest to its teacher.

    python benchmarks/trials.py                     # what is missing of TRIALS, two at a time; appends to benchmarks/results/trials.jsonl
    python benchmarks/trials.py --only 'one step'   # of one group

Every trial is a shipped recipe with changed keys, trained and measured as a user would. What each found out is written down in trials.md, whose
table this script keeps up to date.
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
from benchmarks.table import between  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LOG = ROOT / "benchmarks" / "trials.md"
SHOWN = {"fd_scenes_teacher": "FD to the teacher", "fd_scenes": "FD to real scenes", "scene_accuracy": "all right", "mode_entropy": "modes"}
COSTS = {"training_seconds": "training s", "network_passes": "passes"}


def _rates(student: float, fake_score: float | None = None) -> tuple[str, ...]:
    of_critic = () if fake_score is None else (f"optimizer.fake_score.lr={fake_score}",)
    return (f"optimizer.student.lr={student}", *of_critic)


_WEAK = "distiller.gan.weight=0.03"
# What the recipes said when the trials were made: about 300,000 network passes, and the learning rates of the digits recipes. What the trials
# showed has changed the recipes since.
BEFORE: Mapping[str, tuple[str, ...]] = {
    "scenes_dmd_1step": ("train.steps=470", *_rates(5e-4, 1e-3)),
    "scenes_dmd2_1step": ("train.steps=590", *_rates(5e-4, 1e-3)),
    "scenes_dmd2_gan_1step": ("train.steps=310", *_rates(5e-4, 1e-3), _WEAK),
    "scenes_f_distill_1step": ("train.steps=290", *_rates(5e-4, 1e-3), _WEAK),
    "scenes_scm_2step": ("train.steps=670", *_rates(3e-4)),
    "scenes_rcm_2step": ("train.steps=300", *_rates(3e-4, 6e-4)),
    "scenes_tbcm_2step": ("train.steps=700", *_rates(3e-4)),
    "scenes_meanflow_2step": ("distiller.tangent=exact", "distiller.discrete_step=0.01", "train.steps=780", *_rates(5e-4)),
    "scenes_lcm_4step": ("train.steps=940", *_rates(5e-4)),
    "scenes_tscd_4step": ("train.steps=940", *_rates(5e-4)),
    "scenes_dmd2_4step": ("train.steps=310", *_rates(2e-4, 4e-4)),
    "scenes_dmd2_gan_4step": ("train.steps=160", *_rates(2e-4, 4e-4), _WEAK),
    "scenes_phased_dmd_4step": ("train.steps=260", *_rates(2e-4, 4e-4)),
}
ONE, AT_7, GAN, GAN_AT_TENTH = "scenes_dmd2_1step", "student.grid=[0.7]", "scenes_dmd2_gan_1step", "distiller.gan.weight=0.1"
# By group and what is tried: the recipe and the keys that differ from it.
TRIALS: Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "one step": {
        "dmd2": (ONE, ()),
        "told time .7": (ONE, (AT_7,)),
        "told time .85": (ONE, ("student.grid=[0.85]",)),
        ".7, twice the learning rates": (ONE, (AT_7, "optimizer.student.lr=1e-3", "optimizer.fake_score.lr=2e-3")),
        ".7, two critic updates": (ONE, (AT_7, "distiller.critic_updates=2", "train.steps=430")),
        ".7, decoupled guidance": (ONE, (AT_7, "distiller.decoupled={}", "train.steps=470")),
        ".7, discriminator": ("scenes_dmd2_gan_1step", (AT_7,)),
        ".7, regression": ("scenes_dmd_1step", (AT_7,)),
        "rcm": ("scenes_rcm_2step", ("student={steps: 1, grid: [0.99]}",)),
        ".7, four times as long": (ONE, (AT_7, "train.steps=2360")),
    },
    "one step, faster": {
        "four times the learning rates": (ONE, ("optimizer.student.lr=2e-3", "optimizer.fake_score.lr=4e-3")),
        "half the batch, twice the steps": (ONE, ("train.batch_size=32", "train.steps=1180")),
        "discriminator, twice the learning rates": (
            "scenes_dmd2_gan_1step",
            ("optimizer.student.lr=1e-3", "optimizer.fake_score.lr=2e-3", "optimizer.discriminator.lr=2e-3"),
        ),
        "discriminator of weight .1": ("scenes_dmd2_gan_1step", ("distiller.gan.weight=0.1",)),
        "discriminator of weight .3": ("scenes_dmd2_gan_1step", ("distiller.gan.weight=0.3",)),
        "discriminator of weight .1, four times the learning rates": (
            "scenes_dmd2_gan_1step",
            ("distiller.gan.weight=0.1", "optimizer.student.lr=2e-3", "optimizer.fake_score.lr=4e-3", "optimizer.discriminator.lr=4e-3"),
        ),
    },
    "four steps": {
        "dmd2": ("scenes_dmd2_4step", _rates(2e-4, 4e-4)),
        "dmd2, five times the learning rates": ("scenes_dmd2_4step", _rates(1e-3, 2e-3)),
        "discriminator of weight .1, five times the learning rates but its own": ("scenes_dmd2_gan_4step", (GAN_AT_TENTH, *_rates(1e-3, 2e-3))),
        "phases, five times the learning rates": ("scenes_phased_dmd_4step", _rates(1e-3, 2e-3)),
        "lcm, four times the learning rate": ("scenes_lcm_4step", _rates(2e-3)),
        "tscd, four times the learning rate": ("scenes_tscd_4step", _rates(2e-3)),
    },
    "two steps": {
        "scm, four times the learning rate": ("scenes_scm_2step", _rates(1.2e-3)),
        "rcm, four times the learning rates": ("scenes_rcm_2step", _rates(1.2e-3, 2.4e-3)),
        "tbcm, four times the learning rate": ("scenes_tbcm_2step", _rates(1.2e-3)),
        "mean flow, four times the learning rate": ("scenes_meanflow_2step", _rates(2e-3)),
        "mean flow, differences along the trajectory, twice the rate": (
            "scenes_meanflow_2step",
            ("distiller.tangent=discrete", "distiller.discrete_step=0.02", "train.steps=940", *_rates(1e-3)),
        ),
    },
    "one step, both": {
        "discriminator of weight .1, four times the other learning rates": (GAN, (GAN_AT_TENTH, *_rates(2e-3, 4e-3))),
        "discriminator of weight .1, twice the other learning rates": (GAN, (GAN_AT_TENTH, *_rates(1e-3, 2e-3))),
        "f-distill, four times the learning rates but the discriminator's": ("scenes_f_distill_1step", _rates(2e-3, 4e-3)),
        "rcm, four times the learning rates": ("scenes_rcm_2step", ("student={steps: 1, grid: [0.99]}", *_rates(1.2e-3, 2.4e-3))),
    },
    "ten minutes of two cores": {
        "one step, dmd2, four times the learning rates": (ONE, ("train.steps=2360", *_rates(2e-3, 4e-3))),
        "one step, f-distill of weight .1, the same rates": ("scenes_f_distill_1step", ("train.steps=1160", GAN_AT_TENTH, *_rates(2e-3, 4e-3))),
        "one step, discriminator of weight .1, twice the learning rates": (GAN, ("train.steps=1240", GAN_AT_TENTH, *_rates(1e-3, 2e-3))),
        "four steps, phases, five times the learning rates": ("scenes_phased_dmd_4step", ("train.steps=1040", *_rates(1e-3, 2e-3))),
    },
}


def asked_for(groups: Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]], seed: int) -> list[Asked]:
    trials = [(f"{group}: {name}", *tried) for group, own in groups.items() for name, tried in own.items()]
    return [Asked(recipe, seed, (*BEFORE[recipe], *keys), name) for name, recipe, keys in trials]


def table(rows: Rows) -> str:
    """A line a trial, in the order of TRIALS, beside what it changed; means where there are several seeds."""
    values: dict[str, dict[str, float]] = {}
    for row in kept.with_means(rows, []):
        if "seed" not in row:
            values.setdefault(row["model"], {})[row["name"]] = row["value"]
    heads = ["trial", "recipe and keys", *SHOWN.values(), *COSTS.values()]
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 2)}"]
    for group, trials in TRIALS.items():
        for name, (recipe, keys) in trials.items():
            if own := values.get(f"{group}: {name}"):
                cells = [f"{own[key]:.3g}" for key in SHOWN] + [f"{own[key]:,.0f}" for key in COSTS]
                lines.append(f"| {group}: {name} | `{' '.join([recipe, *keys])}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TRIALS, help="one group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    chosen = parser.parse_args()
    output = RESULTS / "trials.jsonl"
    groups = {chosen.only: TRIALS[chosen.only]} if chosen.only else TRIALS
    keep = functools.partial(kept.write, output)
    asked, work = asked_for(groups, chosen.seed), ROOT / "runs" / "trials"
    rows, failed = measure(asked, kept.read(output), keep, work=work, jobs=chosen.jobs, threads=chosen.threads)
    LOG.write_text(between(LOG.read_text(encoding="utf-8"), "trials", table(rows)), encoding="utf-8")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

"""What does a training step cost beside its network passes?

    python -m benchmarks.train_step --device cpu --methods dmd2 scm     # the shipped digits recipes of these methods
    make gpu OPTIONS='--only train_step real_sizes'                     # on a GPU, into benchmarks/results/gpu.jsonl

`ratio` is a step's time over the sum of its passes' times, each pass made again alone in the same run; `ratio_all` over passes, optimizers and
averages. 1 means that the training loop costs nothing. Below 1, passes of a step overlap: on a GPU, one is launched while another runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from benchmarks.measuring import clock
from benchmarks.measuring.case import Case, LeftOut, Row, Target
from benchmarks.random_sd3 import MEDIUM
from benchmarks.training import networks, trainers
from benchmarks.training.networks import Network
from benchmarks.training.step import cpu_time, measure_step
from fastgen.config import Recipe, shipped_recipes
from fastgen.plan import Plan
from fastgen.trainer import Trainer

SD3_RECIPES = ("sd35_medium_dmd2_4step_lora", "sd35_medium_scm_2step", "sd35_medium_rcm_4step", "sd35_medium_meanflow_2step")
# Recipes that cannot be measured as they are: the teacher's own teacher is made by a script; drawing pairs takes longer than the rest.
CHANGES = {"digits_teacher": ("teacher.pretrained=fastgen:digits",), "digits_dmd_1step": ("data.pairs=128",)}
TUNINGS = {"full": "student.tune=full", "lora": "student.tune.lora.rank=64"}
SHARE = 0.85  # of the free memory that networks and what trains them may take; the rest is for activations


def cases(target: Target) -> Iterator[Case]:
    """Every method on the digits teacher by its shipped recipe, and some on a random SD3 of 450 million parameters."""
    if target.rehearsal:
        yield from (_digits(name, target, ("train.batch_size=4",)) for name in ("digits_dmd2_1step", "digits_scm_2step"))
        network = networks.sd3("sd3_tiny", networks.SD3_TINY, tokens=8)
        yield _random(network, "sd35_medium_meanflow_2step", target, ("train.batch_size=2", "train.micro_batch=1"), ("full",))
        return
    yield from (_digits(name, target) for name in shipped_recipes() if name.startswith("digits_"))
    network = networks.sd3("sd3_450m", networks.SD3_SMALL)
    yield from (_random(network, name, target, ("train.batch_size=8", "train.micro_batch=8")) for name in SD3_RECIPES)


def real_sizes(target: Target) -> Iterator[Case]:
    """SD3.5-medium at 1024 x 1024 pixels, and blocks of FLUX.1 at as many."""
    one = ("train.batch_size=1", "train.micro_batch=1")
    if target.rehearsal:
        network = networks.flux("flux_tiny", networks.FLUX_TINY, side=64, tokens=6)
        yield _random(network, "sd35_medium_rcm_4step", target, (*one, "distiller.critic_updates=1"), ("lora",))
        return
    for network in (networks.sd3("sd35_medium", MEDIUM.transformer), networks.flux("flux_blocks", networks.FLUX_BLOCKS)):
        yield from (_random(network, name, target, one, seconds=30) for name in SD3_RECIPES[:3])


def _digits(name: str, target: Target, overrides: Sequence[str] = (), seconds: float = 1.5, timed: Callable = clock.elapsed) -> Case:
    changes = (f"train.device={target.device}", *CHANGES.get(name, ()), *overrides)

    def measure() -> Iterable[Row]:
        trainer, planned = trainers.of_recipe(name, changes)
        known = {"network": "digits", "recipe": name, "tuning": "full", "planned_bytes": trainers.planned_bytes(planned)}
        yield _row(trainer, planned, target, seconds, timed) | known

    return Case(name, measure, seconds=10)


def _random(
    network: Network, recipe: str, target: Target, overrides: Sequence[str], tunings: Sequence[str] = tuple(TUNINGS), seconds: float = 12
) -> Case:
    changes = (f"train.device={target.device}", *network.overrides, *overrides)

    def measure() -> Iterable[Row]:
        plans = {tuning: trainers.planned_for(network, Recipe.load(recipe, [*changes, TUNINGS[tuning]])) for tuning in tunings}
        needs = {tuning: trainers.planned_bytes(planned) for tuning, planned in plans.items()}

        def measured(tuning: str) -> Row:
            return _row(trainers.of_network(plans[tuning], network), plans[tuning], target, 3.0) | {"planned_bytes": needs[tuning]}

        row = first_that_fits(needs, target.free_bytes(), measured)
        yield row | {"network": network.name, "recipe": recipe}

    return Case(f"{network.name}_{Recipe.load(recipe).distiller.name}", measure, seconds=seconds)


def first_that_fits(needs: Mapping[str, int], free: int, measure: Callable[[str], Row]) -> Row:
    """What `measure(tuning)` gives for the first tuning whose networks fit into SHARE of the free bytes and whose activations turn out to fit
    too. LeftOut where none does."""
    refused = []
    for tuning, need in needs.items():
        if need > SHARE * free:
            refused.append(f"{tuning}: {need / 1e9:.1f} GB of networks, of {free / 1e9:.1f} GB free")
            continue
        try:
            return measure(tuning) | {"tuning": tuning, "refused": refused}
        except torch.OutOfMemoryError:
            refused.append(f"{tuning}: {need / 1e9:.1f} GB of networks fit, activations do not, of {free / 1e9:.1f} GB free")
        clock.free_memory()
    raise LeftOut("; ".join(refused))


def _row(trainer: Trainer, planned: Plan, target: Target, seconds: float, timed: Callable = clock.elapsed) -> Row:
    train = planned.recipe.train
    return {
        "method": planned.recipe.distiller.name,
        "shape": list(planned.family.latent.shape),
        "batch_size": train.batch_size,
        "micro_batch": train.at_once,
        "precision": train.precision,
        "parameters": trainers.parameters(trainer),
        **measure_step(trainer, trainers.decoders(planned.family), target, seconds=seconds, timed=timed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--methods", nargs="*", help="of the shipped digits recipes; default: all")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timed rounds a recipe")
    parser.add_argument("--cpu-time", action="store_true", help="processor time in place of wall time, on a CPU that others use too")
    chosen = parser.parse_args()
    target, timed = Target(chosen.device), cpu_time if chosen.cpu_time else clock.elapsed
    for name in (name for name in shipped_recipes() if name.startswith("digits_")):
        if not chosen.methods or Recipe.load(name).distiller.name in chosen.methods:
            for row in _digits(name, target, seconds=chosen.seconds, timed=timed).measure():
                print("\n".join(described(row)), flush=True)


def described(row: Row) -> Iterator[str]:
    """A row in a few lines."""
    yield (
        f"{row['recipe']}: {row['median_ms']:.1f} ms a step (± {row['iqr_ms']:.1f}, n = {row['n']}), over its passes {row['ratio']:.3f} "
        f"(± {row['ratio_iqr']:.3f}), over passes, optimizers and averages {row['ratio_all']:.3f}"
    )
    for part in (*row["passes"], *row["rest"]):
        what = f"{part['network']} {part['kind']}" + (f", batch {part['batch']}" if "batch" in part else "")
        yield f"  {part['count']:3d} x {part['median_ms']:8.2f} ms  {what}"


if __name__ == "__main__":
    main()

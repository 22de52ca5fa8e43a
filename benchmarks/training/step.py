"""A training step's time beside that of its parts: the network passes, the optimizers and the averages, each made again by itself.

Step and parts are timed in turn, round by round, so that whatever slows the machine for a while slows them alike. A step is repeated with the
same number, so it draws the same random numbers and makes the same passes every time.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.measuring import clock
from benchmarks.measuring.case import Row, Target
from benchmarks.training.passes import Pass, arrange, grouped, recorded
from benchmarks.training.products import step_flops
from fastgen.trainer import Trainer

GROUPS = ("passes", "optimizers", "averages")
Timed = Callable[[Callable[[], object], Target], float]  # milliseconds of a call


def cpu_time(call: Callable[[], object], target: Target) -> float:
    """Milliseconds that this process computes in a call, on all its threads: on a CPU that others use too, where wall time is no measure."""
    assert not target.is_gpu
    started = time.process_time()
    call()
    return 1e3 * (time.process_time() - started)


@dataclass(frozen=True)
class Part:
    """Something that a step does `count` times. group: one of GROUPS, or the step itself. prepare: what comes before each call and is not timed."""

    group: str
    row: Row
    count: int
    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    times: list[float] = field(default_factory=list)

    def measured(self) -> Row:
        return {**self.row, "count": self.count, **clock.spread(self.times)}


def measure_step(trainer: Trainer, decoders: Mapping[str, nn.Module], target: Target, *, seconds: float, timed: Timed = clock.elapsed) -> Row:
    """Of one step of a trainer that stands where it is to be measured. decoders: networks that are no roles; seconds: of timed rounds."""
    number = trainer.step

    def step() -> dict[str, float]:
        trainer.step = number
        return trainer.train_step()

    step()  # tunes kernels, makes optimizer states, checks tangents
    with clock.peak_bytes(target) as peak:
        made, metrics = recorded(step, trainer.roles, decoders)
        peak_bytes = peak()
    metrics = {name: value for name, value in metrics.items() if name.startswith(("loss/", "grad_norm/"))}
    flops, attention_flops = step_flops(step)
    busy = clock.busy_share(step, target)
    whole = Part("step", {}, 1, step)
    parts = [*_passes(trainer, made), *_optimizers(trainer, number), *_averages(trainer, number)]
    in_turn([whole, *parts], target, seconds=seconds, timed=timed)
    forget(trainer)
    times = clock.spread(whole.times)
    return {
        **ratios(whole, parts),
        **times,
        "step": number,
        "samples_per_s": 1e3 * trainer.settings.batch_size / times["median_ms"],
        "flops": flops,
        "attention_tangent_flops": attention_flops,
        "tflop_per_s": flops / times["median_ms"] / 1e9,
        "busy_share": busy,
        "peak_bytes": peak_bytes,
        "passes": [part.measured() for part in parts if part.group == "passes"],
        "rest": [part.measured() for part in parts if part.group != "passes"],
        "metrics": metrics,
        "finite": all(map(math.isfinite, metrics.values())),
    }


def ratios(whole: Part, parts: Sequence[Part]) -> Row:
    """ratio: the step over its passes; ratio_all: over its passes, optimizers and averages. Each is the median of the rounds', with their
    interquartile range. passes_ms, optimizers_ms, averages_ms: sums of medians."""
    sums = {group: [part for part in parts if part.group == group] for group in GROUPS}
    row: Row = {f"{group}_ms": sum(part.count * clock.spread(part.times)["median_ms"] for part in some) for group, some in sums.items()}
    for name, some in (("ratio", sums["passes"]), ("ratio_all", parts)):
        rounds = [step / sum(part.count * part.times[i] for part in some) for i, step in enumerate(whole.times)]
        low, row[name], high = statistics.quantiles(rounds, n=4)
        row[f"{name}_iqr"] = high - low
    return row


def in_turn(parts: Sequence[Part], target: Target, *, seconds: float, timed: Timed = clock.elapsed) -> None:
    """Time each part once a round, for about `seconds` and at least 5 rounds (in a rehearsal 2), after one round that does not count."""
    rounds = 2
    for i in itertools.count():
        times = []
        for part in parts:
            part.prepare()
            times.append(timed(part.call, target))
        if i == 0:
            rounds = 2 if target.rehearsal else max(5, min(50, round(1e3 * seconds / sum(times))))
            continue
        for part, one in zip(parts, times, strict=True):
            part.times.append(one)
        if i == rounds:
            return


def _passes(trainer: Trainer, made: Iterable[Pass]) -> list[Part]:
    return [
        Part("passes", {"network": one.network, "kind": one.kind, "batch": one.batch}, count, one.run, lambda one=one: arrange(one, trainer.roles))
        for one, count in grouped(made)
    ]


def _trained(trainer: Trainer, step: int) -> dict[str, int]:
    """How often a step trains each role."""
    names = [name for update in trainer.distiller.updates(step) for name in update.trains]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _optimizers(trainer: Trainer, step: int) -> list[Part]:
    """Of each trained role: clipping, the optimizer's step, and what forgets the gradients."""

    def optimise(name: str) -> None:
        trainer.parallel.clip_gradients(trainer.parameters[name], trainer.optimizer_blocks[name].clip).item()
        trainer.optimizers[name].step()
        trainer.optimizers[name].zero_grad(set_to_none=True)

    def prepare(name: str) -> None:
        for group in trainer.optimizers[name].param_groups:
            group["lr"] = 0.0
        for parameter in trainer.parameters[name]:
            parameter.grad = torch.zeros_like(parameter)

    return [
        Part("optimizers", {"network": name, "kind": "optimizer"}, count, lambda name=name: optimise(name), lambda name=name: prepare(name))
        for name, count in _trained(trainer, step).items()
    ]


def _averages(trainer: Trainer, step: int) -> list[Part]:
    names = trainer.ema.keys() & _trained(trainer, step).keys()
    return [Part("averages", {"network": name, "kind": "average"}, 1, trainer.ema[name].update) for name in sorted(names)]


def forget(trainer: Trainer) -> None:
    """Leave the parameters as training finds them."""
    for role in trainer.roles.trained.values():
        for parameter in role.parameters().values():
            parameter.requires_grad_(True)
            parameter.grad = None

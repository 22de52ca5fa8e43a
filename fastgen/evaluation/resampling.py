"""Whether two models differ by more than the choice of pictures: both are measured again on the same resampled ids.

Pictures of one id share prompt and noise, so much of what an id does to one value it does to the other, and the difference varies less than
either. Pictures of one prompt stay together. The reference is the same for both and is not resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.evaluation.intervals import NORMAL, group_sums, jackknife_interval
from fastgen.evaluation.metrics.base import Measured, Metric
from fastgen.evaluation.protocol import SampleSet
from fastgen.evaluation.weights import Unavailable
from fastgen.rng import derive_seed

NUM_GROUPS = 10  # of the jackknife


class Difference(NamedTuple):
    """b - a. interval: 95 %, by the method `over`; None where there is a single unit to resample, which says nothing about others."""

    value: float
    interval: tuple[float, float] | None
    over: str  # bootstrap, jackknife or subsets


Tick = Callable[[int, int], None]  # rounds done, rounds in all


def differences(metric: Metric, a: Measured, b: Measured, *, resamples: int = 100, tick: Tick = lambda done, total: None) -> dict[str, Difference]:
    """Of every value that both have, by name. tick: told after each time that both are measured again. Unavailable as `measure` raises it.

    Values that are means of `scores` have the bootstrap of the paired scores' differences, those that are means over `subsets` the spread of the
    subsets' differences; the others are measured again on each resample. Of the bootstrap's differences only the standard deviation counts,
    interval = difference ± 1.96 std: resamples repeat pictures, which shifts Fréchet distances, most of all those of few pictures.
    """
    values = [metric.values(each) for each in (a, b)]
    found = {name: values[1][name] - values[0][name] for name in values[0] if name in values[1]}
    scores, subsets = _bootstrap_means(metric, a, b, resamples), _subset_spreads(metric, a, b)
    again = [name for name in found if name not in scores and name not in subsets]
    method = _bootstrap if metric.resampling == "bootstrap" else _jackknife
    spread = {**(method(metric, a, b, again, resamples, tick) if again else {}), **subsets, **scores}
    over = {**dict.fromkeys(again, metric.resampling), **dict.fromkeys(subsets, "subsets"), **dict.fromkeys(scores, "bootstrap")}
    return {name: Difference(value, spread[name](value), over[name]) for name, value in found.items()}


Around = Callable[[float], tuple[float, float] | None]  # the interval around a difference


def _normal(samples: Tensor) -> Around:
    return _around(NORMAL * float(samples.std()))


def _around(half: float) -> Around:
    return lambda value: (value - half, value + half)


def _bootstrap_means(metric: Metric, a: Measured, b: Measured, resamples: int) -> dict[str, Around]:
    first, second = metric.scores(a), metric.scores(b)
    spread: dict[str, Around] = {}
    for name in first.keys() & second.keys():
        sums, counts = group_sums(second[name].double() - first[name].double(), a.sets[metric.set].groups)
        draws = [_with_repetitions(len(sums), a.seed, metric.set, index) for index in range(resamples)]
        spread[name] = _normal(torch.stack([sums[rows].sum() / counts[rows].sum() for rows in draws])) if len(sums) > 1 else _nothing
    return spread


def _subset_spreads(metric: Metric, a: Measured, b: Measured) -> dict[str, Around]:
    """Of subsets of m of N pictures, whose differences have the variance s²: that of all pictures' is s² m / N, as of any U-statistic of first
    order; that S random subsets are not all adds s² (1 - m / N) / S. None where pictures share prompts, which subsets tear apart."""
    if a.sets[metric.set].repeats:
        return {}
    first, second = metric.subsets(a), metric.subsets(b)
    spread: dict[str, Around] = {}
    for name in first.keys() & second.keys():
        share, count = first[name].share, len(first[name].values)
        variance = float((second[name].values - first[name].values).var()) * (share + (1 - share) / count) if count > 1 else math.nan
        spread[name] = _around(NORMAL * math.sqrt(variance)) if count > 1 else _nothing
    return spread


def _bootstrap(metric: Metric, a: Measured, b: Measured, names: Iterable[str], resamples: int, tick: Tick) -> dict[str, Around]:
    if min(_num_units(a).values()) < 2:
        return dict.fromkeys(names, _nothing)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(resamples):
        units = {name: _with_repetitions(count, a.seed, name, index) for name, count in _num_units(a).items()}
        _measure_again(metric, a, b, units, samples)
        tick(index + 1, resamples)
    return {name: _normal(torch.tensor(found, dtype=torch.float64)) for name, found in samples.items()}


def _jackknife(metric: Metric, a: Measured, b: Measured, names: Iterable[str], resamples: int, tick: Tick) -> dict[str, Around]:
    groups = _num_groups(a)
    if groups < 2:
        return dict.fromkeys(names, _nothing)
    orders = {name: torch.randperm(count, generator=_generator(a.seed, name, "groups")) for name, count in _num_units(a).items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for group in range(groups):
        units = {name: order[torch.arange(len(order)) % groups != group].sort().values for name, order in orders.items()}
        _measure_again(metric, a, b, units, samples)
        tick(group + 1, groups)
    return {name: lambda value, found=found: jackknife_interval(value, found) for name, found in samples.items()}


def _measure_again(metric: Metric, a: Measured, b: Measured, units: Mapping[str, Tensor], samples: Mapping[str, list[float]]) -> None:
    first, second = (metric.values(selected(each, units)) for each in (a, b))
    for name, found in samples.items():
        if name not in first or name not in second:
            raise Unavailable(f"{name} cannot be measured on some of the pictures alone")
        found.append(second[name] - first[name])


def selected(measured: Measured, units: Mapping[str, Tensor]) -> Measured:
    """What metrics see of some draws of each set alone, in that order and with repetitions. units: (M,) int64, by set: numbers of
    `SampleSet.groups`, of which a picture is one where no prompt has several."""
    sets, rows = {}, {}
    for name, samples in measured.sets.items():
        members = _members(samples)
        chosen = [row for unit in units[name].tolist() for row in members[unit]]
        rows[name] = torch.tensor(chosen)
        prompts, seeds = tuple(samples.prompts[row] for row in chosen), tuple(samples.seeds[row] for row in chosen)
        sets[name] = replace(samples, prompts=prompts, seeds=seeds)
    tables = {(name, of): table.select(rows[name]) for (name, of), table in measured.tables.items()}
    teacher = None if measured.teacher is None else selected(measured.teacher, units)
    return replace(measured, sets=sets, tables=tables, teacher=teacher, pictures=None)


def _members(samples: SampleSet) -> list[list[int]]:
    """The pictures of each draw, in their order: those of a prompt that lie side by side stay so."""
    members: list[list[int]] = [[] for _ in range(_num_draws(samples))]
    for row, group in enumerate(samples.groups):
        members[group].append(row)
    return members


def _num_draws(samples: SampleSet) -> int:
    return max(samples.groups) + 1


def _num_units(measured: Measured) -> dict[str, int]:
    return {name: _num_draws(samples) for name, samples in measured.sets.items()}


def _num_groups(measured: Measured) -> int:
    return min(NUM_GROUPS, *_num_units(measured).values())


def _with_repetitions(count: int, seed: int, name: str, index: int) -> Tensor:
    return torch.randint(count, (count,), generator=_generator(seed, name, index))


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed("comparison", *parts))


def _nothing(_: float) -> None:
    return None

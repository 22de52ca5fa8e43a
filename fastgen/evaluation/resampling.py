"""Whether two models differ by more than the choice of pictures: both are measured again on the same resampled ids.

Pictures of one id share prompt and noise, so much of what an id does to one value it does to the other, and the difference varies less than
either. Pictures of one prompt stay together. The reference is the same for both and is not resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.evaluation.intervals import group_means, jackknife_interval
from fastgen.evaluation.metrics.base import Measured, Metric
from fastgen.evaluation.weights import Unavailable
from fastgen.rng import derive_seed

NUM_GROUPS = 20  # of the jackknife
_NORMAL = 1.959963984540054  # 97.5 % of a normal distribution lie below it


class Difference(NamedTuple):
    """b - a. interval: 95 %, by the method `over`; None where there is a single unit to resample, which says nothing about others."""

    value: float
    interval: tuple[float, float] | None
    over: str  # bootstrap or jackknife


Tick = Callable[[], None]


def differences(metric: Metric, a: Measured, b: Measured, *, resamples: int = 100, tick: Tick = lambda: None) -> dict[str, Difference]:
    """Of every value that both have, by name. tick: told after each of `rounds` measurements. Unavailable as `measure` raises it.

    Values that are means of `scores` have the bootstrap of the paired scores' differences; the others are measured again on each resample. Of
    the bootstrap's differences only the standard deviation counts, interval = difference ± 1.96 std: resamples repeat pictures, which shifts
    Fréchet distances, most of all those of few pictures.
    """
    values = [metric.values(each) for each in (a, b)]
    found = {name: values[1][name] - values[0][name] for name in values[0] if name in values[1]}
    scores = _score_differences(metric, a, b)
    again = [name for name in found if name not in scores]
    spread = _bootstrap_means(metric, a, scores, resamples)
    if again:
        spread |= (_bootstrap if metric.resampling == "bootstrap" else _jackknife)(metric, a, b, found, resamples, tick)
    over = {name: "bootstrap" if name in scores else metric.resampling for name in found}
    return {name: Difference(value, spread[name](value), over[name]) for name, value in found.items()}


def rounds(metric: Metric, a: Measured, b: Measured, resamples: int) -> int:
    """How often both are measured again: none where all values are means of scores."""
    if metric.shows.keys() <= _score_differences(metric, a, b).keys():
        return 0
    return resamples if metric.resampling == "bootstrap" else _num_groups(a)


Around = Callable[[float], tuple[float, float] | None]  # the interval around a difference


def _normal(samples: Tensor) -> Around:
    half = _NORMAL * float(samples.std())
    return lambda value: (value - half, value + half)


def _score_differences(metric: Metric, a: Measured, b: Measured) -> dict[str, Tensor]:
    """Value name → (N,) differences of the scores of one id."""
    first, second = metric.scores(a), metric.scores(b)
    return {name: second[name].double() - first[name].double() for name in first if name in second}


def _bootstrap_means(metric: Metric, a: Measured, scores: Mapping[str, Tensor], resamples: int) -> dict[str, Around]:
    if not scores:
        return {}
    groups, spread = a.sets[metric.set].groups, {}
    for name, each in scores.items():
        units = group_means(each, groups)
        draws = [_with_repetitions(len(units), a.seed, metric.set, index) for index in range(resamples)]
        spread[name] = _normal(torch.stack([units[rows].mean() for rows in draws])) if len(units) > 1 else _nothing
    return spread


def _bootstrap(metric: Metric, a: Measured, b: Measured, names: Mapping[str, float], resamples: int, tick: Tick) -> dict[str, Around]:
    if min(_num_units(a).values()) < 2:
        return dict.fromkeys(names, _nothing)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(resamples):
        units = {name: _with_repetitions(count, a.seed, name, index) for name, count in _num_units(a).items()}
        _measure_again(metric, a, b, units, samples, tick)
    return {name: _normal(torch.tensor(found, dtype=torch.float64)) for name, found in samples.items()}


def _jackknife(metric: Metric, a: Measured, b: Measured, names: Mapping[str, float], resamples: int, tick: Tick) -> dict[str, Around]:
    groups = _num_groups(a)
    if groups < 2:
        return dict.fromkeys(names, _nothing)
    orders = {name: torch.randperm(count, generator=_generator(a.seed, name, "groups")) for name, count in _num_units(a).items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for group in range(groups):
        units = {name: order[torch.arange(len(order)) % groups != group].sort().values for name, order in orders.items()}
        _measure_again(metric, a, b, units, samples, tick)
    return {name: lambda value, found=found: jackknife_interval(value, found) for name, found in samples.items()}


def _measure_again(metric: Metric, a: Measured, b: Measured, units: Mapping[str, Tensor], samples: Mapping[str, list[float]], tick: Tick) -> None:
    first, second = (metric.values(selected(each, units)) for each in (a, b))
    for name, found in samples.items():
        if name not in first or name not in second:
            raise Unavailable(f"{name} cannot be measured on some of the pictures alone")
        found.append(second[name] - first[name])
    tick()


def selected(measured: Measured, units: Mapping[str, Tensor]) -> Measured:
    """What metrics see of some groups of each set alone, in that order and with repetitions. units: (M,) int64, by set: of pictures where
    there is one of each prompt, else of prompts."""
    sets, rows = {}, {}
    for name, samples in measured.sets.items():
        size = samples.per_prompt
        rows[name] = (units[name][:, None] * size + torch.arange(size)).flatten()
        chosen = rows[name].tolist()
        prompts, seeds = tuple(samples.prompts[row] for row in chosen), tuple(samples.seeds[row] for row in chosen)
        sets[name] = replace(samples, prompts=prompts, seeds=seeds)
    tables = {(name, of): table.select(rows[name]) for (name, of), table in measured.tables.items()}
    teacher = None if measured.teacher is None else selected(measured.teacher, units)
    return replace(measured, sets=sets, tables=tables, teacher=teacher, pictures=None)


def _num_units(measured: Measured) -> dict[str, int]:
    return {name: len(samples) // samples.per_prompt for name, samples in measured.sets.items()}


def _num_groups(measured: Measured) -> int:
    return min(NUM_GROUPS, *_num_units(measured).values())


def _with_repetitions(count: int, seed: int, name: str, index: int) -> Tensor:
    return torch.randint(count, (count,), generator=_generator(seed, name, index))


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed("comparison", *parts))


def _nothing(_: float) -> None:
    return None

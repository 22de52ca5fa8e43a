"""Intervals of differences against closed forms: they cover the truth, and pairing makes them as short as it should."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from fastgen.evaluation.frechet import FeatureStatistics, frechet_distance
from fastgen.evaluation.intervals import mean_interval
from fastgen.evaluation.metrics import find_metric
from fastgen.evaluation.metrics.base import Feature, Heading, Measured, Metric, Needs, Subsets, Unavailable, Value, feature
from fastgen.evaluation.metrics.inception_features import InceptionMetric
from fastgen.evaluation.protocol import SampleSet
from fastgen.evaluation.resampling import differences, selected
from fastgen.evaluation.tables import Table

FEATURE = feature("made_up", "numbers")


class Remeasured(Metric):
    """A value of the whole table, by a function."""

    shows: ClassVar = {"number": Heading("number")}
    resampling: ClassVar[Literal["bootstrap", "jackknife"]] = "bootstrap"

    def __init__(self, of: Callable[[Tensor], float]) -> None:
        super().__init__(self.Config(), ["main"])
        self.of = of
        self.seen: list[Tensor] = []

    def needs(self) -> Needs:
        return Needs({"main": (FEATURE,)})

    def measure(self, measured: Measured) -> list[Value]:
        rows = measured.tables["main", FEATURE].read()
        self.seen.append(rows)
        return [Value("number", self.of(rows.double()), len(rows))]


class LeftOut(Remeasured):
    resampling: ClassVar[Literal["bootstrap", "jackknife"]] = "jackknife"


class Scored(Remeasured):
    def scores(self, measured: Measured) -> dict[str, Tensor]:
        return {"number": measured.tables["main", FEATURE].read().double().flatten()}


class Subsetted(Remeasured):
    """The mean over random subsets of their unbiased variance."""

    size, count = 25, 40

    def subsets(self, measured: Measured) -> dict[str, Subsets]:
        table, generator = measured.tables["main", FEATURE], torch.Generator().manual_seed(measured.seed)
        rows = [torch.randperm(len(table), generator=generator)[: self.size] for _ in range(self.count)]
        return {"number": Subsets(torch.stack([table.take(each).double().var() for each in rows]), self.size / len(table))}

    def measure(self, measured: Measured) -> list[Value]:
        return [Value("number", float(self.subsets(measured)["number"].values.mean()), len(measured.tables["main", FEATURE]))]


def mean(rows: Tensor) -> float:
    return float(rows.mean())


def pictures(rows: Tensor, per_prompt: int = 1) -> Measured:
    """Rows (N, ...) as the features of N pictures."""
    count = len(rows)
    samples = SampleSet("main", tuple(f"prompt {i // per_prompt}" for i in range(count)), tuple(range(count)), 0, per_prompt)
    return Measured({"main": samples}, {("main", FEATURE): Table(rows)})


def correlated(count: int, correlation: float, shift: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two samples (N, 1) of standard normal scores whose pairs correlate, the second with another mean."""
    shared, own, other = torch.randn(3, count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a, b = (math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * each for each in (own, other))
    return a, b + shift


def half(interval: tuple[float, float] | None) -> float:
    assert interval is not None
    return (interval[1] - interval[0]) / 2


@pytest.mark.parametrize("metric", [Scored(mean), Remeasured(mean), LeftOut(mean)])
def test_nineteen_in_twenty_intervals_cover_a_known_difference(metric: Metric) -> None:
    runs = 100
    covered = 0
    for seed in range(runs):
        a, b = (replace(pictures(rows), seed=seed) for rows in correlated(40, 0.6, 0.3, seed))
        interval = differences(metric, a, b, resamples=30)["number"].interval
        assert interval is not None
        covered += interval[0] <= 0.3 <= interval[1]
    assert 88 <= covered <= 100  # 95 ± 3 standard deviations of a binomial, and a percent that 30 resamples cost


def test_random_subsets_of_both_give_an_interval_that_covers_and_is_no_wider_than_it_must_be() -> None:
    covered, halves, found = 0, [], []
    for seed in range(100):
        a, b = correlated(200, 0.6, 0.0, seed)
        difference = differences(Subsetted(mean), *(replace(pictures(rows), seed=seed) for rows in (a, 1.5 * b)))["number"]
        assert difference.interval is not None and difference.over == "subsets"
        covered += difference.interval[0] <= 1.25 <= difference.interval[1]
        halves.append(half(difference.interval))
        found.append(difference.value)
    assert 88 <= covered <= 100
    assert sum(halves) / 100 == pytest.approx(1.96 * float(torch.tensor(found).std()), rel=0.2)


def test_subsets_that_tear_prompts_apart_are_not_used() -> None:
    a, b = (pictures(rows, per_prompt=2) for rows in correlated(100, 0.6, 0.0, seed=1))
    assert differences(Subsetted(mean), a, b, resamples=10)["number"].over == "bootstrap"


@pytest.mark.parametrize(("kind", "over"), [(Scored, "bootstrap"), (Remeasured, "bootstrap"), (LeftOut, "jackknife")])
def test_pairing_shrinks_the_interval_as_far_as_the_scores_correlate(kind: type[Remeasured], over: str) -> None:
    a, b = correlated(2000, 0.9, 0.1, seed=3)
    found = differences(kind(mean), pictures(a), pictures(b), resamples=400)["number"]
    assert (found.value, found.over) == (pytest.approx(mean(b) - mean(a), rel=1e-12), over)
    paired, alone = half(mean_interval((b - a).flatten()).interval), half(mean_interval(b.flatten()).interval)
    assert half(found.interval) == pytest.approx(paired, rel=0.5 if kind is LeftOut else 0.1)
    assert half(found.interval) < 0.6 * math.sqrt(2) * alone  # sqrt(1 - 0.9) = 0.32 of what two independent samples have


def test_the_jackknife_of_a_mean_is_the_spread_of_its_groups_means() -> None:
    """With G groups of equal size the variance is that of the groups' means, divided by G; t(9, 97.5 %) = 2.2621571628540993 from tables."""
    a, b = correlated(400, 0.5, 0.0, seed=1)
    metric = LeftOut(mean)
    found = differences(metric, pictures(a), pictures(b))["number"]
    left_in = metric.seen[2::2]  # of a, after both whole tables
    assert len(left_in) == 10 and all(len(rows) == 360 for rows in left_in)
    values = {value: row for row, value in enumerate(a.flatten().tolist())}
    kept = [torch.tensor([values[value] for value in rows.flatten().tolist()]) for rows in left_in]
    assert all(bool((rows.diff() > 0).all()) for rows in kept)  # in the order of ids, none twice
    groups = [torch.tensor(sorted(set(range(400)) - set(rows.tolist()))) for rows in kept]
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(400))
    spread = torch.stack([(b - a)[rows].mean() for rows in groups]).std() / math.sqrt(10)
    assert half(found.interval) == pytest.approx(2.2621571628540993 * float(spread), rel=1e-10)


def test_a_frechet_distances_interval_is_that_of_its_derivative() -> None:
    """One feature, reference N(0, 1): FD = m^2 + (s - 1)^2, whose standard deviation at m = 1, s = 1 is 2 / sqrt n; that of a is near 0."""
    reference = FeatureStatistics(10**6, torch.zeros(1, dtype=torch.float64), torch.full((1, 1), 10.0**6 - 1, dtype=torch.float64))

    def distance(rows: Tensor) -> float:
        return frechet_distance(FeatureStatistics.from_features(rows), reference)

    a, b = (rows / rows.std() for rows in correlated(500, 0.0, 0.0, seed=4))
    a, b = a - a.mean(), b - b.mean() + 1
    found = differences(Remeasured(distance), pictures(a), pictures(b), resamples=200)["number"]
    assert found.value == pytest.approx(1.0, abs=1e-9)
    assert half(found.interval) == pytest.approx(1.96 * 2 / math.sqrt(500), rel=0.15)


def test_groups_of_a_prompt_stay_together_with_their_prompts_seeds_and_teacher() -> None:
    rows = torch.arange(8.0)[:, None]
    whole = replace(pictures(rows, per_prompt=2), teacher=pictures(rows + 100, per_prompt=2))
    part = selected(whole, {"main": torch.tensor([3, 0, 3])})
    assert part.tables["main", FEATURE].read().flatten().tolist() == [6, 7, 0, 1, 6, 7]
    assert part.sets["main"].prompts == ("prompt 3", "prompt 3", "prompt 0", "prompt 0", "prompt 3", "prompt 3")
    assert part.sets["main"].seeds == (6, 7, 0, 1, 6, 7)
    assert part.sets["main"].groups == [0, 0, 1, 1, 0, 0]
    assert part.teacher is not None and part.teacher.tables["main", FEATURE].read().flatten().tolist() == [106, 107, 100, 101, 106, 107]


def test_pictures_of_one_prompt_count_as_one() -> None:
    """Scores that are the same within a prompt say as much as one of each."""
    a, b = correlated(200, 0.0, 0.0, seed=5)
    once = differences(Scored(mean), pictures(a), pictures(b), resamples=400)["number"]
    four = [pictures(rows.repeat_interleave(4, 0), per_prompt=4) for rows in (a, b)]
    for kind in (Scored, Remeasured):
        found = differences(kind(mean), *four, resamples=400)["number"]
        assert half(found.interval) == pytest.approx(half(once.interval), rel=1e-9)


def cycled(rows: Tensor, prompts: int) -> Measured:
    """Rows (N, ...) as the features of N pictures of prompts that begin again where they end."""
    whole = pictures(rows)
    samples = replace(whole.sets["main"], prompts=tuple(f"prompt {i % prompts}" for i in range(len(rows))))
    return replace(whole, sets={"main": samples})


def test_prompts_that_begin_again_are_resampled_whole() -> None:
    """The same pictures in another order are the same draws, and the last prompts have one picture less."""
    a, b = correlated(202, 0.0, 0.0, seed=5)
    shared = torch.randn(41, generator=torch.Generator().manual_seed(6), dtype=torch.float64)[torch.arange(202) % 41][:, None]
    sides = [cycled(rows, 41) for rows in (a, b + 2 * shared)]
    part = selected(sides[0], {"main": torch.tensor([40, 0, 40])})
    assert part.sets["main"].prompts == ("prompt 40",) * 4 + ("prompt 0",) * 5 + ("prompt 40",) * 4
    assert part.tables["main", FEATURE].read().flatten().tolist() == a[[40, 81, 122, 163, 0, 41, 82, 123, 164, 40, 81, 122, 163], 0].tolist()
    wanted = mean_interval((b + 2 * shared - a).flatten(), [i % 41 for i in range(202)])
    for kind, rel in ((Scored, 0.1), (Remeasured, 0.1), (LeftOut, 0.6)):
        found = differences(kind(mean), *sides, resamples=400)["number"]
        assert found.value == pytest.approx(wanted.value, rel=1e-12)
        assert half(found.interval) == pytest.approx(half(wanted.interval), rel=rel)
        assert half(found.interval) > 1.3 * half(mean_interval((b + 2 * shared - a).flatten()).interval)
    assert differences(Subsetted(mean), *sides, resamples=10)["number"].over == "bootstrap"


@pytest.mark.parametrize("kind", [Scored, Remeasured, LeftOut])
def test_a_single_group_has_a_difference_and_no_interval(kind: type[Remeasured]) -> None:
    a, b = (pictures(rows, per_prompt=4) for rows in correlated(4, 0.0, 1.0, seed=0))
    found = differences(kind(mean), a, b)["number"]
    assert found.interval is None and math.isfinite(found.value)


def test_the_same_call_gives_the_same_interval_and_says_how_far_it_is() -> None:
    a, b = (pictures(rows) for rows in correlated(50, 0.0, 1.0, seed=0))
    told: list[tuple[int, int]] = []
    found = [differences(Remeasured(mean), a, b, resamples=7, tick=lambda *counts: told.append(counts)) for _ in range(2)]
    assert found[0] == found[1]
    assert told == [(index, 7) for index in range(1, 8)] * 2


def test_what_cannot_be_measured_on_part_of_the_pictures_says_so() -> None:
    def of_all(rows: Tensor) -> float:
        if len(rows) < 50:
            raise Unavailable("needs 50 pictures")
        return mean(rows)

    a, b = (pictures(rows) for rows in correlated(50, 0.0, 1.0, seed=0))
    with pytest.raises(Unavailable, match="needs 50 pictures"):
        differences(LeftOut(of_all), a, b)


class Pool:
    """Reference pictures whose features are known."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.fit = Table(rows), FeatureStatistics.from_features(rows)

    def statistics(self, of: Feature) -> FeatureStatistics:
        return self.fit

    def table(self, of: Feature) -> Table:
        return self.rows


@pytest.mark.parametrize(
    ("name", "options", "over"),
    [
        ("fid", {}, "bootstrap"),
        ("sfid", {}, "bootstrap"),
        ("fid_infinity", {"points": 3, "smallest": 20}, "bootstrap"),
        ("kid", {"subsets": 20, "subset_size": 30}, "subsets"),
        ("precision_recall", {}, "jackknife"),
    ],
)
def test_inception_metrics_tell_two_models_apart(name: str, options: dict[str, Any], over: str) -> None:
    """One draws from what the reference is of, the other half as far around another centre."""
    kind = find_metric(name)
    metric = kind(kind.Config(**options), ["main"])
    assert isinstance(metric, InceptionMetric)
    real, own, other = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (200, 100, 101))
    shared = SampleSet("main", ("",) * 100, tuple(range(100)))
    a, b = (Measured({"main": shared}, {("main", metric.feature): Table(rows)}, Pool(real)) for rows in (own, other[:100] / 2 + 1))
    found = differences(metric, a, b, resamples=30)
    measured = [{each.name: each.value for each in metric.measure(side)} for side in (a, b)]
    assert found.keys() == measured[0].keys() == kind.shows.keys()
    assert {each.over for each in found.values()} == {over}
    for value, difference in found.items():
        assert difference.value == pytest.approx(measured[1][value] - measured[0][value], rel=1e-9)
        assert difference.interval is not None
        low, high = difference.interval
        assert (high < 0) if value == "recall" else (low > 0 or value == "precision")  # nearer to the centre is more precise, if anything

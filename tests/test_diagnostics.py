"""Drift against closed forms; warnings on series that show a signature, none on those that only look like one, and on real runs of both kinds."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from toy_runs import optimizer_block, toy_method, toy_setting, toy_trainer

from fastgen.config import MoEBlock, OptimizerBlock
from fastgen.diagnostics import Watch, drift
from fastgen.distillers import distiller_names
from fastgen.distillers.dmd2 import DMD2
from fastgen.distillers.f_distill import FDistill
from fastgen.families.toy import Toy

Row = dict[str, Any]


ONE = ["a cat"] * 9


def uniform(*shape: int, low: float = 0.2, high: float = 0.8) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (4, 3, 2, 3, 5)], ids=["images", "videos"])
def test_drift_of_a_student_that_halves_contrast(shape: tuple[int, ...]) -> None:
    teacher = uniform(*shape)
    prompts = ONE[: len(teacher)]
    got = drift(0.5 * teacher + 0.1, teacher, prompts)
    want = {"drift/mean": 0.1 - 0.5 * teacher.mean().item(), "drift/std": 0.5, "drift/saturation": 0.0, "drift/spread": 0.5}
    error = 0.5 * statistics.stdev(picture.mean().item() for picture in teacher) / len(teacher) ** 0.5
    assert got == pytest.approx(want | {"drift/mean_error": error}, abs=1e-6)
    perfect = {"drift/mean": 0, "drift/mean_error": 0, "drift/std": 1, "drift/saturation": 0, "drift/spread": 1}
    assert drift(teacher, teacher, prompts) == pytest.approx(perfect, abs=1e-6)


def test_drift_averages_the_channels_own_deviations() -> None:
    teacher = uniform(6, 3, 4, 4, low=0.4, high=0.5)
    factors, offsets = (torch.tensor(numbers).view(3, 1, 1) for numbers in ([1.0, 2.0, 0.5], [0.3, -0.3, 0.0]))
    assert drift(factors * teacher + offsets, teacher, ONE[:6])["drift/std"] == pytest.approx(3.5 / 3, abs=1e-5)


def test_drift_counts_pixels_within_a_grey_level_of_the_ends() -> None:
    student, teacher = torch.full((2, 3, 2, 2), 0.5), torch.full((2, 3, 2, 2), 0.5)
    student.view(-1)[:6] = torch.tensor([0, 1, 1 / 255, 254 / 255, 1.5 / 255, 253.5 / 255])
    teacher.view(-1)[:1] = 1
    assert drift(student, teacher, ONE[:2])["drift/saturation"] == pytest.approx((4 - 1) / 24)


def test_drift_spread_is_the_mean_distance_of_pairs() -> None:
    student, teacher = uniform(5, 3, 4, 4), uniform(5, 3, 4, 4).flip(0).square()
    student[3] = student[1]
    lengths = [sum((images[i] - images[j]).square().mean().sqrt().item() for i, j in combinations(range(5), 2)) / 10 for images in (student, teacher)]
    assert drift(student, teacher, ONE[:5])["drift/spread"] == pytest.approx(lengths[0] / lengths[1], rel=1e-5)


def test_drift_spread_sees_a_student_that_ignores_its_noise() -> None:
    """Each prompt has one picture, whatever the noise; between prompts the pictures differ as the teacher's do."""
    prompts, teacher = ["a", "b", "c"] * 3 + ["once"], uniform(10, 3, 4, 4)
    student = teacher[[0, 1, 2] * 3 + [9]]
    assert drift(student, teacher, prompts)["drift/spread"] == pytest.approx(0, abs=1e-6)
    pairs = [(i, j) for i, j in combinations(range(10), 2) if prompts[i] == prompts[j]]
    lengths = [sum((images[i] - images[j]).square().mean().sqrt().item() for i, j in pairs) for images in (teacher.square(), teacher)]
    assert drift(teacher.square(), teacher, prompts)["drift/spread"] == pytest.approx(lengths[0] / lengths[1], rel=1e-5)


def test_drift_without_pairs_or_without_contrast_to_compare_with() -> None:
    assert "drift/spread" not in drift(uniform(2, 3, 4, 4), uniform(2, 3, 4, 4), ["a", "b"])
    blank = drift(uniform(3, 3, 4, 4), torch.zeros(3, 3, 4, 4), ONE[:3])
    assert all(math.isfinite(value) for value in blank.values())
    nothing = drift(torch.zeros(3, 3, 4, 4), torch.zeros(3, 3, 4, 4), ONE[:3])
    assert nothing == {"drift/mean": 0, "drift/mean_error": 0, "drift/std": 0, "drift/saturation": 0, "drift/spread": 0}
    assert "drift/mean_error" not in drift(uniform(1, 3, 4, 4), uniform(1, 3, 4, 4), ["a"])


def watched(rows: Iterable[Row], watch: Watch | None = None) -> list[tuple[int, str]]:
    """(index, warning) of all rows."""
    watch = watch or Watch()
    return [(i, warning) for i, row in enumerate(rows) for warning in watch(row)]


def critic_rows(losses: Sequence[float], gaps: Sequence[float], roles: Sequence[str] = ("student", "fake_score")) -> list[Row]:
    lr = {f"lr/{role}": 1e-3 for role in roles}
    return [{"loss/critic": loss, "match/gradient": gap, **lr} for loss, gap in zip(losses, gaps, strict=True)]


def line(start: float, end: float, steps: int) -> list[float]:
    """A straight line with the scatter of single batches, a tenth up and down in turn."""
    return [(start + (end - start) * i / steps) * (1.1 if i % 2 else 0.9) for i in range(steps)]


def test_critic_lag_is_loss_and_gap_that_rise_together() -> None:
    rows = critic_rows(line(1, 0.5, 60) + line(0.5, 2, 60), line(0.6, 0.3, 60) + line(0.3, 1, 60))
    ((at, warning),) = watched(rows + critic_rows(line(2, 5, 300), line(1, 2, 300)))
    assert 75 < at < 115
    assert warning.startswith("critic lag: the fake score no longer follows the student")
    low, high, narrow, wide = (float(number) for number in re.findall(r"from ([\d.]+) to ([\d.]+)", warning) for number in number)
    assert low == pytest.approx(0.53, abs=0.06) and high == pytest.approx(2 * low, rel=0.15)
    assert narrow == pytest.approx(0.33, abs=0.06) and wide >= 1.5 * narrow


def test_critic_lag_is_seen_when_the_gap_swings_back() -> None:
    """Measured at a critic's rate 70 times below the student's: the loss jumps while the gap first falls below where it began."""
    losses = [1.0, 2.5, 4.0, 3.6, 4.2, 3.9, 4.3, 5.4, 3.7, 4.5, 5.5, 3.7, 5.1, 3.1, 3.1, 3.1, 3.0, 3.4, 2.5, 1.9, 3.8, 2.4, 2.3, 2.1, 2.4, 1.8]
    gaps = [0.21, 0.08, 0.06, 0.07, 0.06, 0.06, 0.06, 0.06, 0.07, 0.08, 0.07, 0.09, 0.09, 0.09, 0.11, 0.10, 0.13, 0.11, 0.12, 0.15]
    gaps += [0.11, 0.14, 0.15, 0.15, 0.15, 0.15]
    assert [warning[:10] for _, warning in watched(critic_rows(losses, gaps))] == ["critic lag"]


@pytest.mark.parametrize(
    "rows",
    [
        critic_rows(line(0.05, 1, 300), line(1, 0.2, 300)),
        critic_rows(line(0.5, 0.5, 300), line(0.2, 2, 300)),
        critic_rows(line(0.5, 3, 2000), line(0.2, 0.5, 2000)),
        critic_rows([0.5] * 50 + [2.5] + [0.5] * 50, [0.3] * 50 + [2.0] + [0.3] * 50),
        critic_rows(line(0.5, 0.5, 60), line(0.2, 0.2, 60)) + critic_rows(line(3, 3, 60), line(1, 1, 60), ["student_2", "fake_score_2"]),
        [{key: value for key, value in row.items() if key != "match/gradient"} for row in critic_rows(line(0.5, 5, 99), line(0.2, 2, 99))],
    ],
    ids=["samples spread out", "gap alone", "over thousands of steps", "one bad batch", "the next phase", "no matching"],
)
def test_what_is_no_critic_lag(rows: list[Row]) -> None:
    assert watched(rows) == []


def draws(name: str, *values: float) -> list[Row]:
    """Rows of draws, with rows between them that have none."""
    return [row for value in values for row in ({"match/gradient": 0.3}, {"match/gradient": 0.3, f"drift/{name}": value})]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("saturation", (0.02, 0.11, 0.25), (5, "saturation: in the last two draws 11% and 25% more")),
        ("spread", (0.9, 0.55, 0.52), (5, "mode loss: the student's pictures of one prompt lie 0.55 and then 0.52 times as far apart")),
        ("spread", (0.4, 0.5, 0.5), (5, "mode loss: the student's pictures of one prompt lie 0.50 and then 0.50 times")),
    ],
)
def test_two_bad_draws_in_a_row_are_warned_of_once(name: str, values: tuple[float, ...], expected: tuple[int, str]) -> None:
    ((at, warning),) = watched(draws(name, *values, values[-1], values[-1]))
    assert (at, warning[: len(expected[1])]) == expected


@pytest.mark.parametrize(
    ("name", "values"),
    [("saturation", (0.2, 0.02, 0.2)), ("saturation", (-0.5, -0.5)), ("spread", (0.2, 0.3, 0.45, 0.58, 0.7)), ("spread", (0.5, 0.7, 0.5, 0.9))],
    ids=["one draw", "less than the teacher", "a point that spreads out", "spread for one draw"],
)
def test_draws_that_are_no_reason_to_warn(name: str, values: tuple[float, ...]) -> None:
    assert watched(draws(name, *values)) == []


def test_saturation_and_spread_of_other_methods_are_not_judged() -> None:
    assert watched([{"drift/saturation": 0.5, "drift/spread": 0.1, "loss/consistency": 1.0}] * 5) == []


def shifts(*means: float, error: float = 0.004) -> list[Row]:
    """Rows of a method that logs nothing but its loss, every second with a draw."""
    draw = [{"loss/consistency": 0.1, "drift/mean": mean, "drift/mean_error": error} for mean in means]
    return [row for drawn in draw for row in ({"loss/consistency": 0.1}, drawn)]


@pytest.mark.parametrize(
    ("means", "error", "at", "numbers"),
    [
        ((-0.0292, -0.0461, -0.059, -0.0663), 0.004, 3, "-7 and -12 grey levels"),
        ((0.0311, 0.0548, 0.0522, 0.0284), 0.004, 3, "+8 and +14 grey levels"),
        ((0.0, 0.05, 0.0499, 0.0498), 0.004, 5, "+13 and +13 grey levels"),
        ((0.06, -0.06), 0.004, 3, "+15 and -15 grey levels"),
        ((-0.15, -0.15), 0.049, 3, "-38 and -38 grey levels"),
    ],
    ids=["dark data", "critic lag", "no recovery to speak of", "swings", "beyond chance"],
)
def test_a_mean_that_leaves_the_teachers_is_warned_of_once(means: tuple[float, ...], error: float, at: int, numbers: str) -> None:
    """The first two as measured: dmd2 with a discriminator on data 30 % darker than the teacher, and with a critic that lags."""
    ((seen, warning),) = watched(shifts(*means, *means[-1:] * 3, error=error))
    assert (seen, warning.split(": ")[0]) == (at, "mean shift")
    assert f"in the last two draws the student's mean is {numbers} of 255 off the teacher's" in warning and "optimizer.student.lr" in warning


@pytest.mark.parametrize(
    ("means", "error"),
    [
        ((0.05, 0.01, 0.05, 0.01), 0.004),
        ((0.21, 0.12, 0.07, 0.03, 0.01), 0.004),
        ((0.0195, 0.0195, 0.0195), 0.001),
        ((-0.14, -0.14, -0.14), 0.05),
        ((0.0001, 0.0031, -0.0002, 0.0071, 0.0092), 0.0025),
    ],
    ids=["for one draw", "on its way back", "less than five grey levels", "chance", "a healthy run"],
)
def test_means_that_are_no_reason_to_warn(means: tuple[float, ...], error: float) -> None:
    assert watched(shifts(*means, error=error)) == []


def test_a_mean_without_its_error_is_not_judged() -> None:
    """Of a single picture, or of a run from before the error was logged."""
    assert watched([{"drift/mean": 0.3}] * 5) == []


def test_a_discriminator_that_stays_far_ahead() -> None:
    ahead, level, fooled = ({"discriminate/real": real, "discriminate/fake": fake} for real, fake in ((6.0, -3.0), (2.0, -2.0), (-9.0, 9.0)))
    assert watched([ahead] * 49 + [level] + [ahead] * 49 + [fooled] * 60) == []
    ((at, warning),) = watched([level] + [ahead] * 80)
    assert (at, warning[:17]) == (50, "discriminator won")
    assert "for 50 steps" in warning and "real 6 and fake -3" in warning


def test_experts_that_nobody_chooses() -> None:
    dead, healthy = ({"experts/student/idle": idle} for idle in (0.25, 0.02))
    assert watched([dead] * 49 + [healthy] + [dead] * 49 + [healthy] * 60) == []
    ((at, warning),) = watched([healthy] + [dead] * 80)
    assert (at, warning.split(":")[0]) == (50, "dead experts")
    assert "for 50 steps at least 10% of the experts of student got no token of a batch, 25% now" in warning
    keys = re.findall(r"student\.moe\.([a-z_]+)", warning)
    assert set(keys) == {"balance", "router_std", "remove_dead"} <= MoEBlock.model_fields.keys()


def test_numbers_that_are_not_finite_and_what_is_no_number_are_passed_over() -> None:
    odd = [{"loss/critic": math.nan, "match/gradient": 0.3}, {"loss/critic": 0.5, "match/gradient": math.inf}, {"warnings": ["x"], "note": "y"}]
    rows = critic_rows(line(0.5, 2, 100), line(0.3, 1, 100))
    assert len(watched(rows[:30] + odd + rows[30:])) == 1


def test_a_watch_made_from_a_runs_rows_goes_on_as_if_nothing_had_happened() -> None:
    swings = [1 + 0.8 * math.sin(i / 15) for i in range(300)]
    logits: list[Row] = [{"discriminate/real": 9.0 * (i > 100), "discriminate/fake": 0.0, "drift/spread": 0.8 - i / 500} for i in range(300)]
    rows = [row | logits[i] for i, row in enumerate(critic_rows(swings, swings))]
    whole = watched(rows)
    assert [warning.split(":")[0] for _, warning in whole] == ["critic lag", "mode loss", "discriminator won"]
    for cut in (10, whole[0][0], whole[0][0] + 1, whole[1][0], 130, 299):
        watch = Watch()
        before = watched([json.loads(json.dumps(row | {"warnings": ["of the first run"]})) for row in rows[:cut]], watch)
        assert [*before, *((i + cut, warning) for i, warning in watched(rows[cut:], watch))] == whole


def test_remedies_name_what_recipes_have() -> None:
    remedies = " ".join(signature.remedy for signature in Watch()._signatures.values())
    keys = re.findall(r"distiller\.([a-z_.0-9]+)", remedies)
    assert {"critic_updates", "ida", "decoupled", "regression", "gan", "gan.r1", "gan.weight", "anchor", "reward"} == set(keys)
    for key in keys:
        name, _, inner = key.partition(".")
        field = DMD2.Config.model_fields[name]
        (nested,) = [kind for kind in getattr(field.annotation, "__args__", ()) if kind is not type(None)] if inner else [None]
        assert nested is None or inner in nested.model_fields, key
    assert {key.split(".")[-1] for key in re.findall(r"optimizer\.([a-z_.]+)", remedies)} == {"lr"} <= OptimizerBlock.model_fields.keys()
    assert {"f_distill", "phased_dmd"} <= set(distiller_names()) & set(re.findall(r"\w+", remedies))
    assert "js" in FDistill.Config.model_fields["divergence"].annotation.__args__  # type: ignore[union-attr]


def ring_warnings(critic_updates: int, steps: int) -> list[str]:
    """A one-step student of eight modes, as in the study of critic updates: K = 1 collapses, K = 5 does not."""
    family = Toy("toy:ring", width=32)
    block = optimizer_block(lr=1e-3, betas=[0.0, 0.999])
    method = toy_method(DMD2, toy_setting(family), critic_updates=critic_updates)
    trainer = toy_trainer(method, family, optimizers=block, steps=steps, batch_size=512)
    watch, warnings = Watch(), []
    trainer.run([lambda step, metrics: warnings.extend(watch(metrics))])
    return [warning.split(":")[0] for warning in warnings]


@pytest.mark.slow
def test_one_critic_update_is_warned_of_and_five_are_not() -> None:
    assert ring_warnings(1, 150) == ["critic lag"]
    assert ring_warnings(5, 250) == []

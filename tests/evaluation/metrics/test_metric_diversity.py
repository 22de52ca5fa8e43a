"""LPIPS diversity and the Vendi score of hand-made features."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation.diversity import vendi_score
from fastgen.evaluation.extractors.base import Feature, feature
from fastgen.evaluation.intervals import mean_interval
from fastgen.evaluation.metrics.base import Measured, Metric
from fastgen.evaluation.metrics.lpips_diversity import LpipsDiversity
from fastgen.evaluation.metrics.vendi import Vendi
from fastgen.evaluation.protocol import SampleSet, protocol_from
from fastgen.evaluation.tables import Table
from fastgen.evaluation.weights import Unavailable

POOL3 = feature("inception", "pool3")


def measured(features: dict[Feature, Tensor], per_prompt: int) -> Measured:
    count = len(next(iter(features.values())))
    samples = SampleSet("main", tuple(str(i // per_prompt) for i in range(count)), tuple(range(count)), per_prompt=per_prompt, chunk=per_prompt)
    return Measured({"main": samples}, {("main", each): Table(rows) for each, rows in features.items()})


def only_feature(metric: Metric) -> Feature:
    ((name, (found,)),) = metric.needs().generated.items()
    assert name == "main"
    return found


def test_lpips_diversity_is_the_mean_over_prompts_of_the_mean_over_pairs() -> None:
    """Two prompts: distances .1, .2, .6 (mean .3) and .4, .4, .1 (mean .3 too, to three decimals), and three pictures that are alike."""
    upper = torch.tensor([[[0, 0.1, 0.2], [0, 0, 0.6], [0, 0, 0]], [[0, 0.4, 0.4], [0, 0, 0.4], [0, 0, 0]], [[0, 0, 0]] * 3])
    pairs = (upper + upper.transpose(1, 2)).reshape(9, 3)
    metric = LpipsDiversity(LpipsDiversity.Config(), ["main"])
    known = measured({only_feature(metric): pairs}, 3)
    (value,) = metric.measure(known)
    assert value.value == pytest.approx((0.3 + 0.4 + 0) / 3, rel=1e-6)
    assert (value.name, value.n, value.std_over, value.interval_over) == ("lpips_diversity", 9, "prompts", "prompts")
    assert value.std == pytest.approx(torch.tensor([0.3, 0.4, 0.0]).std().item(), rel=1e-6)
    scores = metric.scores(known)["lpips_diversity"]
    torch.testing.assert_close(scores[:3], torch.tensor([0.15, 0.35, 0.4], dtype=torch.float64), rtol=1e-6, atol=0)
    assert value.value == pytest.approx(scores.mean().item(), rel=1e-12)


def test_conventions_are_part_of_the_features_name() -> None:
    plain, dmd2 = (LpipsDiversity(LpipsDiversity.Config(**options), ["main"]) for options in ({}, {"net": "vgg", "size": 512, "range": "unit"}))
    assert only_feature(plain) == feature("lpips", "pairs", net="alex", size=None, range="signed")
    assert only_feature(dmd2) == feature("lpips", "pairs", net="vgg", size=512, range="unit")


def vendi(rows: Tensor, per_prompt: int, of: Feature = POOL3, **options: object) -> tuple[float, Tensor]:
    metric = Vendi(Vendi.Config.model_validate(options), ["main"])
    assert only_feature(metric) == of
    known = measured({of: rows}, per_prompt)
    (value,) = metric.measure(known)
    assert (value.name, value.n) == ("vendi", len(rows))
    return value.value, metric.scores(known)["vendi"]


def test_vendi_counts_what_differs_in_each_prompt() -> None:
    """Four pictures that are alike: 1; two kinds: 2; four kinds: 4; two at 60 degrees: exp H(3/4, 1/4)."""
    corners = torch.eye(4)
    rows = torch.stack([corners[[0, 0, 0, 0]] * torch.tensor([1.0, 5, 2, 9])[:, None], corners[[0, 1, 1, 0]], corners]).flatten(0, 1)
    value, scores = vendi(rows, 4)
    assert value == pytest.approx(7 / 3, abs=1e-12)
    torch.testing.assert_close(scores, torch.tensor([1.0, 2, 4], dtype=torch.float64).repeat_interleave(4), rtol=0, atol=1e-12)
    half = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    assert vendi(half, 2)[0] == pytest.approx(4 / 27**0.25 * 1.0, abs=1e-12)


def test_vendi_is_that_of_all_groups_at_once_with_more_prompts_than_a_block() -> None:
    rows = torch.randn(2 * 700, 5, generator=torch.Generator().manual_seed(0))
    assert vendi(rows, 2)[0] == pytest.approx(vendi_score(rows, [i // 2 for i in range(1400)]), rel=1e-12)


def test_vendi_of_another_extractors_features() -> None:
    of = feature("open_clip", "image", model="ViT-L-14", pretrained="openai")
    assert vendi(torch.eye(4), 4, of, extractor="open_clip", options={"model": "ViT-L-14", "pretrained": "openai"})[0] == pytest.approx(4)
    content = {"name": "mine", "sets": {"main": {"prompts": "fastgen:classes/4"}}, "metrics": {"vendi": {"extractor": "thumbnails"}}}
    with pytest.raises(UserError, match=r"metrics\.vendi\.extractor"):
        protocol_from(content)


@pytest.mark.parametrize("metric", [LpipsDiversity(LpipsDiversity.Config(), ["main"]), Vendi(Vendi.Config(), ["main"])])
def test_a_prompt_that_comes_again_has_another_group_and_is_one_draw(metric: Metric) -> None:
    """Groups are those that lie side by side; the interval is over the two prompts, whose pictures lie apart."""
    rows = torch.rand(8, 2, generator=torch.Generator().manual_seed(0))
    once = measured({only_feature(metric): rows}, 2)
    cycled = Measured({"main": replace(once.sets["main"], prompts=tuple("ppqqppqq"))}, once.tables)
    (value,), (four,) = metric.measure(cycled), metric.measure(once)
    scores = next(iter(metric.scores(once).values()))
    assert torch.equal(next(iter(metric.scores(cycled).values())), scores)
    expected = mean_interval(scores.view(2, 2, 2).mean((0, 2)))
    assert (value.value, value.std_over) == (four.value, "prompts")
    assert value.interval == pytest.approx(expected.interval, rel=1e-9) and value.interval != four.interval


@pytest.mark.parametrize("metric", [LpipsDiversity(LpipsDiversity.Config(), ["main"]), Vendi(Vendi.Config(), ["main"])])
def test_single_pictures_of_each_prompt_say_nothing(metric: Metric) -> None:
    with pytest.raises(Unavailable, match=r"^needs several pictures of each prompt: give the set main per_prompt: 2 or more$"):
        metric.measure(measured({only_feature(metric): torch.zeros(4, 1)}, 1))

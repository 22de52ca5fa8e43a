from __future__ import annotations

import pytest
import torch
from tables_at_hand import built, measure
from torch import Tensor

from fastgen.evaluation.metrics.base import Unavailable
from fastgen.evaluation.metrics.kid import Kid, squared_discrepancy


def features(n: int, d: int, seed: int) -> Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 ** (seed % 2)


@pytest.mark.parametrize("seed", [0, 2020, 2**32 - 1])
def test_is_torch_fidelitys_on_the_same_subsets(seed: int) -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = features(90, 16, 0), features(70, 16, 1)
    theirs = kid.kid_features_to_metric(x, y, kid_subsets=7, kid_subset_size=40, rng_seed=seed, verbose=False)
    value = measure(built(Kid, subsets=7, subset_size=40), {"pool3": x}, {"pool3": y}, seed)["kid"]
    assert value.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert value.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)
    assert (value.n, value.std_over) == (90, "subsets")


def test_is_its_definition() -> None:
    x, y = features(6, 3, 2), features(5, 3, 3)

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    within = [sum(kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1)) for z in (x, y)]
    across = sum(kernel(a, b) for a in x for b in y) / 30
    assert float(squared_discrepancy(x, y)) == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_equal_distributions_have_a_mean_of_zero() -> None:
    values = torch.stack([squared_discrepancy(features(40, 8, 2 * seed), features(50, 8, 2 * seed + 1) / 2) for seed in range(300)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 300**0.5
    assert bool((values < 0).any())


def test_subsets_need_enough_of_both() -> None:
    with pytest.raises(Unavailable, match=r"at least 1000 images \(subset_size\), got 1200 generated and 999 real ones"):
        measure(built(Kid), {"pool3": features(1200, 2, 0)}, {"pool3": features(999, 2, 1)})
    name = "mmd_inception_" + "a" * 8
    metric = built(Kid, subset_size=20, subsets=2, weights="mine.pth", sha256="a" * 64)
    assert list(measure(metric, {"pool3": features(20, 2, 0)}, {"pool3": features(20, 2, 1)})) == [name]

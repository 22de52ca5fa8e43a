"""Fréchet distance against closed forms, scipy and torch-fidelity."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from fastgen.evaluation.frechet import FeatureStatistics, bootstrap_floor, frechet_distance, half_floor


def gaussian(mean: Tensor, cov: Tensor) -> FeatureStatistics:
    """Statistics that have exactly this mean and unbiased covariance."""
    return FeatureStatistics(n=101, mean=mean.double(), scatter=cov.double() * 100)


def samples(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + torch.randn(d, generator=generator)


def rotation(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def test_diagonal_gaussians_have_the_closed_form():
    m1, m2 = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 1.0, 0.0])
    v1, v2 = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 0.25])
    expected = 5.0 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2
    assert frechet_distance(gaussian(m1, v1.diag()), gaussian(m2, v2.diag())) == pytest.approx(expected, abs=1e-12)


def test_rotating_both_gaussians_changes_nothing():
    q = rotation(7, 1)
    v1, v2 = torch.arange(1.0, 8.0).double(), torch.arange(7.0, 0.0, -1).double() ** 2
    zero = torch.zeros(7)
    expected = float((v1.sqrt() - v2.sqrt()).square().sum())
    assert frechet_distance(gaussian(zero, q @ v1.diag() @ q.T), gaussian(zero, q @ v2.diag() @ q.T)) == pytest.approx(expected, rel=1e-12)


def test_rotating_one_gaussian_in_the_plane():
    # For 2x2 matrices tr (AB)^1/2 = sqrt(tr AB + 2 sqrt(det A det B)); A and B do not commute here.
    angle = torch.tensor(0.7, dtype=torch.float64)
    q = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    a, b = torch.tensor([4.0, 1.0]).double().diag(), q @ torch.tensor([9.0, 0.5]).double().diag() @ q.T
    cross = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    expected = float(a.trace() + b.trace() - 2 * cross)
    assert frechet_distance(gaussian(torch.zeros(2), a), gaussian(torch.zeros(2), b)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(300, 20), (65, 33)])
def test_agrees_with_scipy_and_is_symmetric(n: int, d: int):
    a, b = FeatureStatistics.from_features(samples(n, d, 0)), FeatureStatistics.from_features(samples(n + 50, d, 1))
    root = torch.from_numpy(np.real(np.asarray(scipy.linalg.sqrtm((a.cov @ b.cov).numpy()))))
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * root.trace())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_agrees_with_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = samples(400, 24, 2), samples(400, 24, 3)
    reference = fid.fid_statistics_to_metric(fid.fid_features_to_statistics(x), fid.fid_features_to_statistics(y), verbose=False)
    value = frechet_distance(FeatureStatistics.from_features(x), FeatureStatistics.from_features(y))
    assert value == pytest.approx(next(iter(reference.values())), rel=1e-9)


def test_rank_deficient_covariances_match_the_factor_form():
    # With fewer samples than features tr (S1 S2)^1/2 is the nuclear norm of the product of the centred factors.
    x, y = samples(20, 64, 4), samples(30, 64, 5)
    a, b = FeatureStatistics.from_features(x), FeatureStatistics.from_features(y)
    factors = (x - x.mean(0)) / 19**0.5 @ ((y - y.mean(0)) / 29**0.5).T
    expected = float((x.mean(0) - y.mean(0)).square().sum() + a.cov.trace() + b.cov.trace() - 2 * torch.linalg.svdvals(factors).sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) < 1e-4 * float(a.cov.trace())


def test_disjoint_supports_have_no_cross_term():
    a, b = torch.tensor([3.0, 0.0]).diag(), torch.tensor([0.0, 5.0]).diag()
    assert frechet_distance(gaussian(torch.zeros(2), a), gaussian(torch.zeros(2), b)) == pytest.approx(8.0, abs=1e-6)


def test_merging_batches_equals_one_batch():
    x = samples(257, 12, 6) + 1e4  # a large mean, where running sums of squares lose half the digits
    whole = FeatureStatistics.from_features(x)
    parts = [FeatureStatistics.from_features(part) for part in x.split([1, 100, 3, 153])]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.n == 257
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.cov, whole.cov, rtol=1e-12, atol=1e-12 * float(whole.cov.abs().max()))
    torch.testing.assert_close(whole.cov, torch.cov(x.T), rtol=1e-9, atol=1e-9)


def test_features_are_widened_before_they_are_summed():
    x = samples(100, 5, 7).float()
    a, b = FeatureStatistics.from_features(x), FeatureStatistics.from_features(x.double())
    assert a.mean.dtype == a.cov.dtype == torch.float64
    assert torch.equal(a.cov, b.cov)


def test_mistakes_are_refused():
    one = FeatureStatistics.from_features(torch.zeros(1, 3))
    two = FeatureStatistics.from_features(torch.randn(5, 3))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(one, two)
    with pytest.raises(ValueError, match="dimensions differ: 3 and 4"):
        frechet_distance(two, FeatureStatistics.from_features(torch.randn(5, 4)))
    with pytest.raises(ValueError, match="dimensions differ"):
        two.merge(FeatureStatistics.from_features(torch.randn(5, 4)))
    with pytest.raises(ValueError, match="shape"):
        FeatureStatistics.from_features(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="repeats"):
        bootstrap_floor(torch.randn(9, 2), 1, 0)


def test_floors_of_one_dimension_match_their_expectation():
    # For N(0, 1) samples the distance is |dm|^2 + |ds|^2: resampling N of N has variance 1/N for the mean and about 1/2N for the
    # deviation, so 1.5/N is expected; two halves differ by twice the variance of one, each with N/2 samples: 6/N.
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    mean, std = bootstrap_floor(x, 400, 0)
    assert mean == pytest.approx(1.5 / 2000, rel=0.2)
    assert std == pytest.approx(1.5 / 2000, rel=0.5)
    assert half_floor(x, 400, 0)[0] == pytest.approx(6 / 2000, rel=0.2)
    assert bootstrap_floor(x, 5, 3) == bootstrap_floor(x, 5, 3)
    assert half_floor(x, 5, 3) != half_floor(x, 5, 4)

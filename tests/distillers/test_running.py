from __future__ import annotations

import pytest
import torch
from matching_cases import double

from fastgen.distillers.running import new_log_mean, new_mean, update_log_mean, update_mean

PLACES = torch.tensor([0, 2, 0, 2, 2])


def test_without_decay_it_is_each_places_mean_in_the_batch() -> None:
    state, values = new_mean(4), double(1, 2, 5, 3, 7)
    for _ in range(2):  # the second call knows nothing of the first
        torch.testing.assert_close(update_mean(state, values, PLACES, 0.0), double(3, 4, 3, 4, 4), rtol=1e-15, atol=0)


def test_with_decay_earlier_samples_weigh_less_the_older_they_are() -> None:
    """After three calls a sample that came n calls ago weighs .5^n, whatever the sizes of the batches."""
    state = new_mean(3)
    update_mean(state, double(8, 1), torch.tensor([0, 1]), 0.5)
    second = update_mean(state, double(2, 4, 3), torch.tensor([0, 0, 1]), 0.5)
    torch.testing.assert_close(second, double(10 / 2.5, 10 / 2.5, 3.5 / 1.5))
    third = update_mean(state, double(6), torch.tensor([0]), 0.5)
    torch.testing.assert_close(third, double((0.25 * 8 + 0.5 * (2 + 4) + 6) / (0.25 + 1 + 1)))
    # place 1 got nothing new: its mean stays, its weight fades; place 2 never had a sample
    torch.testing.assert_close(state[:, 1], double(0.25 * 1 + 0.5 * 3, 0.25 + 0.5))
    assert torch.equal(state[:, 2], double(0, 0))


def test_a_micro_batch_of_one_is_normalised_by_those_before_it() -> None:
    state, generator = new_mean(1), torch.Generator().manual_seed(0)
    values = torch.rand(4000, generator=generator).double() * 4
    factors = [(value / update_mean(state, value[None], torch.zeros(1, dtype=torch.long), 0.99)).item() for value in values]
    assert sum(factors[500:]) / 3500 == pytest.approx(1, abs=0.02)


def test_sums_are_exact_and_take_no_gradient() -> None:
    state, values = new_mean(1), torch.full((1000,), 0.1, requires_grad=True)
    mean = update_mean(state, values, torch.zeros(1000, dtype=torch.long), 0.9)
    assert mean.dtype == state.dtype == torch.float64
    assert not mean.requires_grad and not state.requires_grad
    assert (mean - torch.tensor(0.1).double()).abs().max() <= 1e-15


def test_means_of_exponentials() -> None:
    """The logarithm of the mean that `update_mean` would give, and finite where exp is not."""
    plain, logarithmic = new_mean(1), new_log_mean()
    for values in (double(0.3, -1, 2), double(1.5), double(-4, 0)):
        want = update_mean(plain, values.exp(), torch.zeros(len(values), dtype=torch.long), 0.9)[0]
        assert update_log_mean(logarithmic, values, 0.9).item() == pytest.approx(want.log().item(), abs=1e-12)
    torch.testing.assert_close(logarithmic.exp(), plain[:, 0])
    assert update_log_mean(new_log_mean(), double(2000, 2000), 0.9).item() == pytest.approx(2000)
    assert update_log_mean(new_log_mean(), double(-2000, -2000), 0.0).item() == pytest.approx(-2000)


def test_exponentials_without_decay_are_the_batchs_own() -> None:
    state = new_log_mean()
    for values in (double(3, 1), double(-2, 0)):
        assert update_log_mean(state, values, 0.0).item() == pytest.approx(values.exp().mean().log().item(), abs=1e-12)

from __future__ import annotations

import pytest
import torch
from matching_cases import double

from fastgen.distillers.running import log_means, new_log_means

PLACES = torch.tensor([0, 2, 0, 2, 2])


def means(state: torch.Tensor, values: torch.Tensor, places: list[int], step: int, decay: float) -> torch.Tensor:
    """Means of plain values."""
    return log_means(state, values.log(), torch.tensor(places), step, decay).exp()


def test_without_decay_it_is_each_places_mean_in_the_step_before_and_the_sample() -> None:
    state, values = new_log_means(4), double(1, 2, 5, 3, 7)
    torch.testing.assert_close(means(state, values, PLACES.tolist(), 0, 0.0), values)  # alone
    totals, numbers = double(6, 12, 6, 12, 12), double(2, 3, 2, 3, 3)
    torch.testing.assert_close(means(state, 2 * values, PLACES.tolist(), 1, 0.0), (totals + 2 * values) / (numbers + 1))
    # the third step knows nothing of the first, and place 3 has never had a sample
    torch.testing.assert_close(means(state, double(1, 9), [0, 3], 2, 0.0), double((12 + 1) / 3, 9))
    torch.testing.assert_close(means(state, double(4, 5), [0, 2], 3, 0.0), double((1 + 4) / 2, 5))


def test_with_decay_earlier_samples_weigh_less_the_older_they_are() -> None:
    """A sample that came n steps before the last one weighs .5^n, whatever the sizes of the batches."""
    state = new_log_means(3)
    means(state, double(8, 1), [0, 1], 0, 0.5)
    torch.testing.assert_close(means(state, double(2, 4, 3), [0, 0, 1], 1, 0.5), double((8 + 2) / 2, (8 + 4) / 2, (1 + 3) / 2))
    torch.testing.assert_close(means(state, double(6), [0], 2, 0.5), double((0.5 * 8 + 2 + 4 + 6) / 3.5))
    got = means(state, double(1, 1, 1), [0, 1, 2], 3, 0.5)
    # place 1 got nothing new in step 2: its samples only weigh less
    want = double((0.25 * 8 + 0.5 * (2 + 4) + 6 + 1) / (0.25 + 1 + 1 + 1), (0.25 * 1 + 0.5 * 3 + 1) / (0.25 + 0.5 + 1), 1)
    torch.testing.assert_close(got, want)


def test_no_sample_is_more_than_the_number_remembered_times_its_mean() -> None:
    state = new_log_means()
    log_means(state, double(*[0.0] * 8), torch.zeros(8, dtype=torch.long), 0, 0.9)
    for value in (5.0, 50.0, 5000.0):
        factor = (value - log_means(state.clone(), double(value), torch.zeros(1, dtype=torch.long), 1, 0.9)).exp().item()
        assert factor == pytest.approx((8 + 1) / (1 + 8 * 2.718281828459045**-value), rel=1e-9)


def test_how_a_step_is_split_changes_nothing() -> None:
    states, values = [new_log_means(2) for _ in range(3)], torch.rand(3, 6, generator=torch.Generator().manual_seed(0)).double()
    places = [0, 1, 1, 0, 1, 1]
    for step in range(3):
        whole, *split = (
            torch.cat([means(state, values[step, i : i + size], places[i : i + size], step, 0.9) for i in range(0, 6, size)])
            for state, size in zip(states, (6, 2, 1), strict=True)
        )
        for parts in split:
            torch.testing.assert_close(parts, whole, rtol=1e-14, atol=0)


def test_sums_are_exact_and_take_no_gradient() -> None:
    state, values, places = new_log_means(), torch.full((1000,), 0.1, requires_grad=True), torch.zeros(1000, dtype=torch.long)
    log_means(state, values, places, 0, 0.9)
    mean = log_means(state, values, places, 1, 0.9)
    assert mean.dtype == state.dtype == torch.float64
    assert not mean.requires_grad and not state.requires_grad
    assert (mean - torch.tensor(0.1).double()).abs().max() <= 1e-14


@pytest.mark.parametrize("value", [2000.0, -2000.0])
def test_means_beyond_the_range_of_exp(value: float) -> None:
    state, places = new_log_means(), torch.zeros(2, dtype=torch.long)
    log_means(state, double(value, value - 1), places, 0, 0.0)
    want = value + double((2 + torch.e**-1) / 3).log().item()
    assert log_means(state, double(value, value), places, 1, 0.0).tolist() == pytest.approx([want, want])

from __future__ import annotations

import pytest
import torch
from matching_cases import double

from fastgen.distillers.running import log_means, new_log_means

PLACES = torch.tensor([0, 2, 0, 2, 2])


def means(state: torch.Tensor, values: torch.Tensor, places: list[int], step: int, decay: float) -> torch.Tensor:
    """Means of plain values."""
    return log_means(state, values.log(), torch.tensor(places), step, decay).exp()


def test_without_decay_it_is_each_places_mean_in_the_step_before() -> None:
    state, values, nan = new_log_means(4), double(1, 2, 5, 3, 7), float("nan")
    first = means(state, values, PLACES.tolist(), 0, 0.0)
    torch.testing.assert_close(first, double(*[nan] * 5), equal_nan=True)
    for step in (1, 2):  # the third step knows nothing of the first
        torch.testing.assert_close(means(state, step * values, PLACES.tolist(), step, 0.0), max(1, step - 1) * double(3, 4, 3, 4, 4))
    torch.testing.assert_close(means(state, double(1, 1), [1, 3], 3, 0.0), double(nan, nan), equal_nan=True)


def test_with_decay_earlier_samples_weigh_less_the_older_they_are() -> None:
    """A sample that came n steps before the last one weighs .5^n, whatever the sizes of the batches."""
    state = new_log_means(3)
    means(state, double(8, 1), [0, 1], 0, 0.5)
    torch.testing.assert_close(means(state, double(2, 4, 3), [0, 0, 1], 1, 0.5), double(8, 8, 1))
    torch.testing.assert_close(means(state, double(6), [0], 2, 0.5), double((0.5 * 8 + 2 + 4) / 2.5))
    got = means(state, double(1, 1, 1), [0, 1, 2], 3, 0.5)
    # place 1 got nothing new in step 2: its mean stays; place 2 never had a sample
    want = double((0.25 * 8 + 0.5 * (2 + 4) + 6) / (0.25 + 1 + 1), (0.25 * 1 + 0.5 * 3) / (0.25 + 0.5), float("nan"))
    torch.testing.assert_close(got, want, equal_nan=True)


def test_how_a_step_is_split_changes_nothing() -> None:
    states, values = [new_log_means(2) for _ in range(3)], torch.rand(3, 6, generator=torch.Generator().manual_seed(0)).double()
    places = [0, 1, 1, 0, 1, 1]
    for step in range(3):
        whole, *split = (
            torch.cat([means(state, values[step, i : i + size], places[i : i + size], step, 0.9) for i in range(0, 6, size)])
            for state, size in zip(states, (6, 2, 1), strict=True)
        )
        for parts in split:
            torch.testing.assert_close(parts, whole, equal_nan=True, rtol=1e-14, atol=0)
    assert bool(whole.isfinite().all())


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
    log_means(state, double(value, value - 1), places, 0, 0.9)
    want = value + double((1 + torch.e**-1) / 2).log().item()
    assert log_means(state, double(0, 0), places, 1, 0.9).tolist() == pytest.approx([want, want])

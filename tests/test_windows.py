"""PeRFlow's own sampler: exact where a student of the straight line is perfect, the paper's formulas, and stock steps where windows are one step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.path import DiscreteVP, Flow, Kind, Path, TrigFlow, VariancePreserving
from fastgen.sampling import few_step, initial
from fastgen.windows import begin_at, through_windows

PATHS: list[tuple[Path, Kind]] = [
    (Flow(), "velocity"),
    (TrigFlow(), "velocity"),
    (VariancePreserving(), "eps"),
    (VariancePreserving(), "v"),
    (DiscreteVP.scaled_linear(1000, 0.00085, 0.012), "eps"),
    (DiscreteVP.scaled_linear(1000, 0.00085, 0.012), "x0"),
]
SLOPES = (-0.3, 0.2, 0.1)  # eps of each window's pair over x at its start


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Perfect:
    """A student of the straight line that is right everywhere: the pair behind the window from s to e has eps = m x_s and x0 = (x_s - sigma_s eps)
    / alpha_s (on paths to pure noise, whose alpha_s is 0 at first: x0 = m x_s), and at every x_t of the line it predicts that pair."""

    def __init__(self, path: Path, kind: Kind, edges: list[float]) -> None:
        self.path, self.edges, self.asked = path, edges, list[float]()
        self.own: Kind = kind

    def pair(self, x_s: Tensor, window: int) -> tuple[Tensor, Tensor]:
        alpha, sigma = (float(value) for value in self.path.coeffs(times(self.edges[window])))
        slope = SLOPES[window]
        if alpha < 1e-12:
            return slope * x_s, x_s / sigma
        return (x_s - sigma * slope * x_s) / alpha, slope * x_s

    def end(self, x_s: Tensor, window: int) -> Tensor:
        alpha, sigma = (float(value) for value in self.path.coeffs(times(self.edges[window + 1])))
        x0, eps = self.pair(x_s, window)
        return alpha * x0 + sigma * eps

    def __call__(self, x: Tensor, t: Tensor, cond: Any, kind: Kind = "x0", path: Path | None = None) -> Tensor:
        self.asked.append(t[0].item())
        window = next(k for k, (s, e) in enumerate(pairwise(self.edges)) if e < t[0] <= s)
        start, end = self.edges[window : window + 2]
        share = (start - t[0].item()) / (start - end)
        over_start = 1 - share + share * self.end(torch.ones((), dtype=torch.float64), window)
        pair = self.pair(x / over_start, window)
        predicted = self.path.predict(*pair, t, self.own)
        return predicted if kind == self.own else self.path.convert(predicted, x, t, self.own, kind)  # as networks are read, right or not


@pytest.mark.parametrize(("path", "kind"), PATHS)
@pytest.mark.parametrize("inside", [1, 2, 3])
def test_a_perfect_student_goes_from_end_to_end(path: Path, kind: Kind, inside: int) -> None:
    edges = [share * path.t_max for share in (1.0, 0.6, 0.25, 0.0)]
    grid = torch.cat([torch.linspace(s, e, inside + 1, dtype=torch.float64)[:-1] for s, e in pairwise(edges)])
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student = Perfect(path, kind, edges)
    found = through_windows(student, noise, grid, edges, {}, kind=kind)
    want = initial(path, noise, grid)
    for window in range(3):
        want = student.end(want, window)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert student.asked == grid.tolist()
    stock = few_step(Perfect(path, kind, edges), noise, grid, {}, renoise="euler")
    exact = inside == 1 or isinstance(path, Flow)
    assert torch.allclose(stock, want, rtol=1e-9, atol=1e-9) == exact  # which is why it is a sampler of its own


def test_a_step_inside_a_window_is_the_papers() -> None:
    """x_e = lambda_c x_c + eta_c eps, lambda_c = lambda (e - s)/d, eta_c = eta (e - c)/d, d = lambda (c - s) + (e - c), of one evaluation at c."""
    path = VariancePreserving()
    s, e, c = 1.0, 0.4, 0.7
    x, eps = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bar = {t: path.coeffs(times(t))[0].item() ** 2 for t in (s, e)}
    scale = (bar[e] / bar[s]) ** 0.5
    eta = (1 - bar[e]) ** 0.5 - (bar[e] / bar[s] * (1 - bar[s])) ** 0.5
    d = scale * (c - s) + (e - c)
    asked: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, cond: Any, kind: Kind = "x0", other: Path | None = None) -> Tensor:
        asked.append(x)
        return eps if len(asked) == 1 else torch.zeros_like(x)

    predict.path = path  # type: ignore[attr-defined]
    through_windows(predict, x, times(c, e), [s, e, 0.0], {}, kind="eps")  # type: ignore[arg-type]
    torch.testing.assert_close(asked[1], scale * (e - s) / d * x + eta * (e - c) / d * eps, rtol=1e-12, atol=1e-12)


def test_steps_must_stop_at_every_windows_end() -> None:
    edges = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert begin_at(times(1, 0.75, 0.5, 0.25), edges) and begin_at(times(0.98, 0.875, 0.75000001, 0.5, 0.25), edges)
    assert not begin_at(times(1, 0.5), edges) and not begin_at(times(1, 2 / 3, 1 / 3), edges)

"""PeRFlow's own sampler (Yan et al. 2024, arXiv:2405.07510, and its scheduler): through each window along the straight line between its ends.

A student of `interpolant: linear` predicts, at every point of a window from s down to e, one constant pair (x0, eps), in its own kind. On a
curved path the line through alpha x0 + sigma eps at s and at e leaves the path between them, so that a prediction at c is one at

    x_c = A x0 + B eps,   (A, B) = (1 - r) (alpha_s, sigma_s) + r (alpha_e, sigma_e),   r = (s - c)/(s - e),

and not at alpha_c x0 + sigma_c eps, as a stock sampler takes it. With an eps prediction and lambda = alpha_e/alpha_s, eta = sigma_e - lambda
sigma_s it is the paper's x_e = lambda_c x_c + eta_c eps of its `ddim_eps`. At c = s the two are the same: with one step a window this is `euler`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.path import Kind, Path
from fastgen.sampling import Predict, initial


def begin_at(times: Tensor, edges: Sequence[float]) -> bool:
    """Whether steps at `times` (N,) stop at the end of every window; edges: descending path times at which windows begin, and 0."""
    return all(bool(((times - edge).abs() <= 1e-6 * edges[0]).any()) for edge in edges[1:-1])


def through_windows(predict: Predict, noise: Tensor, times: Tensor, edges: Sequence[float], cond: Conditioning, *, kind: Kind) -> Tensor:
    """x0 (B, ...) in the noise's dtype, of unit noise (B, ...), by one evaluation at each of the path times (N,), descending, which stop at every
    edge but the first, the noise end. kind: the network's own."""
    assert begin_at(times, edges), "a step goes past the end of its window"
    x = initial(predict.path, noise, times)
    for t, after in pairwise([*times.tolist(), 0.0]):
        # Grids and edges reach this point through fp32 and JSON.
        start, end = next((s, e) for s, e in pairwise(edges) if t > e + 1e-6 * edges[0])
        x0, eps = _pair(predict, x, t, _on_line(predict.path, t, start, end), cond, kind)
        a, b = _on_line(predict.path, after, start, end)
        x = (a * x0 + b * eps).to(noise.dtype)
    return x


def _pair(predict: Predict, x: Tensor, t: float, at: tuple[float, float], cond: Conditioning, kind: Kind) -> tuple[Tensor, Tensor]:
    """(x0, eps), each (B, ...), of the network's own prediction at x = A x0 + B eps and time t."""
    times = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
    pred, (alpha, sigma) = predict(x, times, cond, kind), at
    one, zero, time = (torch.tensor([value], dtype=torch.float64) for value in (1.0, 0.0, t))
    a, b = (predict.path.predict(*each, time, kind).item() for each in ((one, zero), (zero, one)))
    det = alpha * b - sigma * a
    return (b * x - sigma * pred) / det, (alpha * pred - a * x) / det


def _on_line(path: Path, t: float, start: float, end: float) -> tuple[float, float]:
    """(A, B) at time t of the window from `start` to `end`."""
    (alpha_s, alpha_e), (sigma_s, sigma_e) = (value.tolist() for value in path.coeffs(torch.tensor([start, end], dtype=torch.float64)))
    share = min(1.0, (start - t) / (start - end))
    return alpha_s + share * (alpha_e - alpha_s), sigma_s + share * (sigma_e - sigma_s)

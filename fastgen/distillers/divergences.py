"""f-divergences for distribution matching (Xu et al. 2025, f-distill, arXiv:2502.15681, table 1).

With r = p/q, the teacher's density over the student's, D_f(p || q) = E_q[f(r)] has the gradient of the reverse KL times h(r) = r^2 f''(r)
in each sample. A constant factor of h is absorbed by the normalisation over the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Name = Literal["reverse_kl", "softened_reverse_kl", "js", "squared_hellinger", "forward_kl", "jeffreys", "neyman_chi2", "pearson_chi2"]


class Divergence(NamedTuple):
    """f and h, elementwise on r > 0."""

    f: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]


DIVERGENCES: dict[Name, Divergence] = {
    "reverse_kl": Divergence(lambda r: -r.log(), torch.ones_like),
    "softened_reverse_kl": Divergence(lambda r: (r + 1) * (0.5 + 0.5 / r).log(), lambda r: 1 / (1 + r)),
    "js": Divergence(lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), lambda r: r / (1 + r)),
    "squared_hellinger": Divergence(lambda r: 1 - r.sqrt(), lambda r: r.sqrt() / 4),
    "forward_kl": Divergence(lambda r: r * r.log(), lambda r: r),
    "jeffreys": Divergence(lambda r: (r - 1) * r.log(), lambda r: 1 + r),
    "neyman_chi2": Divergence(lambda r: (1 - r).square() / r, lambda r: 2 / r),
    "pearson_chi2": Divergence(lambda r: (r - 1).square(), lambda r: 2 * r.square()),
}
assert DIVERGENCES.keys() == set(get_args(Name))

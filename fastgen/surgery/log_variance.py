"""A learned log-variance of the loss, as a function of the noise level alone (Karras et al. 2024, eq. 21; Lu & Song 2025, section 4.2).

It belongs to the student, is trained with it, averages with it, and is left behind at export.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen.rng import seeded
from fastgen.surgery.second_time import smooth_features

_HIDDEN = 64


class LogVariance(nn.Module):
    """l (B,) of noise fractions (B,) in [0, 1]; zero at the start. seed: of the hidden layer, any printable parts."""

    def __init__(self, *, seed: object) -> None:
        super().__init__()
        with seeded("log variance", seed):
            self.hidden = nn.Linear(smooth_features(torch.zeros(1)).shape[1], _HIDDEN)
        self.out = nn.Linear(_HIDDEN, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, fraction: Tensor) -> Tensor:
        with torch.autocast(fraction.device.type, enabled=False):
            features = smooth_features(fraction).to(self.hidden.weight.dtype)
            return self.out(nn.functional.silu(self.hidden(features)))[:, 0]

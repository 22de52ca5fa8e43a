"""Networks that are not trained, with all parameters in half precision."""

from __future__ import annotations

import torch
from torch import nn


def narrow(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep its parameters in `dtype`; not its buffers: tables of positions, frequencies and closed forms stay exact."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)

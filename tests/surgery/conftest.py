"""What tests of mixtures of experts share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

FAMILIES = str(Path(__file__).parents[1] / "families")
if FAMILIES not in sys.path:  # configurations of real networks
    sys.path.append(FAMILIES)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers rotates queries, embeds times and gates some layers in fp32 whatever the network's dtype is, which float64 sees; not here."""
    narrow, to = Tensor.float, Tensor.to
    monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x))
    monkeypatch.setattr(Tensor, "to", lambda x, *how, **more: x if x.dtype == torch.float64 and how == (torch.float32,) else to(x, *how, **more))

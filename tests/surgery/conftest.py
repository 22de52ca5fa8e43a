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
    narrow = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x))

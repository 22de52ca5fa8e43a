"""Noise-sample pairs as tests look at them: whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.config import DataBlock
from fastgen.data.encoded import Keeping
from fastgen.data.pair_folder import open_folder
from fastgen.data.pairs import Pairs
from fastgen.progress import Progress


def seeds_of(pairs: Pairs) -> Tensor:
    return pairs.rows.select(torch.arange(len(pairs)))["seed"]


def samples_of(pairs: Pairs) -> Tensor:
    return pairs.rows.select(torch.arange(len(pairs)))["x0"]


def loaded(path: Path, **data: Any) -> Pairs:
    """Those of a folder, as a run on the CPU has them. data: keys of its block."""
    return open_folder(path).load(Keeping(torch.device("cpu"), DataBlock(**data)), Progress())

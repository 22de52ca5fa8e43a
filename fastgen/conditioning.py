"""Conditioning: a dict of batch-first tensors (text embeddings, pooled embeddings, masks, labels) that travels unchanged to the family."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Conditioning = dict[str, Tensor]


def batch_size(cond: Conditioning) -> int:
    """Number of samples; 0 for an empty (unconditional) dict."""
    return next(iter(cond.values())).shape[0] if cond else 0


def cat(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenate along the batch; every part must hold the same keys."""
    keys = parts[0].keys()
    for part in parts[1:]:
        if part.keys() != keys:
            raise ValueError(f"conditionings with different keys: {sorted(keys)} and {sorted(part.keys())}")
    return {key: torch.cat([part[key] for part in parts]) for key in keys}


def select(cond: Conditioning, index: Tensor) -> Conditioning:
    """Rows `index` (N,) int64 of every tensor."""
    return {key: value[index.to(value.device)] for key, value in cond.items()}


def to(cond: Conditioning, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
    """Move every tensor; `dtype` applies to floating-point tensors only."""
    return {key: value.to(device=device, dtype=dtype if value.is_floating_point() else None) for key, value in cond.items()}


def repeat(cond: Conditioning, count: int) -> Conditioning:
    """One sample's conditioning (batch 1) as a batch of `count`."""
    return {key: value.expand(count, *value.shape[1:]) for key, value in cond.items()}


def drop(cond: Conditioning, null: Conditioning, mask: Tensor) -> Conditioning:
    """Replace the rows where mask (B,) is True by `null` (batch 1): conditioning dropout for classifier-free guidance."""
    return {key: torch.where(mask.to(value.device).view(-1, *(1,) * (value.ndim - 1)), null[key].to(value), value) for key, value in cond.items()}


def ragged(rows: Sequence[Tensor], most: int) -> Conditioning:
    """Texts (N_i, D) of different length as `text` (B, most, D), padded with zeros, and `length` (B,) int64."""
    text = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, most - len(row))) for row in rows])
    return {"text": text, "length": torch.tensor([len(row) for row in rows], device=text.device)}


def lengths(cond: Conditioning) -> list[int]:
    """Those of `ragged` texts; on the meta device, where there are none, all that there is room for."""
    length, most = cond["length"], cond["text"].shape[1]
    return [most] * len(length) if length.is_meta else length.tolist()

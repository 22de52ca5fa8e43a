"""Numbers of a whole batch where processes hold parts of it: what is not a mean over samples depends on which samples it saw.

A mean of losses over processes is the loss of the whole batch, so most terms need nothing. What is a ratio, a root or a product of means (weights
that layers get by their errors, the load of experts, logs such as a standard deviation) takes its means from here. The trainer says when a
micro-batch is spread over processes: it is where `train.micro_batch` does not cut it smaller; otherwise, and in one process, these functions
give back what they are given. They take part in no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor


class _Parts(NamedTuple):
    total: Callable[[Tensor], Tensor]  # over all of them, of a tensor that each has
    count: int


_parts: ContextVar[_Parts | None] = ContextVar("parts of a batch", default=None)


@contextmanager
def parts(total: Callable[[Tensor], Tensor], count: int) -> Iterator[None]:
    """Inside, a batch is one of `count` equal parts; total: the sum over them of a tensor that each has. Every part asks for the same, in the same
    order."""
    before = _parts.set(_Parts(total, count) if count > 1 else None)
    try:
        yield
    finally:
        _parts.reset(before)


def batch_total(value: Tensor) -> Tensor:
    """The sum over the parts of the batch, of their own sums."""
    found = _parts.get()
    return value if found is None else found.total(value.detach())


def batch_mean(value: Tensor) -> Tensor:
    """The mean over the parts of the batch, of their own means."""
    found = _parts.get()
    return value if found is None else found.total(value.detach()) / found.count


def batch_std(value: Tensor) -> Tensor:
    """The standard deviation of all elements of a batch, without Bessel's bias, ()."""
    found = _parts.get()
    if found is None:
        return value.std()
    mean, number = batch_mean(value.mean()), value.numel() * found.count
    return (batch_total((value.detach() - mean).square().sum()) / max(1, number - 1)).sqrt()


def root_mean_square(value: Tensor) -> Tensor:
    """Of all elements of a batch, ()."""
    return batch_mean(value.square().mean()).sqrt()

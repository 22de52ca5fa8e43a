"""Batches in the order in which they are needed, drawn ahead where that takes long."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from fastgen.data.training import Batch, Data
from fastgen.rng import SampleRng

AHEAD = 2  # batches


def feed(data: Data, coming: Iterable[SampleRng]) -> Iterator[Batch]:
    """The batch of each of the `coming` samples, in order. What is drawn depends on the samples alone, so it is the same read ahead or not."""
    return _ahead(data.draw, iter(coming)) if data.read_ahead else map(data.draw, coming)


def _ahead(draw: Callable[[SampleRng], Batch], coming: Iterator[SampleRng]) -> Iterator[Batch]:
    """A thread keeps AHEAD batches ready; what it meets is raised where its batch is needed."""
    with ThreadPoolExecutor(1, "batches") as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            while True:
                while len(waiting) <= AHEAD and (rng := next(coming, None)) is not None:
                    waiting.append(pool.submit(draw, rng))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

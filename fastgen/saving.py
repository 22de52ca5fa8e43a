"""When a run's checkpoints are written: while it waits, or beside its next steps, from copies in the CPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from fastgen import checkpoint
from fastgen.errors import UserError
from fastgen.trainer import Metrics, Trainer

if TYPE_CHECKING:
    from fastgen.tensor_files import Group


def own_group(timeout: float) -> Group:
    """A group of all processes that nothing else uses, so that what a thread exchanges in it meets nothing of the training's; None for one
    process. timeout: seconds after which waiting for another fails. Collective."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    return group


class Saver:
    """Checkpoints of one run in `folder`, of which `keep` stay. beside: a thread of each process writes them while training goes on, one at a
    time: `save` waits for the one before, and raises what became of it, on all processes; so does leaving the block.

    Collective, as `save` and `wait` are.
    """

    def __init__(self, folder: Path, *, keep: int, beside: bool, timeout: float = 1800) -> None:
        self.folder, self.keep, self.beside = folder, keep, beside
        self._group = own_group(timeout)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._running: Future[Path] | None = None

    def save(self, trainer: Trainer, recipe: dict[str, Any], *, inputs: Mapping[str, str], metrics: Metrics) -> None:
        """See `checkpoint.Content.of`. CannotWrite as `checkpoint.write`."""
        self.wait()
        content = checkpoint.Content.of(trainer, recipe, inputs=inputs, metrics=metrics, apart=self.beside)
        if self.beside:
            self._running = self._thread.submit(checkpoint.write, self.folder, content, keep=self.keep, group=self._group)
        else:
            checkpoint.write(self.folder, content, keep=self.keep, group=self._group)

    def wait(self) -> None:
        """Until the checkpoint that is being written is there; what it raises."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._thread:
            if error is None:
                self.wait()
            else:
                with suppress(UserError):  # what ended the run says more
                    self.wait()

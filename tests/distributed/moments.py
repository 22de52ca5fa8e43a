"""The moments of a process of a run, counted: each collective, each meeting over the launcher's store, each write, each step and each row.

Counts, unlike seconds, come again, so that a process can be killed where it was killed before.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Heartbeats, which do follow the clock, are none of them.
COLLECTIVES = (
    *("all_reduce", "broadcast", "all_gather", "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
    *("all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_single", "reduce_scatter_single"),  # FSDP2's, of torch to 2.13 and since
)
MEETINGS = ("lone", "told", "together", "same")


def counted(log: str, at: int | None = None) -> None:
    """Note the moments of this process from here on in the file `log`, a name each, in its working folder; and kill it as it comes to number
    `at`, counted from 1."""
    import torch.distributed as dist

    from fastgen import checkpoint, tensor_files
    from fastgen.group import Member
    from fastgen.runlog import RunLog
    from fastgen.trainer import Trainer

    numbers, saving = itertools.count(1), list[bool]()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def before(owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            os.write(file, f"{'save ' * bool(saving)}{name}\n".encode())
            if next(numbers) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        setattr(owner, name, call)

    def write(*given: Any, **named: Any) -> Any:
        saving.append(True)
        try:
            return whole(*given, **named)
        finally:
            saving.pop()

    whole, checkpoint.write = checkpoint.write, write
    places = [(dist, name) for name in COLLECTIVES if hasattr(dist, name)] + [(Member, name) for name in MEETINGS]
    places += [(tensor_files, "save_file"), (os, "fsync"), (os, "replace"), (Trainer, "train_step"), (RunLog, "write")]
    for owner, name in places:
        before(owner, name)


def noted(folder: Path, log: str) -> list[str]:
    return (folder / log).read_text(encoding="utf-8").splitlines()

"""The command line on processes that can be sent signals: forked from one that has imported everything, so that they take no time to start."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the program has it; read when torch is imported
FORKS = mp.get_context("forkserver")
FORKS.set_forkserver_preload(["fastgen.run", "fastgen.terminal", "fastgen.cli", "diffusers", "peft", "torch.distributed", "tensorboard", "ranks"])


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def command(folder: str, environment: Mapping[str, str], arguments: Sequence[str], before: Callable[[], None] | None) -> None:
    """What a process does. before: prepares the fault."""
    os.environ.update(environment)
    rank = environment["RANK"]
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(Path(folder, f"{name}_{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    os.chdir(folder)
    if before is not None:
        before()
    from fastgen.cli import main

    status = main(list(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Ranks:
    """Two processes of `fastgen …`, which stand for what a launcher starts; their streams in files of `folder`, which is their home too."""

    def __init__(self, folder: Path, *each: Sequence[str], before: Mapping[int, Callable[[], None]] | None = None) -> None:
        self.folder = folder
        shared = {"WORLD_SIZE": str(len(each)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        self.processes: list[BaseProcess] = []
        for rank, arguments in enumerate(each):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "HOME": str(folder)}
            process = FORKS.Process(target=command, args=(str(folder), environment, arguments, (before or {}).get(rank)))
            process.start()
            self.processes.append(process)

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.statuses(), [self.err(rank) for rank in range(len(self.processes))])
            assert all(process.is_alive() for process in self.processes), [self.err(rank) for rank in range(len(self.processes))]
            time.sleep(0.05)

    def kill(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def ends(self, seconds: float = 120, *, but: Sequence[int] = ()) -> list[int | None]:
        """Exit statuses of all, once all but some have ended; no process is left."""
        end = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            if rank not in but:
                process.join(max(0.0, end - time.monotonic()))
        found = self.statuses()
        for process in self.processes:
            process.kill()
            process.join()
        return found

    def statuses(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def err(self, rank: int) -> str:
        return (self.folder / f"err_{rank}").read_text(encoding="utf-8")

    def out(self, rank: int) -> str:
        return (self.folder / f"out_{rank}").read_text(encoding="utf-8")

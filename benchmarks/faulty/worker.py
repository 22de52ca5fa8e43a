"""Runs fastgen commands, each in a fork of this process, which has imported everything; benchmarks/faults.py starts it with operations.c preloaded.

A line of JSON in: {"arguments", "root", "at", "mode", "log"}; a line out: {"status", "operations"}, status as of `subprocess`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path


def main() -> None:
    import diffusers
    import peft  # noqa: F401
    import tensorboard  # noqa: F401
    import torch
    import torch.utils.tensorboard
    import transformers  # noqa: F401
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline  # noqa: F401

    from fastgen import caching, cli, report, run, terminal  # noqa: F401

    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    operations = ctypes.CDLL(None)
    operations.faults_count.restype = ctypes.c_long
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(job, cli, operations)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        counted = Path(job["log"] + ".operations")
        print(json.dumps({"status": status, "operations": int(counted.read_text()) if counted.exists() else None}), flush=True)


def _run(job: dict, cli, operations: ctypes.CDLL) -> None:
    """In the fork: the command, its output in a file, then how many operations it made."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (0, 1, 2):
        os.dup2(log if stream else os.open(os.devnull, os.O_RDONLY), stream)
    os.environ["HOME"] = job["root"] + "/home"
    operations.faults_arm(job["root"].encode(), ctypes.c_long(job["at"]), job["mode"])
    status = 70
    try:
        status = cli.main(job["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        count = operations.faults_count()
        operations.faults_arm(b"", ctypes.c_long(0), 0)
        Path(job["log"] + ".operations").write_text(str(count))
        os._exit(status)


if __name__ == "__main__":
    main()

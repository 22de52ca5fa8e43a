"""One thread unless `--threads` says otherwise: tiny tensors run fastest so, and the machine is often shared. Hypothesis repeats the same
examples, without deadlines.

Being here, this file also puts its folder on the import path of every test below it (`import oracle`, `import pipelines`).
"""

from __future__ import annotations

import os

import hypothesis
import pytest
import rounding
import torch

hypothesis.settings.register_profile("fastgen", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fastgen")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="threads of PyTorch in the tests and in the processes that they start")
    parser.addoption("--rounding", action="store_true", help="move the last bits of what rounds, as other processors do: see rounding.py")


def pytest_configure(config: pytest.Config) -> None:
    threads = str(config.getoption("--threads"))
    torch.set_num_threads(int(threads))
    os.environ["OMP_NUM_THREADS"] = threads  # for child processes
    if config.getoption("--rounding"):
        config.pluginmanager.register(rounding)

"""Workers for kernel tests. How Triton runs is fixed when it is first imported, and other tests import it too: so each way has its process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

Run = Callable[..., Any]


def _worker(environment: dict[str, str]) -> Iterator[Run]:
    """A function that calls another (module-level, with picklable arguments) in a fresh process with this environment."""
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool,
    ):
        patch.delenv("TRITON_INTERPRET", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        pool.submit(os.getpid).result()  # starts the process, which keeps this environment
        patch.undo()
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Run]:
    """Runs a function where Triton kernels are interpreted on the CPU."""
    pytest.importorskip("triton")
    yield from _worker({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.fixture(scope="session")
def compiling() -> Iterator[Run]:
    """Runs a function where Triton compiles; a compiler that aborts ends that process alone."""
    pytest.importorskip("triton")
    yield from _worker({})


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture
def run(device: str, request: pytest.FixtureRequest) -> Run:
    """Runs a function on `device`: interpreted on the CPU, or compiled on a GPU in this process."""
    if device == "cpu":
        return request.getfixturevalue("interpreted")
    return lambda function, *args, **kwargs: function(*args, **kwargs)

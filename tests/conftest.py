"""One thread: tiny tensors run fastest so, and the machine is often shared. Hypothesis repeats the same examples, without deadlines.

Being here, this file also puts its folder on the import path of every test below it (`import oracle`, `import pipelines`).
"""

from __future__ import annotations

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fastgen", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fastgen")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)

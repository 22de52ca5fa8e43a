"""One thread: tiny tensors run fastest so, and the machine is often shared.

Being here, this file also puts its folder on the import path of every test below it (`import oracle`, `import pipelines`).
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)

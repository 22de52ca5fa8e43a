"""Thousands of damaged picture files, of every format that Pillow writes: each is read as some picture, or refused in one line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from damaged_pictures import MODES, damaged, read, whole

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", MODES)
def test_every_damaged_file_is_read_or_refused(tmp_path: Path, mode: str) -> None:
    ends: Counter[bool] = Counter()
    for kind, content in ((kind, content) for (kind, of), content in whole().items() if of == mode):
        for changed in damaged(content, 100, f"{kind} {mode}"):
            (tmp_path / "a").write_bytes(changed)
            ends[read(tmp_path / "a") is not None] += 1
    assert ends.total() >= 300 and ends[True] and ends[False]

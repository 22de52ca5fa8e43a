"""The count of a family's own lines, and what it must stay below."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.table import between

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "family_lines.py"


@pytest.fixture(scope="module")
def lines() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_family_lines", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCE = '''"""Module.

Two paragraphs.
"""

import os  # counted

# not counted


class A:
    """Not counted."""

    text = """counted

    on three lines"""

    def f(
        self,
    ) -> None:
        """Not
        counted."""
        return os.fsync(
            1
        )
'''


def test_docstrings_comments_and_blank_lines_do_not_count(lines: Any, tmp_path: Path) -> None:
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    assert lines.code_lines(path) == 1 + 1 + 3 + 3 + 3


def test_a_family_is_small_and_so_is_each_room_of_the_base(lines: Any) -> None:
    own = {name: lines.code_lines(path) for name, path in lines.family_files().items()}
    assert {"sd3", "sana", "wan"} <= own.keys() and "toy" not in own
    assert statistics.median(own.values()) <= 50
    assert max(own.values()) <= 60
    assert max(lines.rooms().values()) <= 300


def test_the_table_names_every_family_once_and_readme_has_it(lines: Any) -> None:
    table, summary = lines.table(), lines.summary()
    assert all(table.count(f"`{name}.py`") == 1 for name in lines.family_files())
    assert all(f"`{name}.py` {count}" in summary for name, count in lines.rooms().items())
    readme = lines.README.read_text(encoding="utf-8")
    assert readme == between(readme, "families", f"{table}\n\n{summary}")

"""Real processes killed at their file operations, and on disks that fill up: the way on ends as if nothing had happened, and nothing is lost.

benchmarks/faults.py does it and says what is compared. `-m slow` kills at every single operation.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("benchmark_faults", ROOT / "benchmarks/faults.py")
assert spec is not None and spec.loader is not None
faults: Any = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = faults
spec.loader.exec_module(faults)
SCENARIOS = {scenario.name: scenario for scenario in faults.SCENARIOS}

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")


@pytest.fixture(scope="module")
def working() -> Iterator[tuple[Any, Path]]:
    with faults.working() as both:
        yield both


def assert_good(verdicts: list[Any], *, killed: bool = True) -> None:
    for verdict in verdicts:
        at = f"at operation {verdict.at}, mode {verdict.mode}:\n{verdict.said}"
        assert verdict.killed or not killed, f"not killed {at}"
        assert verdict.resumed and not verdict.refused, f"refused {at}"
        assert not verdict.altered, f"altered {at}"
        assert not verdict.lost, f"lost {at}"
        assert not verdict.traceback, f"a traceback {at}"


@pytest.mark.parametrize("name", ["dmd2", "cache prompts", "export over another"])
def test_a_few_kills(name: str, working: tuple[Any, Path]) -> None:
    assert_good(faults.strike(working[0], SCENARIOS[name], working[1], 4))


def test_a_few_full_disks(working: tuple[Any, Path]) -> None:
    assert_good(faults.strike(working[0], SCENARIOS["dmd2"], working[1], 3, fill=True), killed=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_kill(name: str, working: tuple[Any, Path]) -> None:
    assert_good(faults.strike(working[0], SCENARIOS[name], working[1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_many_full_disks(name: str, working: tuple[Any, Path]) -> None:
    assert_good(faults.strike(working[0], SCENARIOS[name], working[1], 25, fill=True), killed=False)


def resize(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [100, 700, 2000, 3500, 5000])
@pytest.mark.parametrize("name", ["dmd2", "phased_dmd with gan", "cache pairs", "export over another"])
def test_a_real_disk_that_fills_up(name: str, kilobytes: int, working: tuple[Any, Path], tmp_path: Path) -> None:
    """A file system with that much room left beside what was there before; then it is given more."""
    worker, scenario = working[0], SCENARIOS[name]
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    for folder in (disk, whole):
        folder.mkdir()
    scenario.prepare(worker, whole)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        shutil.copytree(whole, disk, symlinks=True, dirs_exist_ok=True)
        used = shutil.disk_usage(disk).used // 1024
        resize(disk, f"{used + kilobytes}k")
        full = worker.run(scenario.command(disk), disk)
        resize(disk, "64m")
        assert full.status in (0, 2) and not full.has_traceback, full.said
        if full.status:
            lines = [line for line in full.said.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and "no space left on device" in lines[0]
        after = worker.run(scenario.way_on(disk), disk)
        assert after.status == 0, after.said
        assert worker.run(scenario.command(whole), whole).status == 0
        assert scenario.outcome(disk) == scenario.outcome(whole)
    finally:
        subprocess.run(["umount", disk], check=True)

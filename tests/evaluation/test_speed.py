from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastgen.evaluation import speed


def test_median_of_repeats_after_one_uncounted_batch(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    now, cost = [0.0], iter([100.0, 1, 1, 1, 2, 2, 2, 50, 1, 1])  # the warm-up, then three repeats of three batches

    def generate(count: int) -> None:
        sizes.append(count)
        now[0] += next(cost)

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    assert speed.seconds_per_1000(generate, 10, 4, 3) == pytest.approx(1000 * 6 / 10)
    assert sizes == [4, *[4, 4, 2] * 3]


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        speed.seconds_per_1000(lambda count: None, 0, 4, 3)


@pytest.mark.skipif(torch.cuda.is_available() or not Path("/proc/self/status").exists(), reason="compares with Linux's own figure")
def test_peak_memory_on_a_cpu_is_the_peak_resident_set():
    status = Path("/proc/self/status").read_text()
    kibibytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert speed.peak_memory_bytes() == pytest.approx(kibibytes * 1024, rel=0.02)

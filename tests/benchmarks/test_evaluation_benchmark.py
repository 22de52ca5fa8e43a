"""The evaluation benchmark measures what it says: the whole line's numbers are right, both sides' agree, and the newest rows make the table."""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import evaluation
from benchmarks.evaluating import beside_torch_fidelity, line
from benchmarks.evaluating.stages import Stages
from benchmarks.evaluating.stand_in import AS_INCEPTION, Size, StandIn, smooth, write_pictures
from benchmarks.measuring.case import Row
from fastgen.evaluation.extractors.inception import network_input
from fastgen.evaluation.frechet import FeatureStatistics, frechet_distance
from fastgen.rng import derive_seed

COUNT, SMALL = 12, Size(width=16, kernel=99, stride=99)
METRICS = {"fid": {}, "fid_infinity": {"points": 2}, "kid": {"subsets": 2, "subset_size": 8}, "inception_score": {}, "sfid": {}}


def test_the_whole_line_measures_what_is_drawn(tmp_path: Path) -> None:
    row = line.measure(COUNT, SMALL, METRICS)
    assert list(row["stages"]) == list(evaluation._STAGES) and min(cost["cpu_seconds"] for cost in row["stages"].values()) > 0
    assert row["peak_bytes"] >= max(cost["peak_bytes"] for cost in row["stages"].values()) > 2e8
    assert row["disk_bytes"] > 2 * COUNT * 4 * (16 + 63) + COUNT * 4 * 1008

    files = sorted(write_pictures(tmp_path / "real", COUNT).iterdir(), key=lambda path: int(path.stem))
    real = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in files])
    drawn = torch.stack([smooth(derive_seed("evaluation", 0, index)) for index in range(COUNT)])
    network = StandIn(SMALL)
    fits = []
    for pixels in (drawn, real):
        x = network.stem(network_input(pixels, "tf1", torch.device("cpu"), torch.float32))
        fits.append(FeatureStatistics.from_features(network.AvgPool(network.Mixed_7c(network.Mixed_6d(x))).flatten(1)))
    (value,) = [value for name, value in row["values"].items() if name.startswith("fd_inception_") and name.count("_") == 2]
    assert value == pytest.approx(frechet_distance(*fits), rel=1e-3)


def test_the_stand_in_has_inceptions_sizes() -> None:
    network, x = StandIn(AS_INCEPTION), torch.zeros(1, 3, 299, 299)
    mixed = network.Mixed_6d(network.stem(x))
    assert mixed.shape[2:] == (17, 17) and network.AvgPool(network.Mixed_7c(mixed)).shape == (1, 2048, 1, 1)
    assert network.fc.weight.shape == (1008, 2048)


@pytest.mark.parametrize("measure", [beside_torch_fidelity.fid_arithmetic, beside_torch_fidelity.neighbours])
def test_both_sides_give_the_same(measure: evaluation.Callable[..., Row]) -> None:
    row = measure(300, 2, 16)
    assert list(row) == ["fastgen", "torch_fidelity", "difference"] and row["difference"] < 1e-5


def test_rows_of_features_have_neighbours_near_and_far(tmp_path: Path) -> None:
    """Else precision and recall would be 0 or 1, which anything gives."""
    tables = [beside_torch_fidelity.Table(beside_torch_fidelity._write_features(tmp_path / f"{seed}.npy", 1500, 64, seed)) for seed in (0, 1)]
    assert 0.05 < beside_torch_fidelity.share_within(tables[0], tables[1], 3) < 0.95


@pytest.mark.slow
def test_the_network_gives_torch_fidelitys_score() -> None:
    row = beside_torch_fidelity.speed(3, rounds=1)
    assert row["difference"] < 1e-6 and row["fastgen"]["cpu_seconds"] > 0.1


def test_the_least_of_several_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    times = iter([3.0, 9.0, 2.0, 8.0, 4.0, 7.0])

    def run(name: str, value: float) -> float:
        calls.append(name)
        return value

    monkeypatch.setattr(beside_torch_fidelity.Stages, "stage", lambda self, name: _Noted(self, name, next(times)))
    row = beside_torch_fidelity._least_of({"fastgen": lambda: run("ours", 3.0), "torch_fidelity": lambda: run("theirs", 2.0)}, 3)
    assert calls == ["ours", "theirs"] * 3 and row["difference"] == 0.5
    assert (row["fastgen"], row["torch_fidelity"]) == ({"cpu_seconds": 2.0, "peak_bytes": 4.0}, {"cpu_seconds": 7.0, "peak_bytes": 9.0})


class _Noted:
    def __init__(self, stages: Stages, name: str, cost: float) -> None:
        stages.costs[name] = {"cpu_seconds": cost, "peak_bytes": cost}

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.skipif(sys.platform != "linux", reason="peaks begin anew on Linux alone")
def test_a_stages_peak_is_its_own() -> None:
    """Pages come from the kernel and go back to it. An array may lie in what malloc keeps of former ones, which is resident all along."""
    stages, size = Stages(), 2**27
    with stages.stage("much"), mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        for start in range(0, size, mmap.PAGESIZE):
            pages[start] = 1
    with stages.stage("little"):
        pass
    much, little = (stages.costs[name]["peak_bytes"] for name in ("much", "little"))
    assert much - little > 0.8 * size and stages.peak_bytes == much


def test_the_newest_rows_make_the_table(tmp_path: Path) -> None:
    both = {
        "fastgen": {"seconds": 20.0, "cpu_seconds": 10.0, "peak_bytes": 1e9},
        "torch_fidelity": {"seconds": 50.0, "cpu_seconds": 20.0, "peak_bytes": 2e9},
    }
    stages = {name: {"seconds": 9.0, "cpu_seconds": 1.5, "peak_bytes": 1.25e9} for name in evaluation._STAGES}
    rows = [
        {"what": "line", "count": 5000, "threads": 1, "peak_bytes": 1.25e9, "stages": stages},
        {"what": "fid", "count": 5000, "threads": 1, **both, "fastgen": {**both["fastgen"], "cpu_seconds": 99.0}},
        {"what": "speed", "count": 64, "threads": 2, **both},
        {"what": "fid", "count": 5000, "threads": 1, **both},
        {"what": "fid", "count": 7, "threads": 1, **both},  # which is no measurement of ours
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluation.markdown(evaluation.newest(path)).splitlines() == [
        "| pictures, generated and real |  | start | reference | pictures | FID | FID∞ | KID | IS | sFID | whole |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| 5,000 | peak, GB |" + " 1.25 |" * 8 + " **1.25** |",
        "|  | seconds |" + " 1.50 |" * 8 + " 12.0 |",
        "",
        "|  | fastgen | torch-fidelity | fastgen's share |",
        "|---|---:|---:|---:|",
        "| pictures a second, Inception, 2 threads, of processor time | 6.40 | 3.20 | 2.00 |",
        "| pictures a second, Inception, 2 threads, wall time | 3.20 | 1.28 | 2.50 |",
        "| its peak memory, GB, 2 threads | 1.00 | 2.00 | 0.50 |",
        "| FID of features, 5,000 and 5,000 pictures: seconds | 10.0 | 20.0 | 0.50 |",
        "| FID of features, 5,000 and 5,000 pictures: peak, GB | 1.00 | 2.00 | 0.50 |",
    ]  # fmt: skip
    assert evaluation.markdown(evaluation.newest(tmp_path / "absent")) == ""


def test_the_page_holds_the_newest_table() -> None:
    """Where it has a place for it."""
    text = evaluation.PAGE.read_text(encoding="utf-8") if evaluation.PAGE.is_file() else ""
    if "<!-- evaluation:begin -->" in text:
        assert evaluation.between(text, "evaluation", evaluation.markdown(evaluation.newest(evaluation.RESULTS))) == text
    evaluation.write(Path("absent"), "table")


def test_a_page_is_changed_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- evaluation:begin -->\nold\n<!-- evaluation:end -->\nb\n")
    evaluation.write(page, "new")
    assert page.read_text() == "a\n<!-- evaluation:begin -->\nnew\n<!-- evaluation:end -->\nb\n"


def test_what_is_chosen_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cost = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 1e9}
    monkeypatch.setattr(evaluation, "apart", lambda one: {"fastgen": cost, "torch_fidelity": cost, "difference": 0.0})
    path = tmp_path / "rows.jsonl"
    evaluation.main(["--only", "neighbours", "fid", "--counts", "5000", "--output", str(path)])
    found = [json.loads(each) for each in path.read_text().splitlines()]
    assert [(row["what"], row["count"], row["threads"]) for row in found] == [("fid", 5000, 1), ("neighbours", 5000, 1)]
    assert all(row["versions"]["torch-fidelity"] and row["date"] and row["difference"] == 0 for row in found)
    assert "| FID of features, 5,000 and 5,000 pictures: seconds | 1.00 | 1.00 | 1.00 |" in capsys.readouterr().out

"""README's GPU tables are what the result lines say, and the page and the lines of the repository agree."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import table
from benchmarks.measuring import rows
from benchmarks.measuring.case import Row


def environment(run: str, gpu: str = "H100", **more: Any) -> Row:
    own = {
        "gpu": gpu,
        "driver": "580",
        "torch": "2.11",
        "triton": "3.6",
        "date": "2026-11-26T10:00:00",
        "copy_gb_per_s": 3000.4,
        "bf16_tflop_per_s": 798.2,
    }
    return {"slice": "environment", "case": "environment", "run": run, "status": "measured", **own, **more}


def line(run: str, case: str, status: str = "measured", **more: Any) -> Row:
    return {"slice": "s", "case": case, "run": run, "status": status, **more}


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    share = table.Column("of the ceiling", lambda row, here: row["tflop_per_s"] / here["bf16_tflop_per_s"], ".0%")
    columns = (table.key("case", "case"), table.key("ms", "median_ms", ".1f"), table.key("GB", "peak_bytes", ".1f", 1e-9), share)
    pivot = table.Pivot(("s",), lambda row: row["case"], (("a", "ours"), ("b", "theirs"), ("c", "none")), table.key("TFLOP/s", "tflop_per_s", ".0f"))
    own = {"flat": table.Table(("s",), columns, lambda row: "contender" not in row), "pivot": pivot}
    monkeypatch.setattr(table, "TABLES", table.TABLES | own)


def test_without_lines() -> None:
    assert table.render("flat", []) == table.render("pivot", [environment("1")]) == "Not yet measured."

    found = [environment("1"), line("1", "*", "left out", reason="needs diffusers"), line("1", "4k", "failed", contender="a", reason="error 0.3")]
    assert table.render("flat", found).splitlines() == ["*H100*: not yet measured.", "", "- left out: needs diffusers", "- a failed: error 0.3"]


def test_a_line_for_each_measured_row_and_the_reasons_of_the_others() -> None:
    found = [
        environment("1"),
        line("1", "old", median_ms=9.0, tflop_per_s=1.0),
        line("1", "big", "left out", reason="needs 80 GiB"),
        line("1", "huge", "left out", reason="needs 80 GiB"),
        environment("2", date="2026-11-27T10:00:00", copy_gb_per_s=2900.0),
        line("2", "old", median_ms=8.25, tflop_per_s=399.1, peak_bytes=2.5e9),
        line("2", "new", median_ms=7.0, tflop_per_s=79.82),
        line("2", "bad", "failed", reason="ValueError: x"),
        line("2", "*", "left out", reason="needs diffusers"),
    ]
    assert table.render("flat", found).splitlines() == [
        "*H100; driver 580, torch 2.11, triton 3.6; ceilings 2900 GB/s of copies and 798 TFLOP/s of bf16 products; 2026-11-27*",
        "",
        "| case | ms | GB | of the ceiling |",
        "| --- | ---: | ---: | ---: |",
        "| old | 8.2 | 2.5 | 50% |",
        "| new | 7.0 | – | 10% |",
        "",
        "- big, huge left out: needs 80 GiB",
        "- bad failed: ValueError: x",
        "- left out: needs diffusers",
    ]


def test_one_table_a_gpu() -> None:
    found = [environment("1"), line("1", "a", median_ms=1, tflop_per_s=1), environment("2", "A100"), line("2", "a", median_ms=2, tflop_per_s=1)]
    said = table.render("flat", found)
    assert said.index("*H100;") < said.index("| a | 1.0 |") < said.index("*A100;") < said.index("| a | 2.0 |")


def test_contenders_side_by_side() -> None:
    found = [
        environment("1"),
        line("1", "4k", contender="a", tflop_per_s=400.4),
        line("1", "4k", contender="b", tflop_per_s=65.0),
        line("1", "8k", contender="a", tflop_per_s=410.0),
        line("1", "8k", "failed", contender="b", reason="error 0.3"),
        line("1", "8k", "left out", contender="c", reason="not installed"),
    ]
    assert table.render("pivot", found).splitlines()[2:] == [
        "| TFLOP/s | ours | theirs | none |",
        "| --- | ---: | ---: | ---: |",
        "| 4k | 400 | 65 | – |",
        "| 8k | 410 | wrong | – |",
        "",
        "- b failed: error 0.3",
        "- c left out: not installed",
    ]


def test_pages_keep_everything_outside_their_markers() -> None:
    page = "before\n<!-- gpu:flat:begin -->\nold\n<!-- gpu:flat:end -->\nbetween\n<!-- gpu:pivot:begin --><!-- gpu:pivot:end -->\nafter"
    once, empty = table.filled(page, []), "begin -->\nNot yet measured.\n<!-- gpu:"
    told = f"before\n<!-- gpu:flat:{empty}flat:end -->\nbetween\n<!-- gpu:pivot:{empty}pivot:end -->\nafter"
    assert (once, table.filled(once, [])) == (told, told)
    for broken in ("<!-- gpu:flat:begin -->", "<!-- gpu:flat:end --><!-- gpu:flat:begin -->", page + page):
        with pytest.raises(SystemExit, match="no pair of markers"):
            table.filled(broken, [])


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.parent.name)
def test_the_pages_hold_what_the_lines_say(page: Any) -> None:
    """`python benchmarks/table.py --write` makes it so."""
    text = page.read_text(encoding="utf-8")
    assert text == table.filled(text, rows.read(table.RESULTS))


def test_every_table_has_its_place() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in table.PAGES)
    assert all(pages.count(f"<!-- gpu:{name}:begin -->") == 1 for name in table.TABLES if name not in ("flat", "pivot"))


def test_every_table_takes_the_rows_that_its_benchmark_gives() -> None:
    """Of the keys that the benchmarks write; their own tests hold them to these."""
    problem = {"name": "x", "heads": 32, "num_queries": 4096, "num_keys": 512, "head_size": 64, "tangents": "q", "causal": False}
    shared = {"median_ms": 2.0, "iqr_ms": 0.1, "tflop_per_s": 399.1, "ratio": 2.5, "peak_bytes": 2e9}
    step = {"network": "digits", "method": "scm", "recipe": "digits_scm", "tuning": "full", "batch_size": 8, "ratio_all": 1.0, "busy_share": 0.75}
    drawing = {
        "network": "n",
        "model": "student",
        "steps": 2,
        "guidance": 1.0,
        "batch": 1,
        "dtype": "bfloat16",
        "compiled": "no, x",
        "images_per_s": 9.0,
    }
    trained = {"recipe": "r", "seconds": 60.0, "samples_per_s": 99.0, "fd_digits": 2.9, "fd_cpu_mean": 2.86, "fd_cpu_std": 0.04}
    trained |= {"training_seconds_cpu_mean": 380.0, "prompt_accuracy": 0.98, "verify_picture_error": 3e-7}
    again = {"recipe": "r", "steps": 10, "algorithms": "default", "unequal_tensors": 3, "tensors": 9, "largest_difference": 2e-5}
    rows_of = {
        "attention": [shared | {"contender": name, "problem": problem} for name in ("fastgen_jvp", "flash_forward", "flash_backward")],
        "train_step": [shared | step],
        "real_sizes": [shared | step | {"network": "flux_blocks", "busy_share": None}],
        "sampling": [shared | drawing | {"speedup": 3.0}, shared | drawing | {"stock_median_ms": 4.0, "difference": 1e-7}],
        "training": [trained, again],
        "tests": [{"passed": 300, "failed": 0, "seconds": 90.0}],
    }
    found = [environment("1"), *({**row, **line("1", "case"), "slice": name} for name, own in rows_of.items() for row in own)]
    lines = {name: table.render(name, found).splitlines()[-1] for name in table.TABLES if name not in ("flat", "pivot")}
    assert lines == {
        "attention": "| 4096 × 512, d 64 | – | – | – | – | 2.50 | – | – | – |",
        "attention_speed": "| 4096 × 512, d 64 | 399 | – | – | – | – | 399 | – | – | – |",
        "attention_backward": "| 4096 × 512, d 64 | 399 | – | – | – | – |",
        "attention_memory": "| 4096 × 512, d 64 | 2000 | – | – | – | – | 2000 | – | – | – |",
        "train_step": "| digits_scm | full | 8 | 2 | 0 | 2.50 | 1.00 | 50% | 25% | 2.0 |",
        "real_sizes": "| flux_blocks, scm | full | 8 | 2 | 0 | 2.50 | 1.00 | 50% | – | 2.0 |",
        "sampling": "| n, student | 2 | 1 | 1 | bfloat16 | no | 2.0 | 0.1 | 9.0 | 3.0 | 2.0 |",
        "sampling_stock": "| n, student | 2 | 2.0 | 4.0 | 2.50 | 1e-07 |",
        "training": "| r | 60 | 380 | 99 | 2.90 | 2.86 ± 0.04 | 0.980 | 3e-07 |",
        "same_again": "| r | 10 | default | 3 | 9 | 2e-05 |",
        "tests": "| case | 300 | 0 | 90 |",
    }

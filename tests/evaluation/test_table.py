from __future__ import annotations

from fastgen.evaluation.results import Row
from fastgen.evaluation.table import markdown_table, summary_table


def row(name: str, value: float, model: str = "student", **more: object) -> Row:
    return {"name": name, "model": model, "value": value, "n": 1797, **more}  # pyright: ignore[reportReturnType]


ROWS = [
    row("fd_digits", 7.256, steps=1, guidance=1.0),
    row("prompt_accuracy", 0.98438, steps=1, guidance=1.0),
    row("seconds_per_1000_images", 0.25, steps=1, guidance=1.0),
    row("fd_digits", 5.3, "teacher", steps=25, guidance=1.5),
    row("peak_memory_bytes", 1e9, "teacher", steps=25, guidance=1.5),
    row("fd_digits", 0.21, "real", std=0.034, std_over="bootstrap", floor="bootstrap"),
    row("fd_digits", 0.82, "real", std=0.22, std_over="seeds", floor="half"),
    row("diversity", 11.5, "real"),
    row("vendi", 6.161, "real", std=0.023, std_over="seeds"),
    row("mode_entropy", 9.123, steps=1, guidance=1.0),
]


def test_summary_is_aligned_and_merges_real_rows():
    assert summary_table(ROWS).splitlines() == [
        "model       steps  prompt accuracy  FD-digits  diversity  Vendi  modes  s/1000 images  images/s",
        "student         1            0.984       7.26          –      –   9.12           0.25      4000",
        "teacher        25                –       5.30          –      –      –              –         –",
        "real            –                –       0.21      11.50   6.16      –              –         –",
        "real, half      –                –       0.82          –      –      –              –         –",
    ]


def test_markdown_shows_standard_deviations():
    rows = [*ROWS, row("seconds_per_1000_images", 2.0, "real", std=0.1)]
    lines = markdown_table(rows).splitlines()
    assert lines[:2] == [
        "| model | steps | prompt accuracy | FD-digits | diversity | Vendi | modes | s/1000 images | images/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    assert lines[4] == "| real | – | – | 0.21 ± 0.03 | 11.50 | 6.16 ± 0.02 | – | 2.00 ± 0.10 | 500 ± 25 |"
    assert lines[5] == "| real, half | – | – | 0.82 ± 0.22 | – | – | – | – | – |"


def test_guidance_is_named_where_a_model_has_several():
    rows = [row("fd_digits", 5.0, "teacher", steps=4, guidance=w) for w in (1.0, 1.5)] + ROWS[:1]
    assert [line.split("  ")[0] for line in summary_table(rows).splitlines()[1:]] == ["teacher, w 1", "teacher, w 1.5", "student"]


def wide(model: str, steps: int, value: float, n: int) -> list[Row]:
    more = {"steps": steps, "guidance": 1.0}
    return [
        row("zz_made_up", 12345.678, model, **more, n=n),
        row("fd_digits", value, model, **more, n=n, std=0.5, std_over="bootstrap"),
        row("prompt_accuracy", 0.98438, model, **more, n=50, std=0.12, std_over="images", interval=[0.95, 1.0], interval_over="images"),
        row("seconds_per_1000_images", 400.0, model, **more, n=n, interval=[250.0, 500.0], interval_over="bootstrap"),
        row("peak_memory_bytes", 3 * 2**30, model, **more, n=n),
    ]


def test_rows_with_intervals_have_a_line_for_each_metric() -> None:
    rows = [*wide("student", 1, 7.256, 30000), *wide("teacher", 25, 1005.3, 5000)[:-1]]
    assert summary_table(rows).splitlines() == [
        "metric              student, 1 step           teacher, 25 steps                 images",
        "prompt accuracy ↑       0.984 [0.950, 1.000]      0.984 [0.950, 1.000]              50",
        "FD-digits ↓              7.26 ± 0.50           1,005.30 ± 0.50          30,000 / 5,000",
        "images/s ↑               2.50 [2.00, 4.00]         2.50 [2.00, 4.00]",
        "peak memory, MiB ↓      3,072                         –",
        "zz made up          1.235e+04                 1.235e+04                 30,000 / 5,000",
    ]


def test_intervals_are_printed_in_place_of_standard_deviations() -> None:
    line = markdown_table(wide("student", 1, 7.256, 30000)).splitlines()[2]
    assert line == "| student | 1 | 0.984 [0.950, 1.000] | 7.26 ± 0.50 | 400.00 | 2.50 [2.00, 4.00] | 1.235e+04 |"


def test_too_many_metrics_have_a_line_each_and_models_in_blocks_that_fit() -> None:
    names = [f"measure_number_{i}" for i in range(10)]
    rows = [row(name, 1.0, "student", steps=steps) for steps in range(1, 9) for name in names]
    lines = summary_table(rows).splitlines()
    assert max(map(len, lines)) <= 100 and lines.count("") == 1
    assert [line.split()[0] for line in lines if line] == ["metric", *("measure" for _ in names)] * 2
    assert all(f"student, {steps} step" in lines[0] + lines[12] for steps in range(1, 9))
    assert summary_table(rows[:2]).splitlines()[0] == "model    steps  measure number 0  measure number 1"

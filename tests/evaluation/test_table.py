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

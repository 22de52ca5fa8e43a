"""A report's plots go through the measurements, and runs are compared point by point only where they measure the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from html_pages import Tags

from fastgen.curves import COLOURS, panels
from fastgen.errors import UserError
from fastgen.report import write_comparison, write_report
from fastgen.report_quality import against_steps, diversity_beside_quality, point_by_point

RECIPE = (
    "teacher: {pretrained: 'fastgen:digits'}\nstudent: {steps: 2}\ndistiller: {name: dmd2}\ndata: {prompts: 'fastgen:digits'}\ntrain: {steps: 1}\n"
)


def rows(fd: dict[int, float], model: str = "student", **more: Any) -> list[dict[str, Any]]:
    told = {"model": model, "n": 100, **more}
    return [{"name": "fd_digits", "steps": steps, "value": value, **told} for steps, value in fd.items()] + [
        {"name": "diversity", "steps": steps, "value": 12 - value / 10, **told} for steps, value in fd.items()
    ]


REAL = [
    {"name": "fd_digits", "model": "real", "floor": "bootstrap", "value": 0.2, "n": 100},
    {"name": "fd_digits", "model": "real", "floor": "half", "value": 0.9, "n": 50},
    {"name": "diversity", "model": "real", "value": 13.0, "n": 100},
]


def markers(svg: str) -> list[list[tuple[float, float]]]:
    """Where the points of each line stand, in order."""
    groups = re.findall(r"<g[^>]*>\s*<defs>\s*<path[^>]*/>\s*</defs>\s*<g[^>]*>((?:\s*<use[^>]*/>)+)\s*</g>", svg)
    found = [[(float(x), float(y)) for x, y in re.findall(r'<use[^>]*? x="([\d.]+)" y="([\d.]+)"', group)] for group in groups]
    return [points for points in found if len({x for x, _ in points}) > 1 and len({y for _, y in points}) > 1]


def test_quality_stands_against_steps_on_one_scale_for_student_and_teacher() -> None:
    (svg,) = against_steps({"": [*rows({1: 8.0, 2: 6.0, 4: 4.0}), *rows({4: 5.0, 8: 2.0}, "teacher"), *REAL]})
    assert 'aria-label="FD-digits against steps"' in svg and ">student<" in svg and ">teacher<" in svg and ">real<" in svg
    student, teacher = (points for points in markers(svg) if len(points) in (2, 3))
    (x1, y1), (x2, y2), (x4, y4) = student
    assert x4 - x2 == pytest.approx(x2 - x1, rel=1e-4) and y4 - y2 == pytest.approx(y2 - y1, rel=1e-4)  # steps double, the distance falls by 2
    assert teacher[0][0] == pytest.approx(x4, rel=1e-4) and teacher[1][0] - x4 == pytest.approx(x2 - x1, rel=1e-4)
    assert teacher[0][1] == pytest.approx((y2 + y4) / 2, rel=1e-4)


def test_diversity_stands_beside_the_first_distance_with_steps_at_its_points() -> None:
    (svg,) = diversity_beside_quality({"": [*rows({1: 8.0, 2: 6.0}), *rows({25: 5.0}, "teacher"), *REAL]})
    assert 'aria-label="diversity beside FD-digits"' in svg and ">FD-digits ↓<" in svg
    assert {">1<", ">2<", ">25<", ">real<"} <= set(re.findall(">[^<>]+<", svg))


def test_a_run_has_one_colour_on_the_whole_page() -> None:
    """Also where another run has no results, or logs no such scalar; the teacher has a further one."""
    runs = {"first": [], "second": rows({1: 8.0, 2: 6.0}), "third": [*rows({1: 7.0}), *rows({25: 5.0}, "teacher")]}
    (training, _), (steps,), (diversity,) = (
        panels({"loss/x": {"second": ([1, 2], [1.0, 2.0])}}, list(runs))[0],
        against_steps(runs),
        diversity_beside_quality(runs),
    )
    assert [colour in training for colour in COLOURS[:3]] == [False, True, False]
    for plot in (steps, diversity):
        assert [colour in plot for colour in COLOURS[:5]] == [False, True, True, True, False]


def test_nothing_is_plotted_of_single_points_costs_and_what_has_no_better() -> None:
    alone = [{"name": name, "model": "student", "steps": 1, "value": 1.0, "n": 1} for name in ("fd_digits", "seconds_per_1000_images")]
    strange = [{"name": "strange", "model": "student", "steps": steps, "value": 1.0, "n": 1} for steps in (1, 2)]
    assert against_steps({"": [*alone, *strange]}) == [] and diversity_beside_quality({"": [*alone, *strange]}) == []
    assert against_steps({"": []}) == [] and point_by_point({"": [], "b": alone}) is None


def test_intervals_are_drawn_in_the_unit_of_the_heading() -> None:
    plain, barred = (
        against_steps({"": [{"name": "fd_digits", "model": "student", "n": 9, "steps": steps, "value": 4.0 + steps, **more} for steps in (1, 2)]})[0]
        for more in ({}, {"interval": [2.0, 9.0]})
    )
    ticks = [[float(text) for text in re.findall(r">(\d+(?:\.\d+)?)</text>", svg)] for svg in (plain, barred)]
    assert max(ticks[0]) < 7 and max(ticks[1]) >= 8 and min(ticks[1]) in (1.0, 2.0)


def test_seeds_of_one_training_are_left_to_their_mean() -> None:
    mean, seeds = rows({1: 8.0, 2: 6.0}), [row | {"seed": 0, "value": 99.0} for row in rows({1: 8.0, 4: 6.0})]
    assert against_steps({"": [*seeds, *mean]}) == against_steps({"": mean})


def write_run(folder: Path, measured: list[dict[str, Any]], teacher: str | None = None, **provenance: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss/a": 1.0}\n')
    results = {"protocol": "digits", "metrics": measured, "provenance": {"protocol_hash": "a" * 64} | provenance}
    (folder / "results.json").write_text(json.dumps(results))
    if teacher is not None:
        manifest = {"weights": "full", "steps": 2, "grid": [1.0], "prompts": ["x"], "method": "dmd2"}
        manifest["teacher"] = {"pretrained": "t", "guidance": 1.0, "negative_prompt": "", "sha256": teacher}
        call = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 8}
        (folder / "student").mkdir()
        (folder / "student/fastgen.json").write_text(json.dumps(manifest | {"call": call}))
    return folder


def test_runs_are_set_beside_each_other_at_the_same_steps(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", rows({1: 8.0, 2: 6.0})), write_run(tmp_path / "b", [*rows({2: 5.0, 4: 4.0}), *rows({25: 2.0}, "teacher")])]
    write_comparison(runs, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    table = html[html.index("Point by point") :].split("</table>")[0]
    lines = [re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", line) for line in table.split("<tr")[1:]]
    assert lines[:4] == [["metric", "steps", "a", "b"], ["FD-digits ↓", "1", "8.00", "–"], ["", "2", "6.00", "5.00"], ["", "4", "–", "4.00"]]
    assert len(lines) == 7
    (plot, _) = against_steps({"a": rows({1: 8.0, 2: 6.0}), "b": [*rows({2: 5.0, 4: 4.0}), *rows({25: 2.0}, "teacher")]})[0], html
    assert all(f">{label}<" in plot for label in ("a", "b", "teacher")) and "FD-digits against steps" in html


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"protocol_hash": "b" * 64}, {}, "protocol hash: bbbbbbbb / aaaaaaaa"),
        ({"classifier_hash": "c" * 64}, {"classifier_hash": "d" * 64}, "classifier: cccccccc / dddddddd"),
        ({"extractors": {"x": "c" * 64}}, {"extractors": {"x": "d" * 64}}, "extractor x: cccccccc / dddddddd"),
        ({"reference": {"sha256": "c" * 64}}, {"reference": {"sha256": "d" * 64}}, "reference: cccccccc / dddddddd"),
        ({"teacher": "e" * 64}, {"teacher": "f" * 64}, "teacher: eeeeeeee / ffffffff"),
        ({"models": {"teacher": {"sha256": "e" * 64}}}, {"models": {"teacher": {"sha256": "f" * 64}}}, "teacher: eeeeeeee / ffffffff"),
    ],
)
def test_what_does_not_measure_the_same_is_refused_with_both_values(tmp_path: Path, one: dict[str, Any], other: dict[str, Any], message: str) -> None:
    runs = [write_run(tmp_path / name, rows({1: 8.0}), **told) for name, told in (("a", one), ("b", other))]
    with pytest.raises(UserError, match=f"^runs 'a' and 'b' do not measure the same: {message}; report each of them alone$"):
        write_comparison(runs, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    for run in runs:
        write_report(run)


def test_the_same_teacher_by_hash_and_runs_without_results_are_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, rows({1: 8.0}), teacher="e" * 64) for name in "ab"]
    (write_run(tmp_path / "c", [], teacher="f" * 64) / "results.json").unlink()
    write_comparison([*runs, tmp_path / "c"], tmp_path / "page.html")
    tags = Tags((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert tags.open == [] and all(address.startswith(("data:", "#")) for address in tags.addresses())

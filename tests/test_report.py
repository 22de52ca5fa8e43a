"""Reports show a run's numbers, pictures and settings, fetch nothing, and say what an unfinished run lacks."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from fastgen.errors import UserError
from fastgen.report import ABSENT, read_run, write_comparison, write_report

RECIPE = """teacher: {pretrained: "fastgen:digits", guidance: 1.5}
student: {init: teacher, steps: 1}
distiller: {name: dmd2, critic_updates: 1}
data: {prompts: "fastgen:digits"}
optimizer: {student: {name: adamw, lr: LR}}
train: {steps: 40, batch_size: 128}
evaluate: {protocol: digits}
export: {dtype: fp32}
"""
MARKUP = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Tables as lists of rows of cell texts, attributes that could fetch something, and all text outside styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["style"]:
            return
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data


def _write_run(folder: Path, *, lr: str = "5.0e-4", fd: float = 7.1234, steps: int = 40, complete: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE.replace("LR", lr))
    rows = [
        {
            "step": i,
            "seconds": 0.5 * i,
            "loss/match": 1 / i,
            "loss/critic": 0.5,
            "grad_norm/student": 2.0,
            "lr/student": 1e-3,
            "custom/kept": (7 * i) % 11,
        }
        for i in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if complete:
        for step in (20, 40):
            (folder / "samples").mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / f"samples/step_{step:06d}.png")
        (folder / "results.json").write_text(json.dumps(_results(fd)))
        (folder / "student").mkdir()
        call = {"num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 12}
        (folder / "student/fastgen.json").write_text(
            json.dumps({"method": "dmd2", "steps": 1, "grid": [1.0], "call": call, "weights": "full", "prompts": ["a handwritten seven"]})
        )
    return folder


def _results(fd: float) -> dict[str, Any]:
    student, teacher = {"model": "student", "steps": 1, "guidance": 1.0}, {"model": "teacher", "steps": 25, "guidance": 1.5}
    metrics = [
        {"name": "fd_digits", "value": fd, "n": 3594, "std": 0.211, "std_over": "bootstrap", **student},
        {"name": "prompt_accuracy", "value": 0.98125, "n": 2000, **student},
        {"name": "seconds_per_1000_images", "value": 2.0, "n": 5594, **student},
        {"name": "peak_memory_bytes", "value": 3 * 2**20, "n": 5594, **student},
        {"name": MARKUP, "value": 0.0123456, "n": 1, **student},
        {"name": "fd_digits", "value": 2.344, "n": 3594, **teacher},
        {"name": "fd_digits", "model": "real", "floor": "bootstrap", "value": 0.21, "std": 0.065, "n": 1797},
        {"name": "fd_digits", "model": "real", "floor": "half", "value": 0.82, "n": 898},
        {"name": "prompt_accuracy", "model": "real", "value": 0.9961, "n": 1797},
    ]
    return {"protocol": "digits", "metrics": metrics, "provenance": {"date": "2026-10-05T14:03:22+00:00", "versions": {"torch": "2.15.0"}}}


def test_results_stand_in_their_tables_with_floors_apart(tmp_path: Path) -> None:
    page = Page(write_report(_write_run(tmp_path / "run")))
    results, floors = page.tables
    assert results == [
        ["model", "steps", "guidance", "FD-digits ↓", "prompt accuracy ↑", "images/s ↑", "peak memory, MiB ↓", MARKUP],
        ["student", "1", "1", "7.12 ± 0.21", "0.981", "500", "3", "0.01235"],
        ["teacher", "25", "1.5", "2.34", ABSENT, ABSENT, ABSENT, ABSENT],
    ]
    assert floors == [["model", "FD-digits ↓", "prompt accuracy ↑"], ["real", "0.21 ± 0.07", "0.996"], ["real, half", "0.82", ABSENT]]


def test_what_was_not_measured_and_a_quick_look_are_said_on_top(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    more = {"missing": [{"name": "fid", "model": "student", "reason": "needs weights"}, {"name": "kid", "model": "", "reason": "needs <b>"}]}
    results: dict[str, Any] = _results(7.1) | more | {"partial": {"stop_after": 2000}}
    results["metrics"][0]["remark"] = "of few pictures"
    (run / "results.json").write_text(json.dumps(results))
    html = write_report(run).read_text(encoding="utf-8")
    notes = ["a quick look: only the first 2,000 pictures of each set.", "fd_digits of the student, 1 step: of few pictures."]
    assert re.findall(r"<li>(.*?)</li>", html)[:4] == [
        *notes,
        "not measured: fid of the student: needs weights.",
        "not measured: kid: needs &lt;b&gt;.",
    ]


def test_page_is_self_contained_and_escapes_what_it_shows(tmp_path: Path) -> None:
    path = write_report(_write_run(tmp_path / "run"))
    page = Page(path)
    html = path.read_text(encoding="utf-8")
    assert path == tmp_path / "run" / "report.html"
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert "http" not in html and "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "script" not in page.tags and "link" not in page.tags
    assert sorted(item.name for item in path.parent.iterdir()) == [
        "metrics.jsonl",
        "recipe.yaml",
        "report.html",
        "results.json",
        "samples",
        "student",
    ]


def test_pictures_are_the_files_latest_first(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    page = Page(write_report(run))
    pictures = [base64.b64decode(reference.split(",", 1)[1]) for reference in page.references if reference.startswith("data:image/png")]
    assert pictures == [(run / f"samples/step_{step:06d}.png").read_bytes() for step in (40, 20)]
    assert "Earlier samples (1)" in page.text


def test_pictures_of_other_sizes_follow_the_latest(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    for place, name in enumerate(("step_000040_8x16", "step_000040_16x8", "step_000020_16x8", "step_000040_b")):
        Image.new("RGB", (8, 8), (0, place, 99)).save(run / f"samples/{name}.png")
    page = Page(write_report(run))
    pictures = [base64.b64decode(reference.split(",", 1)[1]) for reference in page.references if reference.startswith("data:image/png")]
    names = ("step_000040", "step_000040_16x8", "step_000040_8x16", "step_000020")
    assert pictures == [(run / f"samples/{name}.png").read_bytes() for name in names]
    assert "step 40, 16x8 (height x width)" in page.text and "Earlier samples (1)" in page.text


def test_wide_pictures_are_reduced_and_many_are_thinned(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    for step in range(100, 140):
        Image.new("RGB", (3000, 10)).save(run / f"samples/step_{step:06d}.png")
    page = Page(write_report(run))
    assert len([reference for reference in page.references if reference.startswith("data:image/jpeg")]) == 12
    assert [step for step in re.findall(r"step (\d+)", page.text) if int(step) > 1][:2] == ["139", "138"]
    assert "Earlier samples (12)" in page.text and "step 20" in page.text


def test_title_usage_recipe_and_provenance(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    text = Page(write_report(run)).text
    assert "dmd2 · fastgen:digits · 1 step\n" in text and "2026-10-05 14:03 UTC" in text
    assert (
        "image = pipe(\n    prompt='a handwritten seven',\n    num_inference_steps=1,\n    guidance_scale=1.0,\n    max_sequence_length=12,\n" in text
    )
    assert 'DiffusionPipeline.from_pretrained("run/student")' in text and "fastgen sample run/student" in text and str(tmp_path) not in text
    assert (run / "recipe.yaml").read_text().strip() in text
    assert "versions.torch" in text and "2.15.0" in text
    assert "Interrupted" not in text and "No student" not in text


def test_curves_have_a_panel_for_each_group_and_go_through_the_logged_values(tmp_path: Path) -> None:
    html = write_report(_write_run(tmp_path / "run")).read_text(encoding="utf-8")
    plots, curves = html.split("<h2>Training")
    assert re.findall(r'aria-label="([^"]*)"', plots) == ["FD-digits against steps"]
    assert re.findall(r'aria-label="([^"]*)"', curves) == ["loss", "grad_norm", "lr", "custom"]
    custom = html[html.index('aria-label="custom"') :]
    raw = next(path for path in re.findall(r'<path d="([^"]*)"[^>]*stroke-opacity: 0.3', custom))
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", raw)]
    assert len(points) == 40
    (x1, y1), (x2, y2) = points[:2]  # values 7 and 3
    for step, (x, y) in enumerate(points, 1):
        assert math.isclose(x, x1 + (step - 1) * (x2 - x1), abs_tol=0.01)
        assert math.isclose(y, y1 + ((7 * step) % 11 - 7) * (y2 - y1) / (3 - 7), abs_tol=0.01)
    assert x2 > x1 and y2 > y1


def test_groups_of_distribution_matching_have_panels_that_say_how_to_read_them(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    names = ["match/gradient", "match/gan", "match/gap", "match/sample_std", "match/sample_mean", "critic/loss_t3", "critic/loss_t0"]
    names += ["discriminate/real", "discriminate/fake", "drift/mean", "drift/std", "drift/saturation", "drift/spread", "lr/student", "loss/match"]
    rows = [{"step": i, "samples_per_second": 9.0, "custom/kept": 1.0, **dict.fromkeys(names, 0.5)} for i in range(1, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = write_report(run).read_text(encoding="utf-8").split("<h2>Training")[1]
    figures = re.findall(r'<figure><svg role="img" aria-label="(\w+)".*?</figure>', html, re.DOTALL)
    assert figures == ["loss", "drift", "drift_ratio", "match", "sample", "critic", "discriminate", "lr", "custom", "samples_per_second"]
    texts = {name: re.findall(r"<text[^>]*>([^<]*)</text>", html[html.index(f'aria-label="{name}"') :].split("</svg>")[0]) for name in figures}
    shown = {name: [text for text in texts[name] if re.search("[a-z]", text) and text != "step"] for name in figures}
    assert shown["drift"] == ["drift from the teacher: differences", "mean", "saturation"]
    assert shown["drift_ratio"] == ["drift from the teacher: ratios", "std", "spread"]
    assert shown["match"] == ["distribution matching", "gradient", "gap"]
    assert shown["critic"] == ["critic loss by noise level", "nearest data", "nearest noise"]
    assert shown["sample"] == ["the student's samples while training", "mean", "std"]
    assert shown["loss"] == ["losses", "match", "gan"]
    captions = dict(re.findall(r'aria-label="(\w+)"(?:(?!</figure>).)*</svg>\s*<figcaption>(.*?)</figcaption>', html, re.DOTALL))
    assert captions.keys() == {"drift", "drift_ratio", "match", "sample", "critic", "discriminate"}
    assert "0 is perfect" in captions["drift"] and "1 is perfect" in captions["drift_ratio"]


def test_warnings_stand_at_the_top(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", complete=False, steps=9)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[6] = json.dumps(json.loads(lines[6]) | {"warnings": ["critic lag: <b>1</b>; raise it", "mode loss: so near"]})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    notes = ["Warning at step 7: critic lag: &lt;b&gt;1&lt;/b&gt;; raise it", "Warning at step 7: mode loss: so near"]
    html = write_report(run).read_text(encoding="utf-8")
    listed = re.findall(r"<li>(.*?)</li>", html)
    assert listed[:2] == notes and "reached step 9 of 40" in listed[2]
    assert html.index(notes[0]) < html.index("<h2>Results")
    write_comparison([run, _write_run(tmp_path / "other")], tmp_path / "both.html")
    assert [f"run: {note}" for note in notes] == re.findall(r"<li>(.*?)</li>", (tmp_path / "both.html").read_text(encoding="utf-8"))[:2]


def test_an_interrupted_run_is_reported_as_such(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", steps=7, complete=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss/ma')
    page = Page(write_report(run, tmp_path / "elsewhere" / "page.html"))
    assert "Interrupted or still running: training has reached step 7 of 40." in page.text
    assert "No student has been exported." in page.text and "has not been evaluated" in page.text
    assert "There are no samples yet." in page.text and "from_pretrained" not in page.text
    assert page.tables == [] and "svg" in page.tags


def test_a_run_that_has_logged_nothing(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", steps=0, complete=False)
    assert "No step was logged." in Page(write_report(run)).text


def test_values_that_are_not_finite_or_not_numbers_do_not_break_the_curves(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    lines = [json.dumps({"step": i, "loss/match": float("nan") if i % 3 else 1e-3 * 2.0**i, "note": "x", "ok": True}) for i in range(1, 40)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 40, "loss/match": Infinity}']))
    assert re.findall(r'aria-label="([^"]*)"', write_report(run).read_text(encoding="utf-8").split("<h2>Training")[1]) == ["loss"]


def test_of_a_step_logged_twice_the_later_counts(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", steps=3)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss/match": 9.0}\n{"step": 4, "loss/match": 8.0}\n')
    assert [(row["step"], row["loss/match"]) for row in read_run(run).steps] == [(1, 1.0), (2, 0.5), (3, 9.0), (4, 8.0)]


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    run = _write_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(UserError, match=f"run is not a run folder with something to report: it has no {name}"):
        write_report(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", "a: [", "recipe.yaml' is not valid YAML"),
        ("recipe.yaml", "a: &a [*a]", "recipe.yaml' is not valid YAML"),
        ("recipe.yaml", "just text", "not a recipe"),
        ("metrics.jsonl", '{"step": 1}\nbroken\n{"step": 2}\n', "line 2 of .*metrics.jsonl"),
        ("results.json", "{", "cannot read .*results.json"),
        ("results.json", "{}", "results.json.*key protocol: missing"),
        ("student/fastgen.json", "[]", "JSON object"),
        ("samples/step_000040.png", "not a picture", "is not an image"),
    ],
)
def test_unreadable_files_are_named_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    run = _write_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_comparison_has_one_table_the_differences_and_a_line_for_each_run(tmp_path: Path) -> None:
    runs = [
        _write_run(tmp_path / "a"),
        _write_run(tmp_path / "b", lr="1.0e-3", fd=5.678),
        _write_run(tmp_path / "c", steps=9, complete=False),
    ]
    path = tmp_path / "comparison.html"
    write_comparison(runs, path)
    page, html = Page(path), path.read_text(encoding="utf-8")
    results, points, floors, differences = page.tables
    assert points[:2] == [["metric", "steps", "a", "b", "c"], ["FD-digits ↓", "1", "7.12 ± 0.21", "5.68 ± 0.21", ABSENT]]
    assert [line[:5] for line in results[1:]] == [
        ["a", "student", "1", "1", "7.12 ± 0.21"],
        ["a", "teacher", "25", "1.5", "2.34"],
        ["b", "student", "1", "1", "5.68 ± 0.21"],
        ["b", "teacher", "25", "1.5", "2.34"],
    ]
    assert [line[:2] for line in floors[1:]] == [["a", "real"], ["a", "real, half"], ["b", "real"], ["b", "real, half"]]
    assert differences == [["recipe key", "a", "b", "c"], ["optimizer.student.lr", "0.0005", "0.001", "0.0005"]]
    assert re.findall(r'aria-label="([^"]*)"', html.split("<h2>Training")[1]) == [
        "loss/match",
        "loss/critic",
        "grad_norm/student",
        "lr/student",
        "custom/kept",
    ]
    assert "c: Interrupted or still running: training has reached step 9 of 40." in page.text
    assert len([reference for reference in page.references if reference.startswith("data:image")]) == 2 and "http" not in html


def test_comparison_tells_runs_of_the_same_name_apart(tmp_path: Path) -> None:
    runs = [_write_run(tmp_path / "first" / "run"), _write_run(tmp_path / "second" / "run")]
    write_comparison(runs, tmp_path / "page.html")
    assert [line[0] for line in Page(tmp_path / "page.html").tables[0][1:]] == ["first/run", "first/run", "second/run", "second/run"]
    with pytest.raises(UserError, match="given twice"):
        write_comparison([runs[0], runs[0]], tmp_path / "page.html")
    with pytest.raises(UserError, match="at least one run folder"):
        write_comparison([], tmp_path / "page.html")


HOSTILE = '_run [bold]$\\frac{x <blink> \x1b[31m \u202e 猫 --> id="x_1"'


def test_names_are_shown_as_they_are_whatever_they_look_like(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Folder, prompt, teacher and scalars; no mathematics, no tags, no legend without its line, no warning of a font."""
    runs = [_write_run(tmp_path / name) for name in (HOSTILE, "b")]
    manifest = json.loads((runs[0] / "student/fastgen.json").read_text())
    (runs[0] / "student/fastgen.json").write_text(json.dumps(manifest | {"prompts": [HOSTILE]}))
    (runs[0] / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(RECIPE.replace("LR", "1")) | {"teacher": {"pretrained": f"/a/{HOSTILE}"}}))
    rows = [json.loads(line) | {f"new/{HOSTILE}": 1.0} for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    for path in (write_report(runs[0]), write_comparison(runs, tmp_path / "both.html")):
        page = Page(path)
        assert shown in page.text
        assert "blink" not in page.tags and "\x1b" not in path.read_text(encoding="utf-8")
    overlaid = re.findall("<svg.*?</svg>", (tmp_path / "both.html").read_text(encoding="utf-8"), re.DOTALL)
    assert len(overlaid) == 8
    assert all("_run [bold]$\\frac{x &lt;blink&gt; \\x1b" in panel for panel in overlaid)  # its lines stand in the legends
    assert [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)] == []

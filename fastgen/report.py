"""One self-contained HTML page for a run, or for several side by side: results, curves, samples, use of the student, provenance."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from fastgen import card, curves, records, report_nearest, report_quality, report_table
from fastgen.errors import UserError
from fastgen.evaluation.headings import ABSENT, COSTS, RATE, heading, ordered
from fastgen.evaluation.likeness import joined, unlike
from fastgen.evaluation.results import read_results, remarks
from fastgen.files import reading, write_atomically
from fastgen.manifest import Exported, upgraded
from fastgen.pages import image_uri, rendered, short_names
from fastgen.portable import portable, portable_text
from fastgen.report_table import Row, formatted
from fastgen.runlog import read_rows
from fastgen.yaml_files import read_text, read_yaml

NUM_EARLIER = 12  # sample grids besides the latest one

_WIDEST_LATEST, _WIDEST_EARLIER = 2400, 1600  # pixels; wider sample grids are reduced, or reports would take hundreds of megabytes


@dataclass(frozen=True)
class Run:
    """What a run folder holds, with names in place of paths but in `data`, the recipe's block; `results` and `student` (its fastgen.json) are
    None and `samples` is empty where there is none yet. warnings: what was said before training."""

    folder: Path
    data: dict[str, Any]
    recipe_text: str
    recipe: dict[str, Any]
    steps: list[dict[str, Any]]
    samples: list[tuple[int, Path]]
    results: dict[str, Any] | None
    student: dict[str, Any] | None
    warnings: list[str]

    def value(self, *keys: str) -> Any:
        """recipe[keys[0]][keys[1]]…, or None."""
        node: Any = self.recipe
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    @property
    def title(self) -> str:
        steps = (self.student or {}).get("steps") or self.value("student", "steps")
        method = (self.student or {}).get("method") or self.value("distiller", "name") or "unknown method"
        return f"{method} · {self.value('teacher', 'pretrained') or 'unknown teacher'}" + (f" · {_count(steps, 'step')}" if steps else "")

    @property
    def date(self) -> str:
        """When it was evaluated, or trained."""
        given = ((self.results or {}).get("provenance") or {}).get("date")
        moment = given or datetime.fromtimestamp((self.folder / "metrics.jsonl").stat().st_mtime, UTC).isoformat()
        return f"{str(moment)[:16].replace('T', ' ')} UTC"


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write a run's report to `output` (default: report.html in its folder) and return where it is.

    Samples, results and student may be missing; the page then says so. Raises UserError for a folder without recipe.yaml or metrics.jsonl
    and for a file that cannot be read.
    """
    run = read_run(run_dir)
    output = Path(run_dir) / "report.html" if output is None else Path(output)
    columns = ordered(row["name"] for row in _measured([run]))
    page = {
        "title": run.title,
        "subtitle": f"{run.folder.name} · {run.date}",
        "notes": _notes(run),
        "tiles": _tiles(run),
        "results": report_table.table({"": _rows(run, floors=False)}, columns),
        "floors": report_table.table({"": _rows(run, floors=True)}, columns),
        "counts": _image_counts([run]),
        "points": None,
        **_plots({"": _measured([run])}),
        "nearest": report_nearest.nearest_training(run.data, run.samples[-1][1] if run.samples else None),
        "differences": None,
        "curves": curves.panels(curves.by_group(run.steps)),
        "samples": _sample_pictures(run),
        "usage": _usage(run),
        "recipes": [("recipe.yaml", run.recipe_text)],
        "provenance": [("", _flat((run.results or {}).get("provenance") or {}))],
        "student": json.dumps(run.student, indent=2, ensure_ascii=False) if run.student else "",
    }
    return _write(output, page)


def write_comparison(run_dirs: Sequence[Path], output: Path) -> Path:
    """Write one page for several runs to `output`: one table, the same point by point, the recipe keys in which they differ, overlaid curves,
    latest samples.

    Raises UserError for no run, for runs whose results do not measure the same or are of other teachers, and as `write_report` does.
    """
    runs = dict(zip(short_names(run_dirs, "run folder"), map(read_run, run_dirs), strict=True))
    if not runs:
        raise UserError("a report needs at least one run folder, got none")
    _check_alike(runs)
    columns = ordered(row["name"] for row in _measured(runs.values()))
    page = {
        "title": f"Comparison of {_count(len(runs), 'run')}",
        "subtitle": " · ".join(f"{name}: {run.title}" for name, run in runs.items()),
        "notes": [f"{name}: {note}" for name, run in runs.items() for note in _notes(run)],
        "tiles": [],
        "results": report_table.table({name: _rows(run, floors=False) for name, run in runs.items()}, columns),
        "floors": report_table.table({name: _rows(run, floors=True) for name, run in runs.items()}, columns),
        "counts": _image_counts(runs.values()),
        "points": report_quality.point_by_point({name: _measured([run]) for name, run in runs.items()}),
        **_plots({name: _measured([run]) for name, run in runs.items()}),
        "nearest": None,
        "differences": _differences(runs),
        "curves": curves.panels(curves.by_scalar({name: run.steps for name, run in runs.items()}), list(runs)),
        "samples": [picture for name, run in runs.items() for picture in _sample_pictures(run, prefix=f"{name}, ", num_earlier=0)],
        "usage": None,
        "recipes": [(f"{name}/recipe.yaml", run.recipe_text) for name, run in runs.items()],
        "provenance": [(name, _flat((run.results or {}).get("provenance") or {})) for name, run in runs.items()],
        "student": "",
    }
    return _write(Path(output), page)


def read_run(run_dir: Path) -> Run:
    """Everything of a run folder that a report shows; raises UserError as `write_report` does."""
    import yaml

    folder = Path(run_dir)
    for name in ("recipe.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{run_dir} is not a run folder with something to report: it has no {name}")
    recipe, text = read_yaml(folder / "recipe.yaml"), read_text(folder / "recipe.yaml")
    data = block if isinstance(block := recipe.get("data"), dict) else {}
    if recipe != (named := portable(recipe)):
        recipe, text = named, yaml.safe_dump(named, sort_keys=False, width=120, allow_unicode=True)
    samples = sorted((int(found[1]), path) for path in folder.glob("samples/*.png") if (found := re.fullmatch(r"step_(\d+)", path.stem)))
    results = read_results(folder / "results.json") if os.path.lexists(folder / "results.json") else None
    student = portable(_read_student(folder / "student"))
    warnings = [portable_text(text) for text in _read_warnings(folder / "run.json")]
    return Run(folder.resolve(), data, text, recipe, _read_steps(folder / "metrics.jsonl"), samples, results, student, warnings)


def _read_steps(path: Path) -> list[dict[str, Any]]:
    """One dict for each step, in order; of a step logged twice (the run was resumed) the later one; a last line cut short is left out."""
    steps = {row["step"]: row for row in read_rows(path)}
    return [steps[step] for step in sorted(steps)]


class _Marker(records.Schema):
    warnings: list[str] = Field(default_factory=list)


def _read_warnings(path: Path) -> list[str]:
    """Nothing of older runs, nor of a marker that is broken, for a run does without it."""
    try:
        return records.read(path, _Marker).get("warnings", [])
    except UserError:
        return []


def _read_student(folder: Path) -> dict[str, Any] | None:
    """Of any format, in the words of the newest."""
    path = folder / "fastgen.json"
    if not os.path.lexists(path):
        return None
    record = upgraded(records.read(path))
    with reading(path):
        return records.checked(record, Exported)


def _plots(groups: report_quality.Groups) -> dict[str, list[str]]:
    return {"quality": report_quality.against_steps(groups), "diversity": report_quality.diversity_beside_quality(groups)}


def _check_alike(runs: Mapping[str, Run]) -> None:
    """UserError unless all that were measured were so in the same way, beside the same teacher."""
    measured = [(name, run, run.results) for name, run in runs.items() if run.results is not None]
    for (first, one, results), (second, other, others) in itertools.combinations(measured, 2):
        differing, teachers = unlike(results, others), (_teacher_hash(one), _teacher_hash(other))
        if None not in teachers and teachers[0] != teachers[1]:
            differing.append(f"teacher: {str(teachers[0])[:8]} / {str(teachers[1])[:8]}")
        if differing:
            raise UserError(f"runs {first!r} and {second!r} do not measure the same: {joined(differing)}; report each of them alone")


def _teacher_hash(run: Run) -> str | None:
    """SHA-256 of its files, as the results say, or the student that they are of."""
    provenance = run.results["provenance"] if run.results else {}
    models = provenance.get("models")
    of_teacher = [known for key, known in models.items() if key.partition(",")[0] == "teacher"] if isinstance(models, dict) else []
    recorded = [*of_teacher, (run.student or {}).get("teacher")]
    found = (each.get("sha256") for each in recorded if isinstance(each, dict))
    return next((value for value in found if isinstance(value, str)), None)


def _notes(run: Run) -> list[str]:
    """What was warned of before training and in it, and what keeps this from being the report of a finished run."""
    before = [f"Warning: {text}" for text in run.warnings]
    warnings = [f"Warning at step {row['step']}: {text}" for row in run.steps for text in row.get("warnings", [])]
    return before + warnings + _missing(run)


def _missing(run: Run) -> list[str]:
    """What the report of a finished run has and this one has not, a sentence each."""
    planned, done = run.value("train", "steps"), run.steps[-1]["step"] if run.steps else 0
    notes = []
    if isinstance(planned, int) and done < planned:
        notes.append(f"Interrupted or still running: training has reached step {done} of {planned}.")
    if run.student is None:
        notes.append("No student has been exported.")
    elif "unfinished" in run.student:
        notes.append(card.unfinished_text(run.student))
    if run.results is None:
        notes.append("The student has not been evaluated.")
    return notes + [f"{remark}." for remark in remarks(run.results or {"metrics": []})]


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Heading, number, remark: the first two measures of quality and the speed of the student at its own step count, then training."""
    rows = _rows(run, floors=False)
    students = [row for row in rows if row["model"] == "student"]
    own = run.value("student", "steps")
    steps = own if any(row.get("steps") == own for row in students) else next((row.get("steps") for row in students), None)
    mine = {row["name"]: row for row in students if row.get("steps") == steps}
    teacher = {row["name"]: row for row in reversed(rows) if row["model"] == "teacher"}
    quality = [name for name in ordered(mine) if name not in COSTS and heading(name).better][:2]
    tiles = []
    for name in [*quality, *({RATE} & mine.keys())]:
        against = f"teacher, {_count(teacher[name]['steps'], 'step')}: {formatted(teacher[name])}" if "steps" in teacher.get(name, {}) else ""
        tiles.append((f"{heading(name).text}, {_count(steps, 'step')}", formatted(mine[name]), against))
    if run.steps and isinstance(straight := run.steps[-1].get("straightness/student"), int | float):
        before = run.steps[-1].get("straightness/teacher")
        against = f"teacher: {before:.3f}; 0 is straight" if isinstance(before, int | float) else "0 is straight"
        tiles.append(("straightness", f"{straight:.3f}", against))
    if run.steps:
        seconds = run.steps[-1].get("seconds")
        tiles.append(("training steps", f"{run.steps[-1]['step']:,}", _duration(seconds) if isinstance(seconds, int | float) else ""))
    return tiles


def _measured(runs: Iterable[Run]) -> list[Row]:
    return [row for run in runs for row in (run.results or {}).get("metrics") or []]


def _rows(run: Run, *, floors: bool) -> list[Row]:
    """The measurements of models, or those of real data."""
    return [row for row in _measured([run]) if (row["model"] == "real" or "floor" in row) == floors]


def _image_counts(runs: Iterable[Run]) -> str:
    """Numbers of images behind the models' numbers: "FD-digits 2,000; …", several where runs differ."""
    counts: dict[str, set[int]] = {}
    for run in runs:
        for row in _rows(run, floors=False):
            if "n" in row:
                counts.setdefault(row["name"], set()).add(row["n"])
    by_text: dict[str, list[str]] = {}
    for name, numbers in counts.items():
        by_text.setdefault(" or ".join(f"{n:,}" for n in sorted(numbers)), []).append(heading(name).text)
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in by_text.items())


def _differences(runs: Mapping[str, Run]) -> dict[str, Any] | None:
    """Recipe keys whose values are not the same in all runs, as a table."""
    flat = {name: dict(_flat(run.recipe)) for name, run in runs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    differing = [key for key in keys if len({values.get(key) for values in flat.values()}) > 1]
    if not differing:
        return None
    lines = [{"labels": [key], "student": False, "numbers": [(values.get(key, ABSENT), "") for values in flat.values()]} for key in differing]
    return {"labels": ["recipe key"], "numbers": list(runs), "lines": lines}


def _flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and their values as text."""
    pairs: list[tuple[str, str]] = []
    for key, value in node.items():
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)))
    return pairs


def _sample_pictures(run: Run, *, prefix: str = "", num_earlier: int = NUM_EARLIER) -> list[dict[str, Any]]:
    """Sample grids, latest first and open, followed by those at other sizes of a student that has some; of many earlier ones, `num_earlier` spread
    over the run."""
    earlier, latest = run.samples[:-1], run.samples[-1:]
    if len(earlier) > num_earlier:
        earlier = [earlier[i * (len(earlier) - 1) // max(1, num_earlier - 1)] for i in range(num_earlier)]
    wanted = [(f"step {step}", path, _WIDEST_LATEST) for step, path in latest]
    wanted += [(f"step {step}, {size} (height x width)", path, _WIDEST_EARLIER) for step, of in latest for size, path in _at_other_sizes(of)]
    shown = len(wanted)
    wanted += [(f"step {step}", path, _WIDEST_EARLIER) for step, path in reversed(earlier)]
    return [{"caption": prefix + told, "uri": _image_uri(path, widest), "open": i < shown} for i, (told, path, widest) in enumerate(wanted)]


def _at_other_sizes(sample: Path) -> list[tuple[str, Path]]:
    """What was drawn beside a sample grid at other sizes of the student, by their names (`16x24`), of very many the first."""
    found = {path.stem.removeprefix(f"{sample.stem}_"): path for path in sample.parent.glob(f"{sample.stem}_*.png")}
    return [(name, path) for name, path in sorted(found.items()) if re.fullmatch(r"\d+x\d+", name)][:NUM_EARLIER]


def _image_uri(path: Path, widest: int) -> str:
    """The file as it is, or, where it is wider than `widest`, reduced to that and stored as JPEG."""
    from PIL import Image, UnidentifiedImageError

    content, kind = path.read_bytes(), "png"
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width > widest:
                file = io.BytesIO()
                reduced = image.convert("RGB").resize((widest, max(1, round(image.height * widest / image.width))), Image.Resampling.LANCZOS)
                reduced.save(file, format="JPEG", quality=88)
                content, kind = file.getvalue(), "jpeg"
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image") from error
    return image_uri(content, kind)


def _usage(run: Run) -> dict[str, str] | None:
    """Code that runs the student with diffusers alone, passing what its pipeline must be passed, and the same on the command line, both in
    the folder that the run's lies in."""
    if run.student is None:
        return None
    folder, prompts = f"{run.folder.name}/student", run.student.get("prompts") or ["a red fox in deep snow"]
    shell = f"fastgen sample {shlex.quote(folder)} --prompt {shlex.quote(prompts[0])} --output image.png"
    return {"python": card.call_snippet(run.student, folder), "shell": shell}


def _count(number: Any, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _write(path: Path, page: Mapping[str, Any]) -> Path:
    return write_atomically(path, rendered("report.html.j2", page))

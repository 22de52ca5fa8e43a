"""One self-contained HTML page for a run, or for several side by side: results, curves, samples, use of the student, provenance."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fastgen import card, curves
from fastgen.errors import UserError
from fastgen.files import write_atomically
from fastgen.portable import portable
from fastgen.printing import printable

Row = Mapping[str, Any]  # an entry of results.json["metrics"]

NUM_EARLIER = 12  # sample grids besides the latest one
ABSENT = "\N{EN DASH}"

_WIDEST_LATEST, _WIDEST_EARLIER = 2400, 1600  # pixels; wider sample grids are reduced, or reports would take hundreds of megabytes


class Metric(NamedTuple):
    """How a metric is printed: `better` is an arrow, or empty where more is not simply better."""

    heading: str
    better: str = ""
    decimals: int = 2


# In the order of the table's columns; a metric that is not listed comes last, under its own name.
METRICS = {
    "fd_digits": Metric("FD-digits", "↓"),
    "fid": Metric("FID", "↓"),
    "fid_infinity": Metric("FID∞", "↓"),
    "kid": Metric("KID", "↓", 5),
    "fd_dinov2": Metric("FD-DINOv2", "↓", 1),
    "cmmd": Metric("CMMD", "↓", 3),
    "clip_score": Metric("CLIP score", "↑"),
    "prompt_accuracy": Metric("prompt accuracy", "↑", 3),
    "parity_accuracy": Metric("parity accuracy", "↑", 3),
    "fd_digits_named": Metric("FD named", "↓"),
    "fd_digits_pixel": Metric("FD pixel", "↓"),
    "precision": Metric("precision", "↑", 3),
    "recall": Metric("recall", "↑", 3),
    "diversity": Metric("diversity"),
    "lpips_diversity": Metric("LPIPS diversity", "", 3),
    "vendi": Metric("Vendi score"),
    "mode_entropy": Metric("modes"),
    "seconds_per_1000_images": Metric("images/s", "↑", 0),
    "peak_memory_bytes": Metric("peak memory, MiB", "↓", 0),
}


@dataclass(frozen=True)
class Run:
    """What a run folder holds, with names in place of paths; `results` and `student` (its fastgen.json) are None and `samples` is empty where
    there is none yet."""

    folder: Path
    recipe_text: str
    recipe: dict[str, Any]
    steps: list[dict[str, Any]]
    samples: list[tuple[int, Path]]
    results: dict[str, Any] | None
    student: dict[str, Any] | None

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
    columns = _columns([run])
    page = {
        "title": run.title,
        "subtitle": f"{run.folder.name} · {run.date}",
        "notes": _notes(run),
        "tiles": _tiles(run),
        "results": _table({"": _rows(run, floors=False)}, columns),
        "floors": _table({"": _rows(run, floors=True)}, columns),
        "counts": _image_counts([run]),
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
    """Write one page for several runs to `output`: one table, the recipe keys in which they differ, overlaid curves, latest samples.

    Raises UserError for no run, and as `write_report` does.
    """
    runs = dict(zip(_names(run_dirs), map(read_run, run_dirs), strict=True))
    if not runs:
        raise UserError("a report needs at least one run folder, got none")
    columns = _columns(runs.values())
    page = {
        "title": f"Comparison of {_count(len(runs), 'run')}",
        "subtitle": " · ".join(f"{name}: {run.title}" for name, run in runs.items()),
        "notes": [f"{name}: {note}" for name, run in runs.items() for note in _notes(run)],
        "tiles": [],
        "results": _table({name: _rows(run, floors=False) for name, run in runs.items()}, columns),
        "floors": _table({name: _rows(run, floors=True) for name, run in runs.items()}, columns),
        "counts": _image_counts(runs.values()),
        "differences": _differences(runs),
        "curves": curves.panels(curves.by_scalar({name: run.steps for name, run in runs.items()})),
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
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"cannot read {folder / 'recipe.yaml'}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{folder / 'recipe.yaml'} is not a recipe: it must be a mapping")
    if recipe != (named := portable(recipe)):
        recipe, text = named, yaml.safe_dump(named, sort_keys=False, width=120, allow_unicode=True)
    samples = sorted((int(found[1]), path) for path in folder.glob("samples/*.png") if (found := re.fullmatch(r"step_(\d+)", path.stem)))
    results, student = _read_json(folder / "results.json"), _read_json(folder / "student" / "fastgen.json")
    if results is not None and not isinstance(results.get("metrics"), list):
        raise UserError(f"{folder / 'results.json'} is not a results file: it has no list of metrics")
    return Run(folder.resolve(), text, recipe, _read_steps(folder / "metrics.jsonl"), samples, results, portable(student))


def _read_steps(path: Path) -> list[dict[str, Any]]:
    """One dict for each step, in order; of a step logged twice (the run was resumed) the later one; a last line cut short is left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            steps[int(row["step"])] = row
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"line {number} of {path} is not a JSON object with a step") from error
    return [steps[step] for step in sorted(steps)]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


def _notes(run: Run) -> list[str]:
    """What went wrong in training, and what keeps this from being the report of a finished run."""
    warnings = [f"Warning at step {row['step']}: {text}" for row in run.steps for text in row.get("warnings", [])]
    return warnings + _missing(run)


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
    return notes


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Heading, number, remark: the first two measures of quality and the speed of the student at its own step count, then training."""
    rows = _rows(run, floors=False)
    students = [row for row in rows if row["model"] == "student"]
    own = run.value("student", "steps")
    steps = own if any(row.get("steps") == own for row in students) else next((row.get("steps") for row in students), None)
    mine = {row["name"]: row for row in students if row.get("steps") == steps}
    teacher = {row["name"]: row for row in reversed(rows) if row["model"] == "teacher"}
    quality = [name for name in METRICS if name in mine and METRICS[name].better][:2]
    tiles = []
    for name in dict.fromkeys([*quality, *({"seconds_per_1000_images"} & mine.keys())]):
        against = f"teacher, {_count(teacher[name]['steps'], 'step')}: {_number(teacher[name])}" if "steps" in teacher.get(name, {}) else ""
        tiles.append((f"{METRICS[name].heading}, {_count(steps, 'step')}", _number(mine[name]), against))
    if run.steps:
        seconds = run.steps[-1].get("seconds")
        tiles.append(("training steps", f"{run.steps[-1]['step']:,}", _duration(seconds) if isinstance(seconds, int | float) else ""))
    return tiles


def _rows(run: Run, *, floors: bool) -> list[Row]:
    """The measurements of models, or those of real data."""
    rows = (run.results or {}).get("metrics") or []
    return [row for row in rows if (row["model"] == "real" or "floor" in row) == floors]


def _columns(runs: Iterable[Run]) -> list[str]:
    """Names of all metrics: those of METRICS first, in its order."""
    found = dict.fromkeys(row["name"] for run in runs for row in (run.results or {}).get("metrics") or [])
    return [name for name in METRICS if name in found] + [name for name in found if name not in METRICS]


def _table(groups: Mapping[str, Sequence[Row]], columns: Sequence[str]) -> dict[str, Any] | None:
    """Headings and lines, one line for each (group, model, steps, guidance, floor); metrics that no line has are left out."""
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for group, rows in groups.items():
        for row in rows:
            # The bootstrap floor uses as many images as a model does, as do real rows that are no floor: they share a line.
            floor = None if row.get("floor") == "bootstrap" else row.get("floor")
            key = (group, row["model"], floor, row.get("steps"), row.get("guidance"))
            lines.setdefault(key, {})[row["name"]] = row
    if not lines:
        return None
    used = [name for name in columns if any(name in line for line in lines.values())]
    first = {"run": any(group for group in groups), "model": True}
    ends = {"steps": any(key[3] is not None for key in lines), "guidance": any(key[4] is not None for key in lines)}
    return {
        "labels": [name for name, shown in first.items() if shown],
        "numbers": [name for name, shown in ends.items() if shown] + [f"{_metric(name).heading} {_metric(name).better}".strip() for name in used],
        "lines": [_line(key, line, used, first | ends) for key, line in lines.items()],
    }


def _line(key: tuple[Any, ...], line: Mapping[str, Row], used: Sequence[str], shown: Mapping[str, bool]) -> dict[str, Any]:
    group, model, floor, steps, guidance = key
    settings = [
        text for name, text in (("steps", steps), ("guidance", guidance)) if shown[name] for text in [ABSENT if text is None else f"{text:g}"]
    ]
    return {
        "labels": ([group] if shown["run"] else []) + [f"{model}, {floor}" if floor else model],
        "student": model == "student",
        "numbers": [(text, "") for text in settings]
        + [(_number(line[name], with_std=True), _remark(line[name])) if name in line else (ABSENT, "") for name in used],
    }


def _metric(name: str) -> Metric:
    return METRICS.get(name) or Metric(name.replace("_", " "), "", -1)


def _number(row: Row, *, with_std: bool = False) -> str:
    """A measurement as text, in the unit of its heading; a metric without a fixed number of decimals has four significant digits."""
    value, std, decimals = row["value"], row.get("std"), _metric(row["name"]).decimals
    if row["name"] == "seconds_per_1000_images":
        # To first order a rate has the relative spread of its time.
        rate = 1000 / value
        value, std, decimals = rate, None if std is None else std / value * rate, 0 if rate >= 10 else 2
    elif row["name"] == "peak_memory_bytes":
        value, std = value / 2**20, None if std is None else std / 2**20
    texts = [f"{number:.4g}" if decimals < 0 else f"{number:,.{decimals}f}" for number in (value, std) if number is not None]
    return " ± ".join(texts if with_std else texts[:1])


def _remark(row: Row) -> str:
    """What a number's tooltip says: unrounded value, number of images, what its spread is over."""
    parts = [f"{row['name']} = {row['value']:.6g}"] + ([f"n = {row['n']}"] if "n" in row else [])
    return ", ".join([*parts, f"± over {row['std_over']}"] if "std_over" in row else parts)


def _image_counts(runs: Iterable[Run]) -> str:
    """Numbers of images behind the models' numbers: "FD-digits 2,000; …", several where runs differ."""
    counts: dict[str, set[int]] = {}
    for run in runs:
        for row in _rows(run, floors=False):
            if "n" in row:
                counts.setdefault(row["name"], set()).add(row["n"])
    by_text: dict[str, list[str]] = {}
    for name, numbers in counts.items():
        by_text.setdefault(" or ".join(f"{n:,}" for n in sorted(numbers)), []).append(_metric(name).heading)
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
    """Sample grids, latest first and open; of many earlier ones, `num_earlier` spread over the run."""
    earlier, latest = run.samples[:-1], run.samples[-1:]
    if len(earlier) > num_earlier:
        earlier = [earlier[i * (len(earlier) - 1) // max(1, num_earlier - 1)] for i in range(num_earlier)]
    wanted = [(sample, _WIDEST_LATEST) for sample in latest] + [(sample, _WIDEST_EARLIER) for sample in reversed(earlier)]
    return [{"caption": f"{prefix}step {step}", "uri": _image_uri(path, widest), "open": i == 0} for i, ((step, path), widest) in enumerate(wanted)]


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
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _usage(run: Run) -> dict[str, str] | None:
    """Code that runs the student with diffusers alone, passing what its pipeline must be passed, and the same on the command line, both in
    the folder that the run's lies in."""
    if run.student is None:
        return None
    folder, prompts = f"{run.folder.name}/student", run.student.get("prompts") or ["a red fox in deep snow"]
    shell = f"fastgen sample {shlex.quote(folder)} --prompt {shlex.quote(prompts[0])} --output image.png"
    return {"python": card.call_snippet(run.student, folder), "shell": shell}


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Short names of run folders: the last part of each path, or as many parts as make them differ."""
    parts = [Path(folder).resolve().parts for folder in run_dirs]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    if parts:
        raise UserError(f"the same run folder is given twice: {', '.join(map(str, run_dirs))}")
    return []


def _count(number: Any, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _write(path: Path, page: Mapping[str, Any]) -> Path:
    """Render the template and write it in one step."""
    import jinja2

    loader = jinja2.PackageLoader("fastgen", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.get_template("report.html.j2").render(page)
    return write_atomically(path, "\n".join(printable(line) for line in html.split("\n")))

"""How much data do I need: quality against the number of prompts and pictures, of one method that learns from prompts and one from pictures.

    python benchmarks/data_curve.py              # a quarter of an hour after `make bench`; appends to benchmarks/results/data_curve.jsonl
    python benchmarks/data_curve.py --plot       # only draws benchmarks/results/data_curve.svg again

The first so many scenes of world `scenes` are written as a user would have them, a folder of PNGs with captions and a file of the same prompts,
and two recipes are trained on them: dmd2, which reads the prompts alone, and scm, which reads the pictures. Everything else stays as it is, so
what `make bench` has measured on all of them is taken from its rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.comparing import rows as kept  # noqa: E402
from benchmarks.comparing.runs import Asked, measure  # noqa: E402
from fastgen.data.images import load_images  # noqa: E402
from fastgen.evaluation.preparation import quantised  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
WORLD = "fastgen:scenes"
COUNTS = (30, 100, 300, 1000)  # and all
RECIPES = {"dmd2": ("scenes_dmd2_4step", "prompts"), "scm": ("scenes_scm_2step", "images")}
METRIC = "fd_scenes_teacher"
_SHARE = 0.1  # that every caption is a multiple of
_DATA = ROOT / "runs" / "data_curve" / "data"


def write_scenes(folder: Path, count: int) -> None:
    """The first pictures as PNGs with their captions, and `prompts.jsonl` with the same captions, each as often as it is drawn."""
    from PIL import Image

    images = load_images(WORLD)
    folder.mkdir(parents=True, exist_ok=True)
    lines, prompts = [], {}
    for index in range(count):
        name, captions = f"{index:05d}.png", images.captions[index]
        pixels = quantised((images.sources[index][None] + 1) / 2, "edm")[0]
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name)
        often = [text for text, share in captions.items() for _ in range(round(share / _SHARE))]  # each of a list is drawn as often
        lines.append({"file_name": name, "text": often})
        for text, share in captions.items():
            prompts[text] = prompts.get(text, 0.0) + share
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    written = "".join(json.dumps({"prompt": text, "weight": weight}) + "\n" for text, weight in prompts.items())
    (folder / "prompts.jsonl").write_text(written, encoding="utf-8")


def asked_for(seeds: Sequence[int]) -> list[Asked]:
    """Every run: `dmd2, 30` of 30 prompts, `dmd2, all` of all."""
    found: list[Asked] = []
    for seed in seeds:
        for count in (*COUNTS, None):
            for method, (recipe, key) in RECIPES.items():
                data = () if count is None else (f"data={json.dumps({key: _source(count, key)})}",)
                found.append(Asked(recipe, seed, data, f"{method}, {count or 'all'}"))
    return found


def compared(asked: Sequence[Asked], rows: Sequence[Mapping[str, Any]], threads: int) -> list[dict[str, Any]]:
    """What the comparison of methods has of what is asked for, under the names of this curve."""
    names = {each.key(threads): each.name for each in asked if not each.overrides}
    return [{**row, "model": names[run]} for row in rows if (run := row.get("provenance", {}).get("run")) in names]


def _source(count: int, key: str) -> str:
    """Relative, so that the same run is the same run in another checkout."""
    folder = (_DATA / str(count)).relative_to(ROOT)
    return str(folder / "prompts.jsonl" if key == "prompts" else folder)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, whole: int) -> None:
    """METRIC against the number of pictures, mean over seeds with single seeds as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, method in enumerate(RECIPES):
        points: dict[int, list[float]] = {}
        for row in rows:
            of, count = row["model"].split(", ")
            if row["name"] == METRIC and of == method:
                points.setdefault(whole if count == "all" else int(count), []).append(row["value"])
        counts = sorted(points)
        colour = ("#3b82c4", "#d9742b")[place]
        axes.plot(counts, [sum(points[count]) / len(points[count]) for count in counts], color=colour, marker="o", label=method)
        for count in counts:
            axes.plot([count] * len(points[count]), points[count], color=colour, marker=".", linestyle="none", alpha=0.5)
    axes.set(xscale="log", yscale="log", xlabel="prompts, or pictures", ylabel="FD-scenes to the teacher")
    for direction in (axes.xaxis, axes.yaxis):
        direction.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--plot", action="store_true", help="measure nothing, draw the plot")
    chosen = parser.parse_args()
    output = RESULTS / "data_curve.jsonl"
    rows, failed = kept.read(output), []
    if not chosen.plot:
        for count in COUNTS:
            if not (_DATA / str(count) / "prompts.jsonl").is_file():
                write_scenes(_DATA / str(count), count)
        keep = functools.partial(kept.write, output)
        work = ROOT / "runs" / "data_curve"
        asked = asked_for(chosen.seeds)
        there = {row["provenance"]["run"] for row in rows}
        known = compared(asked, kept.read(RESULTS / "quality_scenes.jsonl"), chosen.threads)
        rows += [row for row in known if row["provenance"]["run"] not in there]
        rows, failed = measure(asked, rows, keep, work=work, jobs=chosen.jobs, threads=chosen.threads)
    if rows:
        plot(rows, RESULTS / "data_curve.svg", whole=len(load_images(WORLD)))
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

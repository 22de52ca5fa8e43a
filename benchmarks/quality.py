"""How good are the students, and what do they cost? Makes README's results table and its sample grid.

    python benchmarks/quality.py                                   # trains every listed recipe with three seeds, measures, writes
    python benchmarks/quality.py --readme                          # also puts table and grid into README.md
    python benchmarks/quality.py --recipes digits_scm_2step        # only that one; the others' rows stay as they are
    python benchmarks/quality.py --seeds 1 --threads 1             # one seed, on one core

Each recipe is trained and exported as a user would; students and teacher are measured with protocol `digits`. Rows go to
benchmarks/results/quality_digits.jsonl, one measurement a line, with provenance: the mean over seeds, and under `seed` what each of
them gave, with the provenance of its own run. The table shows means.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import between
from fastgen import families, fingerprints, generator, pictures, run
from fastgen.config import Recipe
from fastgen.data import digits
from fastgen.evaluation import results, unkept
from fastgen.evaluation.protocol import load_protocol
from fastgen.evaluation.table import markdown_table
from fastgen.plan import plan
from fastgen.terminal import progress
from fastgen.yaml_files import read_yaml

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RECIPES = (
    "digits_dmd2_1step",
    "digits_dmd2_4step",
    "digits_dmd2_gan_1step",
    "digits_dmd2_gan_4step",
    "digits_phased_dmd_4step",
    "digits_f_distill_1step",
    "digits_scm_2step",
    "digits_rcm_2step",
    "digits_tbcm_2step",
    "digits_meanflow_2step",
)
TEACHER, TEACHER_GUIDANCE, TEACHER_STEPS = "fastgen:digits", 1.5, (25, 4, 2, 1)


def train_and_measure(recipe: str, seed: int, work: Path, bars: run.Progress) -> list[dict[str, Any]]:
    """Rows of one student, under the recipe's name: the protocol's metrics and the training seconds. A finished run of the very same
    recipe with as many threads is used again."""
    folder, asked = work / f"{recipe}_seed{seed}", Recipe.load(recipe, [f"train.seed={seed}"])
    if not is_finished(folder, plan(asked).resolved()):
        run.train(asked, folder, overwrite=folder.exists(), progress=bars)
    measured = results.read_results(folder / "results.json")
    rows = [row for row in measured["metrics"] if row["model"] == "student"]
    seconds = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    rows.append({**rows[0], "name": "training_seconds", "value": seconds, "n": 1})
    return [{**row, "model": recipe, "seed": seed, "provenance": measured["provenance"]} for row in rows]


def is_finished(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether the folder holds a measured run of this resolved recipe, and of this number of threads."""
    if not (folder / "results.json").is_file() or read_yaml(folder / "recipe.yaml") != recipe:
        return False
    return results.read_results(folder / "results.json")["provenance"].get("threads") == torch.get_num_threads()


def over_seeds(runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each metric of one recipe, one list of rows a seed."""
    rows = []
    for same in zip(*runs, strict=True):
        assert len({(row["name"], row["steps"], row["model"]) for row in same}) == 1
        values = [row["value"] for row in same]
        spread = {"std": statistics.stdev(values), "std_over": "seeds"} if len(values) > 1 else {}
        shared = {key: value for key, value in same[0].items() if key not in ("seed", "provenance")}
        rows.append({**shared, "value": statistics.mean(values), **spread})
    return rows


def student_rows(runs: Sequence[list[dict[str, Any]]], origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The means over seeds of one recipe, with their origin, then every seed's own rows."""
    return [*({**row, **origin} for row in over_seeds(runs)), *(row for own in runs for row in own)]


def teacher_rows(bars: run.Progress) -> list[dict[str, Any]]:
    """The teacher at several step counts."""
    teacher = generator.load_teacher(TEACHER, guidance=TEACHER_GUIDANCE)
    protocol = load_protocol("digits")
    rows = unkept.run_protocol(protocol, teacher, model="teacher", steps=TEACHER_STEPS, guidance=TEACHER_GUIDANCE, progress=bars)
    return [{**row} for row in rows]


def sample_grid(students: Mapping[str, Path]) -> Any:
    """Teacher at 25, 4, 2, 1 steps, then the students: the same noise down each column; named, generic and parity prompts."""
    named = [digits.NAMED[i % 3].format(word) for i, word in enumerate(digits.WORDS)]
    prompts = [*named, *digits.GENERIC * 2, *digits.PARITY[0] * 2, *digits.PARITY[1] * 2]
    seeds = list(range(100, 100 + len(prompts)))
    teacher = generator.load_teacher(TEACHER, guidance=TEACHER_GUIDANCE)
    rows = [(f"teacher, {count} step{'s' * (count > 1)}", teacher(prompts, seeds, count)) for count in TEACHER_STEPS]
    rows += [(name, generator.load_student(folder)(prompts, seeds)) for name, folder in students.items()]
    return pictures.picture_grid(rows, prompts)


def kept_rows(recipes: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """The rows of earlier measurements of other recipes, means and single seeds, provenance included."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row for row in rows if row["model"] in RECIPES and row["model"] not in recipes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality", help="run folders; finished ones are used again")
    parser.add_argument("--readme", action="store_true", help="put the table and the grid into README.md")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; seconds and the last digits depend on it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bars, output = progress(), RESULTS / "quality_digits.jsonl"
    protocol = load_protocol("digits")
    real = unkept.what_is_real(protocol)
    model_hash = fingerprints.folder_hash(families.resolve_source(TEACHER))
    origin = {
        "seeds": arguments.seeds,
        "provenance": results.provenance(protocol, model_hash=model_hash, extractors=real.extractors),
    }
    students = [
        row
        for recipe in arguments.recipes
        for row in student_rows([train_and_measure(recipe, seed, arguments.work, bars) for seed in arguments.seeds], origin)
    ]
    students += kept_rows(arguments.recipes, output)
    students.sort(key=lambda row: RECIPES.index(row["model"]))
    rows: list[Any] = [*({**row, **origin} for row in teacher_rows(bars)), *students, *({**row, **origin} for row in real.floors)]
    RESULTS.mkdir(exist_ok=True)
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = {recipe.removeprefix("digits_"): arguments.work / f"{recipe}_seed{arguments.seeds[0]}" / "student" for recipe in RECIPES}
    pictures.save_png(sample_grid({name: folder for name, folder in folders.items() if folder.is_dir()}), RESULTS / "digits_grid.png")
    table = markdown_table(rows)
    print(table)
    if arguments.readme:
        readme = ROOT / "README.md"
        readme.write_text(between(readme.read_text(encoding="utf-8"), "quality", table), encoding="utf-8")


if __name__ == "__main__":
    main()

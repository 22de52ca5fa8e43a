"""How good are the students, and what do they cost? Makes README's results tables and sample grids.

    python benchmarks/quality.py                          # every recipe with three seeds, two at a time
    python benchmarks/quality.py --readme                 # also puts table and grid into README.md
    python benchmarks/quality.py --world digits           # the easier world of the demo
    python benchmarks/quality.py --recipes scenes_scm_2step --seeds 0

Each recipe is trained and exported as a user would, and measured with the world's protocol, in a process of its own with one thread. Rows go to
benchmarks/results/quality_WORLD.jsonl as soon as a run has ended, one measurement a line: the mean over seeds, and under `seed` what each of them
gave, with its provenance. The same command goes on where it was stopped: what is there of the same recipe, teacher, protocol and threads is not
made again. Tables show means.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.comparing import rows as kept  # noqa: E402
from benchmarks.comparing import runs  # noqa: E402
from benchmarks.comparing.runs import Asked  # noqa: E402
from benchmarks.comparing.worlds import WORLDS, World  # noqa: E402
from benchmarks.table import between  # noqa: E402
from fastgen import families, fingerprints, generator, pictures  # noqa: E402
from fastgen.evaluation import results, unkept  # noqa: E402
from fastgen.evaluation.protocol import load_protocol  # noqa: E402
from fastgen.evaluation.table import markdown_table  # noqa: E402
from fastgen.fingerprints import digest  # noqa: E402
from fastgen.terminal import progress  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
Rows = list[dict[str, Any]]


def known_rows(world: World, found: Rows, threads: int) -> Rows:
    """Rows of the teacher and of real pictures: those that are there of the same weights, protocol and threads, or new ones."""
    protocol = load_protocol(world.name)
    teacher = fingerprints.folder_hash(families.resolve_source(world.teacher))
    key = digest([world.teacher_steps, world.guidance, teacher, protocol.hash(), threads])
    if same := [row for row in found if row.get("provenance", {}).get("run") == key]:
        return same
    real = unkept.what_is_real(protocol)
    drawn = unkept.run_protocol(
        protocol,
        generator.load_teacher(world.teacher, guidance=world.guidance),
        model="teacher",
        steps=world.teacher_steps,
        guidance=world.guidance,
        progress=progress(),
    )
    origin = {"provenance": {**results.provenance(protocol, model_hash=teacher, extractors=real.extractors), "run": key}}
    return [{**row, **origin} for row in (*drawn, *real.floors)]


def sample_grid(world: World, students: Mapping[str, Path]) -> Any:
    """The teacher at its step counts, then the students: the same noise down each column."""
    prompts = world.shown()
    seeds = list(range(100, 100 + len(prompts)))
    teacher = generator.load_teacher(world.teacher, guidance=world.guidance)
    shown = [(f"teacher, {count} step{'s' * (count > 1)}", teacher(prompts, seeds, count)) for count in world.teacher_steps]
    shown += [(name, generator.load_student(folder)(prompts, seeds)) for name, folder in students.items()]
    return pictures.picture_grid(shown, prompts)


def measure(world: World, asked: Sequence[Asked], work: Path, output: Path, jobs: int, threads: int) -> tuple[Rows, list[str]]:
    """All rows, those of before included, on disk after each run; and what failed, a line each."""
    found = kept.read(output)
    fixed = known_rows(world, found, threads)
    real = [row for row in fixed if row["model"] == "real"]

    def everything(seeds: Rows) -> Rows:
        return [*(row for row in fixed if row["model"] != "real"), *kept.with_means(seeds, world.recipes), *real]

    own = [row for row in found if "seed" in row]
    seeds, failed = runs.measure(asked, own, lambda seeds: kept.write(output, everything(seeds)), work=work, jobs=jobs, threads=threads)
    return everything(seeds), failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="scenes")
    parser.add_argument("--recipes", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality", help="run folders; finished ones are used again")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md, where the grid is shown")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each run; seconds and the last digits depend on it")
    chosen = parser.parse_args()
    world = WORLDS[chosen.world]
    if unknown := set(chosen.recipes or ()) - set(world.recipes):
        parser.error(f"--recipes: {', '.join(sorted(unknown))}; world {world.name} has {', '.join(world.recipes)}")
    torch.set_num_threads(chosen.threads)
    asked = [Asked(recipe, seed) for seed in chosen.seeds for recipe in chosen.recipes or world.recipes]
    rows, failed = measure(world, asked, chosen.work, RESULTS / f"quality_{world.name}.jsonl", chosen.jobs, chosen.threads)
    folders = {recipe.removeprefix(f"{world.name}_"): Asked(recipe, chosen.seeds[0]).folder(chosen.work) / "student" for recipe in world.recipes}
    students = {name: folder for name, folder in folders.items() if folder.is_dir()}
    if len(students) == len(folders):
        pictures.save_png(sample_grid(world, students), RESULTS / f"{world.name}_grid.png")
    told: Any = rows
    table = markdown_table(told)
    print(table)
    if chosen.readme:
        readme = ROOT / "README.md"
        readme.write_text(between(readme.read_text(encoding="utf-8"), f"quality_{world.name}", table), encoding="utf-8")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

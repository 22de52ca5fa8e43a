"""Makes the bundled assets from a seed: `python -m fastgen.assets.build` those of the digits, `python -m fastgen.assets.build scenes` those of
the scenes, each stage of a world or one alone:

    python -m fastgen.assets.build [digits] [classifier|skeleton|teacher]
    python -m fastgen.assets.build scenes [classifiers|vae|skeleton|teacher|statistics]

A teacher is an ordinary fastgen run of recipes/digits_teacher.yaml or recipes/scenes_teacher.yaml (flow matching), whose exported student
becomes the bundled pipeline. What is made on the way lies in .build; a teacher that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from fastgen import run
from fastgen.assets import DIGITS_CLASSIFIER, DIGITS_FEATURES, DIGITS_TEACHER, SCENES_CLASSIFIER, SCENES_FEATURES, SCENES_STATISTICS, SCENES_TEACHER
from fastgen.assets.classifier import train_digits, train_scenes
from fastgen.assets.skeleton import DIGITS, SCENES, build_skeleton, train_vae
from fastgen.evaluation.teacher_statistics import write_statistics
from fastgen.terminal import progress

WORK = Path(".build")


class Stage(NamedTuple):
    """run: of a seed. threads: part of the seed, since another number adds in another order; any machine can run them, on fewer cores more
    slowly."""

    run: Callable[[int], None]
    threads: int


def say(line: str) -> None:
    print(line, flush=True)


def build_vae(seed: int) -> None:
    """Train the scenes' VAE in .build/scenes_vae."""
    torch.manual_seed(seed)
    train_vae(SCENES).save_pretrained(WORK / "scenes_vae")


def build_scenes_skeleton(seed: int) -> None:
    """Make the pipeline around the scenes' teacher in .build/scenes_skeleton."""
    from diffusers import AutoencoderKL

    build_skeleton(SCENES, WORK / "scenes_skeleton", seed, AutoencoderKL.from_pretrained(WORK / "scenes_vae"))


def build_teacher(name: str, output: Path, seed: int) -> None:
    """Train the teacher with the project's own trainer, or go on, and put its export into the package."""
    run_dir = run.train(
        f"{name}_teacher", WORK / f"{name}_teacher", overrides=[f"train.seed={seed}"], resume=True, or_start=True, progress=progress()
    )
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(run_dir / "student", output)
    if (run_dir / "results.json").is_file():
        shutil.copy(run_dir / "results.json", output / "results.json")
    say(f"teacher: {output}")


WORLDS: Mapping[str, Mapping[str, Stage]] = {
    "digits": {
        "classifier": Stage(lambda seed: say(f"classifier: {train_digits(DIGITS_CLASSIFIER, seed)}"), 1),
        "features": Stage(lambda seed: say(f"features: {train_digits(DIGITS_FEATURES, seed + 1)}"), 1),
        "skeleton": Stage(lambda seed: build_skeleton(DIGITS, WORK / "digits_skeleton", seed), 2),
        "teacher": Stage(lambda seed: build_teacher("digits", DIGITS_TEACHER, seed), 1),
    },
    "scenes": {
        "classifiers": Stage(lambda seed: say(f"classifiers: {train_scenes(SCENES_CLASSIFIER, seed, say)}"), 1),
        "features": Stage(lambda seed: say(f"features: {train_scenes(SCENES_FEATURES, seed + 1, say)}"), 1),
        "vae": Stage(build_vae, 1),
        "skeleton": Stage(build_scenes_skeleton, 1),
        "teacher": Stage(lambda seed: build_teacher("scenes", SCENES_TEACHER, seed), 2),
        "statistics": Stage(lambda seed: say(f"statistics: {write_statistics(SCENES_STATISTICS, seed, say=say)}"), 2),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WORLD STAGE", help="by default digits, and all stages")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    world = arguments.what[0] if arguments.what[:1] and arguments.what[0] in WORLDS else "digits"
    names = [name for name in arguments.what if name != world] or list(WORLDS[world])
    if unknown := [name for name in names if name not in WORLDS[world]]:
        parser.error(f"{unknown[0]!r} is no stage of {world}: {', '.join(WORLDS[world])}")
    for name in names:
        torch.set_num_threads(WORLDS[world][name].threads)
        WORLDS[world][name].run(arguments.seed)


if __name__ == "__main__":
    main()

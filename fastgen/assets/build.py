"""Makes the bundled assets from a seed: `python -m fastgen.assets.build` writes classifier, pipeline skeleton, and trained teacher.

Stages can be run alone: `python -m fastgen.assets.build classifier|skeleton|teacher`. The teacher is an ordinary fastgen run of
recipes/digits_teacher.yaml (flow matching), whose exported student becomes the bundled pipeline.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from fastgen import run
from fastgen.assets import DIGITS_CLASSIFIER, DIGITS_TEACHER
from fastgen.assets.classifier import train_classifier
from fastgen.assets.skeleton import build_skeleton
from fastgen.terminal import progress

WORK = Path(".build")


def build_classifier(seed: int) -> None:
    """Train the digit classifier into the package."""
    print("classifier:", train_classifier(DIGITS_CLASSIFIER, seed))


def build_pipeline(seed: int) -> None:
    """Make the pipeline around the teacher in .build/digits_skeleton."""
    print(f"skeleton: VAE reconstruction MSE {build_skeleton(WORK / 'digits_skeleton', seed):.2g}")


def build_teacher(seed: int) -> None:
    """Train the teacher with the project's own trainer and put its export into the package."""
    run_dir = run.train("digits_teacher", WORK / "digits_teacher", overrides=[f"train.seed={seed}"], overwrite=True, progress=progress())
    shutil.rmtree(DIGITS_TEACHER, ignore_errors=True)
    shutil.copytree(run_dir / "student", DIGITS_TEACHER)
    shutil.copy(run_dir / "results.json", DIGITS_TEACHER / "results.json")
    print("teacher:", DIGITS_TEACHER)


# Part of the seed: another number adds in another order. Any machine can run them, on fewer cores more slowly.
THREADS = {"classifier": 1, "skeleton": 2, "teacher": 1}
STAGES = {"classifier": build_classifier, "skeleton": build_pipeline, "teacher": build_teacher}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", nargs="?", choices=STAGES, help="one stage; all of them when left out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in [arguments.stage] if arguments.stage else STAGES:
        torch.set_num_threads(THREADS[name])
        STAGES[name](arguments.seed)


if __name__ == "__main__":
    main()

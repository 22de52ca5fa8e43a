"""The folder of a run: what may lie in it, and what a new run makes of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fastgen import inputs
from fastgen.errors import UserError


def check_folder(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    check_parents(run_dir)
    if run_dir.is_file():
        raise UserError(f"--output: {str(run_dir)!r} is a file, a folder is needed")
    holds_run = (run_dir / "recipe.yaml").is_file() and (run_dir / "metrics.jsonl").is_file()
    if resume and not holds_run:
        raise UserError(f"--resume: {str(run_dir)!r} holds no run to resume")
    if run_dir.is_dir() and any(run_dir.iterdir()) and not holds_run:
        raise UserError(f"--output: {str(run_dir)!r} holds other files and no run; choose an empty or new folder")
    if holds_run and not (resume or overwrite):
        raise UserError(f"--output: {str(run_dir)!r} already holds a run; pass --resume to go on with it or --overwrite to replace it")


def remove_run(run_dir: Path) -> None:
    """Delete what a run writes, and nothing else that lies there."""
    for name in ("recipe.yaml", inputs.FILE, "metrics.jsonl", "results.json", "report.html"):
        (run_dir / name).unlink(missing_ok=True)
    for name in ("samples", "checkpoints", "student", "tensorboard"):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def plain(folder: str | Path) -> Path:
    """A folder's path without `..`, which could turn into a folder that holds other things while the run makes its own."""
    path = Path(folder)
    return path if path.name and ".." not in path.parts else Path(os.path.abspath(path))


def check_parents(folder: Path) -> None:
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"--output: {str(folder)!r} cannot be made, because {str(above)!r} is a file")

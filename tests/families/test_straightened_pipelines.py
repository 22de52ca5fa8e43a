"""PeRFlow and progressive distillation on Stable Diffusion's own pipeline: a guided student, adapters that are handed on, and their export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cells import recipe
from pipelines import verifying_here
from tiny_sd15 import tiny_sd15

from fastgen import run
from fastgen.config import Recipe, validate
from fastgen.export import export_lora, export_student, verify
from fastgen.plan import plan


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    tiny_sd15().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("guidance", ["synchronised", "fixed"])
def test_plain_diffusers_draws_what_a_perflow_student_draws_with_the_guidance_it_is_made_for(source: Path, tmp_path: Path, guidance: str) -> None:
    distiller: dict[str, Any] = {"name": "perflow", "solver_steps": 2, "guidance": guidance, "points": "teacher_trajectory"}
    given = recipe(source, "dmd2", tmp_path)  # of prompts
    given = validate(Recipe, given.dump() | {"distiller": distiller, "optimizer": {"student": {"lr": 1e-3}}})
    running = run.build(plan(given), run.Progress())
    running.trainer.train_step()
    export_student(running.averaged(), running.plan.family, running.info(), tmp_path / "student")
    with verifying_here():
        assert verify(tmp_path / "student", seeds=(0, 1)).passed
    manifest = json.loads((tmp_path / "student/fastgen.json").read_text(encoding="utf-8"))
    assert manifest["guidance"] == (2.0 if guidance == "synchronised" else 1.0)


def test_plain_diffusers_draws_what_a_student_of_two_halvings_draws_as_an_adapter(source: Path, tmp_path: Path) -> None:
    given = recipe(source, "lcm", tmp_path, lora=True)  # of pictures
    running = run.build(plan(validate(Recipe, given.dump() | {"distiller": {"name": "progressive", "halvings": 2}})), run.Progress())
    for _ in range(2):
        running.trainer.train_step()
    first, last = (running.roles[name].own_network_parameters() for name in ("student_2", "student"))
    assert first.keys() == last.keys() and any((first[key] != last[key]).any() for key in first)
    export_lora(running.averaged(), running.plan.family, running.info(), tmp_path / "student")
    with verifying_here():
        assert verify(tmp_path / "student", seeds=(0, 1), teacher_dir=source).passed

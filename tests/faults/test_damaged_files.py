"""Damaged teachers, students, checkpoints, pairs and run folders: every command ends, with what it should do or with one line that says why not.

The mutations and the children they run in are file_mutations.py's. `-m slow` runs hundreds; a case that fails is named by its seed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from file_mutations import Verdict, command_line, in_a_child, strike
from pipelines import PROMPTS, adapter_tuning, student_info, student_role, tiny_sd3

from fastgen import cli
from fastgen.errors import UserError
from fastgen.export import export_lora, export_student
from fastgen.families.sd3 import SD3
from fastgen.generator import load_teacher

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")

TOKENS = 16
Command = Callable[[Path], Callable[[], int]]
OPTIMIZER = {"student": {"lr": 1e-4}, "fake_score": {"lr": 1e-4}}


def recipe(path: Path, teacher: dict[str, Any], data: dict[str, Any], name: str = "dmd2", **student: Any) -> None:
    method = {"name": name} if name == "dmd" else {"name": name, "critic_updates": 1}
    train = {"steps": 4, "batch_size": 2, "device": "cpu", "checkpoint_every": 2}
    content = {"teacher": teacher, "student": {"steps": 1, **student}, "distiller": method, "data": data, "optimizer": OPTIMIZER, "train": train}
    path.write_text(yaml.safe_dump(content))


def draw_from_teacher(root: Path) -> int:
    """As a user's own program would; the status is the command line's."""
    try:
        load_teacher(root / "teacher", max_sequence_length=TOKENS)(PROMPTS[:1], [0], 1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Scenario:
    """part: the folder that is damaged; command: what then reads it."""

    part: str
    command: Command


RECIPE, TOY = "recipe.yaml", "toy.yaml"
SCENARIOS = {
    "a teacher is planned with": Scenario("teacher", lambda root: command_line("train", root / RECIPE, "--dry-run", "--output", root / "new")),
    "a teacher draws": Scenario("teacher", lambda root: lambda: draw_from_teacher(root)),
    "a student draws": Scenario("student", lambda root: command_line("sample", root / "student", "--prompt", "a cat", "--output", root / "x.png")),
    "an adapter draws": Scenario("adapter", lambda root: command_line("sample", root / "adapter", "--prompt", "a cat", "--output", root / "x.png")),
    "an adapter's teacher": Scenario("teacher", lambda root: command_line("sample", root / "adapter", "--prompt", "x", "--output", root / "x.png")),
    "a run is resumed": Scenario(
        "toy_run", lambda root: command_line("train", root / TOY, "--output", root / "toy_run", "--only", "train", "--resume")
    ),
    "a run is exported": Scenario("run", lambda root: command_line("export", root / "run", "--output", root / "new")),
    "a run is reported": Scenario("run", lambda root: command_line("report", root / "run")),
    "pairs are planned with": Scenario(
        "pairs", lambda root: command_line("train", root / "on_pairs.yaml", "--output", root / "new", "--only", "train", "--dry-run")
    ),
    "pairs are trained on": Scenario(
        "pairs", lambda root: command_line("train", root / "on_pairs.yaml", "--output", root / "new", "--only", "train")
    ),
    "pairs are continued": Scenario(
        "pairs", lambda root: command_line("cache", "pairs", root / TOY, "--output", root / "pairs", "--count", "12", "--steps", "2")
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the scenarios damage, where it will lie then: recipes and records hold absolute paths."""
    scratch = tmp_path_factory.mktemp("files")
    root = scratch / "case"
    root.mkdir()
    tiny_sd3().save_pretrained(root / "teacher")
    teacher = {"pretrained": str(root / "teacher"), "guidance": 1.5, "max_sequence_length": TOKENS}
    (root / "prompts.txt").write_text("a red cat\na boat\n")
    (root / "toy.txt").write_text("0\n2\n")
    toy = {"pretrained": "toy:mixture"}
    recipe(root / RECIPE, teacher, {"prompts": str(root / "prompts.txt")})
    recipe(root / TOY, toy, {"prompts": str(root / "toy.txt")})
    recipe(root / "on_pairs.yaml", toy, {"prompts": str(root / "toy.txt"), "pairs": str(root / "pairs")}, "dmd")
    family = SD3(root / "teacher", max_sequence_length=TOKENS)
    export_student(student_role(family), family, student_info(root / "teacher"), root / "student")
    export_lora(student_role(family, tuning=adapter_tuning()), family, student_info(root / "teacher"), root / "adapter")
    commands = [
        ["train", root / RECIPE, "--output", root / "run", "--only", "train", "train.steps=2", "train.checkpoint_every=1", "train.keep=1"],
        ["train", root / TOY, "--output", root / "toy_run", "--only", "train"],
        ["cache", "pairs", root / TOY, "--output", root / "pairs", "--count", "8", "--steps", "2"],
    ]
    for arguments in commands:
        assert cli.main(list(map(str, arguments))) == 0
    shutil.copytree(root / "student", root / "run/student")
    rows = [
        {"name": name, "model": model, "steps": 1, "guidance": 1.0, "value": 0.5, "n": 8}
        for name in ("fid", "seconds_per_1000_images")
        for model in ("student", "teacher")
    ]
    rows += [{"name": "fid", "model": "real", "value": 0.1, "n": 8, "std": 0.01, "std_over": "5 draws", "floor": "split"}]
    provenance = {"date": "2026-11-01T00:00:00+00:00", "versions": {"torch": "2"}, "device": "cpu"}
    (root / "run/results.json").write_text(json.dumps({"protocol": "digits", "metrics": rows, "provenance": provenance}))
    for gone in ("tensorboard", "checkpoints/step_000004"):  # so that there is something to go on with
        shutil.rmtree(root / "toy_run" / gone)
    saved = scratch / "whole"
    root.rename(saved)
    return saved


def verdicts(whole: Path, name: str, seeds: range) -> list[Verdict]:
    scenario = SCENARIOS[name]
    return [strike(whole, whole.parent, scenario.part, scenario.command, seed) for seed in seeds]


def assert_good(found: list[Verdict]) -> None:
    bad = [str(verdict) for verdict in found if not verdict.good]
    assert not bad, f"{len(bad)} of {len(found)}:\n" + "\n".join(bad)


@pytest.fixture(scope="module", autouse=True)
def quiet_forks() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it warns after a fork
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", SCENARIOS)
def test_undamaged_folders_do(name: str, whole: Path) -> None:
    root = whole.parent / "case"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    status, said = in_a_child(SCENARIOS[name].command(root), whole.parent / "said")
    assert status == 0 and "error" not in said, said


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_few_damaged_files(name: str, whole: Path) -> None:
    assert_good(verdicts(whole, name, range(4)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_many_damaged_files(name: str, whole: Path) -> None:
    assert_good(verdicts(whole, name, range(1000, 1060)))

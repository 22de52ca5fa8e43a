"""What a later stage would refuse, the plan refuses: each mistake here once ended a line that had trained already."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipelines import edit_json
from pipelines import same_interpreter as same_interpreter
from pipelines import sd3_folder as sd3_folder

from fastgen import cli, run
from fastgen.config import Recipe, validate
from fastgen.errors import UserError
from fastgen.generator import load_student
from fastgen.plan import Plan, plan

Change = dict[str, Any]
WHOLE = ("distiller", "data", "optimizer")  # are replaced as a whole
PROMPTS = "a red cat\ntwo boats at sea\na small house\n"


@pytest.fixture
def recipe(sd3_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of the tiny pipeline, with blocks whose keys are replaced."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)

    def make(teacher: Path = sd3_folder, **changes: Change) -> Recipe:
        blocks: dict[str, Change] = {
            "teacher": {"pretrained": str(teacher), "guidance": 2.0, "max_sequence_length": 16},
            "student": {"steps": 2},
            "distiller": {"name": "dmd2", "critic_updates": 1},
            "data": {"prompts": str(tmp_path / "prompts.txt")},
            "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
            "train": {"steps": 1, "batch_size": 2, "device": "cpu", "sample_every": 0},
        }
        return validate(Recipe, blocks | {name: keys if name in WHOLE else blocks.get(name, {}) | keys for name, keys in changes.items()})

    return make


LORA: Any = {"tune": {"lora": {"rank": 2}}}


@pytest.mark.usefixtures("same_interpreter")
def test_the_line_exports_an_adapter_where_the_recipe_says_so(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    folder, prompts = tmp_path / "run", ["a red cat"]
    run.train(recipe(student=LORA, export={"weights": "lora"}), folder)
    adapter = folder / "student"
    assert {path.name for path in adapter.iterdir()} == {"README.md", "fastgen.json", "pytorch_lora_weights.safetensors", "scheduler"}
    assert (folder / "report.html").is_file()
    assert cli.main(["sample", str(adapter), "--prompt", prompts[0], "--output", str(tmp_path / "one.png")]) == 0
    assert cli.main(["export", str(folder), "--output", str(tmp_path / "again")]) == 0
    assert cli.main(["export", str(folder), "--output", str(tmp_path / "whole"), "--full"]) == 0
    assert json.loads((tmp_path / "again" / "fastgen.json").read_text())["weights"] == "lora"
    assert json.loads((tmp_path / "whole" / "fastgen.json").read_text())["weights"] == "full"
    difference = load_student(adapter)(prompts, [0]) - load_student(tmp_path / "whole")(prompts, [0])
    assert difference.abs().max() <= 1e-5


@pytest.mark.usefixtures("same_interpreter")
def test_an_adapter_in_the_line_is_measured_and_reported(tmp_path: Path) -> None:
    keys = ["student.tune.lora.rank=2", "export.weights=lora", "train.steps=1", "train.batch_size=4", "train.sample_every=0", "train.device=cpu"]
    assert cli.main(["train", "digits_dmd2_1step", *keys, "--output", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {row["model"] for row in results["metrics"]} == {"student", "teacher", "real"}
    assert (tmp_path / "run" / "report.html").is_file()


MEAN_FLOW: Any = {"distiller": {"name": "mean_flow"}, "data": {"images": "fastgen:digits"}, "optimizer": {"student": {"lr": 1e-3}}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, r"student\.tune: full has no adapter; `export\.weights: full` exports it whole"),
        ({"student": LORA, **MEAN_FLOW}, r"mean_flow gives the student a second time input, which an adapter cannot hold"),
    ],
)
def test_a_form_that_the_export_would_refuse(changes: Change, reason: str, recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=rf"recipe key export\.weights: .*{reason}"):
        plan(recipe(export={"weights": "lora"}, **changes))


def test_an_adapter_has_no_other_precision(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"recipe key export\.dtype: bf16 is of a whole pipeline; `export\.weights: lora` writes fp32"):
        plan(recipe(student=LORA, export={"weights": "lora", "dtype": "bf16"}))

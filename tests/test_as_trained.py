"""An export is the network that was trained: a folder that agrees with itself in plain diffusers may still be another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen import run
from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.export import Verification, verify, worst_difference
from fastgen.run import products

SMALL = ["train.batch_size=4", "train.steps=2", "train.sample_every=0", "evaluate.protocol=null", "train.device=cpu", "optimizer.student.warmup=0"]
LORA = "student.tune={lora: {rank: 2, alpha: 4}}"


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have exports write a network one of whose weights is not what was trained."""
    write = products._write_student

    def spoiled(*arguments: Any, student: list[Any], **options: Any) -> Path:
        weight = next(iter(student[0].role.own_network_parameters().values()))
        with torch.no_grad():
            weight.mul_(1.5)
        return write(*arguments, student=student, **options)

    monkeypatch.setattr(products, "_write_student", spoiled)


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)


@pytest.mark.usefixtures("another")
@pytest.mark.parametrize("more", [[], [LORA, "export.weights=lora", "optimizer.student.lr=0.1"]], ids=["full", "lora"])
def test_an_export_of_another_network_is_an_error(more: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="draws other pictures than the network that was trained, by "):
        run.train(Recipe.load("digits_dmd2_1step", [*SMALL, *more]), tmp_path / "run")


PHASES, MOE = "digits_phased_dmd_4step", ["student.moe={experts: 4, importance: magnitude, calibration: 0, router_std: 0.5}"]
EXPORTED = [("digits_dmd2_1step", [], "full"), ("digits_dmd2_1step", [LORA], "lora"), ("digits_dmd2_1step", MOE, "full"), (PHASES, [LORA], "lora")]


@pytest.mark.parametrize(("recipe", "keys", "weights"), EXPORTED, ids=["full", "lora", "experts", "phases"])
def test_the_command_compares_what_it_exports_too(recipe: str, keys: list[str], weights: Any, tmp_path: Path) -> None:
    run_dir = run.train(Recipe.load(recipe, [*SMALL, "optimizer.student.lr=0.1", *keys]), tmp_path / "run", only="train")
    run.export(run_dir, tmp_path / "student", weights=weights)
    with pytest.MonkeyPatch.context() as patched:
        spoil(patched)
        with pytest.raises(UserError, match=r"student': draws other pictures than the network that was trained, by "):
            run.export(run_dir, tmp_path / "student", weights=weights)


def test_at_each_of_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []

    def seen(one: Sequence[Any], other: Sequence[Any]) -> float:
        drawn.extend(list(each.shape[-2:]) for each in one)
        return worst_difference(one, other)

    monkeypatch.setattr("fastgen.export.worst_difference", seen)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n", encoding="utf-8")
    recipe = Recipe.load("scenes_dmd2_sizes_1step", [*SMALL, f"data.prompts={prompts}", "optimizer.fake_score.warmup=0"])
    run.export(run.train(recipe, tmp_path / "run", only="train"), tmp_path / "student")
    assert drawn == [list(size) for size in recipe.student.sizes or ()] and len(drawn) > 1


@pytest.mark.usefixtures("another")
def test_in_half_precision_it_is_a_warning(tmp_path: Path) -> None:
    heard: list[str] = []

    class Heard(run.Progress):
        def warn(self, message: str) -> None:
            heard.append(message)

    run.train(Recipe.load("digits_dmd2_1step", [*SMALL, "export.dtype=fp16"]), tmp_path / "run", progress=Heard())
    assert [message for message in heard if "than the network that was trained" in message]


@pytest.mark.parametrize(("recipe", "keys"), [("digits_meanflow_2step", []), ("digits_phased_dmd_4step", [LORA, "export.weights=lora"])])
def test_what_is_folded_merged_or_divided_is_still_what_was_trained(
    recipe: str, keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Verification] = []

    def heard(*arguments: Any, **options: Any) -> Verification:
        seen.append(verify(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(products, "verify", heard)
    run.train(Recipe.load(recipe, [*SMALL, *keys]), tmp_path / "run")
    (result,) = seen
    assert result.trained_error is not None and result.trained_error <= 1e-5

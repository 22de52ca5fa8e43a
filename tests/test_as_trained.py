"""An export is the network that was trained: a folder that agrees with itself in plain diffusers may still be another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen import run
from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.export import Verification, verify
from fastgen.run import products

SMALL = ["train.batch_size=4", "train.steps=2", "train.sample_every=0", "evaluate.protocol=null", "train.device=cpu", "optimizer.student.warmup=0"]
LORA = "student.tune={lora: {rank: 2, alpha: 4}}"


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of a network one of whose weights is not what was trained."""
    write = products._write_student

    def spoiled(*arguments: Any, student: list[Any], **options: Any) -> Path:
        weight = next(iter(student[0].role.own_network_parameters().values()))
        with torch.no_grad():
            weight.mul_(1.5)
        return write(*arguments, student=student, **options)

    monkeypatch.setattr(products, "_write_student", spoiled)


@pytest.mark.usefixtures("another")
@pytest.mark.parametrize("more", [[], [LORA, "export.weights=lora", "optimizer.student.lr=0.1"]], ids=["full", "lora"])
def test_an_export_of_another_network_is_an_error(more: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="draws other pictures than the network that was trained, by "):
        run.train(Recipe.load("digits_dmd2_1step", [*SMALL, *more]), tmp_path / "run")


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

"""Verification asks the family: what a stock call is given, which path times its scheduler has taken, and by how much rounding grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import card_snippet, run_snippet, student_info, student_role
from pipelines import same_interpreter as same_interpreter
from pipelines import sd3_folder as sd3_folder
from torch import Tensor

from fastgen import card, cli, export, generator
from fastgen.errors import UserError
from fastgen.export import TOLERANCE, Verification, export_student, verify
from fastgen.families.sd3 import SD3
from fastgen.families.toy import Toy
from fastgen.generator import read_manifest
from fastgen.path import Kind, VariancePreserving

SIZE = [24, 16]


@pytest.fixture(scope="module")
def original(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = SD3(sd3_folder, max_sequence_length=16, size=SIZE)
    return export_student(student_role(family), family, student_info(sd3_folder, steps=2), tmp_path_factory.mktemp("verified") / "student")


@pytest.mark.usefixtures("same_interpreter")
def test_a_student_of_pictures_that_are_not_square(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = verify(original)
    assert (result.passed, result.tolerance) == (True, TOLERANCE)
    manifest = read_manifest(original)
    assert manifest["inputs"] == {"prompt": manifest["prompts"]}
    assert "    prompt='a red cat',\n" in card_snippet(original)
    assert run_snippet(monkeypatch, original).shape == (24, 16, 3)


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize(("dtype", "least"), [("bf16", 1e-4), ("fp16", 1e-5)])
def test_in_half_precision_both_draw_in_it(original: Path, dtype: str, least: float) -> None:
    result = verify(original, dtype=dtype)
    assert result.passed, result
    assert least < result.picture_error < result.tolerance
    assert result.grid_error <= TOLERANCE


class Reversed(SD3):
    """Its scheduler's record says the times otherwise, and its call has another name for prompts."""

    def path_times(self, timesteps: Tensor, sigmas: Tensor) -> Tensor:
        return timesteps.double() / 1000

    def call_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        return {"prompt": [prompt.upper() for prompt in prompts]}

    def encode_texts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return super().encode_texts([prompt.upper() for prompt in prompts])


@pytest.mark.usefixtures("same_interpreter")
def test_verification_goes_through_the_family(sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Reversed(sd3_folder, max_sequence_length=16)
    folder = export_student(student_role(family), family, student_info(sd3_folder, steps=2), tmp_path / "student")
    assert "prompt='A RED CAT'" in card_snippet(folder)
    assert not verify(folder).passed, "SD3 itself reads the prompts as they are"
    monkeypatch.setattr(generator, "find_family", lambda *args, **options: Reversed(*args, **options))
    result = verify(folder)
    assert result.passed, result
    monkeypatch.setattr(Reversed, "path_times", lambda self, timesteps, sigmas: timesteps.double() / 999)
    assert verify(folder).grid_error == pytest.approx(1 / 999, rel=1e-3)


def test_an_eps_prediction_makes_rounding_larger_by_one_over_alpha() -> None:
    path = VariancePreserving()
    t = 0.97
    alpha, sigma = path.coeffs(torch.tensor([t], dtype=torch.float64))
    kinds: dict[Kind, float] = {"eps": 1 / alpha.item(), "v": 1.0, "x0": 1.0}
    for kind, expected in kinds.items():
        family = Toy("toy:gaussian", path=path, kind=kind)
        assert family.amplification(t) == pytest.approx(expected, rel=1e-12)
    x, eps = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    moved = [path.convert(eps + error, x, torch.tensor([t], dtype=torch.float64), "eps", "x0").item() for error in (0.0, 1e-6)]
    assert abs(moved[1] - moved[0]) == pytest.approx(1e-6 * sigma.item() / alpha.item(), rel=1e-6)
    assert Verification(0.0, 1e-4, 4, TOLERANCE * 14).passed
    assert not Verification(0.0, 1e-4, 4).passed
    assert not Verification(1e-4, 0.0, 4, 1.0).passed


def test_what_a_call_is_given_may_be_texts_labels_or_a_number() -> None:
    assert card.chosen({"prompt": ["a", "b"]}, [1, 0, 1]) == {"prompt": ["b", "a", "b"]}
    assert card.chosen({"class_labels": [7, 1000]}, [0]) == {"class_labels": [7]}
    assert card.chosen({"batch_size": 8}, [0, 1]) == {"batch_size": 2}
    assert card.chosen({}, [0]) == {}
    record = {"weights": "full", "prompts": [""], "call": {"num_inference_steps": 1}, "options": {}, "inputs": {"class_labels": [7, 8]}}
    assert card.call_snippet(record).endswith(
        "image = pipe(\n    class_labels=[7],\n    num_inference_steps=1,\n    generator=torch.Generator().manual_seed(0),\n).images[0]\n"
    )
    video = card.call_snippet(record | {"options": {"frames": 5}, "inputs": {"prompt": ["a 'cat'"]}})
    assert """video = pipe(\n    prompt="a 'cat'",\n""" in video
    assert video.endswith(").frames[0]\n")


def test_the_command_names_its_options(original: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, said in ((["--dtype", "fp8"], "--dtype: 'fp8' is no precision; allowed: fp32"), (["--device", "tpu"], "--device: 'tpu' is not")):
        assert cli.main(["verify", str(original), *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")
    asked: list[Any] = []
    monkeypatch.setattr(export, "verify", lambda folder, **options: asked.append(options) or Verification(0.0, 0.0, 4))
    assert cli.main(["verify", str(original), "--device", "cpu", "--dtype", "bf16"]) == 0
    assert asked == [{"teacher_dir": None, "device": torch.device("cpu"), "dtype": "bf16"}]


def test_inputs_that_are_no_identifiers_are_refused(original: Path) -> None:
    record = read_manifest(original) | {"inputs": {"prompt=1); import os; (x": ["a"]}}
    with pytest.raises(UserError, match="names 'prompt=1"):
        card.call_snippet(record)

"""The training benchmark reports what a run and its CPU reference say, tells equal runs from unequal ones, and hides no failure."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import short_training
from benchmarks.measuring import rows, worker
from benchmarks.measuring.case import Case, Target
from fastgen.config import Recipe
from fastgen.errors import TrainingFailed, UserError
from fastgen.export import Verification

CPU, REHEARSAL = Target("cpu"), Target("cpu", rehearsal=True)
RECIPE = "digits_dmd2_1step"
NAMES = ("fd_digits", "prompt_accuracy", "parity_accuracy", "training_seconds")


def reference_file(path: Path, **means: tuple[float, float]) -> Path:
    """Means and deviations by metric, among other recipes' rows and single seeds."""
    lines: list[dict[str, Any]] = [{"name": "fd_digits", "model": "digits_scm_2step", "value": 77.0, "std": 7.0, "seeds": [0, 1]}]
    for name, (value, std) in means.items():
        lines.append({"name": name, "model": RECIPE, "value": value, "std": std, "seeds": [0, 1]})
        lines += [{"name": name, "model": RECIPE, "value": 1000.0 + seed, "seed": seed} for seed in (0, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def stand_in_run(folder: Path, losses: list[float], weight: torch.Tensor) -> Path:
    """A run folder as training leaves it: a step a second, the first in three."""
    folder.mkdir(parents=True)
    lines = [{"step": i + 1, "loss": loss, "seconds": 3.0 + i, "samples_per_second": 128 / (1 if i else 3)} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = folder / "checkpoints" / f"step_{len(losses):06d}"
    kept.mkdir(parents=True)
    save_file({"w": weight}, kept / "student.safetensors")
    (kept / "state.json").write_text("{}")
    return folder


def test_the_reference_is_the_mean_over_seeds(tmp_path: Path) -> None:
    path = reference_file(tmp_path / "rows", **{name: (i + 0.5, 0.1 * i) for i, name in enumerate(NAMES)})
    found = short_training.cpu_reference(RECIPE, path)
    assert found == {name: {"mean": i + 0.5, "std": 0.1 * i} for i, name in enumerate(NAMES)}
    reference_file(path, fd_digits=(4.0, 0.2), prompt_accuracy=(1.0, 0.1))
    with pytest.raises(ValueError, match=r"no mean and deviation over seeds of parity_accuracy, training_seconds of digits_dmd2_1step"):
        short_training.cpu_reference(RECIPE, path)


def test_the_repository_holds_references_of_both_recipes() -> None:
    """README's table: 4.35 ± 0.23 and 2.86 ± 0.04."""
    for recipe, mean, std in ((RECIPE, 4.35, 0.23), ("digits_scm_2step", 2.86, 0.04)):
        fd = short_training.cpu_reference(recipe)["fd_digits"]
        assert (round(fd["mean"], 2), round(fd["std"], 2)) == (mean, std)


def test_recipes_run_as_shipped() -> None:
    for recipe in short_training.RECIPES:
        own, shipped = (Recipe.load(recipe, keys).dump() for keys in (short_training.overrides(CPU), ()))
        assert own["train"].pop("device") == "cpu" and shipped["train"].pop("device") == "auto"
        assert own == shipped and own["train"]["seed"] == 0 and own["evaluate"]["protocol"] == "digits"


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A whole line of stand-ins; what they were asked for."""
    asked: dict[str, Any] = {"verification": Verification(1e-7, 3e-6, 4)}

    def train(recipe: Recipe, folder: Path, *, only: str) -> Path:
        asked["device"], asked["only"] = recipe.train.device, only
        return stand_in_run(folder, [1.0, 2.0, 3.0], torch.ones(2))

    def export(run_dir: Path, output: Path) -> Path:
        output.mkdir()
        return output

    def evaluate(student: Path, *, protocol: str, teacher: bool, device: str) -> dict[str, Any]:
        asked["evaluated"] = (protocol, teacher, device)
        values = {"fd_digits": 4.0, "prompt_accuracy": 0.9, "parity_accuracy": 0.95, "diversity": 11.0}
        real = {"model": "real", "name": "fd_digits", "value": 0.2}
        return {"metrics": [*({"model": "student", "name": name, "value": value} for name, value in values.items()), real]}

    for name, stage in (("train", train), ("export", export), ("evaluate", evaluate)):
        monkeypatch.setattr(short_training.run, name, stage)
    monkeypatch.setattr(short_training, "verify", lambda student: asked["verification"])
    monkeypatch.setattr(short_training, "read_manifest", lambda student: {"prompts": ["a", "b", "c", "d", "e"]})
    drawn = {"cpu": 0.25, "cuda": 0.5}
    monkeypatch.setattr(short_training, "load_student", lambda _, device: lambda prompts, seeds: torch.full((len(prompts),), drawn[device]))
    path = reference_file(
        tmp_path / "rows", fd_digits=(5.0, 0.5), prompt_accuracy=(0.8, 0.05), parity_accuracy=(0.95, 0.01), training_seconds=(100.0, 9.0)
    )
    reference = short_training.cpu_reference
    monkeypatch.setattr(short_training, "cpu_reference", lambda recipe: reference(recipe, path))
    return asked


def test_a_row_holds_speed_proof_and_quality_beside_the_cpus(stages: dict[str, Any]) -> None:
    row = short_training.trained(RECIPE, CPU)[0]
    assert row == {
        "recipe": RECIPE, "steps": 3, "batch_size": 128, "seconds": 5.0, "first_step_s": 3.0, "samples_per_s": 128.0,
        "samples_per_s_of_all": pytest.approx(3 * 128 / 5), "peak_bytes": None, "verify_grid_error": 1e-7, "verify_picture_error": 3e-6,
        "difference_from_cpu": 0.0, "fd_digits": 4.0, "prompt_accuracy": 0.9, "parity_accuracy": 0.95,
        "fd_cpu_mean": 5.0, "fd_cpu_std": 0.5, "prompt_accuracy_cpu_mean": 0.8, "prompt_accuracy_cpu_std": 0.05,
        "parity_accuracy_cpu_mean": 0.95, "parity_accuracy_cpu_std": 0.01, "training_seconds_cpu_mean": 100.0,
        "training_seconds_cpu_std": 9.0, "fd_deviations": -2.0,
    }  # fmt: skip
    assert stages["device"] == "cpu" and stages["only"] == "train" and stages["evaluated"] == ("digits", False, "cpu")
    assert short_training.from_cpu(Path(), Target("cuda")) == 0.25


def test_a_rehearsal_measures_no_quality(stages: dict[str, Any]) -> None:
    row = short_training.trained(RECIPE, REHEARSAL)[0]
    assert "evaluated" not in stages and "fd_digits" not in row and row["fd_cpu_mean"] == 5.0


def outcome(tmp_path: Path, target: Target = CPU) -> dict[str, Any]:
    """The last row that the worker writes of one recipe."""
    path = tmp_path / "lines.jsonl"
    rows.append(path, [{"slice": "environment", "run": "r", "case": "environment", "status": "measured"}])
    worker.work("training", [Case(RECIPE, lambda: short_training.trained(RECIPE, target))], path, "r", 9e9)
    return rows.read(path)[-1]


def test_a_student_that_plain_diffusers_draws_otherwise_is_a_failure(stages: dict[str, Any], tmp_path: Path) -> None:
    stages["verification"] = Verification(0.0, 0.02, 4)
    with pytest.raises(UserError, match=r"plain diffusers differs from our sampler: grid by 0, pictures by 0\.02"):
        short_training.trained(RECIPE, CPU)
    row = outcome(tmp_path)
    assert row["status"] == "failed" and row["reason"].startswith("UserError: ") and "fd_digits" not in row


def test_a_run_that_diverges_is_a_failure_with_its_reason(stages: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(recipe: Recipe, folder: Path, *, only: str) -> Path:
        raise TrainingFailed("step 7: the loss of term 'match' is nan", role="student")

    monkeypatch.setattr(short_training.run, "train", train)
    assert outcome(tmp_path)["reason"] == "TrainingFailed: step 7: the loss of term 'match' is nan"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_a_failure_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands in: training itself refuses."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    row = outcome(tmp_path, Target("cuda"))
    assert row["status"] == "failed"
    assert row["reason"].startswith("UserError: recipe key train.device: 'cuda' is not available here")


def test_equal_to_the_bit_or_the_largest_difference() -> None:
    first = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([3, 4])}
    assert short_training.compared(first, {name: tensor.clone() for name, tensor in first.items()}) == {
        "tensors": 2, "unequal_tensors": 0, "equal": True, "largest_difference": 0.0
    }  # fmt: skip
    second = {"a": torch.tensor([1.0, -1.5]), "b": torch.tensor([3, 4])}
    assert short_training.compared(first, second) == {"tensors": 2, "unequal_tensors": 1, "equal": False, "largest_difference": 0.5}
    with pytest.raises(ValueError, match="only one of two equal runs saved b"):
        short_training.compared(first, {"a": first["a"]})


def test_runs_that_part_are_told_with_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds do not count."""
    ends = iter([([1.0, 2.0, 3.0], 5.0), ([1.0, 2.5, 3.5], 5.25), ([1.0], 5.0), ([1.0], 5.0)])

    def train(recipe: Recipe, folder: Path, *, only: str) -> Path:
        assert torch.are_deterministic_algorithms_enabled() and recipe.train.steps == 10 and recipe.train.batch_size == 128
        if folder.name == "second":
            warnings.warn("scatter_add does not have a deterministic implementation, but you set it. You can file an issue", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        losses, weight = next(ends)
        return stand_in_run(folder, losses, torch.tensor([weight]))

    monkeypatch.setattr(short_training.run, "train", train)
    row = short_training._repeated(RECIPE, CPU, deterministic=True)
    assert row == {
        "recipe": RECIPE, "steps": 10, "algorithms": "deterministic", "tensors": 1, "unequal_tensors": 1, "equal": False,
        "largest_difference": 0.25, "first_unequal_step": 2,
        "complaints": ["scatter_add does not have a deterministic implementation, but you set it"],
    }  # fmt: skip
    assert not torch.are_deterministic_algorithms_enabled()
    row = short_training._repeated(RECIPE, CPU, deterministic=True)
    assert (row["equal"], row["first_unequal_step"], row["largest_difference"]) == (True, None, 0.0)


def test_two_real_runs_on_a_cpu_are_equal_to_the_bit(tmp_path: Path) -> None:
    """Of a closed-form teacher, which is quick."""
    (tmp_path / "prompts.txt").write_text("0\n")
    recipe = {
        "teacher": {"pretrained": "toy:mixture"}, "student": {"steps": 1}, "distiller": {"name": "dmd2"},
        "data": {"prompts": str(tmp_path / "prompts.txt")}, "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "train": {"steps": 5, "batch_size": 4},
    }  # fmt: skip
    (tmp_path / "toy.yaml").write_text(json.dumps(recipe))
    row = short_training.twice(str(tmp_path / "toy.yaml"), REHEARSAL)[0]
    assert row["equal"] and row["tensors"] > 10 and row["steps"] == 2 and row["complaints"] == [] and row["first_unequal_step"] is None


def test_cases_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # put back after; a user's own choice stays
    for target in (CPU, REHEARSAL, Target("cuda")):
        names = [case.name for case in short_training.cases(target)]
        assert len(set(names)) == len(names) == (2 if target.rehearsal else 4)
    assert short_training.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"

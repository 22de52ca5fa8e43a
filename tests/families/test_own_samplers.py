"""Samplers that no pipeline has, from recipe to rows: recorded, drawn with, measured beside the stock one, and refused where they make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import PROMPTS, assert_shows, student_info, student_role, verifying_here
from tiny_sd15 import tiny_sd15

from fastgen import cli, load_student
from fastgen.config import Recipe, validate
from fastgen.distillers.base import Facts
from fastgen.distillers.perflow import PeRFlow
from fastgen.errors import UserError
from fastgen.export import export_student
from fastgen.families import find_family
from fastgen.generator import load_teacher_of, noise_from_seeds, read_manifest
from fastgen.path import DiscreteVP, Flow
from fastgen.path import Path as NoisingPath
from fastgen.plan import plan
from fastgen.sampling import few_step
from fastgen.windows import through_windows

REFLOW = ["digits_reflow_1step", "student.steps=3", "student.sampler=fixed_noise", "data.pairs=8", "train.batch_size=8", "train.steps=1"]
SMALL = ["evaluate.protocol=null", "train.checkpoint_every=0", "train.sample_every=0", "optimizer.student.lr=0.01"]


@pytest.fixture(scope="module")
def reflowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "run"
    with verifying_here():
        assert cli.main(["train", *REFLOW, *SMALL, "--output", str(folder)]) == 0  # which verifies the stock steps
    return folder / "student"


def test_the_student_is_exported_as_stock_and_says_what_it_is_made_for(reflowed: Path) -> None:
    manifest = read_manifest(reflowed)
    assert (manifest["sampler"], manifest["own_sampler"]) == ("euler", {"name": "fixed_noise"})
    assert manifest["recipe"]["student"]["sampler"] == "fixed_noise"
    assert "It is made for a sampler that no pipeline has, `fixed_noise`, which `fastgen sample` draws with" in (reflowed / "README.md").read_text()


def test_sample_draws_with_it_and_natively_if_asked(reflowed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    student, file = load_student(reflowed), tmp_path / "new.png"
    arguments = ["sample", str(reflowed), "--prompt", "any digit", "--seed", "5", "--output", str(file)]
    own, native = student.with_own_sampler()(["any digit"], [5]), student(["any digit"], [5])
    family, times = student.family, student.times()
    latents = few_step(student.predict, noise_from_seeds([5], family.latent.shape), times, student.conditioning(["any digit"]), renoise="fixed")
    torch.testing.assert_close(family.decode_latents(latents), own, rtol=0, atol=1e-6)
    assert (own - native).abs().max() > 1e-3
    for options, expected in (([], own), (["--native"], native)):
        assert cli.main([*arguments, *options]) == 0
        assert_shows(np.asarray(Image.open(file)), expected)
    capfd.readouterr()
    assert cli.main([*arguments, "--steps", "1"]) == 2
    said = "error: --steps: fixed_noise, but a student of one step does not come back to its noise; draw with --native, or other steps\n"
    assert capfd.readouterr().err == said
    assert cli.main([*arguments, "--steps", "1", "--native"]) == 0


def test_evaluate_has_rows_of_both(reflowed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.json"
    evaluated = ["evaluate", str(reflowed), "--no-teacher", "--stop-after", "40", "--store", str(tmp_path / "store"), "--output", str(results)]
    assert cli.main([*evaluated, "--steps", "1,3"]) == 0
    assert "student is not drawn with fixed_noise: a student of one step does not come back to its noise" in capfd.readouterr().err
    found = json.loads(results.read_text(encoding="utf-8"))
    models = found["provenance"]["models"]
    assert list(models) == ["student, 1 step", "student, 3 steps", "student_fixed_noise, 3 steps"]
    native, own = models["student, 3 steps"], models["student_fixed_noise, 3 steps"]
    assert (native["sampler"], own["sampler"]) == ("euler", "fixed_noise")
    assert "scheduler" in native and "scheduler" not in own and native["sha256"] == own["sha256"]
    values = {(row["model"], row["steps"]): row["value"] for row in found["metrics"] if row["name"] == "fd_digits" and "steps" in row}
    assert values.keys() == {("student", 1), ("student", 3), ("student_fixed_noise", 3)}
    assert values["student", 3] != values["student_fixed_noise", 3]


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    tiny_sd15().save_pretrained(folder / "teacher")
    family = find_family(folder / "teacher")
    edges = {"name": "linear_windows", "edges": [1.0, family.sampling_times(4)[2].item(), 0.0]}
    return export_student(student_role(family, noise=0.1), family, student_info(folder / "teacher", own_sampler=edges), folder / "student")


def test_a_student_of_linear_windows_is_drawn_through_them(windowed: Path) -> None:
    student = load_student(windowed)
    edges, noise = read_manifest(windowed)["own_sampler"]["edges"], noise_from_seeds([3, 4], student.family.latent.shape)
    cond = student.conditioning(PROMPTS[:2])
    want = through_windows(student.predict, noise, student.times(), edges, cond, kind="eps")
    got = student.with_own_sampler().latents(PROMPTS[:2], [3, 4])
    assert torch.equal(got, want)
    assert (got - student.latents(PROMPTS[:2], [3, 4])).abs().max() > 1e-3
    assert student.why_not_own(4) is None
    said = student.why_not_own(3)
    assert said is not None and said.startswith("3 steps do not stop at the ends of its windows, [1.0, ")


def test_a_handed_over_sample_is_on_no_windows_line(windowed: Path) -> None:
    with pytest.raises(UserError, match=r"^--first-step-from-teacher: hands over between the lines of linear_windows; draw with --native$"):
        load_student(windowed).with_own_sampler().with_first_step(load_teacher_of(windowed, teacher_dir=windowed.parent / "teacher"), 4)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("digits_dmd2_1step", ["student.sampler=fixed_noise"], "fixed_noise, but dmd2 trains steps of the euler or stochastic sampler alone"),
        ("digits_reflow_1step", ["student.sampler=fixed_noise"], "fixed_noise, but a student of one step does not come back to its noise; use euler"),
        (
            "digits_reflow_1step",
            ["student.sampler=linear_windows"],
            "linear_windows, but reflow trains steps of the euler or stochastic or fixed_noise sampler alone",
        ),
        (
            "digits_perflow_4step",
            ["student.sampler=linear_windows", "distiller.interpolant=linear"],
            "linear_windows, but this student's windows are what a stock sampler goes through; use euler: "
            "linear_windows is for distiller.interpolant: linear, on a curved path, with more steps than windows",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_key(recipe: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(Recipe.load(recipe, overrides))
    assert str(caught.value) == f"recipe key student.sampler: {message}"


@pytest.mark.parametrize(
    ("path", "interpolant", "windows", "allowed"),
    [
        (DiscreteVP.scaled_linear(1000, 0.00085, 0.012), "linear", 2, True),
        (DiscreteVP.scaled_linear(1000, 0.00085, 0.012), "linear", 4, False),
        (DiscreteVP.scaled_linear(1000, 0.00085, 0.012), "constant", 2, False),
        (Flow(), "linear", 2, False),
    ],
)
def test_linear_windows_are_for_lines_that_leave_the_path(path: NoisingPath, interpolant: str, windows: int, allowed: bool) -> None:
    config: Any = validate(PeRFlow.Config, {"name": "perflow", "interpolant": interpolant, "windows": windows}, "distiller")
    facts = Facts(4, 1.0, (1.0, 0.75, 0.5, 0.25), path.t_max, path=path, own_sampler="linear_windows")
    if allowed:
        return PeRFlow.check(config, facts)
    with pytest.raises(UserError, match=r"^recipe key student\.sampler: linear_windows, but this student's windows are what a stock sampler"):
        PeRFlow.check(config, facts)

"""Which blocks a smaller student keeps by importance: what the loss says of a network without each, and what becomes of it in a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import same_interpreter as same_interpreter
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen import cli, run
from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.export import verify
from fastgen.families import find_family
from fastgen.outlook import dry_run
from fastgen.plan import plan
from fastgen.surgery.block_importance import without_each
from fastgen.surgery.shrink import Shrink, most_important


class Residual(nn.Module):
    """x + w x."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * x


class Chain(nn.Module):
    """prod (1 + w_i) x, whose configuration counts its blocks as a diffusers transformer's does."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(weight) for weight in weights])
        self.config = {"num_layers": len(weights)}

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def batches(network: nn.Module, target: float, *values: float) -> Any:
    return [lambda x=x: (network(torch.tensor(x, dtype=torch.float64)) - target * x).square() for x in values]


def test_the_rise_is_that_of_the_loss_without_the_block() -> None:
    chain = Chain(0.5, 0.0, -0.2, 1.0)
    whole = 1.5 * 0.8 * 2
    losses = {0: (0.8 * 2 - whole) ** 2, 1: 0.0, 2: (1.5 * 2 - whole) ** 2, 3: (1.5 * 0.8 - whole) ** 2}
    found = without_each(chain, {"blocks": [0, 1, 2, 3]}, batches(chain, whole, 1.0, 2.0))
    assert {place: pytest.approx(2.5 * loss, abs=1e-14) for place, loss in losses.items()} == found["blocks"]  # mean of 1 and 2 squared
    assert found["blocks"][1] == 0  # the identity, to the bit
    assert len(chain.blocks) == 4 and chain(torch.ones(())).item() == pytest.approx(whole)  # as it was


@pytest.mark.parametrize(("depth", "kept"), [(0.75, [0, 2, 3]), (2, [0, 3]), (1, [3]), (1.0, [0, 1, 2, 3])])
def test_the_identity_goes_first_and_the_others_by_what_they_do(depth: float, kept: list[int]) -> None:
    chain = Chain(0.5, 0.0, -0.2, 1.0)
    assert most_important(chain, Shrink(depth, "importance"), batches(chain, 2.4, 1.0)) == {"blocks": kept}


def test_a_block_that_does_harm_goes_before_one_that_does_nothing() -> None:
    chain = Chain(1.0, 0.0, 0.3)
    assert most_important(chain, Shrink(2, "importance"), batches(chain, 2.0, 1.0)) == {"blocks": [0, 1]}


def test_without_batches_nothing_is_measured() -> None:
    with pytest.raises(ValueError, match="at least one"):
        without_each(Chain(1.0), {"blocks": [0]}, [])


def test_a_block_without_which_the_loss_is_not_finite_stays() -> None:
    chain = Chain(1.0, 0.5)
    found = without_each(chain, {"blocks": [0, 1]}, [lambda: torch.tensor(1.0 if len(chain.blocks) == 2 else float("nan"))])
    assert found == {"blocks": {0: float("inf"), 1: float("inf")}}


# In a run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits teacher, in which block 2 of 4 passes on what it gets."""
    folder = tmp_path_factory.mktemp("teacher") / "pipeline"
    family = find_family("fastgen:digits")
    network: Any = family.load_backbone()
    block = network.transformer_blocks[2]
    with torch.no_grad():
        for layer in (block.attn.to_out[0], block.attn.to_add_out, block.ff.net[2], block.ff_context.net[2]):
            layer.weight.zero_()
            layer.bias.zero_()
    family.load_pipeline(network, family.export_scheduler()).save_pretrained(folder)
    return folder


def digits(teacher: Path | str, *overrides: str) -> Recipe:
    keys = [f"teacher.pretrained={teacher}", "train.batch_size=4", "train.sample_every=0", "train.device=cpu", "evaluate.protocol=null"]
    shrink = ["student.shrink={depth: 3, keep: importance, calibration: 2}", "train.steps=2", "train.checkpoint_every=1"]
    return Recipe.load("digits_dmd2_1step", [*keys, *shrink, *overrides])


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.train(digits(teacher), tmp_path_factory.mktemp("importance") / "run", only="train")


def kept(manifest: Path) -> Any:
    return json.loads((manifest / "fastgen.json").read_text(encoding="utf-8"))["surgery"]["shrink"]["kept"]


@pytest.mark.usefixtures("same_interpreter")
def test_the_student_has_no_identity_and_says_which_blocks_it_has(whole: Path, tmp_path: Path) -> None:
    student = run.export(whole, tmp_path / "student")
    assert kept(student) == {"transformer_blocks": [0, 1, 3]}
    assert "3 of 4 transformer_blocks (0, 1, 3)" in (student / "README.md").read_text(encoding="utf-8")
    assert verify(student).passed


def test_a_student_begins_with_the_blocks_that_stayed(teacher: Path) -> None:
    running = run.build(plan(digits(teacher), only="train"), run.Progress())
    assert running.plan.kept == {"transformer_blocks": [0, 1, 3]}
    network: Any = running.roles["student"].denoiser.backbone
    theirs: Any = running.roles["teacher"].denoiser.backbone
    for ours, place in zip(network.transformer_blocks, [0, 1, 3], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.transformer_blocks[place].parameters(), strict=True))
    assert len(theirs.transformer_blocks) == 4


def test_a_continuation_measures_nothing_anew(whole: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("measured again")

    resumed = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(resumed / "checkpoints/step_000002")
    monkeypatch.setattr("fastgen.run.calibration.most_important", refuse)
    run.train(digits(teacher), resumed, resume=True, only="train")
    got, want = (load_file(folder / "checkpoints/step_000002/ema_student.safetensors") for folder in (resumed, whole))
    assert all(torch.equal(got[key], want[key]) for key in want)
    for steps in ("step_000001", "step_000002"):  # killed before its first checkpoint
        shutil.rmtree(resumed / "checkpoints" / steps)
    run.train(digits(teacher), resumed, resume=True, only="train")
    again = load_file(resumed / "checkpoints/step_000002/ema_student.safetensors")
    assert all(torch.equal(again[key], want[key]) for key in want)
    begun = run.build(plan(digits(teacher, f"student.init={whole}"), only="train"), run.Progress())  # another run's student brings its own
    assert begun.plan.kept == {"transformer_blocks": [0, 1, 3]}


def test_a_run_is_resumed_with_the_same_calibration(whole: Path, teacher: Path) -> None:
    with pytest.raises(UserError, match=r"recipe key student\.shrink\.calibration is 3, the run in .* has 2"):
        run.train(digits(teacher, "student.shrink.calibration=3"), whole, resume=True, only="train")


def test_a_dry_run_says_what_is_not_known_yet(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = dry_run(digits(teacher))["student"]
    assert found["unmeasured"] and len(found["kept"]["transformer_blocks"]) == 3
    keys = [f"{key}={value}" for key, value in {"student.shrink.depth": 3, "student.shrink.keep": "importance"}.items()]
    assert cli.main(["plan", "digits_dmd2_1step", *keys]) == 0
    assert "student: 3 of 4 transformer_blocks (by importance, measured when the run begins), " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.shrink={keep: importance}", ".keep: importance of how many blocks? give student.shrink.depth too (given: 'importance')"),
        (
            "student.shrink={depth: 0.5, keep: importance, init: random}",
            ".init: importance is of the teacher's weights, which a random start leaves behind; set student.shrink.keep to even (given: 'random')",
        ),
        (
            "student.shrink={depth: 0.5, keep: importance, calibration: 0}",
            ".calibration: importance is measured on 1 batch or more; for none, set student.shrink.keep to even, first or ends (given: 0)",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_by_its_key(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        digits("fastgen:digits", override)
    assert str(caught.value) == f"recipe key student.shrink{message}"


def test_a_closed_form_teacher_has_nothing_to_measure(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("0\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^recipe key student\.shrink: Backbone has no list of alike blocks to leave some out of; remove it"):
        plan(digits("toy:mixture", f"data.prompts={tmp_path / 'prompts.txt'}"), only="train")

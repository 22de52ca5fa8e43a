"""Runs of pairs: prompts that need not be said twice, and a teacher that leaves memory once it has drawn them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastgen import cli, run
from fastgen.config import Recipe
from fastgen.data.pair_folder import open_folder
from fastgen.data.prompts import load_prompts
from fastgen.data.store import open_store
from fastgen.errors import UserError
from fastgen.plan import plan
from fastgen.runlog import read_rows
from fastgen.saving import Saver

SMALL = ["train.batch_size=4", "train.steps=2", "train.checkpoint_every=1", "evaluate.protocol=null", "train.device=cpu", "distiller.straightness=0"]


def recipe(*overrides: str) -> Recipe:
    return Recipe.load("digits_reflow_1step", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    assert cli.main(["cache", "pairs", "digits_reflow_1step", "data.pairs=null", "--count", "8", "--steps", "2", "--output", str(folder)]) == 0
    return folder


def without_prompts(pairs: Path, *overrides: str) -> Recipe:
    return recipe("data.prompts=null", f"data.pairs={pairs}", "train.sample_every=0", *overrides)


def test_pairs_bring_their_own_prompts(pairs: Path, tmp_path: Path) -> None:
    planned = plan(without_prompts(pairs))
    assert planned.pairs is not None and planned.prompts is not None
    texts = planned.pairs.prompts()
    assert planned.prompts == {text: texts.count(text) / 8 for text in texts}
    assert planned.prompts.keys() <= load_prompts("fastgen:digits").keys()
    alone, beside = (run.train(each, tmp_path / name, only="train") for name, each in (("a", without_prompts(pairs)), ("b", recipe(
        f"data.pairs={pairs}", "train.sample_every=0"))))  # fmt: skip
    got, want = (load_file(folder / "checkpoints/step_000002/ema_student.safetensors") for folder in (alone, beside))
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6)  # reflow draws from its pairs alone


def test_a_folder_that_grows_changes_no_run_that_has_begun(pairs: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(pairs, tmp_path / "pairs"))
    whole = run.train(without_prompts(own), tmp_path / "run", only="train")
    want = load_file(whole / "checkpoints/step_000002/ema_student.safetensors")
    shutil.rmtree(whole / "checkpoints/step_000002")
    assert cli.main(["cache", "pairs", "digits_reflow_1step", "data.pairs=null", "--count", "12", "--steps", "2", "--output", str(own)]) == 0
    run.train(without_prompts(own), whole, resume=True, only="train")
    got = load_file(whole / "checkpoints/step_000002/ema_student.safetensors")
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_store_of_prompts_is_filled_with_those_of_the_pairs(pairs: Path, tmp_path: Path) -> None:
    block = f"{{from: {pairs}, count: 5}}"
    asked = ["cache", "prompts", "digits_reflow_1step", "data.prompts=null", f"data.pairs={block}", "--output", str(tmp_path / "store")]
    assert cli.main(asked) == 0
    found = open_store(tmp_path / "store/prompts")
    assert found is not None and [text for _, text in found.about()] == list(dict.fromkeys(open_folder(pairs).prompts()[:5]))
    before = (tmp_path / "store/prompts/shard_000000.safetensors").stat().st_mtime_ns
    run.train(without_prompts(pairs, f"data.pairs={block}", f"data.store={tmp_path / 'store'}"), tmp_path / "run", only="train")
    assert (tmp_path / "store/prompts/shard_000000.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("overrides", [["data.pairs=8"], ["distiller={name: tbcm}", "data.pairs=null"]])
def test_who_draws_needs_prompts(overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"^recipe key data\.prompts: missing; "):
        plan(recipe("data.prompts=null", *overrides))


@pytest.mark.parametrize(("method", "kept"), [("reflow", {"student"}), ("{name: slimflow, two_step: {}}", {"student", "teacher"})])
def test_a_teacher_that_has_drawn_the_pairs_is_released(method: str, kept: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    save = Saver.save

    def saving(saver: Saver, trainer: Any, *arguments: Any, **named: Any) -> None:
        assert trainer.models.keys() == trainer.roles.keys()
        seen.append(set(trainer.roles))
        save(saver, trainer, *arguments, **named)

    monkeypatch.setattr(Saver, "save", saving)
    block = f"distiller={method}" if method.startswith("{") else f"distiller.name={method}"
    keys = [block, "data.pairs=8", "train.sample_every=1"]
    whole = run.train(recipe(*keys), tmp_path / "run", only="train")
    assert seen == [kept, kept]
    assert all("drift/std" in row for row in read_rows(whole / "metrics.jsonl"))  # the teacher's pictures were drawn before
    shutil.rmtree(whole / "checkpoints/step_000002")
    run.train(recipe(*keys), whole, resume=True, only="train")
    assert seen == [kept, kept, kept]

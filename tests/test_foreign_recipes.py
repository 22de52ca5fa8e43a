"""Recipe files and overrides as foreign text: what is no recipe is named in a line, and numbers have bounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from test_config import BASE, load, refusal, written

from fastgen import cli, run
from fastgen.config import Recipe, shipped_recipes
from fastgen.errors import UserError
from fastgen.yaml_files import read_yaml


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 1}\nteacher: {}\ntrain: {steps: 2}\n", "key 'train' is given twice"),
        ("train:\n  steps: 1\n  steps: 2\n", "key 'steps' is given twice"),
        ("train: {steps: 1\n", "is not valid YAML"),
        ("- train\n", "is not a recipe: a mapping of blocks, such as teacher and student, is needed"),
        ("", "is not a recipe"),
        ("train: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("? [1]\n: 2\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as refused:
        Recipe.load(path)
    assert words in str(refused.value)
    assert repr(str(path)) in str(refused.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"recipe\.yaml' is not valid YAML: it is not UTF-8 text"):
        read_yaml(path)


def test_yaml_anchors_and_merges_work(tmp_path: Path) -> None:
    path = written(tmp_path, "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "not of the form key=value, such as train.steps=10"),
        ("=3", "not of the form key=value"),
        ("train..steps=3", "not of the form key=value"),
        (".steps=3", "not of the form key=value"),
        ("train.steps=[1", "the value is not valid YAML"),
        ("train={steps: 1, steps: 2}", "key 'steps' is given twice"),
        ("train.steps.x=3", "recipe key train.steps is "),
        ("=", "not of the form key=value"),
        ("a..b=1", "not of the form key=value"),
        ("student.tune.lora.rank=[", "line 1, column 2: expected the node content"),
        ("train.steps=!!float x", "line 1, column 1: 'x' is no float"),
        ("train.seed=*a", "found undefined alias 'a'"),
        ("data.prompts=\udcff", "holds the control character '\\udcff'"),
        (f"{'a.' * 40}b=1", "no recipe key has 41 parts"),
    ],
)
def test_a_malformed_override_is_repeated_in_the_message(override: str, words: str) -> None:
    message = refusal(override)
    assert message.startswith(f"override {override!r}")
    assert words in message


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=" + "x" * 10**5,
        "train.steps=[" + "9, " * 5000 + "]",
        "k" * 10**5 + "=1",
        "data.prompts=" + "[" * 10**5,
        "train.steps.x=" + "y" * 10**5,
    ],
    ids=["a value", "a list", "a key", "brackets", "below"],
)
def test_a_message_shows_the_two_ends_of_what_is_long(override: str) -> None:
    message = refusal(override)
    assert " ... " in message
    assert len(message) < 1000


def test_an_override_below_an_alias_changes_one_of_its_places(tmp_path: Path) -> None:
    data = yaml.safe_load(shipped_recipes()[BASE].read_text())
    data["optimizer"]["fake_score"] = data["optimizer"]["student"]
    path = written(tmp_path, yaml.safe_dump(data))
    assert "*id001" in path.read_text()
    before, after = Recipe.load(path), Recipe.load(path, ["optimizer.student.lr=0.5"])
    assert (after.optimizer["student"].lr, after.optimizer["fake_score"]) == (0.5, before.optimizer["fake_score"])


def test_a_recipe_that_is_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=r"recipe\.yaml' is a device or a pipe; a recipe is read from a file"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_a_recipe_and_runs_that_are_links_in_a_circle_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circle = tmp_path / "circle"
    circle.symlink_to("circle")
    for words in (["train", str(circle), "--output", str(tmp_path / "out")], ["report", str(circle), str(circle)]):
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and str(circle) in error and error.count("\n") == 1


def test_the_home_of_nobody_is_a_folder_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"no recipe .~nobody_here/recipe\.yaml"):
        Recipe.load("~nobody_here/recipe.yaml")
    with pytest.raises(UserError, match=r"~nobody_here/prompts\.txt"):
        run.plan(load("data.prompts=~nobody_here/prompts.txt"))


@pytest.mark.parametrize(
    "override",
    [
        f"train.steps={10**30}", f"train.batch_size={10**12}", f"train.micro_batch={10**12}", f"train.seed={2**70}", f"train.seed={2**63}",
        f"train.keep={10**12}", f"train.checkpoint_every={10**12}", f"train.sample_every={10**12}", f"evaluate.every={10**12}", "student.steps=1001",
        f"student.tune.lora.rank={10**9}", "student.tune.lora.rank=0", f"teacher.resolution={10**9}", f"teacher.max_sequence_length={10**9}",
        "teacher.shift=1e30", "teacher.shift=1e-30", "teacher.guidance=1e308", "optimizer.student.lr=1e308", "optimizer.student.lr=1e-400",
        "optimizer.student.clip=1e38", "optimizer.student.weight_decay=1e38", f"optimizer.student.warmup={10**12}", "distiller.critic_updates=1001",
        "distiller.match_times.shift=1e30", "distiller.match_times.shift=1e-30", "distiller.match_times.mean=-1e30", "distiller.match_times.std=1e30",
        f"distiller.gan.start={10**12}", "distiller.gan.weight=1e30", "distiller.anchor.evaluations=1001",
        "distiller.rollout={times: sampled, steps: 1001}",
    ],
)  # fmt: skip
def test_a_number_beyond_its_bound_is_refused_with_its_key(override: str) -> None:
    key, _, value = override.partition("=")
    if value.startswith("{"):
        key = f"{key}.steps"
    message = refusal(override)
    assert message.startswith(f"recipe key {key}: ")
    assert any(words in message for words in ("less than", "greater than", "at most"))


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("digits_scm_2step", "distiller.replay=1001"),
        ("digits_scm_2step", f"distiller.warmup={10**12}"),
        ("digits_tbcm_2step", "distiller.trajectory.evaluations=1001"),
        ("digits_tscd_4step", f"distiller.num_times={10**9}"),
        ("digits_lcm_2step", f"distiller.skip={10**9}"),
        ("digits_rcm_2step", f"distiller.start={10**12}"),
        ("digits_phased_dmd_4step", "distiller.first_phase=65"),
        ("digits_dmd_1step", f"distiller.regression.warmup={10**12}"),
    ],
)
def test_a_methods_own_numbers_have_bounds(name: str, override: str) -> None:
    with pytest.raises(UserError, match=rf"recipe key {override.partition('=')[0]}: .*less than"):
        run.plan(Recipe.load(name, [override]))

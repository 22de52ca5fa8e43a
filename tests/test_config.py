"""Recipes: shipped ones are valid and survive YAML; overrides are typed; every mistake names its key and what is allowed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgen import run
from fastgen.config import Recipe, Tuning, apply_override, find_recipe, shipped_recipes, validate
from fastgen.distillers import distiller_class, distiller_names
from fastgen.errors import UserError, nearest
from fastgen.families import resolve_source
from fastgen.generator import load_teacher

BASE = "digits_dmd2_1step"
RECIPES = sorted(shipped_recipes())


def load(*overrides: str) -> Recipe:
    return Recipe.load(BASE, overrides)


def refusal(*overrides: str) -> str:
    """The message with which a recipe, its distiller's own keys included, is refused."""

    def read() -> None:
        recipe = load(*overrides)
        validate(distiller_class(recipe.distiller.name).Config, recipe.distiller.model_dump(), "distiller")

    with pytest.raises(UserError) as refused:
        read()
    return str(refused.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_are_valid_and_come_back_from_yaml(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    assert Recipe.load(written(tmp_path, recipe.to_yaml())) == recipe
    assert validate(Recipe, recipe.dump()) == recipe


def offline(name: str) -> list[str]:
    """Overrides that put the bundled teacher and its data in the place of what only a hub, a user's folder or a build script has."""
    if name in ("digits_teacher", "scenes_teacher"):
        return [f"teacher.pretrained=fastgen:{name.removesuffix('_teacher')}"]
    if not name.startswith("sd35_"):
        return []
    data = next(key for key, source in Recipe.load(name).data.model_dump().items() if source is not None)
    return ["teacher.pretrained=fastgen:digits", "teacher.resolution=null", f"data.{data}=fastgen:digits"]


# Those of other families are planned on their tiny pipelines, in families/test_matrix.py.
@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(("digits_", "scenes_", "sd35_"))])
def test_everything_a_shipped_recipe_names_is_there(name: str) -> None:
    recipe = Recipe.load(name, offline(name))
    planned = run.plan(recipe)
    assert planned.resolved()["distiller"].keys() == planned.method.Config.model_fields.keys()
    again = run.plan(validate(Recipe, planned.resolved()))
    assert (again.resolved(), again.method, again.method_config) == (planned.resolved(), planned.method, planned.method_config)


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_comment_of_a_recipe_is_the_command_that_runs_it(name: str) -> None:
    first = shipped_recipes()[name].read_text().splitlines()[0]
    commands = {"digits_teacher": "# python -m fastgen.assets.build teacher", "scenes_teacher": "# python -m fastgen.assets.build scenes teacher"}
    assert first.startswith(commands.get(name, f"# fastgen train recipes/{name}.yaml"))


def test_a_shipped_recipe_is_found_by_name_and_by_path_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = shipped_recipes()[BASE]
    assert find_recipe(BASE) == find_recipe(f"{BASE}.yaml") == find_recipe(f"recipes/{BASE}.yaml") == shipped
    (tmp_path / f"{BASE}.yaml").write_text("mine: 1")
    assert find_recipe(f"{BASE}.yaml").read_text() == "mine: 1"
    with pytest.raises(UserError, match=f"no recipe '{BASE}s'; did you mean '{BASE}'"):
        find_recipe(f"{BASE}s")
    with pytest.raises(UserError, match="no recipe 'elsewhere/"):
        find_recipe(f"elsewhere/{BASE}.yaml")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.student.lr=1e-4", 1e-4),  # a string in YAML 1.1
        ("optimizer.student.lr=1", 1.0),
        ("optimizer.student.betas=[0.5, 0.75]", (0.5, 0.75)),
        ("optimizer.student.name=sgd", "sgd"),
        ("train.steps=7", 7),
        ("train.micro_batch=null", None),
        ("train.micro_batch=", None),
        ("train.micro_batch=16", 16),
        ("student.grid=[0.75]", [0.75]),
        ("student.grid=auto", "auto"),
        ("teacher.negative_prompt=blurry, out of focus", "blurry, out of focus"),
        ("teacher.negative_prompt='7'", "7"),
        ("teacher.negative_prompt=a=b", "a=b"),
        ("evaluate.protocol=null", None),
        (" train.seed =3", 3),
    ],
)
def test_overrides_are_typed_by_the_schema(override: str, value: Any) -> None:
    read: Any = load(override)
    for part in override.partition("=")[0].strip().split("."):
        read = read[part] if isinstance(read, dict) else getattr(read, part)
    assert read == value
    assert type(read) is type(value)


def test_the_last_of_two_overrides_holds() -> None:
    assert load("train.steps=3", "train.steps=4").train.steps == 4


@pytest.mark.parametrize("before", [[], ["student.tune=full"]])
def test_an_override_below_full_tuning_makes_a_lora_block(before: list[str]) -> None:
    tune = load(*before, "student.tune.lora.rank=8", "student.tune.lora.targets=[to_q, to_k]").student.tune
    assert isinstance(tune, Tuning)
    assert (tune.lora.rank, tune.lora.alpha, tune.lora.targets) == (8, None, ["to_q", "to_k"])


def test_an_override_reaches_the_distillers_own_blocks() -> None:
    recipe = load("distiller.match_times.name=logit_normal", "distiller.critic_updates=3")
    config: Any = validate(distiller_class("dmd2").Config, recipe.distiller.model_dump(), "distiller")
    assert (config.match_times.name, config.critic_updates, config.renoise) == ("logit_normal", 3, "euler")


@pytest.mark.parametrize(
    ("override", "key", "suggestion", "allowed"),
    [
        ("optimiser.student.lr=1", "optimiser", "optimizer", "teacher"),
        ("train.batchsize=1", "train.batchsize", "batch_size", "micro_batch"),
        ("teacher.guidence=1", "teacher.guidence", "guidance", "negative_prompt"),
        ("student.step=1", "student.step", "steps", "grid"),
        ("data.prompt=x", "data.prompt", "prompts", "images"),
        ("evaluate.protocl=digits", "evaluate.protocl", "protocol", "every"),
        ("export.type=fp32", "export.type", "dtype", "dtype"),
        ("optimizer.student.learning=1", "optimizer.student.learning", None, "weight_decay"),
        ("optimizer.student.beta=[0, 0]", "optimizer.student.beta", "betas", "clip"),
        ("student.tune.loar.rank=1", "student.tune.loar", "lora", "lora"),
        ("student.tune.lora.rnk=1", "student.tune.lora.rnk", "rank", "targets"),
        ("distiller.critic_update=1", "distiller.critic_update", "critic_updates", "match_times"),
        ("distiller.match_times.low=0", "distiller.match_times.low", "lo", "shift"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(override: str, key: str, suggestion: str | None, allowed: str) -> None:
    message = refusal(override)
    assert message.startswith(f"recipe key {key}: unknown key; ")
    assert (f"did you mean {suggestion!r}?" in message) == (suggestion is not None)
    assert allowed in message.partition("allowed: ")[2].split(", ")


@pytest.mark.parametrize(
    ("override", "key", "given", "words"),
    [
        ("train.steps=many", "train.steps", "'many'", "integer"),
        ("train.steps=1.5", "train.steps", "1.5", "integer"),
        ("train.steps=0", "train.steps", "0", "greater than or equal to 1"),
        ("train.steps=[1]", "train.steps", "[1]", "integer"),
        ("train.steps=", "train.steps", "None", "integer"),
        ("train.seed=-1", "train.seed", "-1", "greater than or equal to 0"),
        ("train.ema=1", "train.ema", "1", "less than 1"),
        ("train.precision=fp64", "train.precision", "'fp64'", "'fp32', 'bf16' or 'fp16'"),
        ("train.precision=fp16", "train.precision", "'fp16'", "use bf16 or fp32"),
        ("train.shard=fsdp2", "train.shard", "'fsdp2'", "'none'"),
        ("train.device=gpu", "train.device", "'gpu'", "auto, cpu, cuda, cuda:N"),
        ("train.device=cpu:x", "train.device", "'cpu:x'", "auto, cpu, cuda, cuda:N"),
        ("train=fast", "train", "'fast'", "a block with keys among steps, batch_size"),
        ("evaluate=", "evaluate", "None", "a block with keys among protocol, every"),
        ("optimizer=[]", "optimizer", "[]", "dictionary"),
        ("optimizer.student=3", "optimizer.student", "3", "a block with keys among name, lr"),
        ("optimizer.student.name=lion", "optimizer.student.name", "'lion'", "'adamw', 'adam', 'sgd' or 'adamw8bit'"),
        ("optimizer.student.lr=-1e-3", "optimizer.student.lr", "'-1e-3'", "greater than 0"),
        ("optimizer.student.lr=fast", "optimizer.student.lr", "'fast'", "number"),
        ("optimizer.student.betas=[0.9]", "optimizer.student.betas.1", "[0.9]", "required"),
        ("optimizer.student.betas=[0.9, 1]", "optimizer.student.betas", "[0.9, 1]", "[0, 1)"),
        ("optimizer.student.betas=[-0.1, 0.9]", "optimizer.student.betas", "[-0.1, 0.9]", "[0, 1)"),
        ("optimizer.student.betas=0.9", "optimizer.student.betas", "0.9", "tuple"),
        ("teacher.pretrained=7", "teacher.pretrained", "7", "string"),
        ("teacher.guidance=0.5", "teacher.guidance", "0.5", "greater than or equal to 1"),
        ("student.tune=half", "student.tune", "'half'", "'full' or a block with keys among lora"),
        ("student.tune.lora.rank=0", "student.tune.lora.rank", "0", "greater than or equal to 1"),
        ("student.tune={lora: 3}", "student.tune.lora", "3", "rank, alpha, targets"),
        ("student.tune={lora: {rank: 4, targets: all}}", "student.tune.lora.targets", "'all'", "'auto' or a list in brackets"),
        ("student.grid=dense", "student.grid", "'dense'", "'auto' or a list in brackets"),
        ("student.grid=[a]", "student.grid.0", "'a'", "number"),
        ("distiller.name=", "distiller.name", "None", "string"),
        ("distiller=dmd2", "distiller", "'dmd2'", "a block with keys among name"),
        ("distiller.critic_updates=0", "distiller.critic_updates", "0", "greater than or equal to 1"),
        ("distiller.renoise=ddim", "distiller.renoise", "'ddim'", "'euler', 'stochastic' or 'fixed'"),
        ("distiller.match_times={lo: 0.9, hi: 0.1}", "distiller.match_times", "'hi': 0.1", "lo must not exceed hi"),
    ],
)
def test_a_wrong_value_is_refused_with_key_given_and_allowed(override: str, key: str, given: str, words: str) -> None:
    message = refusal(override)
    assert message.startswith(f"recipe key {key}: ")
    assert words in message
    assert given in message.rpartition("(given: ")[2]


NUMBERS = [
    "train.steps", "train.batch_size", "train.micro_batch", "train.seed", "train.ema", "train.keep", "teacher.guidance", "teacher.resolution",
    "student.steps", "student.tune.lora.rank", "optimizer.student.lr", "optimizer.student.eps", "optimizer.fake_score.clip",
    "optimizer.student.warmup", "evaluate.every", "distiller.critic_updates", "distiller.match_times.std", "distiller.match_times.shift",
]  # fmt: skip
REALS = ["train.ema", "teacher.guidance", "optimizer.student.lr", "optimizer.student.weight_decay", "optimizer.student.clip"]
REALS += ["distiller.match_times.hi", "distiller.match_times.mean", "distiller.critic_times.std"]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["true", "no"])
def test_a_boolean_is_no_number(key: str, value: str) -> None:
    message = refusal(f"{key}={value}")
    assert message.startswith(f"recipe key {key}: ")
    assert message.endswith(f"(given: {value == 'true'})")


def test_a_boolean_in_a_list_of_numbers_is_refused() -> None:
    assert refusal("student.grid=[true]") == "recipe key student.grid.0: a number is needed, not a boolean (given: True)"
    assert "[0.5, True]" in refusal("optimizer.student.betas=[0.5, true]")
    assert refusal("optimizer.student.betas=[0.5, false]").startswith("recipe key optimizer.student.betas.1: a number is needed")


@pytest.mark.parametrize("key", REALS)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "1e999"])
def test_nan_and_infinity_are_refused(key: str, value: str) -> None:
    assert refusal(f"{key}={value}").startswith(f"recipe key {key}: ")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["student.grid=[1.0, 0.5]"], "2 times do not fit student.steps = 1"),
        (["student.grid=[]"], "0 times do not fit student.steps = 1"),
        (["student.steps=3"] * 2 + ["student.grid=[1.0, 0.5]"], "2 times do not fit student.steps = 3"),
        (["student.steps=2", "student.grid=[0.5, 1.0]"], "times must descend within (0, 1]"),
        (["student.steps=2", "student.grid=[0.5, 0.5]"], "times must descend within (0, 1]"),
        (["student.grid=[0.0]"], "times must descend within (0, 1]"),
        (["student.grid=[1.25]"], "times must descend within (0, 1]"),
    ],
)
def test_an_explicit_grid_must_fit_its_steps_and_descend(overrides: list[str], words: str) -> None:
    message = refusal(*overrides)
    assert message.startswith("recipe key student.grid: ")
    assert words in message
    assert str(yaml.safe_load(overrides[-1].partition("=")[2])) in message  # what was given


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.critic.lr=1"], "optimizer.critic: dmd2 trains no such role; allowed: fake_score, student"),
        (["optimizer={student: {lr: 1}}"], "optimizer.fake_score: missing; dmd2 trains student, fake_score"),
        (["train.batch_size=9", "train.micro_batch=2"], "train.micro_batch: 2 does not divide train.batch_size 9"),
        (["data.prompts=null"], "data.prompts: missing; dmd2 trains on prompts"),
        (["data.images=fastgen:digits"], "data.images: dmd2 does not use it"),
        (["distiller={name: flow_matching}", "optimizer={student: {lr: 1}}"], "data.images: missing; flow_matching trains on images"),
        (["evaluate.protocol=null", "evaluate.every=5"], "evaluate.every: needs evaluate.protocol"),
        (["evaluate.protocol=digit"], "evaluate.protocol): did you mean 'digits'?"),
        (["distiller.name=dmd22"], "distiller.name: 'dmd22' is not a method; did you mean 'dmd2'?"),
        (["teacher.family=sd33"], "teacher.family: 'sd33' is not a family; did you mean 'sd3'?"),
    ],
)
def test_blocks_must_fit_each_other(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        run.plan(load(*overrides))
    assert f"recipe key {words}" in str(refused.value)


def test_a_missing_block_is_named(tmp_path: Path) -> None:
    data = yaml.safe_load(shipped_recipes()[BASE].read_text())
    del data["data"]
    with pytest.raises(UserError, match="recipe key data: missing, and it has no default"):
        Recipe.load(written(tmp_path, yaml.safe_dump(data)))


def test_apply_override_changes_nothing_else() -> None:
    data: dict[str, Any] = {"a": {"b": 1, "c": [2]}, "d": 3}
    apply_override(data, "a.e.f=[4, x]")
    assert data == {"a": {"b": 1, "c": [2], "e": {"f": [4, "x"]}}, "d": 3}


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", distiller_names())
def test_every_distiller_refuses_unknown_keys(name: str) -> None:
    with pytest.raises(UserError, match=r"recipe key distiller\.nonsense: unknown key; .*allowed: .*name"):
        validate(distiller_class(name).Config, {"name": name, "nonsense": 1}, "distiller")


def test_nearest_suggests_only_what_is_close() -> None:
    assert nearest("stpes", ["steps", "seed"]) == "did you mean 'steps'? allowed: seed, steps"
    assert nearest("xyz", ["steps", "seed"]) == "allowed: seed, steps"


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"experts": [{"end": 0.5}, {"end": 0.0}]}, "a student of several experts"),
        ({"own_steps_only": True}, "a student of its own number of steps alone"),  # at other times its network predicts nothing
    ],
)
def test_a_student_that_is_more_than_its_network_is_no_teacher(told: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = tmp_path / "phased"
    shutil.copytree(resolve_source("fastgen:digits"), folder)
    manifest = json.loads((folder / "fastgen.json").read_text())
    run.plan(load(f"teacher.pretrained={folder}"))
    (folder / "fastgen.json").write_text(json.dumps(manifest | told))
    with pytest.raises(UserError, match=rf"recipe key teacher.pretrained: .* is {reason}, which cannot teach yet"):
        run.plan(load(f"teacher.pretrained={folder}"))
    with pytest.raises(UserError, match=rf"'{folder}' is {reason}, which cannot teach yet; load_student loads it"):
        load_teacher(folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{from: teacher}", r"data\.pairs: count: missing; it says how many pairs the teacher draws"),
        ("{count: 5, solver: dpm}", r"data\.pairs\.solver: .*'euler' or 'heun'"),
        ("{count: 0}", r"data\.pairs\.count: "),
        ("{count: 5, step: 2}", r"data\.pairs\.step: unknown key; did you mean 'steps'"),
        ("{count: 5, steps: 2000}", r"data\.pairs\.steps: "),
        ("{count: 5, from: 5}", r"data\.pairs\.from: "),
        ("[5]", r"data\.pairs: a number of pairs, 1 or more, or a folder"),
    ],
)
def test_a_wrong_key_of_pairs_is_named(given: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^recipe key {message}"):
        Recipe.load("digits_dmd_1step", [f"data.pairs={given}"])
    read = Recipe.load("digits_dmd_1step", ["data.pairs={from: somewhere, count: 5}"])
    assert read.dump()["data"]["pairs"] == {"from": "somewhere", "count": 5, "solver": None, "steps": None}
    assert validate(Recipe, read.dump()) == read

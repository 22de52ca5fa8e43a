"""Recipes and command lines as nobody means them, each made from its seed alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml

from fastgen.assets import DIGITS_TEACHER
from fastgen.config import shipped_recipes
from fastgen.distillers import distiller_names

NUMBERS = [
    "0", "-0.0", "1", "-1", "2", "0.5", "7", "1000", "65537", "1e9", "10000000000", "1000000000000000000000000000000", "9223372036854775807",
    "9223372036854775808", "18446744073709551616", "1e-400", "1.0e-320", "1e-30", "1e30", "1.0e+308", "1e999", "1.0e+999", ".inf", "-.inf", ".nan",
    "0x7fffffffffffffff", "010", "1_000", "1:30", "0x1" + "0" * 3000, "1" + "0" * 400, "1" + "0" * 5000, "!!float x", "!!int x", "!!int ''",
]  # fmt: skip
TEXTS = [
    "", "null", "~", "true", "no", "auto", "full", "teacher", "none", "x", "a b", "'7'", "2024-01-31", "!!binary YQ==", "!!timestamp x", "!!set {a}",
    "!!python/object/apply:os.getcwd []", '"\\ud800"', '"\\0"', '"\\e[31m"', '"\\UFFFFFFFF"', "größe", "'\u2028'", "[bold]", "%", "@", "*a", "&a",
    "&a [*a]", "&a {<<: *a}", "{", "[", "'", "- ", "? x", "{a: {b: {c: 1}}}", "[[[[1]]]]", "[" * 3000, "{a: " * 3000, "[]", "{}", "[null]", "[1, a]",
    "[true]", "{1: 2}", "{null: 1}", "{[a]: b}", "{name: x}", "'" + "x" * 50_000 + "'", "\udcff", "\x07", "\ufeff", "dmd2", "cuda:999", "cuda:x",
    "fastgen:digits", "toy:ring", "toy:gaussian", "toy:", "fastgen:", "https://x/y", "a//b", "~nobody/x", "$HOME",
]  # fmt: skip
COMMANDS = {
    "train": ["--output", "--resume", "--resume-or-start", "--resume-from", "--allow-change", "--overwrite", "--only"],
    "export": ["--output", "--lora", "--unfinished"],
    "verify": [],
    "sample": ["--prompt", "--output", "--steps", "--seed", "--first-step-from-teacher", "--first-step-guidance"],
    "evaluate": ["--protocol", "--steps", "--output", "--teacher", "--no-teacher", "--teacher-steps"],
    "report": ["--output"],
    "recipes": [],
    "cache": ["--output", "--count", "--steps", "--solver", "--batch"],
}
FLAGS = {"--resume", "--resume-or-start", "--overwrite", "--lora", "--unfinished", "--teacher", "--no-teacher"}
# In every command line where a value of the fuzzer would start hours of honest work.
_REFUSED = "teacher.pretrained=nowhere/at_all"


def make_places(root: Path) -> list[str]:
    """Paths of every kind below `root`, which becomes the working folder."""
    for name in ("folder", "empty", "name\nwith\x1b[31m control", "[bold]", "folder/step_000001", "run/checkpoints/step_000001"):
        (root / name).mkdir(parents=True)
    (root / "file.txt").write_text("x\n")
    (root / "0.txt").write_text("\n0\n")
    (root / "file.json").write_text("[]")
    (root / "run/recipe.yaml").write_text("a: &a [*a]")
    (root / "large.yaml").touch()
    os.truncate(root / "large.yaml", 100_000_000)
    (root / "bytes.yaml").write_bytes(bytes(range(256)))
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "pipe.png")
    (root / "dangling").symlink_to("nothing")
    (root / "circle").symlink_to("circle")
    (root / "student").symlink_to(DIGITS_TEACHER)
    made = [*os.listdir(root), "folder/step_000001", "run/checkpoints"]
    others = ["", ".", "..", "/", "nowhere", "nowhere/at_all", "~nobody/x", "x" * 5000, "a/" * 3000, "\udcff", "file.txt/below", "/dev/zero"]
    return [*sorted(made), *others]


def _number_or_text(random: Random) -> str:
    return random.choice(NUMBERS if random.random() < 0.6 else TEXTS)


def _blocks(data: dict[str, Any]) -> list[dict[str, Any]]:
    """All mappings in a recipe, which may be in themselves by now."""
    found = [data]
    for block in found:
        found += [below for below in block.values() if isinstance(below, dict) and not any(below is one for one in found)]
    return found


def _value(random: Random) -> Any:
    choices: list[Callable[[], Any]] = [
        lambda: random.choice([0, -1, 1, 2, 10**6, 10**12, 2**63 - 1, 2**63, 2**70, 10**30, 10**400]),
        lambda: random.choice([-0.0, 0.5, 1e-320, 1e-30, 1e30, 1e308, float("inf"), float("nan")]),
        lambda: random.choice([None, True, False, [], {}, "", "x", "auto", "full", "\n", "\x1b[31m", "\u2028", "a" * 5000]),
        lambda: [_value(random) for _ in range(random.randrange(4))],
        lambda: {random.choice(["name", "lo", "rank", "lora", "x"]): _value(random)},
    ]
    return random.choices(choices, [4, 4, 3, 1, 1])[0]()


def _mutate_tree(random: Random, data: dict[str, Any]) -> None:
    block = random.choice([block for block in _blocks(data) if block])
    key = random.choice(list(block))
    change = random.randrange(6)
    if change == 0:
        block[key[:-1] + random.choice(["", "x", "\n", " "])] = block.pop(key)
    elif change == 1:
        del block[key]
    elif change == 2:
        block[random.choice(["name", "steps", "lora", "times", "gan", "x"])] = _value(random)
    elif change == 3:
        block[key] = random.choice(_blocks(data))
    else:
        block[key] = _value(random)


def _mutate_text(random: Random, text: str) -> str:
    lines = text.split("\n")
    at = random.randrange(len(lines))
    change = random.randrange(6)
    if change == 0:
        lines.insert(random.randrange(len(lines)), lines[at])
    elif change == 1:
        lines[at] = random.choice([" ", "\t", "- ", "? ", "&a ", "*a ", "<<: ", "---\n", "%YAML 9\n"]) + lines[at]
    elif change == 2:
        lines[at] = lines[at].partition(":")[0] + ": " + _number_or_text(random)
    elif change == 3:
        del lines[at:]
    else:
        place = random.randrange(len(text))
        return (
            text[:place]
            + random.choice(["\0", "\x1b", "{", "[", '"', "'", "&", "*", "!", "#", ":", "\r", "\u2028", "\n"])
            + text[place + change - 4 :]
        )
    return "\n".join(lines)


def _keys(data: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(data, dict):
        for key, below in data.items():
            yield f"{prefix}{key}"
            yield from _keys(below, f"{prefix}{key}.")


_MORE_KEYS = [
    "student.tune.lora.rank", "student.tune.lora.alpha", "student.tune.lora.targets", "student.grid", "student.init", "teacher.shift",
    "teacher.resolution", "teacher.max_sequence_length", "teacher.revision", "teacher.family", "teacher.guidance", "teacher.negative_prompt",
    "data.background", "data.pairs", "data.images", "data.prompts", "train.seed", "train.keep", "train.micro_batch", "train.checkpoint_every",
    "train.sample_every", "train.ema", "train.device", "train.precision", "optimizer.student.warmup", "optimizer.student.betas",
    "optimizer.student.eps", "optimizer.student.clip", "optimizer.student.weight_decay", "evaluate.every", "evaluate.protocol", "export.dtype",
    "distiller.gan.taps", "distiller.gan.weight", "distiller.gan.start", "distiller.anchor.evaluations", "distiller.rollout.steps",
    "distiller.rollout.times", "distiller.reward.name", "distiller.reward.beta", "distiller.trajectory.evaluations", "distiller.trajectory.shift",
    "distiller.num_times", "distiller.skip", "distiller.stages", "distiller.phases", "distiller.first_phase", "distiller.replay",
    "distiller.warmup", "distiller.start", "distiller.match_times", "distiller.match_times.shift", "distiller.match_times.std",
    "distiller.times.mean", "distiller.critic_updates", "distiller.guidance", "distiller.huber", "distiller.regression.warmup", "distiller.ida",
    "distiller.normaliser", "distiller.discrete_step", "distiller.margin", "distiller.drop",
]  # fmt: skip


def _override(random: Random, keys: list[str], places: list[str]) -> str:
    key = random.choice(keys if random.random() < 0.6 else _MORE_KEYS)
    change = random.randrange(20)
    if change == 0:
        key = random.choice(["", "..", ".a", "a..b", key + ".x", key[:-1], "a." * 3000 + "b", "\x1b", "\udcff"])
    value = random.choice(places) if change in (1, 2) else random.choice(distiller_names()) if change == 3 else _number_or_text(random)
    return key if change == 4 else f"{key}={value}"


def _recipe(random: Random, places: list[str]) -> tuple[str, list[str]]:
    """Name of a recipe, mutated into `mutated.yaml` or not, and the keys it had before."""
    name = random.choice([name for name in shipped_recipes() if name.startswith("digits_")])
    text = shipped_recipes()[name].read_text()
    data = yaml.safe_load(text)
    if data["teacher"]["pretrained"] != "fastgen:digits" or random.random() < 0.5:
        data["teacher"]["pretrained"] = random.choice(["toy:gaussian", "fastgen:digits"])
    if data["teacher"]["pretrained"] == "toy:gaussian" and "prompts" in data["data"]:
        data["data"] |= {"prompts": "0.txt"}
        data["evaluate"] = {"protocol": None}
    kind, keys = random.randrange(10), list(_keys(data))
    if kind == 0:
        return random.choice([name, name, *places]), keys
    for _ in range(random.randrange(1, 3) if kind < 4 else 0):
        _mutate_tree(random, data)
    text = yaml.safe_dump(data, sort_keys=False)
    for _ in range(random.randrange(1, 3) if kind in (3, 4, 5) else 0):
        text = _mutate_text(random, text)
    Path("mutated.yaml").write_bytes(text.encode(random.choice(["utf-8"] * 8 + ["utf-16", "latin-1"]), "replace"))
    return "mutated.yaml", keys


def _dry_run(random: Random, places: list[str]) -> list[str]:
    recipe, keys = _recipe(random, places)
    words = ["train", recipe, *(_override(random, keys, places) for _ in range(random.choice([0, 1, 1, 2])))]
    return [*words, "--dry-run", "--output", "out", *(["--only", "train"] if random.random() < 0.7 else [])]


def _command_line(random: Random, places: list[str]) -> list[str]:
    """Any command with any options; none that would do what takes long."""
    command = random.choice(list(COMMANDS))
    words, options = [], COMMANDS[command]
    for option in random.sample(options, random.randrange(len(options) + 1)) if random.random() < 0.5 else options:
        if option in FLAGS:
            words.append(option)
        elif random.random() < 0.6 and option in ("--output", "--prompt"):
            words += [option, random.choice([*places, "new", "new.png", "pipe.png", "folder/new"])]
        else:
            fit = random.random() < 0.6  # more than its type
            words += [option, random.choice(["1", "2", "euler", "digits", "train"] if fit else [*NUMBERS, *TEXTS, *places])]
    if command == "cache":
        recipe, keys = _recipe(random, places)
        return [command, random.choice(["pairs", "pairs", "pairs", "x"]), recipe, *words, _override(random, keys, places), _REFUSED]
    if command == "recipes":
        return [command, random.choice(["list", "show", "x"]), *random.choices([*places, *shipped_recipes()], k=random.randrange(2))]
    if command == "train":
        return [command, *words, "--dry-run", random.choice([*places, *shipped_recipes()]), *random.choices(places, k=random.randrange(2))]
    unfit = [place for place in places if place != "student"]
    words = [command, *words, *random.choices(unfit, k=random.choice([0, 1, 1, 1, 1, 1, 2]))]
    if random.random() < 0.1:
        words.insert(random.randrange(len(words)), random.choice(["--", "-", "--x", "--output", "-h", "--=", "\udcff", ""]))
    return words


def arguments(seed: int, places: list[str]) -> list[str]:
    """The command line of a seed; may write `mutated.yaml` into the working folder."""
    random = Random(seed)
    words = _dry_run(random, places) if random.random() < 0.7 else _command_line(random, places)
    return [word.replace("\0", "") for word in words]  # which no system passes on

"""A user's mistake on the command line: exit status 2, one line that starts with `error: ` and says what was wrong, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

from fastgen import checkpoint, cli, run
from fastgen.assets import DIGITS_TEACHER
from fastgen.config import Recipe
from fastgen.data.store import Manifest
from fastgen.families import source_hash
from fastgen.fingerprints import sealed

RECIPE = "digits_dmd2_1step"
TO = ("--output", "new")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def linked_copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, copy_function=os.link))


def replace(path: Path, content: str | bytes) -> None:
    path.unlink()  # it is a link to the original
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def make_pipelines(root: Path) -> None:
    """Copies of the bundled teacher as a student, and broken ones."""
    manifest = json.loads((DIGITS_TEACHER / "fastgen.json").read_text())
    manifest["teacher"]["pretrained"] = "fastgen:digits"  # its own teacher, a skeleton, does not ship
    student = Path(shutil.copytree(DIGITS_TEACHER, root / "student"))
    manifests: dict[str, Any] = {
        "no_json": "{",
        "a_list": [],
        "format_9": manifest | {"format": 9},
        "no_call": {key: value for key, value in manifest.items() if key != "call"},
        "no_steps": manifest | {"call": {"guidance_scale": 1.0}},
        "odd_weights": manifest | {"weights": "half"},
        "lost_teacher": manifest | {"teacher": manifest["teacher"] | {"pretrained": "nowhere/teacher"}},
        "lora_without_file": manifest | {"weights": "lora"},
    }
    for name, content in manifests.items():
        text = content if isinstance(content, str) else json.dumps(content)
        replace(linked_copy(student, root / f"student_{name}") / "fastgen.json", text)
    (linked_copy(student, root / "student_no_manifest") / "fastgen.json").unlink()
    (linked_copy(student, root / "student_no_weights") / "transformer" / WEIGHTS).unlink()
    (linked_copy(student, root / "student_no_config") / "transformer" / "config.json").unlink()
    replace(linked_copy(student, root / "student_bad_header") / "transformer" / WEIGHTS, b"\xff" * 64)
    replace(linked_copy(student, root / "student_bad_encoder") / "text_encoder" / "model.safetensors", b"\xff" * 64)
    whole = (student / "transformer" / WEIGHTS).read_bytes()
    replace(linked_copy(student, root / "student_cut_short") / "transformer" / WEIGHTS, whole[:-100])
    config = json.loads((student / "transformer" / "config.json").read_text())
    config["num_attention_heads"] //= 2
    replace(linked_copy(student, root / "student_misshapen") / "transformer" / "config.json", json.dumps(config))
    for name, index in {"cogview4": '{"_class_name": "CogView4Pipeline"}', "no_class": "{}", "bad_index": "{"}.items():
        (root / f"teacher_{name}").mkdir()
        (root / f"teacher_{name}" / "model_index.json").write_text(index)


def make_runs(root: Path) -> None:
    """Run folders as far as commands read them before they find the mistake."""
    resolved = run.plan(Recipe.load(RECIPE)).resolved()
    for name in ("run", "run_without_checkpoint", "run_bad_recipe"):
        (root / name).mkdir()
        (root / name / "recipe.yaml").write_text(yaml.safe_dump(resolved))
        (root / name / "metrics.jsonl").write_text('{"step": 1, "loss/match": 0.5}\n')
    (root / "run/checkpoints/step_000001").mkdir(parents=True)
    state = {"format": checkpoint.FORMAT, "step": 1, "seconds": 1.0, "trained": [], "pairs": None, "recipe": resolved, "inputs": {}, "files": {}}
    (root / "run/checkpoints/step_000001/state.json").write_text(json.dumps(sealed(state)))
    (root / "run_bad_recipe/recipe.yaml").write_text("train: [")
    (root / "run_without_metrics").mkdir()
    (root / "run_without_metrics/recipe.yaml").write_text("train: {}")


def make_files(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "full").mkdir()
    (root / "full/notes.txt").write_text("mine")
    (root / "folder.png").mkdir()
    texts = {
        "empty.txt": " \n\n",
        "unread.txt": "any digit\nblorp qux\n",
        "bad.jsonl": '{"prompt": "a"}\n{"prompt"\n',
        "no_prompt.jsonl": '{"text": "a"}\n',
        "weight.jsonl": '{"prompt": "a", "weight": -1}',
        "weightless.jsonl": '{"prompt": "a", "weight": 0}',
        "list.yaml": "- 1\n",
        "broken.yaml": "train: {steps: 1\n",
        "twice.yaml": "train: {}\ntrain: {}\n",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    for name in ("binary.txt", "binary.jsonl", "binary.yaml"):
        (root / name).write_bytes(b"\xff\xfe\x00")
    images = {"bad_line": "{", "no_text": '{"file_name": "a.png"}', "no_file": '{"file_name": "a.png", "text": "x"}', "empty": ""}
    for name, metadata in images.items():
        (root / f"images_{name}").mkdir()
        (root / f"images_{name}/metadata.jsonl").write_text(metadata)
    make_pairs(root)


def make_pairs(root: Path) -> None:
    """Folders of noise-sample pairs of the bundled teacher, none drawn yet."""
    teacher = {"teacher.pretrained": source_hash("fastgen:digits"), "teacher.guidance": 1.5, "teacher.negative_prompt": ""}
    teacher |= {"teacher.max_sequence_length": None, "--solver": "euler", "--steps": 1, "the sampling grid": [1.0], "train.seed": 0}
    for name, changes, shape in (("unfinished", {}, (2, 8, 8)), ("guided", {"teacher.guidance": 9.0}, (2, 8, 8)), ("large", {}, (16, 128, 128))):
        fields: Any = {"seed": ("int64", ()), "x0": ("float", shape)}
        manifest = Manifest(kind="pairs", count=3, dtype="fp32", fields=fields, origin=teacher | changes, rows="", teacher="fastgen:digits")
        (root / f"pairs_{name}/pairs").mkdir(parents=True)
        (root / f"pairs_{name}/pairs/store.json").write_text(json.dumps(sealed(manifest.model_dump(mode="json"))))
    for name in ("broken/pairs/store", "older/pairs"):
        (root / f"pairs_{name}.json").parent.mkdir(parents=True)
        (root / f"pairs_{name}.json").write_text("{")
    (root / "strange/pairs").mkdir(parents=True)
    (root / "strange/pairs/notes.txt").write_text("mine")
    (root / "reward.py").write_text("NUMBER = 3\ndef flat(pixels, prompts):\n    return pixels.mean((1, 2, 3))\n")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the mistakes below need."""
    root = tmp_path_factory.mktemp("errors")
    for make in (make_pipelines, make_runs, make_files):
        make(root)
    return root


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(root)): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(root.rglob("*"))}


def train(*overrides: str, options: tuple[str, ...] = TO) -> tuple[str, ...]:
    return ("train", RECIPE, *overrides, *options)


def images(folder: str) -> tuple[str, ...]:
    return train("distiller={name: flow_matching}", "optimizer={student: {lr: 1e-3}}", f"data={{images: {folder}}}")


def dmd(pairs: str, *overrides: str) -> tuple[str, ...]:
    return train("distiller={name: dmd}", f"data.pairs={pairs}", *overrides)


def cache_pairs(*options: str) -> tuple[str, ...]:
    return ("cache", "pairs", RECIPE, *(options if "--output" in options else (*options, *TO)))


def sample(folder: str, *options: str) -> tuple[str, ...]:
    return ("sample", folder, "--prompt", "any digit", "--output", "new.png", *options)


ALLOWED = "did you mean"
# name: (command line, words of the message)
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # the command line itself
    "unknown command": (("trian",), ("'trian'", "train", "fastgen --help")),
    "unknown option": (train("--ouput", "x"), ("--ouput", "--output", "fastgen train --help")),
    "unknown global option": (("--loud",), ("--loud",)),
    "no recipe given": (("train",), ("Missing argument", "RECIPE")),
    "option without its value": (("train", RECIPE, "--output"), ("--output",)),
    "recipes without a command": (("recipes",), ("Missing command", "fastgen recipes --help")),
    "recipes with an unknown command": (("recipes", "lst"), ("'lst'", "list")),
    "recipes show without a name": (("recipes", "show"), ("NAME",)),
    "recipes show of an unknown name": (("recipes", "show", "digits_dmd2_2step"), ("'digits_dmd2_2step'", ALLOWED, RECIPE)),
    "recipes show of a binary file": (("recipes", "show", "binary.yaml"), ("binary.yaml", "UTF-8")),
    # recipe files
    "recipe missing": (("train", "digits_dmd2_1stp"), ("no recipe 'digits_dmd2_1stp'", f"{ALLOWED} '{RECIPE}'")),
    "recipe is a folder": (("train", "full"), ("'full' is a folder",)),
    "recipe is broken YAML": (("train", "broken.yaml"), ("broken.yaml", "not valid YAML")),
    "recipe is binary": (("train", "binary.yaml"), ("binary.yaml", "not valid YAML")),
    "recipe is a list": (("train", "list.yaml"), ("list.yaml", "not a recipe", "teacher and student")),
    "recipe gives a key twice": (("train", "twice.yaml"), ("key 'train' is given twice",)),
    # overrides
    "override without =": (train("train.steps"), ("'train.steps'", "key=value")),
    "override below a scalar": (train("train.steps.x=1"), ("train.steps.x=1", "recipe key train.steps", "no keys below")),
    "override of broken YAML": (train("train.steps=[1"), ("train.steps=[1", "not valid YAML")),
    # keys and values
    "unknown top-level key": (train("trian.steps=1"), ("recipe key trian: unknown key", f"{ALLOWED} 'train'")),
    "misspelt nested key": (train("train.batchsize=1"), ("recipe key train.batchsize", f"{ALLOWED} 'batch_size'")),
    "misspelt key of the distiller": (train("distiller.critic_update=1"),
        ("recipe key distiller.critic_update", f"{ALLOWED} 'critic_updates'")),
    "misspelt key in the distiller's block": (train("distiller.match_times.low=0"), ("recipe key distiller.match_times.low", "'lo'")),
    "wrong type": (train("train.steps=many"), ("recipe key train.steps", "integer", "'many'")),
    "boolean for a number": (train("distiller.critic_updates=true"), ("recipe key distiller.critic_updates", "boolean", "True")),
    "negative lr": (train("optimizer.student.lr=-1"), ("recipe key optimizer.student.lr", "greater than 0", "-1")),
    "NaN": (train("optimizer.student.lr=.nan"), ("recipe key optimizer.student.lr", "finite", "nan")),
    "betas out of range": (train("optimizer.student.betas=[0.9, 1.0]"), ("recipe key optimizer.student.betas", "[0, 1)", "[0.9, 1.0]")),
    "grid of the wrong length": (train("student.grid=[1, 0.5]"), ("recipe key student.grid", "2 times", "student.steps = 1")),
    "grid that ascends": (train("student.steps=2", "student.grid=[0.5, 1]"), ("recipe key student.grid", "descend", "[0.5, 1")),
    "grid outside (0, 1]": (train("student.grid=[1.5]"), ("recipe key student.grid", "(0, 1]", "1.5")),
    "fp16": (train("train.precision=fp16"), ("recipe key train.precision", "bf16 or fp32")),
    "shard not offered": (train("train.shard=fsdp2"), ("recipe key train.shard", "'none'", "fsdp2")),
    "micro_batch that does not divide": (train("train.micro_batch=7"), ("recipe key train.micro_batch: 7", "train.batch_size 128")),
    "device not here": (train("train.device=cuda"), ("recipe key train.device: 'cuda'", "available: auto, cpu")),
    "device that does not exist": (train("train.device=tpu"), ("recipe key train.device", "'tpu'", "cuda:N")),
    # names
    "unknown distiller": (train("distiller.name=dmd22"), ("recipe key distiller.name: 'dmd22'", f"{ALLOWED} 'dmd2'")),
    "unknown family": (train("teacher.family=sd33"), ("recipe key teacher.family: 'sd33'", f"{ALLOWED} 'sd3'", "auto")),
    "unknown optimizer role": (train("optimizer.critic.lr=1"), ("recipe key optimizer.critic", "fake_score, student")),
    "missing optimizer role": (train("optimizer={student: {lr: 1}}"), ("recipe key optimizer.fake_score: missing",)),
    "unknown optimizer": (train("optimizer.student.name=lion"),
        ("recipe key optimizer.student.name", "'adamw', 'adam', 'sgd' or 'adamw8bit'", "'lion'")),
    "unknown protocol": (train("evaluate.protocol=digit"), ("recipe key evaluate.protocol", "'digit'", f"{ALLOWED} 'digits'")),
    "LoRA targets that match no layer": (train("student.tune.lora={rank: 2, targets: [nope]}"),
        ("recipe key student.tune.lora.targets", "'nope'")),
    "no LoRA targets": (train("student.tune.lora={rank: 2, targets: []}"), ("recipe key student.tune.lora.targets", "[]")),
    # data
    "no prompts": (train("data.prompts=null"), ("recipe key data.prompts: missing", "dmd2")),
    "prompts file missing": (train("data.prompts=nowhere.txt"), ("recipe key data.prompts", "'nowhere.txt'")),
    "prompts of an unknown kind": (train("data.prompts=list.yaml"), ("recipe key data.prompts", "*.jsonl")),
    "prompts file empty": (train("data.prompts=empty.txt"), ("recipe key data.prompts", "'empty.txt'")),
    "prompts file binary": (train("data.prompts=binary.txt"), ("recipe key data.prompts", "UTF-8")),
    "jsonl binary": (train("data.prompts=binary.jsonl"), ("recipe key data.prompts", "UTF-8")),
    "jsonl line broken": (train("data.prompts=bad.jsonl"), ("recipe key data.prompts", "'bad.jsonl' line 2", "JSON")),
    "jsonl line without prompt": (train("data.prompts=no_prompt.jsonl"), ("recipe key data.prompts", "line 1", "'prompt'")),
    "jsonl weight negative": (train("data.prompts=weight.jsonl"), ("recipe key data.prompts", "line 1", "-1")),
    "jsonl weights all zero": (train("data.prompts=weightless.jsonl"), ("recipe key data.prompts", "positive weight")),
    "prompts that cannot be read": (train("data.prompts=unread.txt"), ("recipe key data.prompts: 'blorp qux'", "tokenizer_3")),
    "negative prompt that cannot be read": (train("teacher.negative_prompt=blurry"), ("recipe key teacher.negative_prompt: 'blurry'",)),
    "images given to dmd2": (train("data.images=fastgen:digits"), ("recipe key data.images", "dmd2 does not use it")),
    "images missing": (images("nowhere"), ("recipe key data.images", "'nowhere'", "metadata.jsonl")),
    "images without rows": (images("images_empty"), ("recipe key data.images", "is empty")),
    "images line broken": (images("images_bad_line"), ("recipe key data.images", "line 1", "is not JSON")),
    "images line without text": (images("images_no_text"), ("recipe key data.images", "line 1", "'text'")),
    "images file missing": (images("images_no_file"), ("recipe key data.images", "line 1", "a.png")),
    "background that is no colour": (train("data.background=whit"), ("recipe key data.background", "a name such as white", "'whit'")),
    "background that YAML reads as a number": (train("data.background=000000"), ("recipe key data.background", "in quotes", "given: 0")),
    "background that YAML reads as a comment": (train("data.background=#fff"), ("recipe key data.background", "in quotes", "given: None")),
    "background out of range": (train("data.background=rgb(300, 0, 0)"), ("recipe key data.background", "rgb(300, 0, 0)")),
    "background that is transparent": (train("data.background='#ffffff80'"), ("recipe key data.background", "opaque", "#ffffff80")),
    "background of no images": (train("data.background=black"), ("recipe key data.background", "needs data.images")),
    "pairs missing": (dmd("null"), ("recipe key data.pairs: missing; dmd", "a number", "`fastgen cache pairs`")),
    "no pairs": (dmd("0"), ("recipe key data.pairs", "1 or more", "`fastgen cache pairs`", "given: 0")),
    "half a pair": (dmd("1.5"), ("recipe key data.pairs", "1 or more", "1.5")),
    "pairs that are a boolean": (dmd("true"), ("recipe key data.pairs", "a number of pairs", "True")),
    "pairs from nowhere": (dmd("nowhere"), ("recipe key data.pairs: 'nowhere' is no folder", "`fastgen cache pairs`")),
    "pairs from another folder": (dmd("full"), ("recipe key data.pairs: 'full' is no folder",)),
    "pairs that cannot be read": (dmd("pairs_broken"), ("recipe key data.pairs", "'pairs_broken/pairs/store.json'")),
    "pairs of an older fastgen that cannot be read": (dmd("pairs_older"), ("recipe key data.pairs", "cannot read 'pairs_older/pairs.json'")),
    "pairs not all there": (dmd("pairs_unfinished"), ("recipe key data.pairs: 'pairs_unfinished/pairs' holds 0 of 3",)),
    "pairs of other guidance": (dmd("pairs_guided"), ("recipe key data.pairs: 'pairs_guided/pairs'", "teacher.guidance 9.0", "has 1.5")),
    "pairs of another shape": (dmd("pairs_large"), ("recipe key data.pairs: 'pairs_large/pairs'", "(16, 128, 128)", "(2, 8, 8)")),
    "pairs given to dmd2": (train("data.pairs=100"), ("recipe key data.pairs", "dmd2", "distiller.regression")),
    "pairs for several steps": (train("data.pairs=100", "distiller.regression={}", "student.steps=4"),
        ("recipe key distiller.regression", "student.steps is 4")),
    # rewards
    "reward of no form": (train("distiller.reward.name=digits"), ("recipe key distiller.reward.name: 'digits'", "module:function")),
    "unknown bundled reward": (train("distiller.reward.name=fastgen:clip"), ("recipe key distiller.reward.name", "'fastgen:clip'", "digits")),
    "reward in no module": (train("distiller.reward.name=nowhere:f"), ("recipe key distiller.reward.name", "cannot import 'nowhere'")),
    "reward in no file": (train("distiller.reward.name=nowhere.py:f"), ("recipe key distiller.reward.name", "no file 'nowhere.py'")),
    "reward not in its file": (train("distiller.reward.name=reward.py:flt"), ("recipe key distiller.reward.name", "'flt'", f"{ALLOWED} 'flat'")),
    "reward that is no function": (train("distiller.reward.name=reward.py:NUMBER"), ("recipe key distiller.reward.name", "no function")),
    # caches
    "cache without a command": (("cache",), ("Missing command", "fastgen cache --help")),
    "cache of something else": (("cache", "pictures"), ("'pictures'", "fastgen cache --help")),
    "cache pairs without output": (("cache", "pairs", RECIPE), ("--output",)),
    "cache no pairs": (cache_pairs("--count", "0"), ("--count", "1")),
    "cache pairs in no steps": (cache_pairs("--steps", "0"), ("--steps", "1")),
    "cache pairs in no batch": (cache_pairs("--batch", "0"), ("--batch", "1")),
    "cache pairs with an unknown solver": (cache_pairs("--solver", "rk4"), ("--solver", "'rk4'", "euler", "heun")),
    "cache pairs of no recipe": (("cache", "pairs", "nowhere", *TO), ("no recipe 'nowhere'",)),
    "cache pairs of no teacher": (cache_pairs("teacher.pretrained=./nowhere"), ("recipe key teacher.pretrained", "'./nowhere'")),
    "cache pairs without prompts": (cache_pairs("data.prompts=null"), ("recipe key data.prompts: missing", "data.images")),
    "cache pairs of prompts that cannot be read": (cache_pairs("data.prompts=unread.txt"), ("recipe key data.prompts: 'blorp qux'",)),
    "cache pairs over other files": (cache_pairs("--output", "strange"), ("recipe key data.pairs: 'strange/pairs'", "other files")),
    "cache pairs over a file": (cache_pairs("--output", "empty.txt"), ("recipe key data.pairs: cannot write 'empty.txt/pairs'", "is a file")),
    "cache pairs below a file": (cache_pairs("--output", "empty.txt/x"), ("recipe key data.pairs: cannot write 'empty.txt/x/pairs'", "is a file")),
    "cache pairs among others": (cache_pairs("--output", "pairs_guided"), ("data.pairs: 'pairs_guided/pairs'", "teacher.guidance 9.0", "1.5")),
    "cache pairs among unreadable ones": (cache_pairs("--output", "pairs_broken"), ("'pairs_broken/pairs/store.json'",)),
    "cache pairs among older ones": (cache_pairs("--output", "pairs_older"), ("--output: 'pairs_older'", "older fastgen", "not continued")),
    "cache pairs of data without images": (cache_pairs("--from", "data"), ("recipe key data.images: missing; --from data",)),
    "cache pairs of a part beyond": (cache_pairs("--part", "3/2"), ("--part",)),
    # teachers
    "teacher folder missing": (train("teacher.pretrained=./nowhere"), ("recipe key teacher.pretrained", "'./nowhere'", "hub id")),
    "teacher folder without index": (train("teacher.pretrained=./full"), ("recipe key teacher.pretrained", "'./full'", "model_index.json")),
    "teacher of an unsupported class": (train("teacher.pretrained=./teacher_cogview4"),
        ("recipe key teacher.pretrained", "CogView4Pipeline", "StableDiffusion3Pipeline", "families/README.md")),
    "teacher index without class": (train("teacher.pretrained=./teacher_no_class"), ("recipe key teacher.pretrained", "_class_name")),
    "teacher index broken": (train("teacher.pretrained=./teacher_bad_index"), ("recipe key teacher.pretrained", "model_index.json")),
    "unknown bundled teacher": (train("teacher.pretrained=fastgen:digit"),
        ("recipe key teacher.pretrained", "'digit'", f"{ALLOWED} 'digits'")),
    "hub id offline": (train("teacher.pretrained=nobody/nothing"), ("recipe key teacher.pretrained", "'nobody/nothing'", "hub")),
    "unknown closed form": (train("teacher.pretrained=toy:rings"), ("recipe key teacher.pretrained", "toy:rings", f"{ALLOWED} 'ring'")),
    "closed form without --only train": (train("teacher.pretrained=toy:ring"), ("recipe key teacher.pretrained", "--only train")),
    "teacher with a broken header": (train("teacher.pretrained=student_bad_header"), ("student_bad_header", "cannot read")),
    "teacher with a broken encoder": (train("teacher.pretrained=./student_bad_encoder"), ("text_encoder", "cannot read")),
    "teacher cut short": (train("teacher.pretrained=./student_cut_short"), ("student_cut_short", "cannot read")),
    "resolution that does not fit": (train("teacher.resolution=9"), ("recipe key teacher.resolution: 9",)),
    # run folders
    "output holds other files": (train(options=("--output", "full")), ("--output: 'full'", "other files")),
    "output is a file": (train(options=("--output", "empty.txt")), ("--output: 'empty.txt'", "folder")),
    "output below a file": (train(options=("--output", "empty.txt/x")), ("--output: 'empty.txt/x'", "is a file")),
    "output is here, and here are other files": (train(options=("--output", "nowhere/..")), ("--output", "other files")),
    "existing run without flags": (train(options=("--output", "run")), ("--output: 'run'", "--resume", "--overwrite")),
    "resume without a run": (train(options=(*TO, "--resume")), ("--resume: 'new'", "no run")),
    "resume with another recipe": (train("train.seed=5", options=("--output", "run", "--resume")),
        ("--resume", "recipe key train.seed is 5", "has 0")),
    "resume of a broken recipe": (train(options=("--output", "run_bad_recipe", "--resume")),
        ("run_bad_recipe/recipe.yaml", "not valid YAML")),
    "resume and overwrite": (train(options=("--output", "run", "--resume", "--overwrite")), ("--resume and --overwrite",)),
    "unknown stage": (train(options=(*TO, "--only", "export")), ("--only: 'export'", "allowed: train")),
    # export
    "export without output": (("export", "run"), ("--output",)),
    "export of nothing": (("export", "nowhere", *TO), ("'nowhere'", "no run")),
    "export of a run without checkpoint": (("export", "run_without_checkpoint", *TO), ("'run_without_checkpoint' holds no checkpoint",)),
    "export --lora of a full run": (("export", "run", *TO, "--lora"), ("--lora", "student.tune: full")),
    "export over other files": (("export", "run", "--output", "full"), ("--output: 'full'", "no exported student")),
    "export over a file": (("export", "run", "--output", "empty.txt"), ("--output: 'empty.txt'",)),
    "export below a file": (("export", "run", "--output", "empty.txt/x"), ("--output: 'empty.txt/x'", "is a file")),
    # students
    "verify nothing": (("verify", "nowhere"), ("no folder 'nowhere'",)),
    "verify a run": (("verify", "run"), ("'run' holds no fastgen.json",)),
    "verify a broken manifest": (("verify", "student_no_json"), ("student_no_json/fastgen.json", "not valid JSON")),
    "sample without prompt": (("sample", "student", "--output", "new.png"), ("--prompt",)),
    "sample without output": (("sample", "student", "--prompt", "x"), ("--output",)),
    "sample into another format": (("sample", "student", "--prompt", "x", "--output", "new.jpg"), ("--output: 'new.jpg'", ".png")),
    "sample into a folder": (("sample", "student", "--prompt", "x", "--output", "folder.png"), ("--output: 'folder.png' is a folder",)),
    "sample into no folder": (("sample", "student", "--prompt", "x", "--output", "no/new.png"), ("--output", "no folder 'no'")),
    "sample in no steps": (sample("student", "--steps", "0"), ("--steps", "1")),
    "sample in too many steps": (sample("student", "--steps", "100000"), ("--steps", "1000")),
    "sample with a negative seed": (sample("student", "--seed", "-1"), ("--seed", "0")),
    "sample with a huge seed": (sample("student", "--seed", str(2**70)), ("--seed",)),
    "teacher's first step of one": (sample("student", "--steps", "1", "--first-step-from-teacher", "2"),
        ("--first-step-from-teacher", "--steps 2 or more")),
    "no teacher's steps": (sample("student", "--first-step-from-teacher", "0"), ("--first-step-from-teacher", "1")),
    "too many teacher's steps": (sample("student", "--first-step-from-teacher", "100000"), ("--first-step-from-teacher", "1000")),
    "guidance of no first step": (sample("student", "--first-step-guidance", "2"), ("--first-step-guidance", "needs --first-step-from-teacher")),
    "first step's guidance below 1": (sample("student", "--first-step-from-teacher", "2", "--first-step-guidance", "0"),
        ("--first-step-guidance: 0 ", "from 1")),
    "first step's guidance NaN": (sample("student", "--first-step-from-teacher", "2", "--first-step-guidance", "nan"),
        ("--first-step-guidance", "nan")),
    "first step's guidance infinite": (sample("student", "--first-step-from-teacher", "2", "--first-step-guidance", "inf"),
        ("--first-step-guidance", "inf")),
    "first step of a lost teacher": (sample("student_lost_teacher", "--steps", "2", "--first-step-from-teacher", "2"), ("'nowhere/teacher'",)),
    "sample a prompt that cannot be read": (sample("student", "--prompt", "blorp qux"), ("--prompt: 'blorp qux'", "tokenizer_3")),
    "sample from nothing": (sample("nowhere"), ("no folder 'nowhere'",)),
    "sample from a file": (sample("empty.txt"), ("no folder 'empty.txt'",)),
    "sample without fastgen.json": (sample("student_no_manifest"), ("'student_no_manifest' holds no fastgen.json",)),
    "fastgen.json is no JSON": (sample("student_no_json"), ("student_no_json/fastgen.json", "not valid JSON")),
    "fastgen.json is a list": (sample("student_a_list"), ("student_a_list/fastgen.json", "must be a JSON object")),
    "fastgen.json of a later version": (sample("student_format_9"), ("student_format_9/fastgen.json", "format 9")),
    "fastgen.json without call": (sample("student_no_call"), ("student_no_call/fastgen.json", "key call: missing")),
    "fastgen.json without steps": (sample("student_no_steps"), ("student_no_steps/fastgen.json", "key call.num_inference_steps: missing")),
    "fastgen.json with odd weights": (sample("student_odd_weights"), ("'full' or 'lora'", '"half"')),
    "student without weights": (sample("student_no_weights"), ("student_no_weights/transformer", "cannot read")),
    "student without config": (sample("student_no_config"), ("student_no_config/transformer/config.json",)),
    "student with a broken header": (sample("student_bad_header"), ("student_bad_header/transformer", "cannot read")),
    "student with a broken encoder": (sample("student_bad_encoder"), ("student_bad_encoder", "cannot read")),
    "student cut short": (sample("student_cut_short"), ("student_cut_short/transformer", "cannot read")),
    "student of another shape": (sample("student_misshapen"), ("student_misshapen/transformer", "cannot read")),
    "LoRA folder without adapter": (sample("student_lora_without_file"), ("pytorch_lora_weights.safetensors", "cannot read")),
    # evaluation and reports
    "evaluate nothing": (("evaluate", "nowhere"), ("MODEL: no folder 'nowhere'",)),
    "evaluate with an unknown protocol": (("evaluate", "student", "--protocol", "fid50k"), ("'fid50k'", "digits")),
    "evaluate in 0 steps": (("evaluate", "student", "--steps", "0"), ("--steps: '0'", "such as 1,2,4")),
    "evaluate in steps that are no numbers": (("evaluate", "student", "--steps", "a,b"), ("--steps: 'a,b'", "such as 1,2,4")),
    "evaluate in superscript steps": (("evaluate", "student", "--steps", "²"), ("--steps: '²'",)),
    "evaluate with no teacher steps": (("evaluate", "student", "--teacher-steps", ""), ("--teacher-steps: ''",)),
    "evaluate into no folder": (("evaluate", "student", "--output", "no/results.json"), ("--output", "no folder 'no'")),
    "evaluate into a folder": (("evaluate", "student", "--output", "full"), ("--output: 'full' is a folder",)),
    "report without runs": (("report",), ("RUN_DIR",)),
    "report of nothing": (("report", "nowhere"), ("nowhere", "recipe.yaml")),
    "report of a student": (("report", "student"), ("student", "recipe.yaml")),
    "report of a run without metrics": (("report", "run_without_metrics"), ("run_without_metrics", "metrics.jsonl")),
    "report of a broken recipe": (("report", "run_bad_recipe"), ("run_bad_recipe/recipe.yaml",)),
    "report of one run twice": (("report", "run", "run"), ("given twice", "run")),
    "report into no folder": (("report", "run", "--output", "no/report.html"), ("--output", "no folder 'no'")),
    "report into a folder": (("report", "run", "--output", "full"), ("--output: 'full' is a folder",)),
}  # fmt: skip


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub reads HF_HUB_OFFLINE once, at import; everything asks this constant afterwards."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def assert_refused(
    arguments: tuple[str, ...], words: tuple[str, ...], root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    before = snapshot(root)
    capfd.readouterr()
    status = cli.main(list(arguments))
    out, err = capfd.readouterr()
    assert (status, out) == (2, ""), err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert err.strip() != "error:"
    for word in words:
        assert word in err
    assert snapshot(root) == before


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("arguments", "words"), CASES.values(), ids=[name.replace(" ", "_") for name in CASES])
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], words: tuple[str, ...], workshop: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert_refused(arguments, words, workshop, monkeypatch, capfd)


@pytest.mark.parametrize(
    "name",
    [
        "unknown distiller",
        "prompts file missing",
        "prompts that cannot be read",
        "teacher folder missing",
        "LoRA targets that match no layer",
        "teacher cut short",
    ],
)
def test_a_dry_run_finds_the_mistake_too(name: str, workshop: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, words = CASES[name]
    assert_refused((*arguments, "--dry-run"), words, workshop, monkeypatch, capfd)


def test_half_a_launcher_is_refused(workshop: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(train(), ("WORLD_SIZE=2", "MASTER_PORT", "torchrun"), workshop, monkeypatch, capfd)
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert_refused(train(), ("WORLD_SIZE='two'", "no number of processes"), workshop, monkeypatch, capfd)


def test_an_output_that_ends_in_dots_does_not_hide_what_it_replaces(
    tmp_path: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home/run").mkdir(parents=True)
    (tmp_path / "home/letters.txt").write_text("mine")
    shutil.copytree(workshop / "run", tmp_path / "home/run", dirs_exist_ok=True)
    # `nowhere/..` does not exist before the export makes `nowhere`, and is `home` afterwards.
    arguments = ("export", "home/run", "--output", "home/nowhere/..")
    assert_refused(arguments, ("--output", "no exported student"), tmp_path, monkeypatch, capfd)


def test_the_table_covers_every_command() -> None:
    commands: set[str] = {arguments[0] for arguments, _ in CASES.values()}
    assert {"train", "export", "verify", "sample", "evaluate", "report", "recipes", "cache"} <= commands
    assert len(CASES) >= 40


def test_only_mistakes_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of ours keeps its traceback."""

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(Recipe, "load", fail)
    with pytest.raises(KeyError, match="ours"):
        cli.main(["train", RECIPE])

"""A run and its continuation read the same, by content: a path may change its content no less than a content its path."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from PIL import Image
from pipelines import sd3_folder as sd3_folder
from safetensors.torch import load_file

from fastgen import checkpoint, generator, inputs, load_student, load_teacher_of, run
from fastgen import plan as plans
from fastgen.caching import cache_pairs
from fastgen.config import Recipe, validate
from fastgen.errors import UserError
from fastgen.families import is_hub_id, resolve_source, source_hash
from fastgen.plan import Plan, plan

torch.set_num_threads(1)
TOY: dict[str, Any] = {
    "teacher": {"pretrained": "toy:mixture"},
    "student": {"steps": 1},
    "distiller": {"name": "dmd2", "critic_updates": 1},
    "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
    "train": {"steps": 2, "batch_size": 4, "checkpoint_every": 1, "sample_every": 0, "device": "cpu"},
}


def recipe(root: Path, base: dict[str, Any] = TOY, **data: Any) -> Recipe:
    (root / "prompts.txt").write_text("0\n2\n2\n")
    return validate(Recipe, base | {"data": data or {"prompts": str(root / "prompts.txt")}})


def changed(given: Recipe, **keys: Any) -> Recipe:
    """A recipe with other values, `block__key=value`."""
    data = given.dump()
    for key, value in keys.items():
        block, name = key.split("__")
        data[block][name] = value
    return validate(Recipe, data)


def begin(root: Path, given: Recipe) -> Path:
    """What a run folder says before training."""
    planned = plan(given, only="train")
    (root / "run").mkdir(exist_ok=True)
    inputs.write(root / "run", inputs.identify(planned))
    (root / "run/recipe.yaml").write_text(yaml.safe_dump(planned.resolved()))
    return root / "run"


def newest_state(run_dir: Path) -> dict[str, Any] | None:
    return checkpoint.read_state(checkpoint.latest(run_dir)) if checkpoint.checkpoints(run_dir / "checkpoints") else None


def recorded(run_dir: Path) -> inputs.Inputs:
    return inputs.recorded(run_dir, newest_state(run_dir))


def go_on(run_dir: Path, given: Recipe, **options: Any) -> inputs.Inputs:
    return inputs.check_same(run_dir, plan(given, only="train", **options), newest_state(run_dir))[0]


def digest(folder: Path) -> dict[str, str]:
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("checkpoints", [True, False], ids=["with checkpoints", "killed before the first"])
def test_prompts_are_their_texts_and_weights(tmp_path: Path, checkpoints: bool) -> None:
    given, file = recipe(tmp_path), tmp_path / "prompts.txt"
    run_dir = run.train(given, tmp_path / "run", only="train")
    if not checkpoints:
        shutil.rmtree(run_dir / "checkpoints")
    same = tmp_path / "same.jsonl"
    same.write_text('{"prompt": "0", "weight": 1}\n{"prompt": "2", "weight": 2}\n')
    before = digest(run_dir)
    for text in ("0\n1\n2\n", "2\n0\n2\n", "0\n2\n"):  # another text, another order, another weight
        file.write_text(text)
        with pytest.raises(UserError, match=rf"--resume: recipe key data\.prompts: '{file}' has changed since the run began; resume with what"):
            run.train(given, run_dir, resume=True, only="train")
        assert digest(run_dir) == before
    other = tmp_path / "other.txt"
    other.write_text("1\n")
    with pytest.raises(UserError, match=rf"data\.prompts: '{other}' holds something else than '{file}', with which the run began"):
        run.train(changed(given, data__prompts=str(other)), run_dir, resume=True, only="train")
    assert digest(run_dir) == before
    run.train(changed(given, data__prompts=str(same)), run_dir, resume=True, only="train")
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["data"]["prompts"] == str(same)
    assert checkpoint.latest(run_dir).name == "step_000002"
    run.train(changed(given, data__prompts=str(same)), run_dir, resume=True, only="train")


def teacher_recipe(root: Path, teacher: Path) -> Recipe:
    return recipe(root, TOY | {"teacher": {"pretrained": str(teacher), "max_sequence_length": 16}})


@pytest.fixture
def teacher(sd3_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd3_folder, tmp_path / "teacher"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


UNREAD = (
    "README.md",
    "picture.png",
    ".cache/date",
    "sd3.safetensors",
    "onnx/model.onnx",
    "vae/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
)


def test_a_teacher_is_what_its_pipeline_is_loaded_from(teacher: Path, tmp_path: Path) -> None:
    known = source_hash(str(teacher))
    for name in UNREAD:
        (teacher / name).parent.mkdir(exist_ok=True)
        (teacher / name).write_text("from a fuller download")
    assert source_hash(str(teacher)) == known
    assert source_hash(str(teacher.rename(tmp_path / "moved"))) == known
    names = [str(file.relative_to(tmp_path / "moved")) for file in sorted((tmp_path / "moved").rglob("*")) if file.is_file()]
    read = {name for name in names if name.endswith((".json", "model.safetensors")) and "fp16" not in name}
    assert len(read) >= 15
    for name in sorted(read):
        file = tmp_path / "moved" / name
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        assert source_hash(str(tmp_path / "moved")) != known, name
        file.write_bytes(content)
    (tmp_path / "moved/transformer/diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    assert source_hash(str(tmp_path / "moved")) != known


def test_a_teacher_that_changes_is_refused_and_one_that_moves_is_not(teacher: Path, tmp_path: Path) -> None:
    given = teacher_recipe(tmp_path, teacher)
    run_dir = begin(tmp_path, given)
    go_on(run_dir, given)
    moved = Path(shutil.copytree(teacher, tmp_path / "moved"))
    go_on(run_dir, changed(given, teacher__pretrained=str(moved)))
    flip(teacher / "transformer/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=rf"--resume: recipe key teacher\.pretrained: '{teacher}' has changed since the run began"):
        go_on(run_dir, given)
    go_on(run_dir, changed(given, teacher__pretrained=str(moved)))
    with pytest.raises(UserError, match=r"--resume: recipe key teacher\.guidance is 2\.0, the run in"):
        go_on(run_dir, changed(given, teacher__pretrained=str(moved), teacher__guidance=2.0))


def test_a_run_goes_on_with_its_teacher_kept_as_it_was_wherever_it_lies(teacher: Path, tmp_path: Path) -> None:
    given = teacher_recipe(tmp_path, teacher)
    run_dir = begin(tmp_path, given)
    go_on(run_dir, changed(given, teacher__offload=True, train__ema_device="cpu", train__offload_optimizers=True))
    for key, value in (("dtype", "bf16"), ("quantise", "int8")):
        another = changed(given, **{f"teacher__{key}": value})
        with pytest.raises(UserError, match=rf"--resume: recipe key teacher\.{key} is '{value}', the run in"):
            go_on(run_dir, another)
        with pytest.raises(UserError, match=rf"--allow-change: teacher\.{key} decides what is trained"):
            inputs.check_same(run_dir, plan(another, only="train"), newest_state(run_dir), allowed=[f"teacher.{key}"])


def test_what_is_exported_is_not_put_on_another_teacher(teacher: Path, tmp_path: Path) -> None:
    given = teacher_recipe(tmp_path, teacher)
    run_dir = run.train(given, tmp_path / "run", only="train")
    state = checkpoint.read_state(checkpoint.latest(run_dir))
    assert state["inputs"]["teacher.pretrained"] == source_hash(str(teacher))
    student = run.export(run_dir, tmp_path / "student")
    assert json.loads((student / "fastgen.json").read_text())["teacher"]["sha256"] == source_hash(str(teacher))
    flip(teacher / "vae/diffusion_pytorch_model.safetensors")  # it goes into the student as it is
    with pytest.raises(UserError, match=rf"recipe key teacher\.pretrained: '{teacher}' has changed since the run began"):
        run.export(run_dir, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    taken_over = changed(given, student__init=str(run_dir))
    with_it = plans._origin(taken_over)
    assert with_it.differs == (f"teacher.pretrained '{teacher}', which has changed since",)
    flip(teacher / "vae/diffusion_pytorch_model.safetensors")
    moved = Path(shutil.copytree(teacher, tmp_path / "moved"))
    assert plans._origin(changed(taken_over, teacher__pretrained=str(moved))).differs == ()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4), (80 * i, 0, 0)).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": ["a", "b"] if i else "c"} for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def images_recipe(root: Path, teacher: Path, images: Path) -> Recipe:
    method = {"distiller": {"name": "flow_matching"}, "optimizer": {"student": {"lr": 1e-3}}}
    return recipe(root, TOY | method | {"teacher": {"pretrained": str(teacher)}}, images=str(images))


def test_images_are_their_captions_and_files(sd3_folder: Path, pictures: Path, tmp_path: Path) -> None:
    given = images_recipe(tmp_path, sd3_folder, pictures)
    run_dir = begin(tmp_path, given)
    moved = Path(shutil.copytree(pictures, tmp_path / "moved"))
    (moved / "2.png").rename(moved / "two.png")
    metadata = moved / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("2.png", "two.png").replace('{"', '{ "'))
    go_on(run_dir, changed(given, data__images=str(moved)))
    text = metadata.read_text()
    for other in (text.replace('"b"', '"d"'), "\n".join(text.splitlines()[::-1]), text.replace("two.png", "1.png"), "\n".join(text.splitlines()[:2])):
        metadata.write_text(other)
        with pytest.raises(UserError, match=rf"data\.images: '{moved}' holds something else than '{pictures}'"):
            go_on(run_dir, changed(given, data__images=str(moved)))
    Image.new("RGB", (4, 4), (81, 0, 0)).save(pictures / "1.png")
    with pytest.raises(UserError, match=rf"data\.images: '{pictures}' has changed since the run began"):
        go_on(run_dir, given)


def pairs_recipe(root: Path) -> Recipe:
    return recipe(root, TOY | {"distiller": {"name": "dmd"}}, prompts=str(root / "prompts.txt"), pairs=str(root / "pairs"))


def test_pairs_may_grow_and_move_but_not_change(tmp_path: Path) -> None:
    given = pairs_recipe(tmp_path)
    drawing = changed(given, data__pairs=None)
    cache_pairs(drawing, tmp_path / "pairs", count=6)
    run_dir = run.train(given, tmp_path / "run", only="train")
    final = "checkpoints/step_000002/ema_student.safetensors"
    want = load_file(run_dir / final)
    cache_pairs(drawing, tmp_path / "pairs", count=40)
    go_on(run_dir, given, started=True)
    shutil.rmtree(run_dir / "checkpoints")  # it starts over, with as many as it began with
    run.train(given, run_dir, resume=True, only="train")
    got = load_file(run_dir / final)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert checkpoint.read_state(checkpoint.latest(run_dir))["pairs"] == 6
    moved = Path(shutil.copytree(tmp_path / "pairs", tmp_path / "moved"))
    run.train(changed(given, data__pairs=str(moved)), run_dir, resume=True, only="train")
    shutil.rmtree(tmp_path / "pairs")
    cache_pairs(changed(drawing, train__seed=1), tmp_path / "pairs", count=40)
    with pytest.raises(UserError, match=rf"data\.pairs: '{tmp_path / 'pairs'}' holds something else than '{moved}'"):
        run.train(given, run_dir, resume=True, only="train")
    shutil.rmtree(tmp_path / "pairs")
    cache_pairs(drawing, tmp_path / "pairs", count=5)
    with pytest.raises(UserError, match=r"recipe key data\.pairs: .* holds 5 pairs, but the run began with 6"):
        run.train(given, run_dir, resume=True, only="train")
    with pytest.raises(UserError, match=r"--resume: recipe key data\.pairs is 6, the run in"):
        run.train(changed(given, data__pairs=6), run_dir, resume=True, only="train")


def test_student_init_is_its_newest_checkpoint(tmp_path: Path) -> None:
    first = run.train(recipe(tmp_path), tmp_path / "first", only="train")
    given = changed(recipe(tmp_path), student__init=str(first))
    run_dir = begin(tmp_path, given)
    moved = Path(shutil.copytree(first, tmp_path / "moved"))
    go_on(run_dir, changed(given, student__init=str(moved)))
    run.train(changed(recipe(tmp_path), train__seed=1), first, overwrite=True, only="train")
    with pytest.raises(UserError, match=rf"student\.init: '{first}' has changed since the run began"):
        go_on(run_dir, given)
    go_on(run_dir, given, started=True)  # all that it brought is in the checkpoint
    go_on(run_dir, changed(given, student__init=str(moved)), started=True)
    shutil.rmtree(first)
    go_on(run_dir, given, started=True)
    for other in (str(tmp_path / "nowhere"), "teacher"):
        with pytest.raises(UserError, match=r"--resume: recipe key student\.init is "):
            go_on(run_dir, changed(given, student__init=other), started=True)


def test_a_reward_is_its_code(tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text("def bright(pixels, prompts):\n    return pixels.mean((1, 2, 3))\n")
    reward = {"name": f"{file}:bright"}
    given = changed(Recipe.load("digits_dmd2_1step"), distiller__reward=reward, data__prompts=str(tmp_path / "prompts.txt"))
    (tmp_path / "prompts.txt").write_text("a digit\n")
    run_dir = begin(tmp_path, given)
    moved = Path(shutil.copy(file, tmp_path / "moved.py"))
    go_on(run_dir, changed(given, distiller__reward={"name": f"{moved}:bright"}))
    file.write_text("def bright(pixels, prompts):\n    return -pixels.mean((1, 2, 3))\n\n\ndef dark(pixels, prompts):\n    return 0\n")
    with pytest.raises(UserError, match=rf"distiller\.reward\.name: '{file}:bright' has changed since the run began"):
        go_on(run_dir, given)
    with pytest.raises(UserError, match=r"distiller\.reward\.name: '.*:dark' holds something else than"):
        go_on(run_dir, changed(given, distiller__reward={"name": f"{file}:dark"}))


class Hub:
    """A hub with one repository, whose commits are folders of a download cache as the real one lays it out."""

    def __init__(self, root: Path, content: Path) -> None:
        self.snapshots, self.content = root / "models--owner--name/snapshots", content
        self.names: dict[str | None, str] = {}
        self.downloads: list[str | None] = []

    def push(self, commit: str, **scheduler: Any) -> str:
        shutil.copytree(self.content, self.snapshots / commit)
        file = self.snapshots / commit / "scheduler/scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
        self.names |= {None: commit, "main": commit, commit: commit}
        return commit

    def download(self, name: str, revision: str | None = None) -> Path:
        assert name == "owner/name"
        self.downloads.append(revision)
        if revision not in self.names:
            raise OSError(f"{revision} is not a valid git identifier")
        return self.snapshots / self.names[revision]


@pytest.fixture
def hub(tmp_path: Path, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path, sd3_folder)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", found.download)
    return found


def shift_of(planned: Plan) -> float:
    return planned.family.shift


def test_a_hub_id_is_pinned_to_the_commit_that_was_downloaded(hub: Hub, tmp_path: Path) -> None:
    old = hub.push("a" * 40)
    given = recipe(tmp_path, TOY | {"teacher": {"pretrained": "owner/name"}})
    assert plan(given).resolved()["teacher"]["revision"] == old
    run_dir = begin(tmp_path, given)
    new = hub.push("b" * 40, shift=2.0)
    assert plan(given).resolved()["teacher"]["revision"] == new
    assert (shift_of(plan(given)), shift_of(plan(changed(given, teacher__revision=old)))) == (2.0, 3.0)
    kept = inputs.at_its_commit(given, inputs.began_as(run_dir, None))  # the hub has moved on, the run has not
    assert kept.teacher.revision == old
    go_on(run_dir, kept)
    with pytest.raises(UserError, match=r"teacher\.pretrained: 'owner/name' has changed since the run began"):
        go_on(run_dir, changed(given, teacher__revision="main"))
    hub.push("c" * 40)  # the same files again
    go_on(run_dir, changed(given, teacher__revision="main"))
    go_on(run_dir, changed(given, teacher__pretrained=str(hub.snapshots / old)))
    with pytest.raises(UserError, match=r"recipe key teacher\.revision: cannot get 'owner/name' at 'v9' from the hub"):
        plan(changed(given, teacher__revision="v9"))


def test_a_run_and_its_student_stay_at_their_commit(hub: Hub, tmp_path: Path) -> None:
    old = hub.push("a" * 40)
    given = recipe(
        tmp_path, TOY | {"teacher": {"pretrained": "owner/name", "max_sequence_length": 16}, "student": {"steps": 1, "tune": {"lora": {"rank": 2}}}}
    )
    run_dir = run.train(given, tmp_path / "run", only="train")
    hub.push("b" * 40, shift=2.0)
    run.train(given, run_dir, resume=True, only="train")
    student = run.export(run_dir, tmp_path / "student", weights="lora")
    manifest = generator.read_manifest(student)
    assert (manifest["teacher"]["revision"], manifest["base"]) == (old, "owner/name")
    assert f'from_pretrained("owner/name", revision="{old}", torch_dtype' in (student / "README.md").read_text()
    assert load_student(student).family.shift == load_teacher_of(student).family.shift == 3.0
    hub.names[old] = "b" * 40
    with pytest.raises(UserError, match=r"its teacher 'owner/name' has changed since the student was trained"):
        load_student(student)


@pytest.mark.parametrize("source", ["fastgen:digits", "toy:mixture", "folder", "./owner/name"])
def test_only_hub_ids_have_revisions(source: str, tmp_path: Path, sd3_folder: Path) -> None:
    source = str(sd3_folder) if source == "folder" else source
    with pytest.raises(UserError, match=r"recipe key teacher\.revision: 'main' is given, but '.*' is no hub id"):
        plan(recipe(tmp_path, TOY | {"teacher": {"pretrained": source, "revision": "main"}}), only="train")
    assert not is_hub_id(source)


def test_a_folder_named_as_a_hub_id_comes_first(hub: Hub, tmp_path: Path, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_hub_id("owner/name")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sd3_folder, tmp_path / "owner/name")
    assert not is_hub_id("owner/name")
    assert resolve_source("owner/name") == Path("owner/name")
    assert hub.downloads == []


def test_bundled_and_closed_form_teachers() -> None:
    assert source_hash("toy:mixture") == "toy:mixture"
    assert source_hash("fastgen:digits") == source_hash(str(resolve_source("fastgen:digits")))
    assert len(source_hash("fastgen:digits")) == 64


def test_a_record_that_is_damaged_or_missing(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    run_dir = begin(tmp_path, given)
    record = (run_dir / inputs.FILE).read_text()
    assert recorded(run_dir) == inputs.identify(plan(given, only="train"))
    for text in (record.replace("toy:", "toz:"), "{", "[]", ""):
        (run_dir / inputs.FILE).write_text(text)
        with pytest.raises(UserError, match=r"cannot read '.*inputs\.json'"):
            go_on(run_dir, given)
    (run_dir / inputs.FILE).unlink()  # of an older fastgen that was killed before its first checkpoint
    go_on(run_dir, given)
    shutil.copy(tmp_path / "prompts.txt", tmp_path / "other.txt")
    with pytest.raises(UserError, match=r"--resume: recipe key data\.prompts is "):
        go_on(run_dir, changed(given, data__prompts=str(tmp_path / "other.txt")))


def test_the_record_of_a_run_is_made_once(tmp_path: Path) -> None:
    run_dir = run.train(recipe(tmp_path), tmp_path / "run", only="train")
    hashes = recorded(run_dir).hashes
    assert hashes == {"teacher.pretrained": "toy:mixture", "data.prompts": hashlib.sha256(f'[["0", {1 / 3}], ["2", {2 / 3}]]'.encode()).hexdigest()}
    assert json.loads((run_dir / inputs.FILE).read_text())["hashes"] == hashes
    run.train(changed(recipe(tmp_path), train__seed=1), run_dir, overwrite=True, only="train")
    assert recorded(run_dir).hashes == hashes


def test_a_run_of_an_older_fastgen_had_the_defaults_of_keys_added_since(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    folder = begin(tmp_path, given)
    before = yaml.safe_load((folder / "recipe.yaml").read_text())
    del before["student"]["sampler"], before["distiller"]["ida"], before["data"]["background"]
    del before["optimizer"]["student"]["warmup"], before["evaluate"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(before))
    inputs.check_same(folder, plan(given, only="train"), None)
    with pytest.raises(UserError, match=r"^--resume: recipe key student\.sampler is 'stochastic', the run in .* has 'euler'"):
        inputs.check_same(folder, plan(changed(given, student__sampler="stochastic"), only="train"), None)


@pytest.mark.parametrize("damage", [{"train": None}, {"optimizer": [1]}, {"optimizer": {"student": 3}}, {"distiller": "dmd2"}])
def test_a_damaged_recipe_of_a_run_is_another_one(damage: dict[str, Any], tmp_path: Path) -> None:
    given = recipe(tmp_path)
    folder = begin(tmp_path, given)
    before = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(before | damage))
    with pytest.raises(UserError, match=r"^--resume: recipe key "):
        inputs.check_same(folder, plan(given, only="train"), None)


def test_computing_blocks_again_may_begin_with_a_continuation(teacher: Path, tmp_path: Path) -> None:
    given = changed(recipe(tmp_path), teacher__pretrained=str(teacher))
    folder = begin(tmp_path, given)
    inputs.check_same(folder, plan(changed(given, train__checkpointing=True), only="train"), None)

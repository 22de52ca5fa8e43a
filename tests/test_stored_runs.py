"""Runs that read their data from a store: the same numbers as from memory, in micro-batches, read ahead, and after a kill."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_sets import loaded, samples_of
from PIL import Image
from pipelines import sd3_folder as sd3_folder
from safetensors.torch import load_file

from fastgen import caching, cli, run
from fastgen.config import Recipe, validate
from fastgen.data import feed
from fastgen.data.rows import Held
from fastgen.data.store import Store, open_store
from fastgen.errors import UserError
from fastgen.outlook import dry_run
from fastgen.plan import plan
from fastgen.progress import Progress
from fastgen.run.building import build

TEXTS = [f"a picture of {what}" for what in ("boats", "cats", "two dogs", "a hill", "nothing")]
SCORE = {"optimizer": {"student": {"lr": 1e-4}, "fake_score": {"lr": 1e-4}}}
GAN = {"optimizer": {**SCORE["optimizer"], "discriminator": {"lr": 1e-4}}}
TWO: dict[str, Any] = {"student": {"steps": 2}}
FROM_PROMPTS: dict[str, dict[str, Any]] = {
    "dmd2": {**SCORE, **TWO},
    "phased_dmd": {**SCORE, **TWO, "distiller": {"phases": [{"start": 1.0, "end": 0.75, "share": 0.5}, {"start": 0.75, "end": 0.0, "share": 0.5}]}},
    "tbcm": {"train": {"batch_size": 4, "micro_batch": 2}},
    "dmd": {**SCORE, "data": {"pairs": 6}},
    "reflow": {"data": {"pairs": {"count": 6, "solver": "heun", "steps": 3}}},
    "slimflow": {"data": {"pairs": 6}, "distiller": {"two_step": {}, "anneal": {"steps": 3}}},
}
FROM_IMAGES: dict[str, dict[str, Any]] = {
    "scm": TWO,
    "rcm": {**SCORE, **TWO},
    "mean_flow": TWO,
    "lcm": TWO,
    "tscd": TWO,
    "perflow": {**TWO, "distiller": {"solver_steps": 2}},
    "progressive": {**TWO, "distiller": {"halvings": 2}},
    "flow_matching": TWO,
    "f_distill": {**GAN, "distiller": {"gan": {}}},
    "dmd2": {**GAN, "distiller": {"gan": {}}},
}
METHODS = [("prompts", name) for name in FROM_PROMPTS] + [("images", name) for name in FROM_IMAGES]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    lines = []
    for i, text in enumerate(TEXTS):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": [text, "noise"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def recipe(teacher: Path, source: Path, kind: str, method: str, **data: Any) -> Recipe:
    given = {"prompts": FROM_PROMPTS, "images": FROM_IMAGES}[kind][method]
    base: dict[str, dict[str, Any]] = {
        "teacher": {"pretrained": str(teacher), "max_sequence_length": 16},
        "student": {"steps": 1},
        "distiller": {"name": method},
        "data": {kind: str(source / "prompts.txt") if kind == "prompts" else str(source)},
        "optimizer": {"student": {"lr": 1e-4}},
        "train": {"steps": 4, "batch_size": 6, "micro_batch": 3, "checkpoint_every": 2, "sample_every": 0, "device": "cpu"},
    }
    return validate(Recipe, {name: block | given.get(name, {}) | (data if name == "data" else {}) for name, block in base.items()})


def weights(folder: Path, step: int = 4) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoints" / f"step_{step:06d}").glob("*.safetensors"))
    return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_training_from_a_store_is_training_from_memory_to_the_bit(sd3_folder: Path, source: Path, tmp_path: Path, kind: str, method: str) -> None:
    memory = recipe(sd3_folder, source, kind, method)
    stored = recipe(sd3_folder, source, kind, method, store=str(tmp_path / "store"), keep="disk")
    expected = weights(run.train(memory, tmp_path / "memory", only="train"))
    built = build(plan(stored, only="train"), Progress())
    assert isinstance(built.data.parts[0].cond, Store) and built.data.read_ahead and len(expected) > 10
    assert same(weights(run.train(stored, tmp_path / "stored", only="train")), expected)


def test_a_closed_form_teacher_which_has_no_pipeline_trains_from_a_store_too(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("0\n1\n2\n", encoding="utf-8")

    def toy(**data: Any) -> Recipe:
        data = {"prompts": str(tmp_path / "prompts.txt"), **data}
        train = {"steps": 2, "batch_size": 4, "sample_every": 0, "device": "cpu"}
        return validate(
            Recipe, {"teacher": {"pretrained": "toy:mixture"}, **TWO, "distiller": {"name": "dmd2"}, "data": data, **SCORE, "train": train}
        )

    expected = weights(run.train(toy(), tmp_path / "memory", only="train"), step=2)
    stored = weights(run.train(toy(store=str(tmp_path / "store"), keep="disk"), tmp_path / "stored", only="train"), step=2)
    assert len(expected) > 10 and same(stored, expected)
    other = toy(store=str(tmp_path / "store")).model_copy(update={"teacher": toy().teacher.model_copy(update={"pretrained": "toy:ring"})})
    with pytest.raises(UserError, match=r"^recipe key data\.store: .* was encoded with text encoders 'toy:mixture', this recipe needs 'toy:ring'"):
        plan(other, only="train")


def test_a_closed_form_teacher_takes_no_pictures(source: Path) -> None:
    given = recipe(source, source, "images", "flow_matching")
    given = given.model_copy(update={"teacher": given.teacher.model_copy(update={"pretrained": "toy:mixture", "max_sequence_length": None})})
    with pytest.raises(UserError, match=r"^recipe key data\.images: the teacher makes vectors of 2 numbers, and pictures are none; train on"):
        plan(given, only="train")


def test_a_run_goes_on_from_a_store_as_it_would_have_from_memory_and_the_other_way_round(sd3_folder: Path, source: Path, tmp_path: Path) -> None:
    memory = recipe(sd3_folder, source, "images", "scm")
    stored = recipe(sd3_folder, source, "images", "scm", store=str(tmp_path / "store"), keep="disk")
    expected = weights(run.train(memory, tmp_path / "whole", only="train"))
    for name, first, then in (("a", memory, stored), ("b", stored, memory)):
        run.train(first, tmp_path / name, only="train")
        run.train(then, tmp_path / name, only="train", resume_from="step_000002")
        assert same(weights(tmp_path / name), expected)


def test_a_small_store_is_read_into_memory_at_the_start(sd3_folder: Path, source: Path, tmp_path: Path) -> None:
    heard = Heard()
    built = build(plan(recipe(sd3_folder, source, "images", "scm", store=str(tmp_path / "store")), only="train"), heard)
    assert isinstance(built.data.parts[0].cond, Held) and isinstance(built.data.parts[0].latents, Held)
    assert f"5 images in '{tmp_path}/store/latents': 0.00 GB, read into memory" in heard.stages


class Heard(Progress):
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.warnings: list[str] = []

    def stage(self, message: str) -> None:
        self.stages.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_half_precision_is_the_same_in_memory_and_in_a_store_and_not_that_of_single(sd3_folder: Path, source: Path, tmp_path: Path) -> None:
    runs = [{"dtype": "bf16"}, {"dtype": "bf16", "store": str(tmp_path / "store"), "keep": "disk"}, {}]
    memory, stored, single = (
        weights(run.train(recipe(sd3_folder, source, "images", "scm", **data), tmp_path / str(i), only="train")) for i, data in enumerate(runs)
    )
    assert same(memory, stored) and not same(memory, single)


def test_online_encodes_what_is_drawn_to_the_same_numbers(sd3_folder: Path, source: Path) -> None:
    ahead, online = (build(plan(recipe(sd3_folder, source, "images", "scm", encode=how), only="train"), Progress()) for how in ("ahead", "online"))
    for one, other in zip(*(list(each.trainer._batches()) for each in (ahead, online)), strict=True):
        assert one.prompts == other.prompts and one.latents is not None and other.latents is not None
        torch.testing.assert_close(other.latents, one.latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.cond, one.cond, rtol=1e-5, atol=1e-5)


def test_an_online_run_keeps_its_encoders_and_trains(sd3_folder: Path, source: Path, tmp_path: Path) -> None:
    run_dir = run.train(recipe(sd3_folder, source, "images", "scm", encode="online"), tmp_path / "run", only="train")
    assert len(weights(run_dir)) > 10


def test_caches_of_parts_are_what_a_run_makes_itself(sd3_folder: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = recipe(sd3_folder, source, "images", "scm", store=str(tmp_path / "own"))
    build(plan(given, only="train"), Progress())
    (tmp_path / "recipe.yaml").write_text(given.to_yaml(), encoding="utf-8")
    for kind in ("prompts", "latents"):
        for part in ("2/2", "1/2"):
            assert cli.main(["cache", kind, str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "cached"), "--part", part]) == 0
        for file in sorted((tmp_path / "own" / kind).iterdir()):
            assert file.read_bytes() == (tmp_path / "cached" / kind / file.name).read_bytes()
    assert capsys.readouterr().out.splitlines()[-1] == f"latents: {tmp_path}/cached/latents holds 5 of 5, 5 of them new"
    assert [made for _, made in caching.cache_encoded("prompts", given, tmp_path / "cached")] == [0]


def test_pictures_that_cannot_be_decoded_are_left_out_of_a_store_too(sd3_folder: Path, source: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for file in source.iterdir():
        (pictures / file.name).write_bytes(file.read_bytes()[: -40 if file.name == "3.png" else None])
    memory, stored = {"skip_broken": True}, {"skip_broken": True, "store": str(tmp_path / "store"), "keep": "disk"}
    heard = [Heard(), Heard(), Heard()]
    one, two, again = (
        build(plan(recipe(sd3_folder, pictures, "images", "scm", **data), only="train"), heard[i]) for i, data in enumerate((memory, stored, stored))
    )
    assert heard[0].warnings == heard[1].warnings == heard[2].warnings and "1 of 5 pictures are left out" in heard[0].warnings[0]
    for batches in zip(*(list(each.trainer._batches()) for each in (one, two, again)), strict=True):
        assert all(batch.latents is not None and torch.equal(batch.latents, batches[0].latents) for batch in batches)
        assert all(batch.latents.flatten(1).any(1).all() for batch in batches)


def test_a_flipped_byte_ends_the_run_with_its_name(sd3_folder: Path, source: Path, tmp_path: Path) -> None:
    given = recipe(sd3_folder, source, "images", "scm", store=str(tmp_path / "store"), keep="disk")
    build(plan(given, only="train"), Progress())
    (file,) = (tmp_path / "store/latents").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-2] ^= 4
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"^recipe key data\.store: row 4 in '.*latents/shard_000000\.safetensors' is not what was written"):
        run.train(given, tmp_path / "run", only="train")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"encode": "online", "store": "x"}, r"data\.store: says how encoded data are kept, and with data\.encode: online they are not"),
        ({"encode": "online", "dtype": "bf16"}, r"data\.dtype: says how encoded data are kept"),
        ({"keep": "disk"}, r"data\.keep: says how data\.store is read, and there is none"),
    ],
)
def test_keys_that_have_nothing_to_say_are_refused_by_the_dry_run(sd3_folder: Path, source: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^recipe key {message}"):
        dry_run(recipe(sd3_folder, source, "images", "scm", **data), only="train")


def test_a_store_of_something_else_is_refused_by_the_dry_run_with_both_values(sd3_folder: Path, source: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    given = recipe(sd3_folder, source, "images", "scm", store=store)
    build(plan(given, only="train"), Progress())
    dry_run(given, only="train")

    def refused(message: str, **changed: Any) -> None:
        content = given.dump()
        for key, value in changed.items():
            block, name = key.split("_", 1)
            content[block][name] = value
        with pytest.raises(UserError, match=rf"^recipe key data\.store: .*{message}; choose another folder"):
            dry_run(validate(Recipe, content), only="train")

    refused("encoded with teacher.max_sequence_length 16, this recipe needs 12", teacher_max_sequence_length=12)
    refused(r"latents' was encoded with teacher.size \[16, 16\], this recipe needs \[24, 24\]", teacher_resolution=24)
    refused("encoded with data.dtype 'fp32', this recipe needs 'bf16'", data_dtype="bf16")
    refused("encoded with data.crop 'center', this recipe needs 'random'", data_crop="random")
    (tmp_path / "fewer.txt").write_text("\n".join(TEXTS[:2]), encoding="utf-8")
    fewer = recipe(sd3_folder, source, "prompts", "dmd2", store=store, prompts=str(tmp_path / "fewer.txt"))
    with pytest.raises(UserError, match="holds 6 other prompts than this recipe's 2; choose another folder"):
        dry_run(fewer, only="train")


def test_batches_are_drawn_ahead_in_order_and_what_fails_is_raised_in_its_place() -> None:
    class Data:
        read_ahead = True
        drawn: list[int]

        def __init__(self) -> None:
            self.drawn = []

        def draw(self, rng: int) -> int:
            self.drawn.append(rng)
            if rng == 5:
                raise UserError("the sixth is broken")
            return rng

    def coming() -> Iterator[Any]:
        yield from range(9)

    data: Any = Data()
    batches = feed.feed(data, coming())
    assert [next(batches) for _ in range(4)] == [0, 1, 2, 3]
    assert len(data.drawn) <= 4 + feed.AHEAD
    assert next(batches) == 4
    with pytest.raises(UserError, match="sixth"):
        next(batches)
    assert data.drawn[:6] == [0, 1, 2, 3, 4, 5] and open_store(Path("nowhere")) is None


def test_latents_of_a_store_and_of_pairs_serve_as_images(sd3_folder: Path, source: Path, tmp_path: Path) -> None:
    pictures = recipe(sd3_folder, source, "images", "scm", store=str(tmp_path / "store"))
    expected = weights(run.train(pictures, tmp_path / "pictures", only="train"))
    latents = recipe(sd3_folder, source, "images", "scm", images=str(tmp_path / "store"))
    assert same(weights(run.train(latents, tmp_path / "latents", only="train")), expected)
    caching.cache_pairs(recipe(sd3_folder, source, "prompts", "dmd2"), tmp_path / "pairs", count=7, steps=2)
    drawn = loaded(tmp_path / "pairs")
    built = build(plan(recipe(sd3_folder, source, "images", "scm", images=str(tmp_path / "pairs")), only="train"), Progress())
    batch = next(built.trainer._batches())
    assert batch.latents is not None
    for latent, prompt in zip(batch.latents, batch.prompts, strict=True):
        index = [torch.equal(latent, x0) for x0 in samples_of(drawn)].index(True)
        assert drawn.prompts[index] == prompt


def test_latents_that_are_not_the_teachers_are_refused(sd3_folder: Path, source: Path, tmp_path: Path) -> None:
    build(plan(recipe(sd3_folder, source, "images", "scm", store=str(tmp_path / "store")), only="train"), Progress())
    content = recipe(sd3_folder, source, "images", "scm", images=str(tmp_path / "store")).dump()

    def refused(message: str, **changed: Any) -> None:
        given = {**content, "teacher": {**content["teacher"], **changed.get("teacher", {})}, "data": {**content["data"], **changed.get("data", {})}}
        with pytest.raises(UserError, match=rf"^recipe key data\.{message}"):
            dry_run(validate(Recipe, given), only="train")

    refused(r"images: '.*latents' was encoded with teacher.size \[16, 16\], this recipe needs \[24, 24\]", teacher={"resolution": 24})
    refused("crop: says how picture files are read, and '.*store' holds latents", data={"crop": "random"})
    refused(r"images: '.*prompts' is a store of prompts, not of latents", data={"images": str(tmp_path / "store/prompts")})
    (tmp_path / "store/latents/shard_000000.safetensors").unlink()
    refused("images: '.*latents' lacks 1 of 1 shards; finish it with the same `fastgen cache latents` command")


def test_archives_elsewhere_are_fetched_for_a_store_and_refused_for_training(sd3_folder: Path, source: Path, tmp_path: Path) -> None:
    for k, names in enumerate((("0", "1"), ("2", "3", "4"))):
        with tarfile.open(tmp_path / f"set-{k:02d}.tar", "w") as tar:
            for name in names:
                (tmp_path / f"{name}.txt").write_text(TEXTS[int(name)], encoding="utf-8")
                tar.add(source / f"{name}.png", f"{name}.png")
                tar.add(tmp_path / f"{name}.txt", f"{name}.txt")
    local = recipe(sd3_folder, source, "images", "scm", images=str(tmp_path / "local"), store=str(tmp_path / "own"))
    (tmp_path / "local").mkdir()
    for archive in tmp_path.glob("*.tar"):
        shutil.copy(archive, tmp_path / "local")
    build(plan(local, only="train"), Progress())
    for pattern in ("set-{00..01}.tar", "set-*.tar", "set-0{0,1}.tar"):
        away = recipe(sd3_folder, source, "images", "scm", images=f"file://{tmp_path}/{pattern}")
        with pytest.raises(
            UserError, match=r"^recipe key data\.images: 'file://.*' lies elsewhere, .* fastgen cache latents RECIPE data\.images=file://"
        ):
            dry_run(away, only="train")
        output = tmp_path / f"made {pattern}"
        assert [made for _, made in caching.cache_encoded("latents", away, output)] == [5]
        for file in (tmp_path / "own/latents").iterdir():
            assert (output / "latents" / file.name).read_bytes() == file.read_bytes()
        shutil.rmtree(output / "archives")
        built = build(plan(recipe(sd3_folder, source, "images", "scm", images=str(output)), only="train"), Progress())
        assert next(built.trainer._batches()).latents is not None
    gone = recipe(sd3_folder, source, "images", "scm", images=f"file://{tmp_path}/set-{{00..02}}.tar")
    with pytest.raises(UserError, match=r"^recipe key data\.images: cannot fetch 'file://.*/set-02\.tar'"):
        caching.cache_encoded("latents", gone, tmp_path / "gone")

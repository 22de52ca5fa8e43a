"""`fastgen cache pairs`: what it writes is what the stock pipeline draws from the same seeds, and a recipe trains on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pair_sets import loaded, samples_of, seeds_of
from pipelines import draw
from pipelines import sd3_folder as sd3_folder

from fastgen import cli, run
from fastgen.caching import cache_pairs
from fastgen.config import Recipe
from fastgen.data import store
from fastgen.data.digits import load_images
from fastgen.data.pair_folder import open_folder
from fastgen.data.pairs import TeacherSampler, make_pairs
from fastgen.data.store import open_store
from fastgen.errors import UserError
from fastgen.families.sd3 import SD3
from fastgen.generator import load_teacher
from fastgen.pictures import picture_row, save_png
from fastgen.plan import plan
from fastgen.progress import Progress

DIGITS: dict[str, Any] = {
    "teacher": {"pretrained": "fastgen:digits", "guidance": 1.5},
    "student": {"steps": 1},
    "distiller": {"name": "dmd"},
    "data": {"prompts": "fastgen:digits"},
    "optimizer": {"student": {"lr": 1e-4}, "fake_score": {"lr": 1e-4}},
    "train": {"steps": 2, "batch_size": 4, "seed": 7, "device": "cpu"},
}
TOY = DIGITS | {"teacher": {"pretrained": "toy:mixture", "guidance": 2.0, "negative_prompt": "1"}}


def recipe(tmp_path: Path, base: dict[str, Any] = DIGITS) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "0", "weight": 3}\n{"prompt": "2"}\n')
    return recipe(tmp_path, TOY | {"data": {"prompts": str(tmp_path / "prompts.jsonl")}})


def test_the_pairs_are_the_stock_pipelines_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "pairs"
    assert cli.main(["cache", "pairs", str(recipe(tmp_path)), "--output", str(output), "--count", "6", "--steps", "3", "--batch", "4"]) == 0
    assert capsys.readouterr().out == f"pairs: {output / 'pairs'} holds 6 of 6, 6 of them new\n"
    pairs, family = loaded(output), SD3("fastgen:digits")
    pipeline = family.load_pipeline(None, family.export_scheduler())
    call = family.call_arguments(3, 1.5) | {"negative_prompt": [""] * 6}
    expected = draw(pipeline, list(pairs.prompts), seeds_of(pairs).tolist(), **call)
    assert (family.decode_latents(samples_of(pairs)) - expected).abs().max() < 1e-5
    assert expected.std() > 0.1
    assert cli.main(["cache", "pairs", str(recipe(tmp_path)), "--output", str(output), "--count", "6", "--steps", "3"]) == 0
    assert capsys.readouterr().out == f"pairs: {output / 'pairs'} holds 6 of 6, 0 of them new\n"


def test_they_are_the_pairs_that_a_run_of_the_recipe_would_draw_itself(toy: Path, tmp_path: Path) -> None:
    read = Recipe.load(toy)
    _, made = cache_pairs(read, tmp_path / "pairs", count=12)
    assert made == 12
    planned, teacher = plan(Recipe.load(toy, ["data.pairs=12"]), only="train"), load_teacher("toy:mixture", guidance=2.0, negative_prompt="1")
    assert planned.prompts is not None
    sampler = TeacherSampler(teacher.predict, planned.family.grid(25), planned.family.latent.shape)
    own = make_pairs(sampler, planned.family.encode_prompts, planned.prompts, range(12), seed=7)
    cached = loaded(tmp_path / "pairs")
    assert torch.equal(seeds_of(cached), seeds_of(own))
    assert cached.prompts == own.prompts
    assert set(own.prompts) == {"0", "2"}
    torch.testing.assert_close(samples_of(cached), samples_of(own), rtol=0, atol=1e-6)


def test_options_reach_the_manifest_and_the_sampler(toy: Path, tmp_path: Path) -> None:
    assert (
        cli.main(
            ["cache", "pairs", str(toy), "teacher.guidance=3", "--output", str(tmp_path / "p"), "--count", "2", "--solver", "heun", "--steps", "5"]
        )
        == 0
    )
    folder, kept = open_folder(tmp_path / "p"), open_store(tmp_path / "p/pairs")
    assert folder.count == 2 and dict(folder.drawn) == {"solver": "heun", "steps": 5, "shape": (2,), "dtype": "fp32"}
    assert kept is not None and kept.manifest.origin["train.seed"] == 7
    assert kept.manifest.origin["the sampling grid"] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert folder.teacher == {
        "pretrained": "toy:mixture",
        "guidance": 3.0,
        "negative_prompt": "1",
        "max_sequence_length": None,
        "sha256": "toy:mixture",
        "dtype": "fp32",
        "quantise": None,
    }


def test_captions_serve_where_the_recipe_has_images(tmp_path: Path) -> None:
    captioned = Recipe.load(recipe(tmp_path, DIGITS | {"data": {"images": "fastgen:digits"}}))
    prompted = Recipe.load(recipe(tmp_path))
    for name, read in (("captions", captioned), ("prompts", prompted)):
        cache_pairs(read, tmp_path / name, count=5, steps=1)
    pairs = [loaded(tmp_path / name) for name in ("captions", "prompts")]
    assert len(set(pairs[0].prompts)) > 1
    assert all("digit" in prompt or "number" in prompt or "handwritten" in prompt for prompt in pairs[0].prompts)
    assert torch.equal(seeds_of(pairs[0]), seeds_of(pairs[1]))


def test_a_recipe_takes_the_folder_only_for_its_own_teacher(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_pairs(Recipe.load(toy), tmp_path / "pairs", count=3)
    monkeypatch.chdir(tmp_path)
    planned = plan(Recipe.load(toy, ["data.pairs=pairs"]), only="train")
    assert planned.pairs is not None
    assert planned.pairs.count == planned.pairs.held() == 3
    assert planned.resolved()["data"]["pairs"] == str(tmp_path / "pairs")  # holds in any folder
    assert plan(Recipe.load(toy, ["data.pairs=9"]), only="train").resolved()["data"]["pairs"] == 9
    with pytest.raises(ValueError, match=r"recipe key data\.pairs: 'pairs/pairs' was drawn with teacher\.guidance 2\.0, this recipe has 4\.0"):
        plan(Recipe.load(toy, ["data.pairs=pairs", "teacher.guidance=4"]), only="train")
    with pytest.raises(ValueError, match=r"recipe key data\.pairs: 'pairs/pairs' was drawn with teacher\.pretrained 'toy:mixture'"):
        plan(Recipe.load(recipe(tmp_path), ["data.pairs=pairs", "teacher.guidance=2"]), only="train")


def test_pairs_know_their_teacher_by_content(tmp_path: Path, sd3_folder: Path) -> None:
    teacher = Path(shutil.copytree(sd3_folder, tmp_path / "teacher"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    base = DIGITS | {
        "teacher": {"pretrained": str(teacher), "max_sequence_length": 16},
        "data": {"prompts": str(prompts), "pairs": str(tmp_path / "p")},
    }
    ours = recipe(tmp_path, base)
    cache_pairs(Recipe.load(ours, ["data.pairs=null"]), tmp_path / "p", count=2, steps=1)
    moved = teacher.rename(tmp_path / "moved")
    prompts.rename(tmp_path / "texts.txt")
    elsewhere = [f"teacher.pretrained={moved}", f"data.prompts={tmp_path / 'texts.txt'}"]
    assert plan(Recipe.load(ours, elsewhere)).pairs is not None
    assert (
        cache_pairs(Recipe.load(ours, [*elsewhere, "data.pairs=null"]), tmp_path / "p", count=3, steps=1)[1] == 3
    )  # a shard that is not whole is made again
    shutil.copytree(moved, teacher)
    edit_scheduler(teacher, shift=2.0)
    (tmp_path / "texts.txt").rename(prompts)
    with pytest.raises(UserError, match=rf"data\.pairs: .* was drawn with teacher\.pretrained '{teacher}', which has changed since"):
        plan(Recipe.load(ours))
    with pytest.raises(UserError, match=r"data\.pairs: .* was drawn with teacher\.pretrained .*, which has changed since; choose another"):
        cache_pairs(Recipe.load(ours, ["data.pairs=null"]), tmp_path / "p", count=4, steps=1)


def edit_scheduler(teacher: Path, **values: Any) -> None:
    file = teacher / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_progress_counts_from_what_is_there_and_ends_even_after_a_failure(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    class Noting(Progress):
        def start(self, what: str, total: int, done: int = 0) -> None:
            events.append((what, total, done))

        def update(self, done: int, numbers: Any) -> None:
            events.append(done)
            if done > 8:
                raise KeyboardInterrupt

        def finish(self) -> None:
            events.append("end")

    monkeypatch.setattr(store, "ROWS", 4)
    cache_pairs(Recipe.load(toy), tmp_path / "p", count=4)
    with pytest.raises(KeyboardInterrupt):
        cache_pairs(Recipe.load(toy), tmp_path / "p", count=10, batch=3, progress=Noting())
    assert events == [("drawing pairs", 10, 4), 7, 8, 10, "end"]


def test_pairs_of_data_are_the_noise_that_the_teachers_flow_leads_to(tmp_path: Path) -> None:
    """The bundled teacher's own flow, there and back: what it draws from that noise is the picture again."""
    unguided = DIGITS | {"teacher": {"pretrained": "fastgen:digits"}}
    images = tmp_path / "images"
    caption = {"file_name": "0.png", "text": "a handwritten seven"}
    images.mkdir()
    pixels, labels = load_images()
    chosen = [i for i, label in enumerate(labels.tolist()) if label == 7][:6]
    for place, i in enumerate(chosen):
        save_png(picture_row(pixels[i : i + 1] / 2 + 0.5), images / f"{place}.png")
    lines = [json.dumps(caption | {"file_name": f"{place}.png"}) for place in range(6)]
    (images / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    read = Recipe.load(recipe(tmp_path, unguided | {"data": {"images": str(images)}}))
    for output, part in (("one", (0, 1)), ("two", (0, 2))):
        store, made = cache_pairs(read, tmp_path / output, steps=60, solver="heun", source="data", batch=4, part=part)
        assert (len(store), made) == (6, 6)
    pairs = loaded(tmp_path / "one")
    noise, x0 = pairs.select(torch.arange(6))
    teacher = load_teacher("fastgen:digits", steps=60)
    sampler = TeacherSampler(teacher.predict, teacher.times(), teacher.family.latent.shape, "heun")
    again = sampler(noise, teacher.family.encode_prompts(list(pairs.prompts)))
    assert (again - x0).square().mean() < 0.05 * x0.square().mean()  # in 60 steps either way
    assert 0.5 < noise.std() < 1.5
    assert set(pairs.prompts) == {"a handwritten seven"}
    for keys, message in (
        (["teacher.guidance=1.5"], r"teacher\.guidance: 1\.5, but only the unguided teacher's flow leads from data to noise"),
        (["data.skip_broken=true"], r"data\.skip_broken"),
    ):
        with pytest.raises(UserError, match=rf"recipe key {message}"):
            cache_pairs(Recipe.load(tmp_path / "recipe.yaml", keys), tmp_path / "three", source="data")
    with pytest.raises(UserError, match=r"--count: 7, but --from data makes a pair of every image, and there are 6"):
        cache_pairs(read, tmp_path / "three", source="data", count=7)
    assert not (tmp_path / "three").exists()


def test_fewer_pairs_than_a_folder_was_begun_for_are_refused_until_it_is_whole(toy: Path, tmp_path: Path) -> None:
    read = Recipe.load(toy)
    cache_pairs(read, tmp_path / "p", count=9)
    assert cache_pairs(read, tmp_path / "p", count=4)[1] == 0  # nothing is left to draw
    (tmp_path / "p/pairs/shard_000000.safetensors").unlink()
    with pytest.raises(UserError, match=r"--count: 4, but .* was begun for 9 pairs and holds 0; finish it, use its first with data\.pairs\.count"):
        cache_pairs(read, tmp_path / "p", count=4)
    assert cache_pairs(read, tmp_path / "p")[1] == 9  # what it was begun for


def test_pairs_are_drawn_in_the_precision_of_the_run_and_told_apart_by_it(tmp_path: Path) -> None:
    plain, narrow = Recipe.load(recipe(tmp_path)), Recipe.load(recipe(tmp_path), ["train.precision=bf16"])
    for name, read in (("plain", plain), ("narrow", narrow)):
        cache_pairs(read, tmp_path / name, count=4, steps=2)
    apart = (samples_of(loaded(tmp_path / "plain")) - samples_of(loaded(tmp_path / "narrow"))).abs().max()
    assert 0 < apart < 0.5
    with pytest.raises(UserError, match=r"data\.pairs: .* was drawn with teacher\.dtype 'fp32', this recipe needs 'bf16'"):
        cache_pairs(narrow, tmp_path / "plain", count=4, steps=2)
    with pytest.raises(UserError, match=r"was drawn with teacher\.quantise None, this recipe needs 'int8'"):
        cache_pairs(Recipe.load(recipe(tmp_path), ["teacher.quantise=int8"]), tmp_path / "plain", count=4, steps=2)


def test_a_run_takes_the_first_of_more_pairs_that_its_store_holds(tmp_path: Path) -> None:
    keys = [f"data.store={tmp_path / 'store'}", "train.steps=1", "evaluate.protocol=null", "student.steps=1"]
    losses = []
    for name, count in (("few", 6), ("more", 9), ("again", 6)):
        folder = run.train(Recipe.load(recipe(tmp_path), [*keys, f"data.pairs={{count: {count}, steps: 2}}"]), tmp_path / name, only="train")
        losses.append(json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]))
    assert {key: losses[0][key] for key in losses[0] if "loss" in key} == {key: losses[2][key] for key in losses[2] if "loss" in key}
    assert open_folder(tmp_path / "store").count == 9


def test_images_that_the_teacher_does_not_draw_have_no_noise(tmp_path: Path) -> None:
    cache_pairs(Recipe.load(recipe(tmp_path)), tmp_path / "guided", count=4, steps=1)
    unguided = DIGITS | {"teacher": {"pretrained": "fastgen:digits"}}
    for images, message in (("fastgen:scenes", "16"), (str(tmp_path / "guided"), r"was drawn with teacher\.guidance 1\.5, this recipe has 1\.0")):
        read = Recipe.load(recipe(tmp_path, unguided | {"data": {"images": images}}))
        with pytest.raises(UserError, match=rf"recipe key data\.images: .*{message}"):
            cache_pairs(read, tmp_path / "new", source="data")
    assert not (tmp_path / "new").exists()

"""Runs of several sizes: each update is that of a run of its size alone, whatever is between; what cannot be is refused by its key."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import PROMPTS, pictures
from PIL import Image
from pipelines import edit_json, same_interpreter, tiny_protocol, tiny_sd3
from safetensors.torch import load_file
from tiny_dit import tiny_dit
from tiny_flux import tiny_flux
from torch import Tensor

from fastgen import cli, inputs, run
from fastgen.caching import cache_encoded, cache_pairs
from fastgen.config import Recipe, validate
from fastgen.errors import UserError
from fastgen.generator import load_student, noise_from_seeds, read_manifest
from fastgen.memory import data_bytes
from fastgen.plan import plan
from fastgen.rng import SampleRng
from fastgen.run.building import load_pairs

__all__ = ["same_interpreter"]
SIZES = [[16, 16], [16, 24]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def saved(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / "of_sizes" / family
        if not folder.exists():
            {"flux": tiny_flux, "sd3": tiny_sd3, "dit": tiny_dit}[family]().save_pretrained(folder)
        return folder

    return saved


def recipe(source: Path, folder: Path, method: str = "dmd2", **changes: Any) -> Recipe:
    """Of two steps at both SIZES; changes: by key, of its blocks."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    from_pictures = method == "lcm"
    distillers = {"dmd2": {"critic_updates": 1}, "tbcm": {"trajectory": {"evaluations": 4}, "warmup": 1}, "lcm": {"num_times": 8, "skip": 2}}
    data: dict[str, Any] = {
        "teacher": {"pretrained": str(source), "guidance": 2.0, "max_sequence_length": 16},
        "student": {"steps": 2, "sizes": SIZES},
        "distiller": {"name": method, **distillers.get(method, {})},
        "data": {"images": str(sized_pictures(folder))} if from_pictures else {"prompts": str(prompts)},
        "optimizer": {role: {"lr": 1e-3} for role in ["student", *(["fake_score"] if "dmd" in method else [])]},
        "train": {"steps": 2, "batch_size": 4, "micro_batch": 2, "ema": 0.0, "device": "cpu", "sample_every": 0},
    }
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value}
    if method == "phased_dmd":
        data["optimizer"] = {role: {"lr": 1e-3} for role in ("student", "fake_score")}
        data["train"]["steps"] = 200
    return validate(Recipe, data)


def sized_pictures(folder: Path) -> Path:
    """Two of each size."""
    if not (folder / "images").exists():
        for i, file in enumerate(sorted(pictures(folder, ["a red cat", "two boats at sea", "a small house", "a moon"]).glob("*.png"))):
            height, width = SIZES[i % 2]
            with Image.open(file) as image:
                image.resize((4 * width, 4 * height)).save(file)
    return folder / "images"


def built(read: Recipe) -> Any:
    return run.build(plan(read, only="train"), run.Progress())


def weights(running: Any) -> dict[str, Tensor]:
    return {f"{name} {key}": value.detach().clone() for name, role in running.roles.trained.items() for key, value in role.parameters().items()}


def place_of(running: Any, step: int = 0) -> int:
    return running.data.draw(SampleRng(running.plan.recipe.train.seed, (step, 0), range(2)).at("data")).place


def alone(read: Recipe, size: list[int]) -> Recipe:
    """The same recipe at one size, as teacher.size says it."""
    data = read.dump()
    data["teacher"]["size"], data["student"]["sizes"] = size, None
    return validate(Recipe, data)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_an_update_is_that_of_a_run_of_its_size_alone(family: str, folders: Any, tmp_path: Path) -> None:
    """Noise, grid and shift are the size's: to the bit, on one whose grid follows the size too."""
    seen = set[int]()
    for seed in range(20):
        running = built(recipe(folders(family), tmp_path, "tbcm", train={"seed": seed, "steps": 1}))
        if (place := place_of(running)) in seen:
            continue
        seen.add(place)
        single = built(alone(running.plan.recipe, SIZES[place]))
        assert torch.equal(single.plan.times, running.trainer.distiller.each[place].setting.grid)
        before = weights(running)
        running.trainer.train_step()
        single.trainer.train_step()
        after = weights(running)
        assert any(not torch.equal(after[name], before[name]) for name in after)
        assert all(torch.equal(value, after[name]) for name, value in weights(single).items())
        if len(seen) == 2:
            break
    assert seen == {0, 1}
    grids = [distiller.setting.grid for distiller in running.trainer.distiller.each]
    assert torch.equal(*grids) == (family == "sd3")


def test_a_list_of_one_size_is_that_size(folders: Any, tmp_path: Path) -> None:
    read = recipe(folders("sd3"), tmp_path, student={"sizes": SIZES[1:]})
    one, same = built(read), built(alone(read, SIZES[1]))
    for _ in range(2):
        one.trainer.train_step()
        same.trainer.train_step()
    expected = weights(same)
    assert all(torch.equal(value, expected[name]) for name, value in weights(one).items())


def saved(folder: Path) -> dict[str, Tensor]:
    (newest,) = sorted((folder / "checkpoints").iterdir())[-1:]
    return {file.name + key: value for file in newest.glob("role_*.safetensors") for key, value in load_file(file).items()}


def test_a_resumed_run_and_one_that_reads_batches_ahead_draw_the_same_sizes(folders: Any, tmp_path: Path) -> None:
    def told(**data: Any) -> Recipe:
        return recipe(folders("sd3"), tmp_path, "lcm", data=data, train={"steps": 5, "checkpoint_every": 2, "keep": 3})

    run.train(told(), tmp_path / "whole", only="train")
    run.train(told(store=str(tmp_path / "store"), keep="disk"), tmp_path / "read", only="train")
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"prompts", "16x16", "16x24"}
    run.train(told(), tmp_path / "whole_again", only="train")
    run.train(told(), tmp_path / "whole_again", only="train", resume_from="step_000002", resume=True)
    expected = saved(tmp_path / "whole")
    assert len(expected) > 10
    for folder in ("read", "whole_again"):
        found = saved(tmp_path / folder)
        assert found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())
    places = {place_of(built(told()), step) for step in range(5)}
    assert places == {0, 1}


def test_latents_of_both_sizes_are_cached_beside_each_other_and_train_the_same(folders: Any, tmp_path: Path) -> None:
    read = recipe(folders("sd3"), tmp_path, "lcm")
    made = cache_encoded("latents", read, tmp_path / "latents")
    assert [(store.path.parent.name, new) for store, new in made] == [("16x16", 2), ("16x24", 2)]
    stored = recipe(folders("sd3"), tmp_path, "lcm", data={"images": str(tmp_path / "latents")})
    ours, theirs = built(read), built(stored)
    for running in (ours, theirs):
        for _ in range(2):
            running.trainer.train_step()
    expected = weights(ours)
    assert all(torch.equal(value, expected[name]) for name, value in weights(theirs).items())
    with pytest.raises(UserError, match=r"^recipe key data\.images: .* holds latents by size, but none of 24x16 \(it has 16x16, 16x24\)"):
        plan(
            recipe(folders("sd3"), tmp_path, "lcm", data={"images": str(tmp_path / "latents")}, student={"sizes": [[16, 16], [24, 16]]}), only="train"
        )
    for key in ("sizes", "buckets"):  # neither says which
        sizes, buckets = {"student": {"sizes": None}}, {"buckets": "auto"} if key == "buckets" else {}
        with pytest.raises(UserError, match=r"^recipe key data\.images: .* say which in student\.sizes: it has \[\[16, 16\], \[16, 24\]\]"):
            plan(recipe(folders("sd3"), tmp_path, "lcm", data={"images": str(tmp_path / "latents"), **buckets}, **sizes), only="train")
    one = str(tmp_path / "latents" / "16x16")
    with pytest.raises(UserError, match=r"^recipe key data\.images: these are latents of one size, and student\.sizes has 2"):
        plan(recipe(folders("sd3"), tmp_path, "lcm", data={"images": one}), only="train")


def test_pairs_have_sizes(folders: Any, tmp_path: Path) -> None:
    read = recipe(folders("flux"), tmp_path, "reflow", data={"pairs": 5, "store": str(tmp_path / "store")}, train={"batch_size": 2, "micro_batch": 1})
    running = built(read)
    teacher = running.generator("teacher")
    for place, count in enumerate((3, 2)):
        pairs = load_pairs(running, run.Progress(), place)
        noise, x0 = pairs.select(torch.arange(count))
        shape = running.plan.families[place].latent.shape
        assert len(pairs) == count and noise.shape == x0.shape == (count, *shape)
        seeds = pairs.rows.select(torch.arange(count))["seed"].tolist()
        assert torch.equal(noise, noise_from_seeds(seeds, shape))
        expected = teacher.at_size(SIZES[place]).latents(pairs.prompts, seeds)
        assert (x0 - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (tmp_path / "store" / "16x24" / "pairs").is_dir()
    run.train(read, tmp_path / "run", only="train")
    with pytest.raises(UserError, match=r"^recipe key student\.sizes: a folder holds pairs of one size; give teacher\.size"):
        cache_pairs(read, tmp_path / "pairs", count=2)
    cache_pairs(alone(read, SIZES[0]), tmp_path / "pairs", count=2, steps=2)
    with pytest.raises(UserError, match=r"^recipe key data\.pairs: .* holds pairs of one size, and the student has 2; give a number"):
        plan(recipe(folders("flux"), tmp_path, "reflow", data={"pairs": str(tmp_path / "pairs")}), only="train")
    with pytest.raises(UserError, match=r"^recipe key data\.pairs: 1 for 2 sizes"):
        plan(recipe(folders("flux"), tmp_path, "reflow", data={"pairs": 1}), only="train")


def test_buckets_fill_the_sizes_from_the_pictures(folders: Any, tmp_path: Path) -> None:
    sized_pictures(tmp_path)
    (tmp_path / "images" / "4.txt").write_text("a star")
    Image.new("RGB", (96, 64)).save(tmp_path / "images" / "4.png")
    read = recipe(folders("sd3"), tmp_path, "lcm", student={"sizes": None}, data={"buckets": "auto"}, teacher={"size": [24, 24]})
    planned = plan(read, only="train")
    sizes = [list(family.picture_shape[1:]) for family in planned.families]
    assert sizes == [[20, 28], [24, 24]]  # three of five are 2:3, nearest to 5:7 in steps of 4 pixels
    assert [len(part) for part in planned.divided] == [3, 2]
    outcome = run.dry_run(read, tmp_path / "run", only="train")
    assert [(each["size"], each["images"]) for each in outcome["sizes"]] == [([20, 28], 3), ([24, 24], 2)]
    assert built(read).trainer.train_step()["loss/consistency"] > 0


def test_latents_of_found_sizes_are_trained_on_by_the_line_that_caching_says(
    folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sized_pictures(tmp_path)
    read = recipe(folders("sd3"), tmp_path, "lcm", student={"sizes": None}, data={"buckets": "auto"}, teacher={"size": [24, 24]})
    for i in range(2):
        (tmp_path / "images" / f"more{i}.txt").write_text("a star")
        Image.new("RGB", (96, 64)).save(tmp_path / "images" / f"more{i}.png")
    (tmp_path / "recipe.yaml").write_text(read.to_yaml())
    assert cli.main(["cache", "latents", "recipe.yaml", "--output", "kept"]) == 0
    said = capsys.readouterr()
    line = next(line for line in (said.out + said.err).splitlines() if "student.sizes=" in line)
    expected = plan(read, only="train")
    typed = plan(Recipe.load("recipe.yaml", shlex.split(line)), only="train")
    assert [family.picture_shape for family in typed.families] == [family.picture_shape for family in expected.families]
    assert [len(part) for part in typed.divided] == [len(part) for part in expected.divided] == [4, 2]
    stored = plan(Recipe.load("recipe.yaml", ["data.store=kept"]), only="train")  # which needs nothing typed
    assert [family.picture_shape for family in stored.families] == [family.picture_shape for family in expected.families]
    said = r"it has \[\[20, 28\], \[24, 24\]\], the most frequent first, and remove teacher\.size and data\.buckets$"
    with pytest.raises(UserError, match=said):
        plan(Recipe.load("recipe.yaml", ["data.images=kept"]), only="train")


def test_a_continuation_has_the_sizes_that_the_run_began_with(folders: Any, tmp_path: Path) -> None:
    """Given as they are, and as other images, though allowed, ask for others."""
    sized_pictures(tmp_path)
    other = Path(shutil.copytree(tmp_path / "images", tmp_path / "other"))
    bucketed = {"student": {"sizes": None}, "teacher": {"size": [24, 24]}}
    read = recipe(folders("sd3"), tmp_path, "lcm", **bucketed, data={"buckets": "auto"})
    planned, state = plan(read, only="train"), {"recipe": {}, "inputs": {}, "pairs": None}
    began = inputs.identify(planned)
    state |= {"recipe": planned.resolved(), "inputs": began.hashes}
    assert json.loads(began.hashes["data.buckets"]) == [list(family.picture_shape[1:]) for family in planned.families] and len(planned.families) == 2

    def go_on(given: Recipe, *allowed: str) -> inputs.Inputs:
        return inputs.check_same(tmp_path / "run", plan(given, only="train"), state, allowed)[0]

    assert go_on(read) == began
    moved = recipe(folders("sd3"), tmp_path, "lcm", **bucketed, data={"buckets": "auto", "images": str(other)})
    (other / "0.txt").write_text("a green cat")
    assert go_on(moved, "data.images").hashes["data.buckets"] == began.hashes["data.buckets"]
    for i in range(4):
        Image.new("RGB", (64, 64)).save(other / f"{i}.png")
    with pytest.raises(UserError, match=r"recipe key data\.buckets: data\.images asks for the sizes \[\[24, 24\]\], with .*\] the run began"):
        go_on(moved, "data.images")
    none = recipe(folders("sd3"), tmp_path, "lcm", **bucketed)
    with pytest.raises(UserError, match=r"recipe key data\.buckets is None, the run in .* has 'auto'; resume with the same recipe$"):
        go_on(none)
    with pytest.raises(UserError, match=r"^--allow-change: data\.buckets decides what is trained"):
        go_on(none, "data.buckets")


def test_memory_is_that_of_the_largest_size(folders: Any, tmp_path: Path) -> None:
    from fastgen.activations import step_bytes

    read = recipe(folders("sd3"), tmp_path, "lcm")
    several, largest = plan(read, only="train"), plan(alone(read, [16, 24]), only="train")
    assert several.largest == 1
    assert step_bytes(several, 0) == step_bytes(largest, 0)
    latents = 4 * 4 * 8 * (8 * 2 + 12 * 2)  # fp32, channels, height, widths of two pictures each
    assert data_bytes(several) - data_bytes(largest) == latents - 4 * 4 * 8 * 12 * 4


@pytest.mark.parametrize(
    ("family", "method", "changes", "message"),
    [
        ("sd3", "dmd2", {"student": {"sizes": [[16, 16], [16, 18]]}}, r"student\.sizes\.1: \[16, 18\]: 18 is not a multiple of 4 and at most 64"),
        ("sd3", "dmd2", {"student": {"sizes": [[15, 16]]}}, r"student\.sizes\.0: 15 is not a multiple of 4"),
        ("sd3", "dmd2", {"teacher": {"size": [16, 16]}}, r"teacher\.size: student\.sizes says which sizes are drawn; remove one"),
        ("sd3", "dmd2", {"teacher": {"resolution": 16}}, r"teacher\.resolution: student\.sizes says which"),
        ("sd3", "lcm", {"data": {"buckets": "auto"}}, r"data\.buckets: fills student\.sizes, which is given"),
        ("sd3", "dmd2", {"data": {"buckets": "auto"}, "student": {"sizes": None}}, r"data\.buckets: needs data\.images"),
        ("sd3", "lcm", {"student": {"sizes": [[16, 16], [16, 24], [32, 8]]}}, r"student\.sizes\.2: \[32, 8\] is nearest to none of the 4 images"),
        ("dit", "dmd2", {"teacher": {"max_sequence_length": None}}, r"student\.sizes\.0: does not apply to DiTPipeline"),
        (
            "dit",
            "lcm",
            {"teacher": {"max_sequence_length": None}, "data": {"buckets": "auto"}, "student": {"sizes": None}},
            r"data\.buckets: the call of DiTPipeline takes no height and width",
        ),
        (
            "flux",
            "dmd2",
            {"student": {"sizes": [[16, 16], [2**16, 2**16]]}},
            r"student\.steps: 2 steps with teacher\.shift .* has two times that are",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(family: str, method: str, changes: Any, message: str, folders: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^recipe key {message}"):
        plan(recipe(folders(family), tmp_path, method, **changes), only="train", dry=True)


@pytest.mark.parametrize(("sizes", "message"), [([[16, 16], [16, 16]], r"\[16, 16\] is there twice"), ([], "at least 1"), ([[16]], "at least 2")])
def test_a_list_of_sizes_is_read_strictly(sizes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^recipe key student\.sizes.*{message}"):
        recipe(tmp_path, tmp_path, student={"sizes": sizes})


def test_a_shift_that_follows_the_size_needs_a_pipeline_that_tells_it(folders: Any, tmp_path: Path) -> None:
    """SD3's call hands over mu and no times, which its scheduler shifts to another end."""
    folder = tmp_path / "dynamic"
    pipeline = tiny_sd3()
    pipeline.save_pretrained(folder)
    edit_json(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    with pytest.raises(
        UserError, match=r"^recipe key student\.sizes: the teacher's shift follows the size, .* give teacher\.shift, one for all sizes$"
    ):
        plan(recipe(folder, tmp_path), only="train")
    assert len(plan(recipe(folder, tmp_path, teacher={"shift": 2.0}), only="train").families) == 2


def test_phases_and_windows_need_one_grid_for_all_sizes(folders: Any, tmp_path: Path) -> None:
    phased = {"distiller": Recipe.load("digits_phased_dmd_4step").dump()["distiller"], "student": {"steps": 4, "sizes": SIZES}}
    with pytest.raises(UserError, match=r"^recipe key student\.sizes\.1: .* but of phased_dmd its phases divide one grid; give teacher\.shift or"):
        plan(recipe(folders("flux"), tmp_path, "phased_dmd", **phased), only="train")
    phased["student"]["grid"] = [1.0, 0.75, 0.5, 0.25]
    assert len(plan(recipe(folders("flux"), tmp_path, "phased_dmd", **phased), only="train").families) == 2
    data = recipe(folders("flux"), tmp_path, "lcm", student={"sampler": "linear_windows"}).dump()
    data["distiller"] = {"name": "perflow"}
    with pytest.raises(UserError, match=r"^recipe key student\.sizes\.1: .* its sampler's windows have the ends of one grid"):
        plan(validate(Recipe, data), only="train")


def test_students_that_follow_each_other_have_the_grids_of_sizes(folders: Any, tmp_path: Path) -> None:
    """Several networks, of which one is drawn with."""
    halved = recipe(folders("flux"), tmp_path, "dmd2", train={"steps": 2}).dump()
    halved["optimizer"].pop("fake_score")
    halved["distiller"], halved["data"] = {"name": "progressive", "halvings": 2}, {"images": str(sized_pictures(tmp_path))}
    running = built(validate(Recipe, halved))
    for _ in range(2):
        running.trainer.train_step()
    steps = [distiller._steps["student_2"] for distiller in running.trainer.distiller.each]
    assert not torch.equal(*steps)


def test_a_second_time_needs_one_grid_for_all_sizes(folders: Any, tmp_path: Path) -> None:
    """Into whose weights it is folded."""
    mean_flow = recipe(folders("flux"), tmp_path, "dmd2", distiller={"name": "mean_flow"})
    data = mean_flow.dump()
    data["optimizer"].pop("fake_score")
    data["distiller"] = {"name": "mean_flow"}
    data["data"] = {"images": str(sized_pictures(tmp_path))}
    with pytest.raises(
        UserError, match=r"^recipe key student\.sizes\.1: .* its second time is folded into the weights, for one grid; give teacher\."
    ):
        plan(validate(Recipe, data), only="train")
    data["student"]["grid"] = [1.0, 0.5]
    assert all(torch.equal(torch.tensor([1.0, 0.5]).double(), grid) for grid in grids_of(plan(validate(Recipe, data), only="train")))


def grids_of(planned: Any) -> list[Tensor]:
    return [planned.setting({}, place=place).grid for place in range(len(planned.families))]


def test_the_command_line_draws_and_names_sizes(folders: Any, tmp_path: Path, same_interpreter: None, capsys: Any) -> None:
    run.train(recipe(folders("flux"), tmp_path, train={"sample_every": 2}, evaluate={"protocol": None}), tmp_path / "run")
    student = tmp_path / "run" / "student"
    manifest = read_manifest(student)
    assert [each["size"] for each in manifest["sizes"]] == SIZES
    assert manifest["grid"] == manifest["sizes"][0]["grid"] != manifest["sizes"][1]["grid"]
    assert manifest["sizes"][1]["call"] == manifest["call"] | {"height": 16, "width": 24}
    assert {path.name for path in (tmp_path / "run" / "samples").iterdir()} == {"step_000002.png", "step_000002_16x24.png"}
    assert "step 2, 16x24 (height x width)" in (tmp_path / "run" / "report.html").read_text("utf-8")
    config = json.loads((student / "scheduler" / "scheduler_config.json").read_text())
    assert config["use_dynamic_shifting"] and config["shift_terminal"] is None and (config["base_shift"], config["max_shift"]) == (0.4, 1.3)

    assert cli.main(["sample", str(student), "--prompt", "a red cat", "--size", "16x24", "--output", str(tmp_path / "wide.png")]) == 0
    with Image.open(tmp_path / "wide.png") as image:
        assert image.width > image.height
    generator = load_student(student)
    assert generator.sizes == SIZES
    assert generator.at_size([16, 24])(["a red cat"], [0]).shape == (1, 3, 16, 24)
    assert cli.main(["sample", str(student), "--prompt", "x", "--size", "24x16", "--output", str(tmp_path / "no.png")]) == 2
    assert "--size: 24x16, but student" in capsys.readouterr().err


@pytest.mark.parametrize("several", [True, False])
def test_pictures_that_are_enlarged_are_said(folders: Callable[[str], Path], tmp_path: Path, several: bool) -> None:
    images = sized_pictures(tmp_path)
    student: dict[str, Any] = {"student": {"steps": 2, "sizes": SIZES if several else None}}
    asked = recipe(folders("sd3"), tmp_path, "lcm", **student, **({} if several else {"teacher": {"size": [16, 16]}}))
    assert not [line for line in plan(asked, dry=True).warnings if "smaller than" in line]
    file = sorted(images.glob("*.png"))[1]
    with Image.open(file) as image:
        image.resize((18, 12)).save(file)
    way_on = "leave them out, or give " + ("smaller student.sizes" if several else "a smaller teacher.size")
    made = "16x24" if several else "16x16"
    what = "1 of 4 pictures are smaller than what they are trained as and are enlarged, which blurs them"
    assert f"data.images: {what}, such as {str(file)!r} (12x18, made {made}); {way_on}" in plan(asked, dry=True).warnings
    made_of = run.dry_run(asked, tmp_path / "out")["warnings"]
    assert any("1 of 4 pictures are smaller" in line for line in made_of)


def test_a_protocol_of_another_size_than_the_first_is_told_what_decides(folders: Callable[[str], Path], tmp_path: Path) -> None:
    protocol = tiny_protocol(tmp_path)
    sizes = {"student": {"steps": 2, "sizes": [[16, 24], [16, 16]]}, "evaluate": {"protocol": protocol}}
    said = r"recipe key evaluate\.protocol: protocol tiny measures .*: of several sizes the first in student\.sizes is measured; "
    with pytest.raises(UserError, match=rf"^{said}put \[16, 16\] first$"):
        plan(recipe(folders("sd3"), tmp_path, **sizes), dry=True)
    sizes["student"] = {"steps": 2, "sizes": [[16, 24], [24, 16]]}
    with pytest.raises(UserError, match=rf"^{said}put the one that it measures first, or set evaluate\.protocol to null$"):
        plan(recipe(folders("sd3"), tmp_path, **sizes), dry=True)

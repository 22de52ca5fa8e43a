"""A recipe's `evaluate` block, from the dry run to the report: what cannot be measured is refused or said first, and costs no student."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pipelines import PROMPTS, verifying_here
from pipelines import sd3_folder as sd3_folder

from fastgen import cli, run
from fastgen.config import Recipe, validate
from fastgen.errors import TrainingFailed, UserError
from fastgen.evaluation import protocol as protocols
from fastgen.evaluation.extractors.base import Feature, Pictures, feature
from fastgen.evaluation.extractors.thumbnails import Thumbnails
from fastgen.evaluation.metrics.base import Heading, Measured, Metric, Needs, Value
from fastgen.evaluation.runner import Evaluation
from fastgen.families.sd3 import SD3
from fastgen.inputs import identify
from fastgen.plan import plan
from fastgen.progress import Progress
from fastgen.run import products

RGB = feature("thumbnails", "rgb", size=64)


class Level(Metric):
    """The mean level, which needs no weights and no reference."""

    shows: ClassVar = {"level": Heading("level")}
    real: ClassVar[list[Feature]] = []

    def needs(self) -> Needs:
        return Needs({self.set: [RGB]}, self.real)

    def measure(self, measured: Measured) -> list[Value]:
        table = measured.tables[self.set, RGB]
        return [Value("level", float(table.read().double().mean()), len(table))]


class ToReal(Level):
    """How far it is from the reference's."""

    shows: ClassVar = {"to_real": Heading("to real pictures")}
    real: ClassVar = [RGB]

    def measure(self, measured: Measured) -> list[Value]:
        ours, real = super().measure(measured)[0], measured.real().table(RGB).read().double().mean()
        return [ours._replace(name="to_real", value=ours.value - float(real))]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find, own = protocols.find_metric, {"level": Level, "to_real": ToReal}
    monkeypatch.setattr(protocols, "find_metric", lambda name, where="": own.get(name) or find(name, where))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where features are kept
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    Path("data/texts.txt").write_text("\n".join(PROMPTS))


def write_protocol(metrics: Mapping[str, Any] | None = None, *, name: str = "own.yaml", **more: Any) -> str:
    """Measures a picture of each prompt; by default what needs nothing."""
    sets = {"main": {"prompts": "texts.txt", "first_seed": 0}}
    Path(name).write_text(yaml.safe_dump({"name": "own", "size": [16, 16], "sets": sets, "metrics": dict(metrics or {"level": None}), **more}))
    return name


def write_reference(folder: Path = Path("data/real")) -> str:
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (16, 16), (60 * index,) * 3).save(folder / f"{index}.png")
    return folder.name


def content(teacher: Path, **changes: Any) -> dict[str, Any]:
    blocks = {
        "teacher": {"pretrained": str(teacher), "guidance": 2.0, "max_sequence_length": 16},
        "student": {"steps": 2},
        "distiller": {"name": "dmd2", "critic_updates": 1},
        "data": {"prompts": "prompts.txt"},
        "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "train": {"steps": 2, "batch_size": 2, "device": "cpu", "sample_every": 0},
        "evaluate": {"protocol": "own.yaml", "data_dir": "data"},
    }
    return {name: {**keys, **changes.get(name, {})} for name, keys in blocks.items()}


def recipe(teacher: Path, **changes: Any) -> Recipe:
    return validate(Recipe, content(teacher, **changes))


def evaluated(**keys: Any) -> dict[str, Any]:
    return {"evaluate": keys}


def write_statistics(width: int) -> str:
    np.savez("data/real.npz", mu=np.zeros(width), sigma=np.eye(width))
    return "real.npz"


PROTOCOL = r"recipe key evaluate\.protocol"
# What is made wrong, the recipe's changes, and what is said.
REFUSED: dict[str, tuple[Callable[[], object], dict[str, Any], str]] = {
    "no such protocol": (lambda: None, evaluated(protocol="digit"), rf"unknown protocol 'digit' \({PROTOCOL}\): did you mean 'digits'\?"),
    "no such file": (lambda: None, evaluated(protocol="none.yaml"), rf"{PROTOCOL}: 'none\.yaml' is not there; a file is needed"),
    "no YAML": (lambda: Path("own.yaml").write_text("sets: ["), {}, rf"{PROTOCOL}: 'own\.yaml' is not valid YAML: line 1"),
    "an unknown key": (lambda: write_protocol(metric={}), {}, rf"{PROTOCOL}: 'own\.yaml' key metric: unknown key; did you mean 'metrics'"),
    "an unknown metric": (lambda: write_protocol({"levels": None}), {}, rf"{PROTOCOL}: 'own\.yaml': metrics\.levels: "),
    "no prompts": (lambda: Path("data/texts.txt").unlink(), {}, rf"{PROTOCOL}: 'own\.yaml': sets\.main\.prompts: no file 'data/texts\.txt'"),
    "few prompts": (
        lambda: write_protocol(sets={"main": {"prompts": "texts.txt", "count": 4}}),
        {},
        rf"{PROTOCOL}: 'own\.yaml': sets\.main\.count: 4 pictures need 4 prompts, 'texts\.txt' holds 3",
    ),
    "no data": (lambda: None, evaluated(data_dir="none"), r"recipe key evaluate\.data_dir: no folder 'none'"),
    "data that are a file": (
        lambda: None,
        evaluated(data_dir="prompts.txt"),
        r"recipe key evaluate\.data_dir: 'prompts\.txt' is a file, a folder is",
    ),
    "no weights": (lambda: None, evaluated(weights_dir="none"), r"recipe key evaluate\.weights_dir: no folder 'none'"),
    "weights that are a file": (lambda: None, evaluated(weights_dir="prompts.txt"), r"recipe key evaluate\.weights_dir: 'prompts\.txt' is a file"),
    "a long name": (lambda: None, evaluated(weights_dir="x" * 5000), r"recipe key evaluate\.weights_dir: no folder 'x"),
    "another size": (lambda: write_protocol(size=[8, 8]), {}, rf"{PROTOCOL}: protocol own measures images of shape \(3, 8, 8\)"),
    "nothing that can be measured": (
        lambda: write_protocol({"fid": None, "to_real": None}, reference={"images": "real"}),
        {},
        rf"{PROTOCOL}: protocol own: nothing can be measured: fid: needs .*; to_real: 'own\.yaml': reference\.images: no folder 'data/real'",
    ),
    "statistics in place of pictures": (
        lambda: write_protocol({"to_real": None}, reference={"file": write_statistics(5)}),
        {},
        rf"{PROTOCOL}: protocol own: nothing can be measured: to_real: 'data/real\.npz' (holds no|is of 5 features)",
    ),
    "a broken reference": (
        lambda: (write_protocol({"to_real": None}, reference={"images": write_reference()}), Path("data/real/1.png").write_bytes(b"png")),
        {},
        rf"{PROTOCOL}: protocol own: nothing can be measured: to_real: .*'data/real/1\.png' is not a picture that can be read",
    ),
    "nothing to be measured during training": (
        lambda: write_protocol({"teacher_error": None}),
        evaluated(every=1),
        r"recipe key evaluate\.every: teacher_error needs the teacher's pictures, which are drawn at the end alone, so nothing can be measured",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_evaluation_would_refuse_the_plan_refuses(name: str, sd3_folder: Path) -> None:
    spoil, changes, reason = REFUSED[name]
    write_protocol()
    plan(recipe(sd3_folder))
    spoil()
    with pytest.raises(UserError, match=f"^{reason}"):
        plan(recipe(sd3_folder, **changes))


def test_a_method_without_a_teacher_is_not_measured_beside_one(sd3_folder: Path) -> None:
    write_protocol({"teacher_error": None})
    write_reference(Path("pictures"))
    for index, prompt in enumerate(PROMPTS):
        Path(f"pictures/{index}.txt").write_text(prompt)
    blocks = content(sd3_folder)
    blocks |= {"distiller": {"name": "flow_matching"}, "data": {"images": "pictures"}, "optimizer": {"student": {"lr": 1e-3}}}
    with pytest.raises(UserError, match=rf"^{PROTOCOL}: .*teacher_error: needs the teacher's pictures, and no teacher is measured here$"):
        plan(validate(Recipe, blocks))


def test_what_is_measured_in_part_is_said_in_a_line_for_each_reason(sd3_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_protocol({"level": None, "fid": None, "kid": None, "to_real": None, "teacher_error": None}, reference={"images": "real"})
    Path("recipe.yaml").write_text(yaml.safe_dump(content(sd3_folder)))
    assert cli.main(["train", "recipe.yaml", "evaluate.every=3", "--dry-run"]) == 0
    said = [line.removeprefix("warning").strip() for line in capfd.readouterr().out.splitlines() if "evaluate." in line]
    cut, weights, reference, teacher, late = said
    assert cut.startswith("recipe key evaluate.protocol: the end is cut off 1 of 3 prompts")
    assert weights.startswith("evaluate.protocol: fid, kid are not measured: needs ") and weights.endswith("(recipe key evaluate.weights_dir)")
    assert reference == "evaluate.protocol: to_real is not measured: 'own.yaml': reference.images: no folder 'data/real'"
    assert teacher == "evaluate.every: teacher_error needs the teacher's pictures, which are drawn at the end alone"
    assert late == "evaluate.every: 3 is more than train.steps, 2, so the student is measured at the last step alone"


class Told(Progress):
    """Notes all that it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.warned: list[str] = []
        self.open: list[str] = []
        self.within: list[tuple[str, ...]] = []  # counted work, from the outermost to the one that begins
        self.counts: dict[str, list[int]] = {}

    def stage(self, message: str) -> None:
        self.stages.append(message)

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.open.append(what)
        self.within.append(tuple(self.open))

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        self.counts.setdefault(self.open[-1], []).append(done)

    def warn(self, message: str) -> None:
        self.warned.append(message)

    def finish(self) -> None:
        self.open.pop()


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def failing(monkeypatch: pytest.MonkeyPatch, calls: Collection[int], error: Exception | None = None) -> list[int]:
    """Some of the evaluations, counted from 0, fail once they draw; returns the count so far."""
    draw, count = Evaluation.draw, [0]

    def drawing(self: Evaluation, subject: Any) -> bool:
        count[0] += 1
        if count[0] - 1 in calls:
            raise error or UserError("cannot write 'features': no space left on device; free some space and go on")
        return draw(self, subject)

    monkeypatch.setattr(Evaluation, "draw", drawing)
    return count


def test_an_evaluation_that_fails_during_training_costs_its_row(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_protocol()
    failing(monkeypatch, [1])
    told = Told()
    run_dir = run.train(recipe(sd3_folder, train={"steps": 3}, evaluate={"every": 1}), "run", only="train", progress=told)
    assert ["eval/level" in row for row in rows(run_dir)] == [True, False, True]
    why = "evaluate.protocol: the student is not measured here: cannot write 'features': no space left on device; free some space and go on"
    assert why in rows(run_dir)[1]["warnings"] and f"warning at step 2: {why}" in told.warned
    assert (run_dir / "checkpoints/step_000003").is_dir() and told.open == []


def test_an_extractor_that_fails_is_no_divergence(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first call is the warm-up's."""
    extract, calls = Thumbnails.__call__, []

    def spoilt(self: Thumbnails, pictures: Pictures, layers: Collection[str]) -> dict[str, torch.Tensor]:
        calls.append(len(pictures.pixels))
        made = extract(self, pictures, layers)
        return {name: rows.float() * (float("nan") if len(calls) == 2 else 1) for name, rows in made.items()}

    write_protocol()
    monkeypatch.setattr(Thumbnails, "__call__", spoilt)
    run_dir = run.train(recipe(sd3_folder, evaluate={"every": 1}), "run", only="train")
    assert ["eval/level" in row for row in rows(run_dir)] == [False, True]
    assert "pictures are not finite: the extractor's weights are damaged" in rows(run_dir)[0]["warnings"][-1]


def test_pictures_that_are_none_end_training_as_ever(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = SD3.decode_latents
    monkeypatch.setattr(SD3, "decode_latents", lambda self, latents: decode(self, latents) * float("nan"))
    write_protocol()
    with pytest.raises(TrainingFailed, match=r"^step 1: \d of \d pictures of the student are not finite; .*; newest sound checkpoint: none"):
        run.train(recipe(sd3_folder, evaluate={"every": 1}), "run", only="train")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_student_that_could_not_be_measured_is_whole_and_is_measured_later(
    sd3_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_protocol()
    Path("recipe.yaml").write_text(yaml.safe_dump(content(sd3_folder)))
    command, run_dir = ["train", "recipe.yaml", "--output", "run"], Path("run")
    with verifying_here():
        with monkeypatch.context() as patch:
            failing(patch, [0])
            assert cli.main(command) == 2
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith("error: recipe key evaluate.protocol: the student in 'run/student' is whole, but could not be measured: cannot write")
        assert line.endswith("; the same command with --resume goes on from there")
        assert json.loads((run_dir / "run.json").read_text())["unmeasured"].startswith("cannot write 'features'")
        assert not (run_dir / "results.json").exists()
        assert "The student has not been evaluated." in (run_dir / "report.html").read_text()
        assert cli.main(["verify", "run/student"]) == 0
        before, trained = files(run_dir / "student"), files(run_dir / "checkpoints")
        with monkeypatch.context() as patch:
            for name in ("export_student", "verify"):
                patch.setattr(products, name, None)  # called once already
            assert cli.main([*command, "--resume"]) == 0
    assert (files(run_dir / "student"), files(run_dir / "checkpoints")) == (before, trained)
    assert {row["model"] for row in json.loads((run_dir / "results.json").read_text())["metrics"]} == {"student", "teacher"}
    assert "The student has not been evaluated." not in (run_dir / "report.html").read_text()
    assert "unmeasured" not in json.loads((run_dir / "run.json").read_text())


def test_another_student_is_exported_and_keeps_no_results_of_the_former(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_protocol()
    with verifying_here():
        run_dir = run.train(recipe(sd3_folder), "run")
        former, results = files(run_dir / "student"), run_dir / "results.json"
        assert results.is_file()
        (run_dir / "student/fastgen.json").unlink()
        run.train(recipe(sd3_folder), "run", resume=True)
        assert files(run_dir / "student").keys() == former.keys() and results.is_file()
        failing(monkeypatch, [0])
        with pytest.raises(UserError, match=r"could not be measured"):
            run.train(recipe(sd3_folder, train={"steps": 3}), "run", resume=True, allow_change=["train.steps"])
    assert files(run_dir / "student") != former and not results.exists()


def test_a_moved_run_is_exported_without_what_measured_it(sd3_folder: Path) -> None:
    write_protocol()
    run_dir = run.train(recipe(sd3_folder), "run", only="train")
    shutil.rmtree("data")
    Path("own.yaml").unlink()
    assert (run.export(run_dir, Path("student")) / "fastgen.json").is_file()


def test_real_pictures_are_looked_at_once_in_a_run(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract, real = Thumbnails.__call__, []

    def counting(self: Thumbnails, pictures: Pictures, layers: Collection[str]) -> dict[str, torch.Tensor]:
        real.extend([1] * (not any(pictures.prompts)))  # drawn ones have prompts here
        return extract(self, pictures, layers)

    monkeypatch.setattr(Thumbnails, "__call__", counting)
    write_protocol({"to_real": None}, reference={"images": write_reference()})
    run_dir = run.train(recipe(sd3_folder, train={"steps": 3}, evaluate={"every": 1}), "run", only="train")
    values = [row["eval/to_real"] for row in rows(run_dir)]
    assert len(real) == 1 and len(set(values)) == 3  # and the student anew each time


def test_progress_and_what_is_missing_during_training(sd3_folder: Path) -> None:
    write_protocol({"level": None, "fid": None, "to_real": None}, reference={"images": write_reference()})
    told = Told()
    run.train(recipe(sd3_folder, evaluate={"every": 1}), "run", only="train", progress=told)
    drawn, measured = ("training", "pictures of the student, 2 steps"), ("training", "metrics of the student, 2 steps")
    assert told.within == [("encoding prompts",), ("training",), ("training", "reference pictures"), drawn, measured, drawn, measured]
    assert told.counts[drawn[1]] == [3, 3] and told.counts["training"] == [1, 2]
    assert len([line for line in told.warned if line.startswith("warning: fid is not measured")]) == 1  # not at every evaluation


def test_a_protocol_that_has_changed_is_said_when_a_run_goes_on(sd3_folder: Path) -> None:
    write_protocol()
    given = recipe(sd3_folder, evaluate={"every": 1})
    run_dir = run.train(given, "run", only="train")
    before = identify(plan(given)).hashes["evaluate.protocol"]
    assert json.loads((run_dir / "inputs.json").read_text())["hashes"]["evaluate.protocol"] == before
    write_protocol(description="which changes no number")
    write_protocol({"level": None}, batch_size=2)
    same, changed, again = Told(), Told(), Told()
    run.train(given, "run", resume=True, only="train", progress=same)
    write_protocol(quantisation="truncate")
    warning = "evaluate.protocol: 'own.yaml' is not what the run began with: numbers before and from here on do not compare"
    assert warning in run.dry_run(given, "run", resume=True, only="train")["warnings"]
    for told in (changed, again):
        run.train(given, "run", resume=True, only="train", progress=told)
    said = [f"warning: {warning}" in told.warned for told in (same, changed, again)]
    assert said == [False, True, False]
    after = json.loads((run_dir / "inputs.json").read_text())["hashes"]["evaluate.protocol"]
    assert json.loads((run_dir / "run.json").read_text())["resumed"][1]["changed"] == {"evaluate.protocol": [before, after]}


def test_the_recipe_of_a_run_finds_a_protocols_files_from_anywhere(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names are of the current folder, unless evaluate.data_dir says of which."""
    shutil.copy("data/texts.txt", "texts.txt")
    write_protocol()
    for folder in ("data", None):
        resolved = plan(recipe(sd3_folder, evaluate={"data_dir": folder})).resolved()
        with monkeypatch.context() as patch:
            patch.chdir("/")
            assert plan(validate(Recipe, resolved)).resolved() == resolved
    write_protocol(sets={"main": {"prompts": str(Path("texts.txt").absolute())}})
    assert plan(recipe(sd3_folder, evaluate={"data_dir": None})).resolved()["evaluate"]["data_dir"] is None

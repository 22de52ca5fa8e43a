"""A run's folder: every state in which a kill can leave it is taken by a flag, and one trainer writes at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import flip
from safetensors.torch import load_file

from fastgen import checkpoint, cli, run
from fastgen.config import Recipe, validate
from fastgen.errors import UserError
from fastgen.run.folder import RunFolder


def toy(prompts: str = "prompts.txt", **train: Any) -> Recipe:
    block = {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "keep": 5, "device": "cpu", **train}
    data = {
        "teacher": {"pretrained": "toy:mixture"},
        "student": {"steps": 1},
        "distiller": {"name": "dmd2"},
        "data": {"prompts": prompts},
        "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "train": block,
    }
    return validate(Recipe, data)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("0\n")
    monkeypatch.chdir(tmp_path)


def go(output: str | Path = "run", given: Recipe | None = None, **flags: Any) -> Path:
    return run.train(given or toy(), output, only="train", **flags)


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def end(run_dir: Path) -> dict[str, Any]:
    return {file.name: file.read_bytes() for file in sorted((run_dir / "checkpoints/step_000006").glob("*.safetensors"))}


@pytest.fixture
def whole(in_a_folder: None) -> Path:
    return go("whole")


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(folder / "checkpoints")]


FLAGS: tuple[dict[str, Any], ...] = ({}, {"resume": True}, {"or_start": True}, {"overwrite": True})


class Killed(BaseException):
    """As a kill: nothing that is ours handles it, and what follows it did not happen."""


def test_a_run_that_was_killed_while_the_first_samples_were_drawn_goes_on(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_steps", killed)
        with pytest.raises(Killed):
            go()
    assert not (Path("run") / "metrics.jsonl").exists()
    with pytest.raises(UserError, match=r"already holds a run; pass --resume to go on with it or --overwrite"):
        go()
    shutil.copytree("run", "other", dirs_exist_ok=True)
    assert end(go(resume=True)) == end(whole)
    assert end(go("other", overwrite=True)) == end(whole)


def test_a_kill_inside_overwrite_leaves_a_run_that_every_flag_but_none_accepts(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """At each of the removals, for each of the flags."""
    from fastgen.run import folder

    for count in range(1, 12):
        for flags in FLAGS[1:]:
            shutil.rmtree("run", ignore_errors=True)
            shutil.copytree(whole, "run")
            left = [count]

            def remove(path: Path, left: list[int] = left, really: Any = folder.remove) -> None:
                left[0] -= 1
                if not left[0]:
                    raise Killed
                really(path)

            with monkeypatch.context() as patch:
                patch.setattr(folder, "remove", remove)
                try:
                    go(overwrite=True)
                except Killed:
                    pass
                else:
                    assert count > 9
            assert end(go(**flags)) == end(whole)
            assert steps(Path("run")) == [1, 2, 3, 4, 5, 6]


def test_a_folder_with_nothing_but_what_a_kill_left_before_the_marker_is_empty(whole: Path) -> None:
    Path("run").mkdir()
    for name in (".lock", ".partial_run.json.123.456"):
        (Path("run") / name).touch()
    assert end(go()) == end(whole)
    assert not list(Path("run").glob(".partial_*"))


def test_resume_needs_a_run_and_resume_or_start_does_not(whole: Path) -> None:
    with pytest.raises(UserError, match=r"--resume: 'run' holds no run to resume; --resume-or-start starts one"):
        go(resume=True)
    assert not Path("run").exists()
    assert end(go(or_start=True)) == end(whole)
    before = (Path("run") / "metrics.jsonl").read_text()
    go(or_start=True)
    assert (Path("run") / "metrics.jsonl").read_text() == before


def test_other_files_are_left_alone_whatever_the_flag() -> None:
    Path("run").mkdir()
    (Path("run") / "thesis.tex").write_text("mine")
    for flags in FLAGS:
        with pytest.raises(UserError, match=r"holds (other files and )?no run"):
            go(**flags)
    assert os.listdir("run") == ["thesis.tex"]


def test_a_second_trainer_is_refused_and_writes_nothing(whole: Path) -> None:
    with (whole / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
        for flags in FLAGS[1:]:
            with pytest.raises(UserError, match=r"process \d+ on .* is training into 'whole' now; wait for it, stop it, or choose another folder"):
                go("whole", **flags)
        assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    go("whole", resume=True)


def test_two_that_start_at_once_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes when the first has planned and not yet made its folder."""
    claim = RunFolder.claim
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "claim", lambda self, check: (patch.undo(), go(), claim(self, check)))
        with pytest.raises(UserError, match="already holds a run"):
            go()
    assert steps(Path("run")) == [1, 2, 3, 4, 5, 6]


def test_what_cannot_be_built_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise UserError("a broken picture")

    monkeypatch.setattr(run, "build", broken)
    for output in ("deep/down/run", "empty"):
        Path("empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="a broken picture"):
            go(output)
    assert sorted(os.listdir(".")) == ["empty", "prompts.txt"]
    assert os.listdir("empty") == []


def test_a_broken_newest_checkpoint_names_the_newest_complete_one_from_which_a_run_goes_on(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    want = end(whole)
    newest, older = (whole / f"checkpoints/step_{step:06d}" for step in (6, 4))
    flip(newest / "role_student.safetensors", 0.5)
    flip(older / "role_student.safetensors", 0.5)
    with pytest.raises(UserError, match=r"step_000006.*the newest complete one is step_000002: .* --resume-from step_000002 goes on from it"):
        go("whole", resume=True)
    with pytest.raises(UserError, match=r"holds no checkpoint 'step_000003'; it has step_000002, step_000004, step_000006"):
        go("whole", resume_from="step_000003")
    for name in ("step_000002/../step_000004", "step_", "", "latest", "-1"):
        with pytest.raises(UserError, match="holds no checkpoint"):
            go("whole", resume_from=name)
    go("whole", resume_from="step_000002")
    assert end(whole) == want
    assert steps(whole) == [1, 2, 3, 4, 5, 6]
    assert {"abandoned_step_000004", "abandoned_step_000006"} < set(os.listdir(whole / "checkpoints"))
    assert json.loads((whole / "run.json").read_text())["resumed"][-1]["step"] == 2


def test_export_of_a_broken_newest_checkpoint_names_another(whole: Path) -> None:
    flip(whole / "checkpoints/step_000006/state.json", 0.5)
    with pytest.raises(UserError, match="the newest complete one is step_000004"):
        run.export(whole, Path("student"))


def test_no_complete_checkpoint_says_so(whole: Path) -> None:
    for path in checkpoint.checkpoints(whole / "checkpoints"):
        flip(path / "state.json", 0.3)
    with pytest.raises(UserError, match=r"no other checkpoint is complete: fastgen train … --overwrite starts over"):
        go("whole", resume=True)
    go("whole", overwrite=True)


def test_stray_names_among_checkpoints_are_ignored(whole: Path) -> None:
    shutil.copytree(whole / "checkpoints/step_000006", whole / "checkpoints/step_000003 (copy)")
    for name in ("step_", "step_7", "step_0000009", "step_x", "step_٠٠٠٠٠٩", "step_-00001", f"step_{'9' * 40}"):
        shutil.copytree(whole / "checkpoints/step_000006", whole / "checkpoints" / name)
    (whole / "checkpoints/step_000099").touch()
    assert names(whole) == ["step_000002", "step_000004", "step_000006"]
    go("whole", resume=True)


def test_what_a_kill_left_among_checkpoints_is_put_back_or_removed(whole: Path) -> None:
    want, folder = end(whole), whole / "checkpoints"
    (folder / "step_000006").rename(folder / ".old_step_000006")
    shutil.copytree(folder / "step_000004", folder / ".old_step_000004")
    shutil.copytree(folder / "step_000004", folder / ".partial_step_000005")
    (whole / ".partial_metrics.jsonl.1.2").touch()
    go("whole", resume=True)
    assert sorted(os.listdir(folder)) == ["step_000002", "step_000004", "step_000006"]
    assert end(whole) == want
    assert not list(whole.rglob(".partial_*"))


def test_a_run_of_an_older_version_is_one(whole: Path) -> None:
    for name in ("run.json", ".lock"):
        (whole / name).unlink()
    with pytest.raises(UserError, match="already holds a run"):
        go("whole")
    go("whole", resume=True)
    assert (whole / "run.json").is_file()


def lrs(run_dir: Path) -> list[float]:
    return [json.loads(line)["lr/student"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_may_change_what_it_is_allowed_to(whole: Path) -> None:
    slower = toy()
    slower.optimizer["student"] = slower.optimizer["student"].model_copy(update={"lr": 5e-4})
    with pytest.raises(UserError, match=r"resume with the same recipe, or pass --allow-change optimizer\.student\.lr"):
        go("whole", slower, resume_from="step_000002")
    with pytest.raises(UserError, match=r"pass --allow-change optimizer\.student\.lr"):
        go("whole", slower, resume_from="step_000002", allow_change=["optimizer.student.clip"])
    assert names(whole) == ["step_000002", "step_000004", "step_000006"]
    go("whole", slower, resume_from="step_000002", allow_change=["optimizer.student.lr", "train.ema"])
    assert lrs(whole) == [1e-3, 1e-3, 5e-4, 5e-4, 5e-4, 5e-4]
    (record,) = json.loads((whole / "run.json").read_text())["resumed"]
    assert (record["step"], record["changed"]) == (2, {"optimizer.student.lr": [1e-3, 5e-4]})
    go("whole", slower, resume=True)  # it is the run's now
    with pytest.raises(UserError, match=r"optimizer\.student\.lr is 0\.001, .* has 0\.0005"):
        go("whole", resume=True)


def test_a_finished_run_may_be_prolonged(whole: Path) -> None:
    longer = toy(steps=9)
    go("whole", longer, resume=True, allow_change=["train.steps"])
    assert steps(whole) == list(range(1, 10))
    assert end(whole) == end(go("other", longer))  # the schedule is constant
    other = Path("other/checkpoints/step_000009")
    for file in (whole / "checkpoints/step_000009").glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(other / file.name)
        assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)


def test_prompts_may_change_when_that_is_allowed(whole: Path) -> None:
    Path("more.txt").write_text("0\n1\n")
    more = toy("more.txt")
    with pytest.raises(UserError, match=r"data\.prompts: .* or pass --allow-change data\.prompts"):
        go("whole", more, resume=True)
    go("whole", more, resume=True, allow_change=["data.prompts"])
    go("whole", more, resume=True)
    with pytest.raises(UserError, match=r"data\.prompts"):
        go("whole", resume=True)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("optimizer.studnet.lr", r"no recipe key 'optimizer\.studnet\.lr'; did you mean 'optimizer\.student\.lr'"),
        ("student.steps", "decides what is trained"),
        ("teacher", "decides what is trained"),
        ("distiller.name", "decides what is trained"),
        ("distiller", "decides what is trained"),
        ("data", "decides what is trained"),
        ("", "no recipe key ''"),
    ],
)
def test_what_may_not_change(key: str, why: str, whole: Path) -> None:
    with pytest.raises(UserError, match=f"--allow-change: .*{why}"):
        go("whole", resume=True, allow_change=[key])


def test_the_dry_run_refuses_what_the_run_would_and_writes_nothing(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("toy.yaml").write_text(toy().to_yaml())
    (Path("other")).mkdir()
    (Path("other") / "thesis.tex").touch()
    Path("dangling").symlink_to("nowhere")
    before = {path: path.lstat().st_mtime_ns for path in Path().rglob("*")}

    def dry(*more: str) -> tuple[int, str, str]:
        status = cli.main(["train", "toy.yaml", "--only", "train", "--dry-run", *more])
        out, err = capfd.readouterr()
        return status, out, err

    refused = [
        ("holds other files", ("--output", "other")),
        ("holds no run to resume", ("--output", "new", "--resume")),
        ("is a file", ("--output", "prompts.txt")),
        ("file name too long", ("--output", "x" * 300)),
        ("exclude each other", ("--output", "whole", "--resume", "--overwrite")),
        ("train.batch_size is 5", ("train.batch_size=5", "--output", "whole", "--resume")),
        ("no checkpoint 'step_000001'", ("--output", "whole", "--resume-from", "step_000001")),
        ("needs --resume", ("--output", "whole", "--allow-change", "train.ema")),
        ("is a file", ("--output", "prompts.txt/run")),
        ("is a link to 'nowhere'", ("--output", "dangling/run")),
    ]
    for why, more in refused:
        status, out, err = dry(*more)
        assert (status, out) == (2, ""), (why, out)
        assert why in err and len(err.splitlines()) == 1, err
    status, out, err = dry("--output", "whole")
    assert status == 0 and "warning     'whole' already holds a run; it takes --resume or --overwrite" in out
    for more in (
        ("--output", "new"),
        ("--output", "whole", "--resume"),
        ("--output", "whole", "--overwrite"),
        ("--output", "new", "--resume-or-start"),
    ):
        status, out, err = dry(*more)
        assert status == 0 and "warning" not in out, err
    assert {path: path.lstat().st_mtime_ns for path in Path().rglob("*")} == before


def test_a_fifo_in_a_run_is_refused_before_anybody_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text("")
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(UserError, match=r"cannot read '.*/run\.json': it is no file, but a FIFO"):
        RunFolder(tmp_path).check(resume=True)

"""What ends one process ends all, within its bound and with one line. Run with `pytest -m distributed`."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from damage import flip
from ranks import Ranks

pytestmark = pytest.mark.distributed

RECIPE = """
teacher: {pretrained: "toy:mixture"}
student: {steps: 2}
distiller: {name: dmd2, critic_updates: 1}
data: {prompts: prompts.txt}
optimizer:
  student: {name: adamw, lr: 1.0e-4}
  fake_score: {name: adamw, lr: 1.0e-4}
train: {steps: 100000, batch_size: 8, device: cpu, checkpoint_every: 0, sample_every: 0, ema: 0.9}
"""
TOGETHER = ("train.steps=2", "train.batch_size=4", "train.device=cpu", "train.sample_every=2", "train.checkpoint_every=2")
TRAIN = ("train", "recipe.yaml", "--only", "train", "--output", "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("0\n1\n2\n", encoding="utf-8")
    return tmp_path


def steps(folder: Path) -> int:
    log = folder / "run/metrics.jsonl"
    return len(log.read_text(encoding="utf-8").splitlines()) if log.is_file() else 0


def one_line(ranks: Ranks, *words: str) -> None:
    """Rank 0 has said the one line; nobody else has said anything."""
    lines = [line for rank in range(2) for line in ranks.err(rank).splitlines()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_on_any_process_saves_once_and_ends_all(folder: Path, rank: int) -> None:
    ranks = Ranks(folder, TRAIN, TRAIN)
    ranks.until(lambda: steps(folder) >= 3)
    ranks.kill(rank, signal.SIGTERM)
    assert ranks.ends() == [143, 143]
    assert ranks.err(0) == ranks.err(1) == ranks.out(1) == ""
    assert "stopped at step" in ranks.out(0) and "--resume" in ranks.out(0)
    (saved,) = (folder / "run/checkpoints").iterdir()
    assert json.loads((saved / "state.json").read_text(encoding="utf-8"))["step"] == steps(folder)
    resumed = (*TRAIN[:2], f"train.steps={steps(folder) + 2}", *TRAIN[2:], "--resume", "--allow-change", "train.steps")
    again = Ranks(folder, resumed, resumed)
    assert again.ends() == [0, 0], (again.err(0), again.err(1))
    assert again.out(1) == again.err(1) == ""


def test_a_stopped_process_is_named_within_the_timeout(folder: Path) -> None:
    train = (*TRAIN[:2], "train.timeout=4", *TRAIN[2:])
    ranks = Ranks(folder, train, train)
    ranks.until(lambda: steps(folder) >= 3)
    ranks.kill(1, signal.SIGSTOP)
    assert ranks.ends(60, but=[1])[0] == 1
    one_line(ranks, "process 1 has given no sign", "train.timeout")


def test_a_stopped_process_that_keeps_the_store_ends_the_others_too(folder: Path) -> None:
    train = (*TRAIN[:2], "train.timeout=4", *TRAIN[2:])
    ranks = Ranks(folder, train, train)
    ranks.until(lambda: steps(folder) >= 3)
    ranks.kill(0, signal.SIGSTOP)
    assert ranks.ends(60, but=[0])[1] == 1
    one_line(ranks, "process")


def test_a_killed_process_ends_the_others(folder: Path) -> None:
    ranks = Ranks(folder, TRAIN, TRAIN)
    ranks.until(lambda: steps(folder) >= 3)
    ranks.kill(1, signal.SIGKILL)
    assert ranks.ends() == [1, -signal.SIGKILL]
    one_line(ranks, "process")


def test_a_process_that_is_killed_while_others_wait_for_it_ends_them(folder: Path) -> None:
    """Without a launcher, and long before `train.timeout`: at their last meeting nobody exchanges anything."""
    train = (*TRAIN[:2], "train.steps=2", *TRAIN[2:])
    ranks = Ranks(folder, train, train, before={1: killed_as_it_parts})
    assert ranks.ends() == [1, -signal.SIGKILL]
    one_line(ranks, "process 1 has ended without a word")


def killed_as_it_parts() -> None:
    from fastgen.group import Member

    Member.part = lambda self: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_files() -> None:
    """No space is left for what this process writes as a whole file."""
    import fastgen.files

    fastgen.files._replace = refuse


def full_for_checkpoints() -> None:
    import fastgen.tensor_files

    fastgen.tensor_files.save_file = refuse


def test_a_full_disk_on_one_process_ends_all_with_one_line(folder: Path) -> None:
    train = ("train", "digits_dmd2_gan_1step", *TOGETHER, "data.store=store", *TRAIN[2:])
    ranks = Ranks(folder, train, train, before={1: full_for_files})
    assert ranks.ends() == [2, 2]
    one_line(ranks, "process 1 on", "store", "no space left")


def test_a_checkpoint_that_finds_no_space_ends_all_with_one_line(folder: Path) -> None:
    train = (*TRAIN[:2], "train.checkpoint_every=3", *TRAIN[2:])
    ranks = Ranks(folder, train, train, before={0: full_for_checkpoints})
    assert ranks.ends() == [2, 2]
    one_line(ranks, "step_000003", "no space left")
    assert steps(folder) == 2 and not list((folder / "run/checkpoints").iterdir())


@pytest.mark.parametrize("whose", ["all processes'", "one process's"])
def test_a_damaged_shard_ends_a_resume_with_one_line(folder: Path, whose: str) -> None:
    """Of the run folder that all share, or of one machine's copy that is not as the others'."""
    keys = ("train.steps=4", "train.checkpoint_every=2", "train.keep=2")
    train = (*TRAIN[:2], *keys, *TRAIN[2:])
    assert Ranks(folder, train, train).ends() == [0, 0]
    shutil.copytree(folder / "run", folder / "copy")
    place = "run" if whose == "all processes'" else "copy"
    flip(folder / place / "checkpoints/step_000004/optimizer_fake_score-00002-of-00002.safetensors", 0.7)
    more = ("--resume", "--allow-change", "train.steps")
    resume = [(*TRAIN[:2], *keys, "train.steps=6", *TRAIN[2:4], "--output", where, *more) for where in ("run", place)]
    again = Ranks(folder, *resume)
    assert again.ends() == [2, 2]
    one_line(again, f"{place}/checkpoints/step_000004/optimizer_fake_score-00002-of-00002.safetensors", "damaged", "--resume-from step_000002")
    assert steps(folder) == 4
    if place == "run":
        gone_on = (*resume[0], "--resume-from", "step_000002")
        assert Ranks(folder, gone_on, gone_on).ends() == [0, 0]
        assert steps(folder) == 6


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("train.batch_size=16",), ("process 1 on", "recipe key train.batch_size", "16", "8")),
        (("data.prompts=other.txt",), ("process 1 on", "data.prompts")),
    ],
)
def test_processes_that_disagree_do_not_start(folder: Path, other: tuple[str, ...], words: tuple[str, ...]) -> None:
    (folder / "other.txt").write_text("0\n2\n", encoding="utf-8")
    ranks = Ranks(folder, TRAIN, (*TRAIN[:2], *other, *TRAIN[2:]))
    assert ranks.ends() == [2, 2]
    one_line(ranks, *words)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_size=9", ("recipe key train.batch_size", "9", "2 processes")),
        ("train.micro_batch=3", ("recipe key train.micro_batch", "3", "4 samples")),
        ("train.mesh=[2,1]", ("recipe key train.mesh", "fsdp")),
        ("train.shard=none", ("recipe key train.shard", "2")),
        ("train.sample_evry=1", ("sample_every",)),
    ],
)
def test_a_mistake_is_said_once(folder: Path, override: str, words: tuple[str, ...]) -> None:
    train = (*TRAIN[:2], override, *TRAIN[2:])
    ranks = Ranks(folder, train, train)
    assert ranks.ends() == [2, 2]
    one_line(ranks, *words)
    assert not (folder / "run").exists()


def test_a_role_that_diverges_is_said_once(folder: Path) -> None:
    train = (*TRAIN[:2], "optimizer.fake_score.lr=1e12", *TRAIN[2:])
    ranks = Ranks(folder, train, train)
    assert ranks.ends() == [1, 1]
    one_line(ranks, "role 'fake_score'", "diverged", "start again with a lower learning rate")


def test_a_dry_run_needs_no_launcher(folder: Path) -> None:
    ranks = Ranks(folder, (*TRAIN[:2], "train.shard=ddp", *TRAIN[2:], "--dry-run"))
    assert ranks.ends() == [0], ranks.err(0)


def test_a_launcher_that_starts_one_process_of_several_is_named(folder: Path) -> None:
    ranks = Ranks(folder, (*TRAIN[:2], "train.steps=1", *TRAIN[2:]), before={0: as_accelerate_on_cpus})
    assert ranks.ends() == [0], ranks.err(0)
    assert "accelerate launch started one process" in ranks.out(0) + ranks.err(0) and steps(folder) == 1


def as_accelerate_on_cpus() -> None:
    """What `accelerate launch --cpu --num_processes 2` starts."""
    del os.environ["WORLD_SIZE"], os.environ["RANK"], os.environ["LOCAL_RANK"]
    os.environ["ACCELERATE_USE_CPU"] = "True"

"""Whole runs of two processes, one of which is killed at any moment: what goes on from there ends as the run that nobody killed, bit for bit.
Run with `pytest -m slow`: twenty kills take minutes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from moments import counted, noted
from ranks import Ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 6
KEYS = (f"train.steps={STEPS}", "train.batch_size=4", "train.micro_batch=2", "train.sample_every=3", "train.checkpoint_every=2", "train.keep=2")
KEYS += ("train.device=cpu", "train.timeout=30", "evaluate.protocol=null")
TIMED = ("seconds", "samples_per_second")


def command(recipe: str, *more: str) -> tuple[str, ...]:
    return ("train", recipe, *KEYS, *more, "--output", "run", "--resume-or-start")


def outcome(run: Path) -> dict[str, Any]:
    """Weights, averages, moments and statistics of all checkpoints, the student, pictures and rows; and the names of all files, but of
    TensorBoard's, which are times."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and "tensorboard" not in path.parts]
    compared = {".safetensors", ".png"}
    found: dict[str, Any] = {str(path.relative_to(run)): _hash(path) if path.suffix in compared else "" for path in files}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return found | {"rows": [{key: value for key, value in row.items() if key not in TIMED} for row in rows]}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def spread_kills(moments: list[list[str]], count: int, seed: int) -> list[tuple[int, int]]:
    """(rank, number of its moment): ranks at random; every other moment one of a save's, each kind evenly over the run."""
    draw, kills = random.Random(seed), []
    for i in range(count):
        rank = draw.randrange(2)
        places = [at for at, name in enumerate(moments[rank], 1) if i % 2 == 0 or name.startswith("save ")]
        kills.append((rank, places[int((i + draw.random()) / count * len(places))]))
    return kills


ONLY_TRAIN = ("digits_dmd2_1step", "--only", "train")
# Kills, 20 in all; recipe, keys and options.
CASES = {
    "ddp, to its report": (5, ("digits_dmd2_gan_1step", "data.store=store")),
    "ddp": (6, ONLY_TRAIN),
    "ddp, saving beside": (5, (*ONLY_TRAIN, "train.save_beside=true")),
    "fsdp, saving beside": (4, (*ONLY_TRAIN, "train.shard=fsdp", "train.save_beside=true")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_kill_at_any_moment_changes_nothing(name: str, tmp_path: Path) -> None:
    count, keys = CASES[name]
    train, whole = command(*keys), tmp_path / "whole"
    whole.mkdir()
    ranks = Ranks(whole, train, train, before={rank: functools.partial(counted, f"moments_{rank}") for rank in (0, 1)})
    assert ranks.ends(240) == [0, 0], [ranks.err(rank) for rank in (0, 1)]
    moments, expected = [noted(whole, f"moments_{rank}") for rank in (0, 1)], outcome(whole / "run")
    assert {"save save_file", "save fsync", "save all_gather_object", "train_step", "together"} <= set(moments[0]) & set(moments[1])
    assert [row["step"] for row in expected["rows"]] == list(range(1, STEPS + 1))
    for victim, at in spread_kills(moments, count, seed=len(name)):
        said = f"process {victim} at its moment {at} of {len(moments[victim])}, {moments[victim][at - 1]}"
        folder = tmp_path / f"{victim}_{at}"
        folder.mkdir()
        struck = Ranks(folder, train, train, before={victim: functools.partial(counted, "moments", at)})
        codes = struck.ends(90)
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, (said, codes, struck.err(1 - victim))
        lines = struck.err(1 - victim).splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), (said, lines)
        for leftover in folder.rglob(".partial_*"):  # as after a minute: younger ones could be another process's
            os.utime(leftover, (0, 0))
        again = Ranks(folder, train, train)
        assert again.ends(240) == [0, 0], (said, [again.err(rank) for rank in (0, 1)])
        found = outcome(folder / "run")
        assert found == expected, (said, [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)])

"""A whole run of two processes, from encoding to report, beside the same of one. Run with `pytest -m distributed`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

KEYS = ("train.steps=2", "train.batch_size=4", "train.micro_batch=2", "train.device=cpu", "train.sample_every=2", "train.checkpoint_every=1")
KEYS += ("data.store=store", "optimizer.student.name=sgd", "optimizer.fake_score.name=sgd", "optimizer.discriminator.name=sgd")


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    folders = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        arguments = ("train", "digits_dmd2_gan_1step", *KEYS, "--only", "train", "--output", "run")
        ranks = Ranks(folder, *[arguments] * count)
        assert ranks.ends(240) == [0] * count, [ranks.err(rank) for rank in range(count)]
        assert [ranks.err(rank) for rank in range(count)] == [""] * count
        assert [bool(ranks.out(rank)) for rank in range(count)] == [True, False][:count]
        folders.append(folder)
    one, two = folders
    assert (stored := hashes(one, "store/**/*.*")) == hashes(two, "store/**/*.*") and len(stored) > 8
    assert [path.name for path in sorted((two / "run").rglob("*")) if not path.name.startswith("events")] == [
        path.name for path in sorted((one / "run").rglob("*")) if not path.name.startswith("events")
    ]
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        assert ours.keys() == theirs.keys()
        assert {key: value for key, value in ours.items() if key.startswith("loss")} == pytest.approx(
            {key: value for key, value in theirs.items() if key.startswith("loss")}, rel=1e-4
        )
    for name in ("role_student", "ema_student", "role_fake_score", "role_discriminator"):
        got, want = (load_file(folder / f"run/checkpoints/step_000002/{name}.safetensors") for folder in (two, one))
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert float((got[key] - value).abs().max()) < 1e-5, key

"""A whole run of two processes, from encoding to report, beside the same of one. Run with `pytest -m distributed`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.distributed

KEYS = ("train.steps=2", "train.batch_size=4", "train.micro_batch=2", "train.device=cpu", "train.sample_every=2", "train.checkpoint_every=1")
KEYS += (
    "data.store=store",
    "evaluate.protocol=few.yaml",
    "optimizer.student.name=sgd",
    "optimizer.fake_score.name=sgd",
    "optimizer.discriminator.name=sgd",
)


FEW = """
name: few
description: Some pictures, in chunks that two processes share.
size: [8, 8]
sets:
  named: {prompts: "fastgen:digits/named", count: 40, first_seed: 0}
  open: {prompts: "fastgen:digits/open", count: 40, first_seed: 100}
metrics:
  digits:
chunk: 10
batch_size: 5
"""


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    folders = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "few.yaml").write_text(FEW, encoding="utf-8")
        arguments = ("train", "digits_dmd2_gan_1step", *KEYS, "--output", "run", *(("--only", "train") if count == 1 else ()))
        ranks = Ranks(folder, *[arguments] * count)
        assert ranks.ends(240) == [0] * count, [ranks.err(rank) for rank in range(count)]
        assert [ranks.err(rank) for rank in range(count)] == [""] * count
        assert [bool(ranks.out(rank)) for rank in range(count)] == [True, False][:count]
        folders.append(folder)
    one, two = folders
    assert (stored := hashes(one, "store/**/*.*")) == hashes(two, "store/**/*.*") and len(stored) > 8
    assert hashes(one, "run/samples/*") == hashes(two, "run/samples/*")
    measured_as_one(two, one)
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        assert ours.keys() == theirs.keys()
        assert {key: value for key, value in ours.items() if key.startswith("loss")} == pytest.approx(
            {key: value for key, value in theirs.items() if key.startswith("loss")}, rel=1e-4
        )
    for name in ("role_student", "ema_student", "role_fake_score", "role_discriminator"):
        got, want = (saved(folder / "run/checkpoints/step_000002", name) for folder in (two, one))
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert float((got[key] - value).abs().max()) < 1e-5, key


def saved(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """Of which each process of a run may have written a part."""
    return {key: value for file in checkpoint.glob(f"{name}*.safetensors") for key, value in load_file(file).items()}


def measured_as_one(two: Path, one: Path) -> None:
    """What two processes drew to measure their student, and what came of it, are what one process draws of it: to the bit."""
    alone = Ranks(one, ("evaluate", str(two / "run/student"), "--protocol", "few.yaml", "--output", "results.json"))
    assert alone.ends(120) == [0], alone.err(0)
    features = ".cache/fastgen/evaluations/*/*.npy"
    assert (drawn := hashes(two, features)) == hashes(one, features) and len(drawn) >= 8, sorted(drawn)
    each = [json.loads(file.read_text(encoding="utf-8"))["metrics"] for file in (two / "run/results.json", one / "results.json")]
    timed = ("seconds_per_1000_images", "peak_memory_bytes", "images_per_second")
    first, second = ({(row["model"], row["name"]): row["value"] for row in rows if row["name"] not in timed} for rows in each)
    assert first == second and len(first) >= 6

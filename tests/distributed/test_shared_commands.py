"""Commands that a launcher starts on two processes, beside the same on one; and those that are for one. Run with `pytest -m distributed`."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from test_faults import RECIPE, full_for_files, one_line
from test_whole_runs import FEW, hashes, rows

from fastgen.data import encoded
from fastgen.evaluation import store as evaluated

pytestmark = pytest.mark.distributed

FEATURES = ".cache/fastgen/evaluations/*/*.npy"
TIMED = ("seconds_per_1000_images", "peak_memory_bytes", "images_per_second")
# Six chunks.
FEW = FEW.replace("digits:\n", "digits:\n  fid:\n").replace("40", "12").replace("chunk: 10", "chunk: 4").replace("batch_size: 5", "batch_size: 3")
EVALUATE = ("evaluate", "fastgen:digits", "--steps", "2", "--protocol", "few.yaml", "--device", "cpu", "--output", "results.json")
CACHE = ("cache", "pairs", "recipe.yaml", "--output", "store", "--batch", "100")
# A batch, and a way to spread, that two processes could not train with.
DIGITS = ("digits_dmd2_gan_1step", "train.device=cpu", "train.batch_size=65", "train.shard=none")


def noting() -> None:
    """Have this process note which chunks and shards it makes."""
    rank = os.environ["RANK"]
    for kind, name in ((evaluated.Store, "write"), (encoded.Store, "make")):
        make = getattr(kind, name)

        def noted(self: Any, number: int, *what: Any, make: Callable[..., None] = make) -> None:
            make(self, number, *what)
            with Path(f"made_{rank}").open("a", encoding="utf-8") as file:
                file.write(f"{number}\n")

        setattr(kind, name, noted)


def prepared(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "few.yaml").write_text(FEW, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "prompts.txt").write_text("0\n1\n2\n", encoding="utf-8")
    return folder


def both(folder: Path, *arguments: str) -> tuple[Path, Path, str]:
    """Where one process and two have done it, each in a home of its own, and what was said. Of two each makes half, and no warning comes twice."""
    said, warned = [], []
    for count in (1, 2):
        ranks = Ranks(prepared(folder / str(count)), *[arguments] * count, before=dict.fromkeys(range(count), noting))
        assert ranks.ends(120) == [0] * count, [ranks.err(rank) for rank in range(count)]
        assert [ranks.err(rank) + ranks.out(rank) for rank in range(1, count)] == [""] * (count - 1)
        said.append(ranks.out(0))
        warned.append([line for line in ranks.err(0).splitlines() if "warning" in line])
    assert warned[0] == warned[1] and bool(warned[0]) == (arguments[0] != "cache")  # of a metric without its weights
    each = [(folder / "2" / f"made_{rank}").read_text(encoding="utf-8").split() for rank in (0, 1)]
    assert {int(number) % 2 for number in each[0]} == {0} and {int(number) % 2 for number in each[1]} == {1}
    assert sorted(each[0] + each[1]) == sorted((folder / "1/made_0").read_text(encoding="utf-8").split())
    return folder / "1", folder / "2", said[1]


def numbers(folder: Path) -> dict[Any, Any]:
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {(row["model"], row["name"]): row for row in found["metrics"] if row["name"] not in TIMED}


def test_an_evaluation_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    one, two, said = both(tmp_path, *EVALUATE, "--dump", "dump")
    assert said.endswith("results: results.json\n") and said.count("results:") == 1
    assert (drawn := hashes(one, FEATURES)) == hashes(two, FEATURES) and len(drawn) >= 4, sorted(drawn)
    assert (pictures := hashes(one, "dump/**/*.*")) == hashes(two, "dump/**/*.*") and len(pictures) > 24
    assert numbers(one) == numbers(two) and len(numbers(one)) >= 4
    # What a process cannot do, the main one does: here everything is drawn again.
    (two / "results.json").unlink()
    for store in (two / ".cache/fastgen/evaluations").iterdir():
        shutil.rmtree(store)
    ranks = Ranks(two, EVALUATE, EVALUATE, before={1: full_for_files})
    assert ranks.ends(120) == [0, 0], ranks.err(0)
    (line,) = [line for line in ranks.err(0).splitlines() if line.startswith("warning: process 1")]
    assert "has not drawn its part of the pictures, so process 0 draws it" in line and "no space left" in line
    assert hashes(one, FEATURES) == hashes(two, FEATURES) and numbers(one) == numbers(two)


@pytest.mark.parametrize(("arguments", "shards"), [((*CACHE[1:], "--count", "700"), 3), (("latents", *DIGITS, "--output", "store"), 8)])
def test_a_cache_that_two_processes_fill_is_that_of_one(tmp_path: Path, arguments: tuple[str, ...], shards: int) -> None:
    one, two, said = both(tmp_path, "cache", *arguments)
    assert (kept := hashes(one, "store/**/*.*")) == hashes(two, "store/**/*.*") and len(kept) == shards + 1
    (line,) = [line for line in said.splitlines() if "holds" in line]
    found = re.search(r"holds (\d+) of (\d+), (\d+) of them new$", line)
    assert found is not None and len(set(found.groups())) == 1, line


def test_a_student_is_measured_by_two_processes_while_it_trains(tmp_path: Path) -> None:
    still = [f"optimizer.{role}.{key}" for role in ("student", "fake_score") for key in ("lr=1e-30", "weight_decay=0")]  # the same weights
    keys = ("train.steps=2", "train.batch_size=2", "train.device=cpu", "train.sample_every=0", "evaluate.protocol=few.yaml", "evaluate.every=1")
    one, two, _ = both(tmp_path, "train", "digits_dmd2_1step", *keys, *still, "--output", "run", "--only", "train")
    first, second = ([{key: value for key, value in row.items() if key.startswith("eval/")} for row in rows(folder)] for folder in (one, two))
    names = [key for key in first[0] if not key.endswith(TIMED)]
    assert len(first) == 2 and len(names) >= 2 and all(math.isfinite(value) for value in first[0].values())
    assert [[row[key] for key in names] for row in first] == [[row[key] for key in names] for row in second]
    assert first[0].keys() == second[1].keys() and not list((two / "run").glob(".*valuation*"))


@pytest.mark.parametrize(
    ("each", "words"),
    [
        ([("sample", "student", "--prompt", "a", "--output", "a.png")] * 2, ("sample: is for one process", "2", "train, evaluate, cache")),
        ([("evaluate", "--compare", "a.json", "b.json")] * 2, ("evaluate --compare: is for one process",)),
        ([(*EVALUATE, "--part", "1/2")] * 2, ("--part: the 2 processes",)),
        ([(*CACHE, "--part", "1/2")] * 2, ("--part: the 2 processes",)),
        ([("evaluate", "nowhere")] * 2, ("MODEL", "nowhere")),
        ([("evaluate", "--stepps", "2")] * 2, ("--stepps",)),
        ([EVALUATE, (*EVALUATE, "--stop-after", "3")], ("process 1 on", "another --stop-after", "3", "None")),
        ([CACHE, (*CACHE, "--count", "9")], ("process 1 on", "another count", "9", "None")),
    ],
)
def test_what_processes_cannot_share_is_said_once(tmp_path: Path, each: list[tuple[str, ...]], words: tuple[str, ...]) -> None:
    ranks = Ranks(prepared(tmp_path), *each)
    assert ranks.ends() == [2, 2]
    one_line(ranks, *words)
    assert not (tmp_path / "store").exists() and not (tmp_path / "results.json").exists()


def test_a_full_disk_on_one_process_ends_a_cache_with_one_line(tmp_path: Path) -> None:
    ranks = Ranks(prepared(tmp_path), *[(*CACHE, "--count", "700")] * 2, before={1: full_for_files})
    assert ranks.ends() == [2, 2]
    (line,) = [line for rank in (0, 1) for line in ranks.err(rank).splitlines() if line.startswith("error")]
    assert "process 1 on" in line and "store" in line and "no space left" in line and ranks.err(1) == ranks.out(0) == ""


def test_a_dry_run_is_printed_once(tmp_path: Path) -> None:
    ranks = Ranks(prepared(tmp_path), *[("train", "recipe.yaml", "--only", "train", "--dry-run")] * 2)
    assert ranks.ends() == [0, 0] and ranks.out(0).count("method      dmd2") == 1 and ranks.out(1) == ranks.err(1) == ""

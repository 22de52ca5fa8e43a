"""What a store costs: 200,000 prompts of 300 kB each, 60 GB, beside 2,000 of them on disk and in memory.

    python benchmarks/stores.py            # five minutes; appends to benchmarks/results/stores.jsonl
    python benchmarks/stores.py --pairs    # 100,000 noise-sample pairs of SD3's latents at 512 pixels, 26 GB, beside 2,000 of them: batches drawn
    python benchmarks/stores.py --train    # reflow trained from 100,000 such pairs, beside 1,000 of them

Prompts are the bundled digits', each with a tensor beside it that makes it as wide as those of a large model. Shards are sparse files, so they
take no room. A process each: it opens the store as a run does, then trains digits with dmd2, which reads every row's 300 kB from the store and
uses what the digits' teacher knows of it. Seconds are from the start of opening to the first batch; anonymous memory, which no file can give
back, is the most that the process held while it trained. Of pairs batches are drawn alone, by the prefetching thread, with their noise and
conditioning, for the bundled teachers' latents are too small to tell anything; or the smallest of SD3's transformers that has such latents trains
from them, with random weights.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.training import trainers  # noqa: E402
from benchmarks.training.networks import SD3_TINY, sd3  # noqa: E402
from fastgen import conditioning  # noqa: E402
from fastgen.config import DataBlock, Recipe  # noqa: E402
from fastgen.data import store, weighted  # noqa: E402
from fastgen.data.encoded import Encoder, Keeping  # noqa: E402
from fastgen.data.feed import feed  # noqa: E402
from fastgen.data.pair_folder import Stored  # noqa: E402
from fastgen.data.rows import Held, Rows  # noqa: E402
from fastgen.data.store import ROWS, Manifest, Store, open_store  # noqa: E402
from fastgen.data.training import PairTable, TrainingData  # noqa: E402
from fastgen.progress import Progress  # noqa: E402
from fastgen.rng import SampleRng  # noqa: E402
from fastgen.trainer import Trainer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "stores.jsonl"
RECIPE, WIDE = "digits_dmd2_1step", "wide"
ROW_BYTES = 300_000
CASES = ((2_000, "memory"), (2_000, "disk"), (200_000, "disk"))
PAIR_CASES, TRAIN_CASES, LATENT = ((2_000, "disk"), (100_000, "disk")), ((1_000, "disk"), (100_000, "disk")), (16, 64, 64)
NETWORK = SD3_TINY | {"sample_size": 64, "in_channels": 16, "out_channels": 16, "pos_embed_max_size": 64}
CPU = torch.device("cpu")
_STEPS, _WARM = 60, 10
_TEXTS = [f"prompt {i}" for i in range(1000)]  # of pairs


@dataclass(frozen=True)
class Narrow:
    """Rows that are read whole and given without their width."""

    rows: Rows

    @property
    def read_ahead(self) -> bool:
        return self.rows.read_ahead

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Tensor) -> dict[str, Tensor]:
        read = self.rows.select(index)
        assert read[WIDE].isfinite().all()
        return {key: value for key, value in read.items() if key != WIDE}


def prompts(count: int) -> list[str]:
    return [f"prompt {i}" for i in range(count)]


def manifest(count: int, cond: Mapping[str, Tensor]) -> Manifest:
    fields: dict[str, Any] = {key: ("float", tuple(value.shape[1:])) for key, value in cond.items()}
    width = (ROW_BYTES - sum(4 * value[0].numel() for value in cond.values())) // 4
    identity = store.of_texts(prompts(count))
    return Manifest(kind="prompts", count=count, dtype="fp32", fields={**fields, WIDE: ("float", (width,))}, origin={}, rows=identity)


def write_sparse(folder: Path, count: int, cond: Mapping[str, Tensor]) -> None:
    """Shards whose wide tensors are holes in the file: the first is written, the others are the same but for their prompts."""
    made = store.create(folder, manifest(count, cond), lambda some: store.of_texts(prompts(some)))
    texts = prompts(count)
    wide = made.manifest.fields[WIDE][1]

    def encode(ids: range) -> store.Encoded:
        rows = torch.tensor([i % len(next(iter(cond.values()))) for i in range(len(ids))])
        return store.Encoded({**conditioning.select(dict(cond), rows), WIDE: torch.zeros(len(ids), *wide)}, [texts[i] for i in ids], {})

    for shard in made.shards():
        if shard == 0 or len(made.ids(shard)) < ROWS:
            made.make(shard, encode)
            subprocess.run(["fallocate", "--dig-holes", made.file(shard)], check=True)
        else:
            subprocess.run(["cp", "--sparse=always", made.file(0), made.file(shard)], check=True)


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def train(trainer: Trainer, folder: Path, count: int, kept: str, device: torch.device) -> dict[str, Any]:
    """Open a store as a run does, and train from it."""
    began = time.perf_counter()
    texts = prompts(count)
    opened = store.create(folder, manifest(count, trainer.data.conditioning(trainer.data.prompts)), lambda some: store.of_texts(texts[:some]))
    assert not opened.missing()
    rows: Rows = Store(folder, opened.manifest, device)
    if kept == "memory":
        rows = Held(conditioning.cat([opened.read(ids) for ids in store.cuts(count)]))
    trainer.data = TrainingData(texts, Narrow(rows), weighted.cumulative([1.0] * count))
    next(trainer._batches())
    opening, most = time.perf_counter() - began, 0
    for step in range(_STEPS):
        if step == _WARM:
            started = time.perf_counter()
        trainer.train_step()
        most = max(most, anonymous())
    rate = (_STEPS - _WARM) * trainer.settings.batch_size / (time.perf_counter() - started)
    return {"prompts": count, "kept": kept, "opening_seconds": opening, "anonymous_bytes": most, "samples_per_second": rate}


def pair_encoder(count: int) -> Encoder:
    zeros = torch.zeros(ROWS, *LATENT)

    def encode(ids: Sequence[int]) -> store.Encoded:
        return store.Encoded({"seed": torch.arange(len(ids)), "x0": zeros[: len(ids)]}, [f"prompt {i % 1000}" for i in ids], {})

    return Encoder("pairs", count, {"seed": ("int64", ()), "x0": ("float", LATENT)}, lambda some: "pairs", encode, None, ROWS, {}, "none")


def write_sparse_pairs(folder: Path, count: int) -> None:
    kept = Keeping(CPU, DataBlock(store=str(folder), keep="disk"))
    encoder = pair_encoder(count)
    made = store.create(folder / "pairs", kept.manifest(encoder), encoder.identify)
    for shard in made.shards():
        if shard == 0 or len(made.ids(shard)) < ROWS:
            made.make(shard, lambda ids: encoder.made(ids))
            subprocess.run(["fallocate", "--dig-holes", made.file(shard)], check=True)
        else:
            subprocess.run(["cp", "--sparse=always", made.file(0), made.file(shard)], check=True)


def opened_pairs(folder: Path, count: int, cond: Mapping[str, Tensor]) -> TrainingData:
    """Pairs as a run opens them, beside the prompts that they have."""
    found = open_store(folder / "pairs")
    assert found is not None
    pairs = Stored(found, count).load(Keeping(CPU, DataBlock(keep="disk")), Progress())
    rows = torch.arange(len(_TEXTS)) % len(next(iter(cond.values())))
    data = TrainingData(_TEXTS, Held(conditioning.select(dict(cond), rows)), weighted.cumulative([1.0] * len(_TEXTS)))
    row = {text: i for i, text in enumerate(_TEXTS)}
    return replace(data, pairs=PairTable(pairs, torch.tensor([row[prompt] for prompt in pairs.prompts]), data.cond))


def draw_pairs(folder: Path, count: int, cond: Mapping[str, Tensor]) -> dict[str, Any]:
    """Open pairs as a run does, and draw batches."""
    began = time.perf_counter()
    data = opened_pairs(folder, count, cond)
    batches = feed(data, (SampleRng(0, (step,), range(32)) for step in range(_STEPS + 1)))
    next(batches)
    opening, most, started = time.perf_counter() - began, 0, time.perf_counter()
    for batch in batches:
        assert batch.pairs is not None
        most = max(most, anonymous())
    rate = 32 * _STEPS / (time.perf_counter() - started)
    return {"pairs": count, "kept": "disk", "opening_seconds": opening, "anonymous_bytes": most, "samples_per_second": rate}


def train_pairs(folder: Path, count: int) -> dict[str, Any]:
    """Train a random network on pairs from the disk, as a run does."""
    network = sd3("tiny", NETWORK, tokens=8)
    recipe = Recipe.load("digits_reflow_1step", [f"data.pairs={folder}", "train.steps=1000", "train.batch_size=8", "train.device=cpu"])
    trainer = trainers.of_network(trainers.planned_for(network, recipe), network)
    began, before = time.perf_counter(), anonymous()
    trainer.data = opened_pairs(folder, count, trainer.data.conditioning(trainer.data.prompts))
    opening, most = time.perf_counter() - began, 0
    started = time.perf_counter()
    for _ in range(_STEPS):
        trainer.train_step()
        most = max(most, anonymous())
    rate = _STEPS * recipe.train.batch_size / (time.perf_counter() - started)
    told = {"opening_seconds": opening, "anonymous_bytes": most, "anonymous_before": before, "samples_per_second": rate}
    return {"trained_from_pairs": count, "kept": "disk", "steps": _STEPS, "batch": recipe.train.batch_size, **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=2, metavar=("COUNT", "KEPT"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pairs", action="store_true", help="batches of pairs, in place of training from prompts")
    what.add_argument("--train", action="store_true", help="training from pairs")
    parser.add_argument("--rounds", type=int, default=3, help="of each case, in turn")
    chosen = parser.parse_args()
    if chosen.case:
        count, kept = int(chosen.case[0]), chosen.case[1]
        print(json.dumps(train_pairs(chosen.folder, count) if chosen.train else of_digits(chosen.folder, count, kept, pairs=chosen.pairs)))
        return
    of_pairs, cases = chosen.pairs or chosen.train, PAIR_CASES if chosen.pairs else TRAIN_CASES if chosen.train else CASES
    shared = {"row_bytes": 8 + 4 * math.prod(LATENT) if of_pairs else ROW_BYTES, "torch": torch.__version__}
    with tempfile.TemporaryDirectory(prefix="fastgen-stores-") as folder:
        cond = {} if of_pairs else digits()[1]
        for count in dict.fromkeys(count for count, _ in cases):
            if of_pairs:
                write_sparse_pairs(Path(folder) / str(count), count)
            else:
                write_sparse(Path(folder) / str(count), count, cond)
        for turn in range(chosen.rounds):
            for count, kept in cases:
                command = [sys.executable, __file__, "--case", str(count), kept, "--folder", str(Path(folder) / str(count))]
                command += ["--pairs"] * chosen.pairs + ["--train"] * chosen.train
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
                print(json.dumps(found), flush=True)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**found, "turn": turn, **shared}) + "\n")


def digits() -> tuple[Trainer, dict[str, Tensor]]:
    """The bundled digits' trainer, and the conditioning of its prompts."""
    trainer, _ = trainers.of_recipe(RECIPE, ["train.steps=2000", "train.batch_size=32", "train.device=cpu"])
    return trainer, trainer.data.conditioning(trainer.data.prompts)


def of_digits(folder: Path, count: int, kept: str, *, pairs: bool) -> dict[str, Any]:
    trainer, cond = digits()
    return draw_pairs(folder, count, cond) if pairs else train(trainer, folder, count, kept, CPU)


if __name__ == "__main__":
    main()

"""What is left of a command that is killed, at any of its file operations? Kills real processes, goes on as a user would, and compares.

    python benchmarks/faults.py                       # 200 kills in all: prints the table, appends to benchmarks/results/faults.jsonl
    python benchmarks/faults.py --kills 20            # fewer
    python benchmarks/faults.py --full                # fills the disk at each operation instead of killing
    python benchmarks/faults.py --only scm "cache pairs"

Each trial copies what was there before, runs the command with `faulty/operations.c` preloaded, which kills it before its n-th file operation
(every second time in the middle of a write), and runs the way on: for a run `--resume-or-start`, else the same command again. Operations
are counted, not seconds, so each kill can be made again. resumed: the way on ended well; altered: it ended elsewhere than the command that
nobody killed; lost: it did again what had been saved; refused: it was refused; traceback: one was shown, at any time.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

import fastgen

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "faults.jsonl"
FAULTY = Path(__file__).parent / "faulty"
COUNT, KILL, KILL_HALF_WRITTEN, FILL = range(4)
TIMED = ("seconds", "samples_per_second", "seconds_per_1000_images", "peak_memory_bytes")
_BLOCK = {"lr": 1.0e-3}
_TRAIN = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "sample_every": 2, "keep": 2, "device": "cpu"}
_TEACHER = {"pretrained": "fastgen:digits", "guidance": 1.5}
_RECIPES: dict[str, dict[str, Any]] = {
    "dmd2": {
        "student": {"steps": 1},
        "distiller": {"name": "dmd2"},
        "data": {"prompts": "fastgen:digits"},
        "optimizer": {"student": _BLOCK, "fake_score": _BLOCK},
    },
    "phased_dmd with gan": {
        "student": {"steps": 2},
        "distiller": {"name": "phased_dmd", "phases": [{"start": 1.0, "end": 0.5}, {"start": 0.5, "end": 0.0}], "gan": {"weight": 0.03}},
        "data": {"images": "IMAGES"},
        "optimizer": {"student": _BLOCK, "fake_score": _BLOCK, "discriminator": _BLOCK},
    },
    "scm": {
        "student": {"steps": 2, "grid": [0.99, 0.8]},
        "distiller": {"name": "scm"},
        "data": {"images": "IMAGES"},
        "optimizer": {"student": _BLOCK},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Done:
    """A command that has ended: its exit status (-9: killed), how many operations it made (None: killed), and what it said."""

    status: int
    operations: int | None
    said: str

    @property
    def has_traceback(self) -> bool:
        return "Traceback" in self.said or self.status == 70


class Worker:
    """A process that has imported fastgen, and runs commands in forks of itself."""

    def __init__(self, scratch: Path) -> None:
        library, self.scratch = scratch / "operations.so", scratch
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, FAULTY / "operations.c", "-ldl"], check=True)
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(FAULTY / "worker.py")], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, arguments: Sequence[str], root: Path, *, at: int = 0, mode: int = COUNT) -> Done:
        """`fastgen ARGUMENTS` with its home in `root`, below which operations count."""
        log = self.scratch / "log"
        job = {"arguments": list(arguments), "root": str(root), "at": at, "mode": mode, "log": str(log)}
        log.with_name("log.operations").unlink(missing_ok=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Done(answer["status"], answer["operations"], log.read_text(errors="replace"))


@contextmanager
def working() -> Iterator[tuple[Worker, Path]]:
    """A worker and its scratch folder."""
    with tempfile.TemporaryDirectory(prefix="fastgen-faults-") as folder:
        worker = Worker(Path(folder))
        try:
            yield worker, Path(folder)
        finally:
            worker.process.kill()
            worker.process.wait()


@dataclass(frozen=True)
class Scenario:
    """prepare: makes in a folder what is there before; command: to be killed there; way_on: what its user does then; outcome: what must be the
    same in the end; kept: how much was saved, before the way on; again: how much the way on says it did."""

    name: str
    prepare: Callable[[Worker, Path], None]
    command: Callable[[Path], list[str]]
    way_on: Callable[[Path], list[str]]
    outcome: Callable[[Path], Any]
    lost: Callable[[Any, str], bool] = lambda saved, said: False
    saved: Callable[[Path], Any] = lambda root: None


@dataclass
class Verdict:
    at: int
    mode: int
    killed: bool
    resumed: bool
    altered: bool
    lost: bool
    refused: bool
    traceback: bool
    said: str


def try_once(worker: Worker, scenario: Scenario, before: Path, expected: Any, *, at: int, mode: int) -> Verdict:
    """Copy, strike, go on, compare."""
    root = before.with_name("trial")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(before, root, symlinks=True)
    struck = worker.run(scenario.command(root), root, at=at, mode=mode)
    for leftover in root.rglob(".partial_*"):  # as after a minute: younger ones could be another process's
        os.utime(leftover, (0, 0))
    saved = scenario.saved(root)
    after = worker.run(scenario.way_on(root), root)
    ended = after.status == 0
    return Verdict(
        at=at,
        mode=mode,
        killed=struck.status == -9,
        resumed=ended,
        altered=ended and scenario.outcome(root) != expected,
        lost=ended and scenario.lost(saved, after.said),
        refused=not ended,
        traceback=struck.has_traceback or after.has_traceback or (mode == FILL and struck.status not in (0, 2)),
        said=f"{struck.said[-2000:]}\n--- way on ---\n{after.said[-2000:]}",
    )


def strike(worker: Worker, scenario: Scenario, scratch: Path, kills: int | None = None, *, fill: bool = False) -> list[Verdict]:
    """`kills` trials of a scenario, spread evenly over its operations; None: one at each."""
    before, whole = scratch / "before", scratch / "trial"
    for folder in (before, whole):
        shutil.rmtree(folder, ignore_errors=True)
    before.mkdir()
    scenario.prepare(worker, before)
    shutil.copytree(before, whole, symlinks=True)
    done = worker.run(scenario.command(whole), whole)
    assert done.status == 0 and done.operations, done.said
    expected = scenario.outcome(whole)
    count = min(kills or done.operations, done.operations)
    places = sorted({1 + round(i * (done.operations - 1) / max(1, count - 1)) for i in range(count)})
    modes = [FILL] if fill else [KILL, KILL_HALF_WRITTEN]
    return [try_once(worker, scenario, before, expected, at=at, mode=modes[i % len(modes)]) for i, at in enumerate(places)]


# What is compared


def tree(folder: Path) -> list[str]:
    """Names below a folder; TensorBoard's depend on the time."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "tensorboard/" not in str(path) and path.name != "__pycache__")


def hashes(folder: Path, *patterns: str) -> dict[str, str]:
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for p in patterns for file in sorted(folder.rglob(p))}


def rows(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in (run / "metrics.jsonl").read_text().splitlines()]


def board(run: Path) -> dict[str, list[int]]:
    """Steps of the scalars that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def trained(root: Path) -> Any:
    run = root / "run"
    return tree(run), rows(run), hashes(run, "*.safetensors", "*.png", "recipe.yaml"), board(run)


def newest(root: Path) -> int:
    """Step of the newest checkpoint that is whole, wherever the kill has left it."""
    found = {
        int(path.name.split("step_")[1]) for name in ("step_*", ".old_step_*") for path in (root / "run/checkpoints").glob(name) if _is_whole(path)
    }
    return max(found, default=0)


def _is_whole(path: Path) -> bool:
    from fastgen import checkpoint

    try:
        checkpoint.check(path)
    except ValueError:
        return False
    return True


def trained_again(saved: int, said: str) -> bool:
    found = re.search(r"step_(\d+)", "".join(said.split()).partition("resumingfrom")[2])
    return (int(found.group(1)) if found else 0) < saved


def held(root: Path) -> int:
    from fastgen.data.pair_folder import open_folder

    return open_folder(root / "pairs").held() if (root / "pairs/pairs/store.json").is_file() else 0


def drawn_again(saved: int, said: str) -> bool:
    found = re.search(r"holds(\d+)(?:of\d+)?,(\d+)ofthemnew", "".join(said.split()))
    return found is None or int(found.group(2)) > int(found.group(1)) - saved


# What is killed


def recipe(name: str) -> Callable[[Worker, Path], None]:
    def prepare(worker: Worker, root: Path) -> None:
        content = {"teacher": _TEACHER, "train": _TRAIN, **_RECIPES[name]}
        if "images" in content["data"]:
            content = {**content, "data": {"images": str(_images(root.parent))}}
        (root / "recipe.yaml").write_text(yaml.safe_dump(content))

    return prepare


def _images(scratch: Path) -> Path:
    """Eight digits as picture files, outside what counts."""
    from fastgen.data import digits
    from fastgen.pictures import picture_row, save_png

    folder = scratch / "images"
    if not folder.is_dir():
        pictures, labels = digits.load_images()
        for i in range(8):
            save_png(picture_row(pictures[i : i + 1] / 2 + 0.5), folder / f"{i}.png")
        lines = [json.dumps({"file_name": f"{i}.png", "text": list(digits.captions(int(labels[i])))}) for i in range(8)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def train(*flags: str, only: bool = True) -> Callable[[Path], list[str]]:
    return lambda root: ["train", str(root / "recipe.yaml"), "--output", str(root / "run"), *(["--only", "train"] if only else []), *flags]


def a_run(name: str, *overrides: str) -> Callable[[Worker, Path], None]:
    """A finished run in the folder, besides its recipe."""

    def prepare(worker: Worker, root: Path) -> None:
        recipe(name)(worker, root)
        done = worker.run([*train()(root), *overrides], root)
        assert done.status == 0, done.said

    return prepare


def half_a_run(worker: Worker, root: Path) -> None:
    """One that was killed at its third step."""
    recipe("dmd2")(worker, root)
    whole = worker.run([*train()(root), "--output", str(root / "whole")], root)
    assert whole.operations is not None
    shutil.rmtree(root / "whole")
    for at in range(whole.operations // 2, whole.operations):
        shutil.rmtree(root / "run", ignore_errors=True)
        worker.run(train()(root), root, at=at, mode=KILL)
        if newest(root) == 2 and len(rows(root / "run")) == 3:
            return
    raise AssertionError("no operation lies between the third step's row and the last checkpoint")


def a_student(worker: Worker, root: Path) -> None:
    a_run("dmd2")(worker, root)
    done = worker.run(exported(root), root)
    assert done.status == 0, done.said


def exported(root: Path) -> list[str]:
    return ["export", str(root / "run"), "--output", str(root / "student")]


def exports(root: Path) -> Any:
    return tree(root / "student"), hashes(root / "student", "*.safetensors", "*.json", "*.md")


def pairs(root: Path) -> list[str]:
    return ["cache", "pairs", str(root / "recipe.yaml"), "--output", str(root / "pairs"), "--count", "600", "--steps", "2"]


def pair_contents(root: Path) -> Any:
    return tree(root / "pairs"), hashes(root / "pairs/pairs", "*")


def many_prompts(worker: Worker, root: Path) -> None:
    """600 of them, which are three shards of a store."""
    digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    texts = [" ".join(words) for words in itertools.islice(itertools.product(digits, repeat=3), 600)]
    (root / "prompts.txt").write_text("\n".join(texts), encoding="utf-8")
    content = {"teacher": _TEACHER, "train": _TRAIN, **_RECIPES["dmd2"], "data": {"prompts": str(root / "prompts.txt")}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def encoded(root: Path) -> list[str]:
    return ["cache", "prompts", str(root / "recipe.yaml"), "--output", str(root / "store")]


def stored(root: Path) -> Any:
    """Every byte, shards' headers too."""
    return tree(root / "store"), hashes(root / "store", "*.safetensors", "store.json")


def rows_stored(root: Path) -> int:
    from fastgen.data.store import open_store

    store = open_store(root / "store/prompts")
    return 0 if store is None else len(store) - sum(len(store.ids(shard)) for shard in store.broken())


def evaluated(root: Path) -> list[str]:
    return ["evaluate", str(root / "student"), "--no-teacher"]


def results(root: Path) -> Any:
    metrics = json.loads((root / "student/results.json").read_text())["metrics"]
    return [row for row in metrics if row["name"] not in TIMED], tree(root / "student"), len(list((root / "home/.cache").rglob("*.json")))


SCENARIOS = [
    *(
        Scenario(name, recipe(name), train(), train("--resume-or-start"), trained, trained_again, newest)
        for name in ("dmd2", "phased_dmd with gan", "scm")
    ),
    Scenario("dmd2, resumed", half_a_run, train("--resume"), train("--resume"), trained, trained_again, newest),
    Scenario("dmd2, over another run", a_run("dmd2", "train.seed=1"), train("--overwrite"), train("--overwrite"), trained),
    Scenario("cache pairs", recipe("dmd2"), pairs, pairs, pair_contents, drawn_again, held),
    Scenario("cache prompts", many_prompts, encoded, encoded, stored, drawn_again, rows_stored),
    Scenario("export", a_run("dmd2"), exported, exported, exports),
    Scenario("export over another", a_student, exported, exported, exports),
    Scenario("evaluate", a_student, evaluated, evaluated, results),
]
_SHARES = {"dmd2": 40, "phased_dmd with gan": 40, "scm": 30, "dmd2, resumed": 20, "dmd2, over another run": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--full", action="store_true", help="fill the disk instead")
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", choices=[scenario.name for scenario in SCENARIOS])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    chosen = [scenario for scenario in SCENARIOS if arguments.only is None or scenario.name in arguments.only]
    shares = {scenario.name: _SHARES.get(scenario.name, 12.5) for scenario in chosen}
    shares = {name: max(2, round(arguments.kills * share / sum(shares.values()))) for name, share in shares.items()}
    fields = ["runs", "resumed", "altered", "lost", "refused", "traceback"]
    print("| what was killed | " + " | ".join(fields) + " |\n|---|" + "---:|" * len(fields))
    total = dict.fromkeys(fields, 0)
    with working() as (worker, scratch), arguments.output.open("a") as file:
        for scenario in chosen:
            began = time.monotonic()
            verdicts = strike(worker, scenario, scratch, shares[scenario.name], fill=arguments.full)
            counted = {"runs": len(verdicts), **{field: sum(getattr(v, field) for v in verdicts) for field in fields[1:]}}
            total = {field: total[field] + counted[field] for field in fields}
            print(f"| {scenario.name} | " + " | ".join(str(counted[field]) for field in fields) + " |", flush=True)
            bad = [asdict(verdict) for verdict in verdicts if verdict.altered or verdict.lost or verdict.refused or verdict.traceback]
            for verdict in bad:
                print(json.dumps(verdict, indent=1), file=sys.stderr)
            row = {"scenario": scenario.name, "fault": "full disk" if arguments.full else "kill", **counted, "seconds": time.monotonic() - began}
            row |= {"failures": [[v["at"], v["mode"]] for v in bad], **_origin()}
            file.write(json.dumps(row) + "\n")
    print("| in all | " + " | ".join(str(total[field]) for field in fields) + " |")
    sys.exit(any(total[field] for field in fields[2:]))


def _origin() -> dict[str, Any]:
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "fastgen": fastgen.__version__, "platform": platform.platform()}


if __name__ == "__main__":
    main()

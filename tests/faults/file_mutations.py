"""Files of other people's making, by seed: one file of a folder, damaged in one way, and a command that then reads it.

Commands run in children that are forked from this process, which has everything imported: so a case costs milliseconds, and one that hangs,
takes all memory or crashes is a verdict like any other.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from damage import flipped

from fastgen import cli
from fastgen.errors import UserError
from fastgen.fingerprints import SEAL, file_hashes, sealed

DEADLINE = 40.0  # seconds; the slowest undamaged case takes two
ROOM = 6 * 2**30  # bytes of memory beside what this process has already

RAW = "\0raw\0"  # in place of a value: what follows stands in the file as it is
LONG, DEEP = "x" * 300_000, "[" * 100_000 + "]" * 100_000
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 0.5, 10**6, 10**12, 2**63, "", "text", "0", [], {}, [None], [0], [1, 2], ["a", "b"], {"a": 1}),
    *(f"{RAW}{text}" for text in ("NaN", "Infinity", "-Infinity", "1e400", "1e12", "-0", "1" + "0" * 400, "1" + "0" * 5000, r'"\ud800"', DEEP)),
    *(LONG, "../../x", "/dev/zero", "\N{ZERO WIDTH SPACE}", "a\nb", "[bold]x[/]", [[[[[[]]]]]]),
]
NOT_OURS = (".yaml", ".png", ".md", ".html", ".txt")  # are mutated elsewhere, or are read by nobody


@dataclass(frozen=True)
class Verdict:
    seed: int
    what: str  # the file and its damage
    status: int | None  # None: neither ended by itself nor with an exit status
    said: str

    @property
    def good(self) -> bool:
        """Exit status 0, or 2 with one line that says why."""
        lines = self.said.splitlines()
        said_why = sum(line.startswith("error: ") for line in lines) == 1 and all(len(line) < 1500 for line in lines)
        return "Traceback" not in self.said and (self.status == 0 or (self.status == 2 and said_why))

    def __str__(self) -> str:
        ended = "hung or crashed" if self.status is None else f"status {self.status}"
        return f"seed {self.seed}: {self.what[:150]}: {ended}\n    " + "\n    ".join(line[:250] for line in self.said.splitlines()[-4:])


def files(folder: Path) -> list[Path]:
    """What can be damaged, JSON files first."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in NOT_OURS and "tensorboard" not in path.parts]
    return [path for path in found if path.name != ".lock"]


def mutate(folder: Path, seed: int) -> str:
    """Damage one file of the folder, and say which and how."""
    draw = random.Random(seed)
    found = files(folder)
    records = [path for path in found if path.suffix in (".json", ".jsonl")]
    if records and draw.random() < 0.6:
        path = draw.choice(records)
        how = _shape(path, draw)
    else:
        path = draw.choice(found)
        tensors = path.suffix == ".safetensors" and draw.random() < 0.5
        how = draw.choice(TENSORS if tensors else BYTES)(path, draw)
    if draw.random() < 0.7:
        _reseal(folder, path)
    return f"{path.relative_to(folder)}: {how}"


def _shape(path: Path, draw: random.Random) -> str:
    """Another value somewhere in a JSON file."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    at = draw.randrange(len(lines))
    whole = {"": json.loads(lines[at])}
    places = list(_places(whole, draw))
    holder, key = places[0] if draw.random() < 0.05 else draw.choice(places[1:] or places)
    if draw.random() < 0.12 and holder is not whole:
        del holder[key]
        how = f"{key!r} is gone"
    elif draw.random() < 0.06 and isinstance(holder, dict):
        holder["unknown \N{SNOWMAN}"] = holder.pop(key)
        return _store(path, lines, at, whole, f"{key!r} has another name")
    else:
        value = draw.choice(VALUES)
        holder[key] = value
        how = f"{key!r} is {str(value)[:40]!r}"
    return _store(path, lines, at, whole, how)


def _places(node: Any, draw: random.Random) -> list[tuple[Any, Any]]:
    """Every (container, key) below a node; of long lists a few."""
    keys = list(node) if isinstance(node, dict) else draw.sample(range(len(node)), min(3, len(node))) if isinstance(node, list) else []
    return [place for key in keys for place in [(node, key), *_places(node[key], draw)]]


def _store(path: Path, lines: list[str], at: int, whole: dict[str, Any], how: str) -> str:
    text = _dumped(whole.get("", whole))
    path.write_text("\n".join([*lines[:at], text, *lines[at + 1 :]]) + "\n")
    return how


def _dumped(value: Any) -> str:
    """As JSON, but for what is to stand there raw."""
    if isinstance(value, str) and value.startswith(RAW):
        return value.removeprefix(RAW)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_dumped(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dumped, value)) + "]"
    return json.dumps(value)


def _reseal(folder: Path, damaged: Path) -> None:
    """As if that file had been written so: its record is sealed again, and its hash in a student's is renewed. A checkpoint's is not: weights
    that are finite and wrong diverge, as they may."""
    for name in ("fastgen.json", "state.json", "inputs.json", "store.json"):
        for record in filter(Path.is_file, folder.rglob(name)):
            try:
                content = json.loads(record.read_text())
                if record != damaged:
                    inside = damaged.relative_to(record.parent).as_posix()
                    content["sha256"][inside] = file_hashes(record.parent, [inside])[inside]
                if SEAL in content:
                    record.write_text(json.dumps(sealed({key: value for key, value in content.items() if key != SEAL})))
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, UserError):
                continue


def _flip(path: Path, draw: random.Random) -> str:
    content = path.read_bytes()
    bit = draw.randrange(8 * len(content)) if content else 0
    path.write_bytes(flipped(content, bit) if content else b"")
    return f"bit {bit} flipped"


def _garble(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    start = draw.randrange(max(1, len(content)))
    content[start : start + 16] = draw.randbytes(16)
    path.write_bytes(content)
    return f"16 bytes of noise at {start}"


def _cut(path: Path, draw: random.Random) -> str:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) + 1)])
    return f"cut to {path.stat().st_size} bytes"


def _empty(path: Path, draw: random.Random) -> str:
    path.write_bytes(b"")
    return "empty"


def _delete(path: Path, draw: random.Random) -> str:
    path.unlink()
    return "deleted"


def _swap(path: Path, draw: random.Random) -> str:
    others = [other for other in files(path.parents[1]) if other != path] or [path]
    other = draw.choice(others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
    return f"swapped with {other.relative_to(path.parents[1])}"


def _folder(path: Path, draw: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


def _fifo(path: Path, draw: random.Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a FIFO"


def _dangling(path: Path, draw: random.Random) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return "a link to nothing"


def _circle(path: Path, draw: random.Random) -> str:
    path.unlink()
    path.symlink_to(path.name)
    return "a link to itself"


def _tensor(path: Path, draw: random.Random) -> str:
    """A whole safetensors file in which one tensor is another."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = draw.choice(sorted(tensors))
    kind = draw.choice(["gone", "renamed", "turned", "shorter", "int64", "not finite", "huge", "more", "a number"])
    tensor = tensors.pop(name)
    changed = {
        "gone": dict,
        "renamed": lambda: {f"x.{name}": tensor},
        "turned": lambda: {name: tensor.reshape(tensor.shape[::-1]).contiguous()},
        "shorter": lambda: {name: tensor[:-1].contiguous() if tensor.ndim else tensor.reshape(1)},
        "int64": lambda: {name: tensor.to(torch.int64)},
        "not finite": lambda: {name: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor},
        "huge": lambda: {name: torch.full_like(tensor, 1e38) if tensor.is_floating_point() else tensor},
        "more": lambda: {name: tensor, f"{name}.more": torch.zeros(3)},
        "a number": lambda: {name: torch.tensor(1.0)},
    }[kind]()
    save_file(tensors | changed, path, metadata=metadata)
    return f"tensor {name} {kind}"


def _header(path: Path, draw: random.Random) -> str:
    """Another length or another value in a safetensors header."""
    content = path.read_bytes()
    if draw.random() < 0.3:
        length = draw.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1])
        path.write_bytes(length.to_bytes(8, "little") + content[8:])
        return f"header of {length} bytes"
    size = int.from_bytes(content[:8], "little")
    whole = {"": json.loads(content[8 : 8 + size])}
    holder, key = draw.choice(_places(whole, draw)[1:])
    value = draw.choice(VALUES)
    holder[key] = value
    text = _dumped(whole[""]).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    return f"header: {key!r} is {str(value)[:40]!r}"


BYTES: list[Callable[[Path, random.Random], str]] = [_flip, _flip, _garble, _cut, _empty, _delete, _swap, _folder, _fifo, _dangling, _circle]
TENSORS: list[Callable[[Path, random.Random], str]] = [_tensor, _tensor, _header]


def command_line(*arguments: str | Path) -> Callable[[], int]:
    return lambda: cli.main(list(map(str, arguments)))


def strike(whole: Path, scratch: Path, damaged: str, command: Callable[[Path], Callable[[], int]], seed: int) -> Verdict:
    """What the command says once a file below `damaged` in a copy of `whole` has been mutated."""
    root = scratch / "case"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root, symlinks=True)
    what = mutate(root / damaged, seed)
    status, said = in_a_child(command(root), scratch / "said")
    return Verdict(seed, what, status, said)


def in_a_child(call: Callable[[], int], report: Path) -> tuple[int | None, str]:
    """Exit status (None where there is none) of a call in a fork of this process, and what it and its libraries print on stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(call, report)
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return (code if code >= 0 else None), report.read_text(errors="replace")
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, f"no end after {DEADLINE:.0f} s\n" + report.read_text(errors="replace")


def _child(call: Callable[[], int], report: Path) -> None:
    code = 99
    try:
        handle, nothing = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, 2)
        os.dup2(nothing, 1)
        sys.stderr, sys.stdout = os.fdopen(2, "w", closefd=False), os.fdopen(1, "w", closefd=False)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        code = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)

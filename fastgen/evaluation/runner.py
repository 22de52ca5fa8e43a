"""Running a protocol on a generator, and keeping what came out: results.json, its provenance, and a cache for models that do not change."""

from __future__ import annotations

import hashlib
import json
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import records
from fastgen.errors import NotFinite, UserError
from fastgen.evaluation.protocols import Protocol, Row, Subset
from fastgen.evaluation.speed import peak_memory_bytes, reset_peak_memory, synchronise
from fastgen.files import write_atomically
from fastgen.fingerprints import sealed, unsealed

Generate = Callable[[list[str], list[int], int], Tensor]  # prompts, seeds, steps -> images (B, 3, H, W), float in [0, 1]
Progress = Callable[[int, int, str], None]  # images done, images in all, what is going on

CACHE = Path(".cache/fastgen/results")  # below the home folder


def run_protocol(
    protocol: Protocol,
    generate: Generate,
    *,
    model: str,
    steps: Sequence[int],
    guidance: float,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> list[Row]:
    """One row for each metric and step count, with seconds_per_1000_images and peak_memory_bytes.

    `model` and `guidance` are only recorded: `generate` applies its own guidance. Time is that of generating every image of the protocol
    once (transfer to the CPU included), after one batch that is not counted; memory as in `speed.peak_memory_bytes`.
    Raises UserError for step counts or batch sizes below 1 and for images of a shape that the protocol does not measure, NotFinite for
    images that are none, ValueError when `generate` returns another number of images than asked for.
    """
    if not steps or min(steps) < 1 or batch_size < 1:
        raise UserError(f"step counts and the batch size must be at least 1, got steps {list(steps)} and batch size {batch_size}")
    total = sum(len(subset.prompts) for subset in protocol.subsets.values())
    _warm_up(protocol, generate, min(steps), batch_size)
    rows: list[Row] = []
    for index, count in enumerate(steps):
        reset_peak_memory()
        images, seconds = {}, 0.0
        for name, subset in protocol.subsets.items():
            tick = _ticker(progress, index * total + sum(map(len, images.values())), total * len(steps), f"{model}, {count} steps, {name}")
            images[name], elapsed = _generate(subset, generate, count, batch_size, tick)
            seconds += elapsed
        values = protocol.measure(images)
        rows += [Row(name=name, model=model, steps=count, guidance=guidance, value=v, n=protocol.count(name)) for name, v in values.items()]
        costs = {"seconds_per_1000_images": 1000 * seconds / total, "peak_memory_bytes": peak_memory_bytes()}
        rows += [Row(name=name, model=model, steps=count, guidance=guidance, value=v, n=total) for name, v in costs.items()]
    return rows


@torch.no_grad()
def _generate(subset: Subset, generate: Generate, steps: int, batch_size: int, tick: Callable[[int], None]) -> tuple[Tensor, float]:
    """All images of a subset on the CPU, in order, and the seconds that `generate` took."""
    batches: list[Tensor] = []
    seconds = 0.0
    for start in range(0, len(subset.prompts), batch_size):
        prompts, seeds = list(subset.prompts[start : start + batch_size]), list(subset.seeds[start : start + batch_size])
        synchronise()
        began = time.perf_counter()
        images = generate(prompts, seeds, steps).detach().cpu()
        seconds += time.perf_counter() - began
        if len(images) != len(prompts):
            raise ValueError(f"the generator returned {len(images)} images for {len(prompts)} prompts")
        _require_finite(images)
        batches.append(images)
        tick(start + len(prompts))
    return torch.cat(batches), seconds


@torch.no_grad()
def _warm_up(protocol: Protocol, generate: Generate, steps: int, batch_size: int) -> None:
    """One batch, so that the clock sees no compilation, and a wrong image size is refused before thousands are generated."""
    subset = next(iter(protocol.subsets.values()))
    images = generate(list(subset.prompts[:batch_size]), list(subset.seeds[:batch_size]), steps)
    protocol.check_image(images.shape[1:])
    _require_finite(images)


def _require_finite(images: Tensor) -> None:
    broken = ~images.isfinite().flatten(1).all(1)
    if bool(broken.any()):
        raise NotFinite(f"{int(broken.sum())} of {len(images)} images that the generator returned are not finite, so nothing can be measured")


def _ticker(progress: Progress | None, before: int, total: int, label: str) -> Callable[[int], None]:
    return lambda done: progress(before + done, total, label) if progress else None


def provenance(protocol: Protocol, *, device: str | torch.device = "cpu", model_hash: str | None = None) -> dict[str, Any]:
    """What a measurement depends on besides the model's name: versions, machine, date (UTC), and sha256 hashes of protocol and weights.

    `device` is where the images were generated; `model_hash` is `fingerprints.folder_hash` of the model. A package that is not installed is left out.
    """
    packages = {"fastgen": "fastgen-distill", "torch": "torch", "diffusers": "diffusers", "transformers": "transformers"}
    versions = {key: version for key, package in packages.items() if (version := _version(package))}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions},
        "device": _device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "protocol_hash": protocol.hash(),
        "classifier_hash": protocol.extractor_hash(),
        "model_hash": model_hash,
    }


def write_results(path: str | Path, protocol_name: str, rows: Sequence[Row], provenance: Mapping[str, Any]) -> None:
    """Write results.json (keys protocol, metrics, provenance) in one step: readers see the old file or the whole new one.

    Raises ValueError for a NaN or infinite value, which JSON cannot hold.
    """
    _write_json(Path(path), {"protocol": protocol_name, "metrics": list(rows), "provenance": dict(provenance)})


class Measurement(records.Schema):
    """A row of results.json."""

    name: str
    model: str
    value: float
    steps: int | None = None
    guidance: float | None = None
    n: int = 1
    std: float | None = None
    floor: str | None = None


class Results(records.Schema):
    protocol: str
    metrics: list[Measurement]
    provenance: dict[str, Any]


class _Entry(records.Schema):
    key: str
    rows: list[Measurement]


def read_results(path: str | Path) -> dict[str, Any]:
    """results.json as a dict with the keys protocol, metrics, provenance; raises UserError when it is missing or is something else."""
    return records.read(Path(path), Results)


def cached(key: str, compute: Callable[[], list[Row]], *, folder: Path | None = None) -> list[Row]:
    """The rows stored under `key`, or those of `compute()`, stored for the next time.

    One file per key, named after its sha256, in `folder` (default ~/.cache/fastgen/results), sealed. An entry that cannot be read, or is
    not as it was written, is computed again, and one that cannot be written is not kept; both are said with a warning.
    """
    try:
        path = (folder or Path.home() / CACHE) / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    except RuntimeError as error:
        warnings.warn(f"results could not be cached ({error})", stacklevel=2)
        return compute()
    if path.exists():
        try:
            return _read_entry(path, key)
        except ValueError as error:
            warnings.warn(f"cached results {path} are unreadable ({error}); computing them again", stacklevel=2)
    rows = compute()
    try:
        _write_json(path, sealed({"key": key, "rows": rows}))
    except UserError as error:
        warnings.warn(f"results could not be cached ({error})", stacklevel=2)
    return rows


def _read_entry(path: Path, key: str) -> list[Row]:
    entry = records.checked(unsealed(records.read(path)), _Entry)
    if entry["key"] != key:
        raise ValueError("not an entry of this key")
    return entry["rows"]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return name if device.type == "cpu" else f"{device.type} ({name})"

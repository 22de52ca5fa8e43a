"""results.json: rows, what they depend on, and a cache for rows that do not change."""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from fastgen import records
from fastgen.errors import UserError
from fastgen.files import write_atomically
from fastgen.fingerprints import sealed, unsealed

CACHE = Path(".cache/fastgen/results")  # below the home folder


class Row(TypedDict):
    """One measurement: an entry of `metrics` in results.json. `n` counts images; rows of real data have no steps and no guidance.
    interval: 95 %, by the method that interval_over names. seed: of the training that one of several rows is of, whose mean has a row of its
    own, without it."""

    name: str
    model: str
    value: float
    n: int
    steps: NotRequired[int]
    guidance: NotRequired[float]
    std: NotRequired[float]
    std_over: NotRequired[str]
    interval: NotRequired[list[float]]
    interval_over: NotRequired[str]
    floor: NotRequired[str]
    seed: NotRequired[int]


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

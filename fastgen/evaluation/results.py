"""results.json: rows, what they depend on, and a cache for rows that do not change."""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypedDict

import torch
from pydantic import Field

from fastgen import records
from fastgen.errors import UserError
from fastgen.evaluation.extractors import find_extractor
from fastgen.evaluation.versions import installed
from fastgen.files import write_atomically
from fastgen.fingerprints import sealed, unsealed
from fastgen.portable import portable, portable_text

if TYPE_CHECKING:
    from fastgen.evaluation.metrics.base import Metric
    from fastgen.evaluation.protocol import Protocol, SetBlock

CACHE = Path(".cache/fastgen/results")  # below the home folder
QUANTISATIONS = {"edm": "edm: floor(255 y + 0.5)", "truncate": "truncate: floor(255 y)"}  # of y in [0, 1]


class Row(TypedDict):
    """One measurement: an entry of `metrics` in results.json. `n` counts images; rows of real data have no steps and no guidance.
    interval: 95 %, by the method that interval_over names. against: the `model_key` of the teacher whose pictures it is measured against. seed:
    of the training that one of several rows is of, whose mean has a row of its own, without it."""

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
    remark: NotRequired[str]
    against: NotRequired[str]
    floor: NotRequired[str]
    seed: NotRequired[int]


class Missing(TypedDict):
    """A metric that could not be measured, and why, in one line; model: of which, empty for all."""

    name: str
    model: str
    reason: str


def provenance(
    protocol: Protocol,
    *,
    device: str | torch.device = "cpu",
    model_hash: str | None = None,
    extractors: Mapping[str, str] = MappingProxyType({}),
    reference: Mapping[str, Any] | None = None,
    models: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    batch_size: int | None = None,
) -> dict[str, Any]:
    """What a measurement depends on besides the model's name: versions, machine, date (UTC), every convention, and SHA-256 hashes; no folder of
    this machine.

    device: where the pictures were drawn. model_hash: `fingerprints.folder_hash` of the model. extractors: SHA-256 of each, by what features
    call their `source`. reference: kind and hash of the real pictures or statistics. models: by `model_key`, what is known of each model in the
    rows: its `sha256`, the configuration of its `scheduler`, and its `stores`, the folders of its features by set. batch_size: pictures drawn at
    once, None for the protocol's own. A package that is not installed is left out.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **installed()},
        "device": _device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "protocol_hash": protocol.hash(),
        "model_hash": model_hash,
        "conventions": portable(_conventions(protocol, extractors)),
        "extractors": {portable_text(source): sha256 for source, sha256 in extractors.items()},
        "prompt_sets": {name: {"hash": each.hash, "images": len(each), "per_prompt": each.per_prompt} for name, each in protocol.sets.items()},
        "reference": portable(reference),
        "models": portable(models),
        "batch_size": batch_size or protocol.spec.batch_size,
    }


def model_key(model: str, steps: int | None) -> str:
    """Whom rows with this model and these steps are of."""
    return model if steps is None else f"{model}, {steps} step{'s' * (steps != 1)}"


def _conventions(protocol: Protocol, extractors: Iterable[str]) -> dict[str, Any]:
    """All that a protocol decides and numbers depend on, with the defaults that it leaves unsaid."""
    metrics = protocol.metrics(protocol.resources)
    return {
        "quantisation": QUANTISATIONS[protocol.spec.quantisation],
        "prepare": protocol.spec.prepare.model_dump(),
        "chunk": protocol.spec.chunk,
        "seeds": {name: _seeds_rule(block) for name, block in protocol.spec.sets.items()},
        "subset_seed": protocol.spec.seed,
        "metrics": {name: _convention(metric) for name, metric in metrics.items()},
        "extractors": {portable_text(source): find_extractor(source.partition("(")[0]).convention for source in extractors},
    }


def _convention(metric: Metric) -> dict[str, Any]:
    """A metric's options, its set, and its own words for what they leave unsaid."""
    said = {"convention": metric.convention} if metric.convention else {}
    return {**metric.config.model_dump(mode="json"), "set": metric.set, **said}


def _seeds_rule(block: SetBlock) -> str:
    """How the seed of a picture's noise follows from its id, which goes on from set to set, or from its place in the set."""
    if block.first_seed is not None:
        return f"{block.first_seed} + place in the set"
    return f"derived from ('evaluation', {block.seed}, id)"


def write_results(
    path: str | Path,
    protocol_name: str,
    rows: Sequence[Row],
    provenance: Mapping[str, Any],
    *,
    missing: Sequence[Missing] = (),
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Write results.json in one step (readers see the old file or the whole new one), and return its content: the keys protocol, metrics,
    missing and provenance, and partial where only the first `stop_after` pictures of each set were drawn. Why something is missing is written
    without the folders of this machine.

    Raises ValueError for a NaN or infinite value, which JSON cannot hold.
    """
    lacking = [Missing(name=each["name"], model=each["model"], reason=portable_text(each["reason"])) for each in missing]
    content: dict[str, Any] = {"protocol": protocol_name, "metrics": list(rows), "missing": lacking, "provenance": dict(provenance)}
    if stop_after is not None:
        content["partial"] = {"stop_after": stop_after}
    _write_json(Path(path), content)
    return content


class Measurement(records.Schema):
    """A row of results.json."""

    name: str
    model: str
    value: float
    steps: int | None = None
    guidance: float | None = None
    n: int = 1
    std: float | None = None
    std_over: str | None = None
    interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    interval_over: str | None = None
    remark: str | None = None
    against: str | None = None
    floor: str | None = None
    seed: int | None = None


class _Unmeasured(records.Schema):
    name: str
    model: str
    reason: str


class _Partial(records.Schema):
    stop_after: int


class Results(records.Schema):
    """results.json; files of before there were protocol files have neither `missing` nor `partial`."""

    protocol: str
    metrics: list[Measurement]
    provenance: dict[str, Any]
    missing: list[_Unmeasured] = Field(default_factory=list)
    partial: _Partial | None = None


class _Entry(records.Schema):
    key: str
    rows: list[Measurement]


def read_results(path: str | Path) -> dict[str, Any]:
    """results.json as a dict with the keys protocol, metrics, provenance and what else is in it; UserError when it is missing or something else."""
    return records.read(Path(path), Results)


def reasons(missing: Iterable[Missing], between: str = "") -> list[str]:
    """A line for each reason why metrics could not be measured, which many may share; between: the metrics' names and the reason, by default
    words."""
    names: dict[str, list[str]] = {}
    for each in missing:
        names.setdefault(each["reason"], []).append(each["name"] + (f" of the {each['model']}" if each["model"] else ""))
    verb = {True: " is not measured: ", False: " are not measured: "}
    return [", ".join(some) + (between or verb[len(some) == 1]) + reason for reason, some in names.items()]


def remarks(results: Mapping[str, Any], *, told: bool = False) -> list[str]:
    """What has to be said beside the numbers: that they are of a quick look, what they cannot be used for, and what could not be measured.
    told: why it could not has been said before."""
    partial = results.get("partial")
    quick = [f"a quick look: only the first {partial['stop_after']:,} pictures of each set"] if partial else []
    missing = results.get("missing") or []
    names = ", ".join(dict.fromkeys(each["name"] for each in missing))
    lacking = [f"not measured, for the reasons above: {names}"] if told and missing else [f"not measured: {each}" for each in reasons(missing, ": ")]
    about = [f"{row['name']} of the {model_key(row['model'], row.get('steps'))}: {row['remark']}" for row in results["metrics"] if row.get("remark")]
    return [*quick, *about, *lacking]


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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return name if device.type == "cpu" else f"{device.type} ({name})"

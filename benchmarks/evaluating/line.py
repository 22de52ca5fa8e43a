"""The whole way of an evaluation, from pictures drawn and read to metrics, with stand-ins for the generator and for the Inception network."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import save_file

from benchmarks.evaluating.stages import Stages
from benchmarks.evaluating.stand_in import AS_INCEPTION, Size, StandIn, Synthetic, write_pictures
from benchmarks.measuring.case import Row
from fastgen.evaluation.extractors import inception
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.protocol import Protocol, protocol_from
from fastgen.evaluation.runner import Evaluation
from fastgen.evaluation.settings import Settings
from fastgen.evaluation.weights import Weights
from fastgen.fingerprints import file_hash

METRICS: Mapping[str, Mapping[str, Any]] = {"fid": {}, "fid_infinity": {}, "kid": {}, "inception_score": {}, "sfid": {}}


def measure(count: int, size: Size = AS_INCEPTION, metrics: Mapping[str, Mapping[str, Any]] = METRICS) -> Row:
    """One evaluation of `count` pictures against a folder of as many JPEGs, stage by stage; values: of the stand-in's features, and so no FID.
    disk_bytes: of the features."""
    network = StandIn(size)
    with tempfile.TemporaryDirectory(prefix="fastgen-evaluation-") as name, mock.patch.object(inception, "load_network", return_value=network):
        scratch = Path(name)
        save_file(network.state_dict(), scratch / "stand_in.safetensors")
        return _measured(scratch, _protocol(scratch, count, metrics), metrics)


def _protocol(scratch: Path, count: int, metrics: Mapping[str, Mapping[str, Any]]) -> Protocol:
    own = {"weights": "stand_in.safetensors", "sha256": file_hash(scratch / "stand_in.safetensors")}
    content = {
        "name": "synthetic",
        "sets": {"main": {"prompts": None, "count": count}},
        "reference": {"images": str(write_pictures(scratch / "real", count))},
        "metrics": {name: {**own, **options} for name, options in metrics.items()},
        "batch_size": 64,
    }
    return protocol_from(content)


def _measured(scratch: Path, protocol: Protocol, metrics: Mapping[str, Mapping[str, Any]]) -> Row:
    stages, store = Stages(), scratch / "store"
    with stages.stage("start"):
        resources = Resources(Weights(scratch))
    with stages.stage("reference"):
        evaluation = Evaluation(protocol, resources, Settings(store))
    with stages.stage("pictures"):
        evaluation.draw(Synthetic())
    (drawn,) = evaluation.drawn
    values: dict[str, float] = {}
    for name, metric in evaluation.metrics.items():
        with stages.stage(name):
            values |= {value.name: value.value for value in metric.measure(evaluation.measured(drawn))}
    assert set(evaluation.metrics) == set(metrics), evaluation.missing
    disk = sum(path.stat().st_size for path in store.rglob("*.npy"))
    return {"peak_bytes": stages.peak_bytes, "disk_bytes": disk, "stages": stages.costs, "values": values}

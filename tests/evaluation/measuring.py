"""Pictures that a test has at hand, measured as a protocol's metrics measure them: without a subject, a store or a disk."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastgen.evaluation.extraction import Extractors, by_set, eight_bit
from fastgen.evaluation.extractors.base import Feature, Pictures, Resources
from fastgen.evaluation.metrics.base import Measured, Value
from fastgen.evaluation.preparation import prepared
from fastgen.evaluation.protocol import Protocol, SampleSet
from fastgen.evaluation.tables import Table

COSTS = ("seconds_per_1000_images", "peak_memory_bytes")


def seen(protocol: Protocol, images: Mapping[str, Tensor]) -> Measured:
    """What metrics see of pictures (N, 3, H, W), floats in [0, 1] or uint8, in the order of each set's ids."""
    extractors, tables = Extractors(Resources()), {}
    for name, features in by_set(metric.needs().generated for metric in protocol.metrics(Resources()).values()).items():
        pixels = prepared(eight_bit(images[name], protocol.spec.quantisation), protocol.spec.prepare)
        tables |= {(name, one): Table(rows) for one, rows in extracted(extractors, protocol.sets[name], pixels, features).items()}
    return Measured(protocol.sets, tables, seed=protocol.spec.seed)


def extracted(extractors: Extractors, samples: SampleSet, pixels: Tensor, features: list[Feature]) -> dict[Feature, Tensor]:
    """Features of 8-bit pictures of a whole set, chunk by chunk."""
    assert len(pixels) == len(samples)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(samples), samples.chunk):
        rows = slice(start, start + samples.chunk)
        parts.append(extractors(Pictures(pixels[rows], samples.prompts[rows], samples.per_prompt), features))
    return {one: torch.cat([part[extractors.name(one)] for part in parts]) for one in features}


def values(protocol: Protocol, images: Mapping[str, Tensor]) -> dict[str, Value]:
    """Every value of a protocol's metrics by name, in their order."""
    measured = seen(protocol, images)
    return {value.name: value for metric in protocol.metrics(Resources()).values() for value in metric.measure(measured)}


def measure(protocol: Protocol, images: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: value.value for name, value in values(protocol, images).items()}

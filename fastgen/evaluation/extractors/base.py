"""What turns 8-bit pictures into features: one file a class, found by its name."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fastgen.evaluation.external import External
from fastgen.evaluation.weights import Weights


class Options(BaseModel):
    """Options of an extractor or a metric as a protocol file gives them: strict keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Feature:
    """What a metric reads of every picture: a layer of an extractor with its options, such as `feature("inception", "pool3", resize="clean")`."""

    extractor: str
    layer: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def source(self) -> str:
        """The extractor with its options, as results.json calls it: `dinov2(resize=torch)`."""
        told = ", ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.extractor}({told})" if told else self.extractor


def feature(extractor: str, layer: str, **options: Any) -> Feature:
    return Feature(extractor, layer, tuple(sorted(options.items())))


@dataclass(frozen=True)
class Pictures:
    """Some pictures with their prompts, as extractors get them. per_prompt: how many of one prompt lie side by side; a batch holds whole groups.
    raw: the same pictures before the protocol cropped and resized them, each (3, h, w) of its own size; None where it did neither."""

    pixels: Tensor  # (B, 3, H, W) uint8 on the CPU
    prompts: tuple[str, ...]
    per_prompt: int = 1
    raw: Sequence[Tensor] | Tensor | None = None


@dataclass(frozen=True)
class Resources:
    """What extractors and metrics are built from. data_dir: of prompts, references and other files that a protocol names. external: programs
    that measure, by their metric's name; they come from the command line alone."""

    weights: Weights = field(default_factory=Weights)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data_dir: Path | None = None
    external: Mapping[str, External] = field(default_factory=dict)


class Extractor(ABC):
    """One file in `extractors/` with one such class. Built once an evaluation, before any picture is drawn: Unavailable, in one line, where a
    package or weights are missing. It should load its network at the first call only."""

    class Config(Options):
        """Options that a metric may ask for; they are part of the feature's name."""

    def __init__(self, config: Any, resources: Resources) -> None:
        self.config, self.resources = config, resources

    @property
    @abstractmethod
    def hash(self) -> str:
        """SHA-256 of the weights (and of anything else that the options do not say): features are kept under it."""

    @abstractmethod
    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        """Layer → (B, ...) on the CPU, fp32 (or uint8), whose rows do not depend on the other pictures but through `per_prompt`."""

    convention: ClassVar[str] = ""  # a sentence for results.json: resizing, normalisation, layer


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over a network's parameter names, shapes and fp32 bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()

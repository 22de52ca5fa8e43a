"""What is generated and what is measured on it, under a name: fixed prompts, fixed seeds, metrics, and the floors that real data reach."""

from __future__ import annotations

import hashlib
import json
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from fastgen.data import digits
from fastgen.errors import UserError, nearest
from fastgen.evaluation.diversity import mode_entropy, pairwise_distance, vendi_score
from fastgen.evaluation.fid import FeatureStatistics, bootstrap_floor, frechet_distance, half_floor

FLOOR_REPEATS = 20


class Row(TypedDict):
    """One measurement: an entry of `metrics` in results.json. `n` counts images; rows of real data have no steps and no guidance. seed:
    of the training that one of several rows is of, whose mean has a row of its own, without it."""

    name: str
    model: str
    value: float
    n: int
    steps: NotRequired[int]
    guidance: NotRequired[float]
    std: NotRequired[float]
    std_over: NotRequired[str]
    floor: NotRequired[str]
    seed: NotRequired[int]


@dataclass(frozen=True)
class Subset:
    """Prompts and, one for each, the seed of that image's noise: a prompt's image does not depend on the batch it is generated in."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


class Protocol(ABC):
    """A named, fixed measurement: `subsets` says what to generate, `measure` turns the images into metrics."""

    name: str
    image_shape: tuple[int, int, int]
    metrics: tuple[str, ...]  # names of what `measure` returns

    @property
    @abstractmethod
    def subsets(self) -> Mapping[str, Subset]:
        """What to generate: prompts and seeds by subset name."""

    @abstractmethod
    def measure(self, images: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of the generated images, one (N, *image_shape) float tensor in [0, 1] for each subset, in the order of its prompts."""

    @abstractmethod
    def count(self, metric: str) -> int:
        """Number of generated images that a metric is computed from."""

    @abstractmethod
    def floors(self) -> list[Row]:
        """What real images score: rows with `model: real`."""

    @abstractmethod
    def extractor_hash(self) -> str:
        """sha256 of the feature extractor's weights: distances are comparable only when it is equal."""

    def check_image(self, shape: Sequence[int], key: str = "") -> None:
        """Raise UserError unless images of this shape (C, H, W) are what the protocol measures; key: what named the protocol."""
        if tuple(shape) != self.image_shape:
            where = key and f"{key}: "
            raise UserError(f"{where}protocol {self.name} measures images of shape {self.image_shape}, the model makes {tuple(shape)}")

    def hash(self) -> str:
        """sha256 over the metrics' names and every subset's name, prompts and seeds.

        Results are cached under it: those of fewer metrics are not found any more. A metric that changes its meaning needs a new name.
        """
        subsets = {name: [subset.prompts, subset.seeds] for name, subset in self.subsets.items()}
        content = {"metrics": sorted(self.metrics), "subsets": subsets}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_protocol(name: str) -> Protocol:
    """The protocol called `name`; raises UserError for an unknown one."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r} (recipe key evaluate.protocol): {nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]()


def quantise(images: Tensor) -> Tensor:
    """8-bit images: (N, 3, H, W) float in [0, 1] to uint8 by EDM's rule on [-1, 1], clip(x * 127.5 + 128), what a saved PNG would hold.

    Raises ValueError for NaN or infinity and for values outside [0, 1] by more than 1e-3 (images in [-1, 1], most likely).
    """
    wide = images.detach().cpu().float()
    if not bool(wide.isfinite().all()):
        raise ValueError("generated images contain NaN or infinity")
    low, high = float(wide.min()), float(wide.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"images must be in [0, 1], got values from {low:.4g} to {high:.4g}")
    return ((wide * 2 - 1) * 127.5 + 128).clamp(0, 255).to(torch.uint8)


class Classifier(typing.Protocol):
    """What protocol digits needs of its classifier; images are (B, 3, 8, 8) fp32 in [-1, 1]."""

    def features(self, images: Tensor, /) -> Tensor: ...  # (B, 64)

    def __call__(self, images: Tensor, /) -> Tensor: ...  # logits (B, 10)

    def state_dict(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Measured:
    """Images as the metrics see them, after 8-bit quantisation: features (N, 64), predicted digits (N,), grey pixels (N, 64)."""

    features: Tensor
    digits: Tensor
    pixels: Tensor

    @cached_property
    def feature_statistics(self) -> FeatureStatistics:
        return FeatureStatistics.from_features(self.features)

    @cached_property
    def pixel_statistics(self) -> FeatureStatistics:
        return FeatureStatistics.from_features(self.pixels)


class Digits(Protocol):
    """scikit-learn's 8x8 digits: 1,797 prompts that name the digit, and 1,797 open ones, half generic and half naming the parity.

    Prompt i of `named` is template i mod 3 with the label of real image i. `open` holds 899 generic prompts, then 898 parity prompts
    whose even share is the real images', each kind cycling its texts. Seeds: `named` i, `open` 10,000 + i.
    Each set as a whole should look like all real images, which are the one reference of every distance; the real images, too, are
    quantised to 8 bit. The classifier was trained on part of the reference. Runs on the CPU in fp32.
    """

    name = "digits"
    image_shape = (3, 8, 8)
    metrics = (
        "fd_digits",
        "fd_digits_named",
        "fd_digits_pixel",
        "prompt_accuracy",
        "parity_accuracy",
        "diversity",
        "vendi",
        "mode_entropy",
    )

    def __init__(self, classifier: Classifier | None = None) -> None:
        """Measure with `classifier`, by default the bundled one (loaded at first use)."""
        self._classifier = classifier

    @property
    def subsets(self) -> Mapping[str, Subset]:
        return self._subsets

    @cached_property
    def _subsets(self) -> dict[str, Subset]:
        named = tuple(digits.NAMED[i % 3].format(digits.WORDS[label]) for i, label in enumerate(self._labels.tolist()))
        generic = tuple(digits.GENERIC[i % 3] for i in range(len(named) - self._parities.numel()))
        parity = tuple(digits.PARITY[odd][i % 2] for i, odd in enumerate(self._parities.tolist()))
        return {
            "named": Subset(named, tuple(range(len(named)))),
            "open": Subset(generic + parity, tuple(range(10_000, 10_000 + len(named)))),
        }

    def measure(self, images: Mapping[str, Tensor]) -> dict[str, float]:
        """fd_digits_named and prompt_accuracy of `named`, all other `metrics` of `open`.

        fd_*: Fréchet distance to all real images, of classifier features (64-d) or 8x8 grey values in [-1, 1] (64-d). Accuracies are
        fractions of images whose predicted digit agrees with the prompt. Over the samples of one prompt text, mean over texts:
        diversity is the mean feature distance of two samples; vendi the Vendi score of the features as they are (not negative, but
        cosines of real digits average 0.42, far from saturation: real digits of one class score 1.2 to 1.5, all of them 7.9);
        mode_entropy the effective number of predicted digits, at most 10, of the generic prompts alone: there every digit is a right
        answer, while a wrong parity would pass for diversity.
        Raises UserError for images that are not (3, 8, 8), ValueError for a missing or incomplete subset and values outside [0, 1].
        """
        for name, subset in self.subsets.items():
            if name not in images or len(images[name]) != len(subset.prompts):
                raise ValueError(f"subset {name!r} needs {len(subset.prompts)} images, got {len(images.get(name, ()))}")
            self.check_image(images[name].shape[1:])
        named, free, real = self._view(images["named"]), self._view(images["open"]), self._real
        texts, num_generic = self.subsets["open"].prompts, self.count("mode_entropy")
        guessed = free.digits[num_generic:] % 2
        return {
            "fd_digits": frechet_distance(free.feature_statistics, real.feature_statistics),
            "fd_digits_named": frechet_distance(named.feature_statistics, real.feature_statistics),
            "fd_digits_pixel": frechet_distance(free.pixel_statistics, real.pixel_statistics),
            "prompt_accuracy": float((named.digits == self._labels).double().mean()),
            "parity_accuracy": float((guessed == self._parities).double().mean()),
            "diversity": pairwise_distance(free.features, texts),
            "vendi": vendi_score(free.features, texts),
            "mode_entropy": mode_entropy(free.digits[:num_generic], texts[:num_generic]),
        }

    def count(self, metric: str) -> int:
        parity, everything = len(self._parities), len(self._labels)
        return {"parity_accuracy": parity, "mode_entropy": everything - parity}.get(metric, everything)

    def floors(self) -> list[Row]:
        """Both distances of resampled real images (bootstrap, and half against half over split seeds); real diversities and accuracy.

        `named` and `open` have equal size and reference, so the floor of fd_digits is also that of fd_digits_named. vendi and
        mode_entropy depend on the number of samples, so they are means over draws of one real image for each open prompt.
        """
        real, n = self._real, len(self._labels)
        rows: list[Row] = []
        for name, features in (("fd_digits", real.features), ("fd_digits_pixel", real.pixels)):
            mean, std = bootstrap_floor(features, FLOOR_REPEATS, seed=0)
            rows.append(Row(name=name, model="real", value=mean, n=n, std=std, std_over="bootstrap", floor="bootstrap"))
            mean, std = half_floor(features, FLOOR_REPEATS, seed=0)
            rows.append(Row(name=name, model="real", value=mean, n=n // 2, std=std, std_over="seeds", floor="half"))
        accuracy = float((real.digits == self._labels).double().mean())
        rows.append(Row(name="diversity", model="real", value=self._real_diversity(), n=n))
        rows.append(Row(name="prompt_accuracy", model="real", value=accuracy, n=n))
        return rows + self._real_samples()

    def extractor_hash(self) -> str:
        """sha256 over the classifier's parameter names, shapes and fp32 bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.classifier.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def classifier(self) -> Classifier:
        """The classifier in use; the bundled one is loaded the first time."""
        if self._classifier is None:
            from fastgen.assets.classifier import load_classifier

            self._classifier = load_classifier()
        return self._classifier

    @cached_property
    def _data(self) -> tuple[Tensor, Tensor]:
        return digits.load_images()

    @property
    def _labels(self) -> Tensor:
        return self._data[1]

    @cached_property
    def _parities(self) -> Tensor:
        """Parity (898,) of each parity prompt, even ones first, in the real images' proportion."""
        total = len(self._labels) // 2
        odd = round(total * float((self._labels % 2).double().mean()))
        return (torch.arange(total) >= total - odd).long()

    @cached_property
    def _real(self) -> Measured:
        return self._view((self._data[0] + 1) / 2)

    @torch.no_grad()
    def _view(self, images: Tensor) -> Measured:
        """Quantise images (N, 3, 8, 8) in [0, 1] and compute everything the metrics need of them."""
        signed = quantise(images).float() / 127.5 - 1
        features = torch.cat([self.classifier.features(batch) for batch in signed.split(512)])
        logits = torch.cat([self.classifier(batch) for batch in signed.split(512)])
        return Measured(features=features, digits=logits.argmax(1), pixels=signed.mean(1).flatten(1))

    @cached_property
    def _described(self) -> dict[str, Tensor]:
        """Rows of the real images that each open prompt describes: all for a generic text, those of its parity for the others."""
        odd = self._labels % 2
        generic = dict.fromkeys(digits.GENERIC, torch.arange(len(odd)))
        return generic | {text: torch.where(odd == p)[0] for p in (0, 1) for text in digits.PARITY[p]}

    def _real_diversity(self) -> float:
        groups = [text for text, rows in self._described.items() for _ in rows]
        return pairwise_distance(self._real.features[torch.cat(list(self._described.values()))], groups)

    def _real_samples(self) -> list[Row]:
        """vendi and mode_entropy of real images in place of the generated ones: as many for each text, none twice, drawn again by seed."""
        texts = sorted(self.subsets["open"].prompts, key=list(self._described).index)  # generic ones stay first
        num_generic = self.count("mode_entropy")
        scores: list[list[float]] = []
        for seed in range(FLOOR_REPEATS):
            generator = torch.Generator().manual_seed(seed)
            drawn = [rows[torch.randperm(len(rows), generator=generator)[: texts.count(text)]] for text, rows in self._described.items()]
            shown = self._real.digits[torch.cat(drawn)[:num_generic]]
            scores.append([vendi_score(self._real.features[torch.cat(drawn)], texts), mode_entropy(shown, texts[:num_generic])])
        return [
            Row(name=name, model="real", value=float(over.mean()), n=self.count(name), std=float(over.std()), std_over="seeds")
            for name, over in zip(("vendi", "mode_entropy"), torch.tensor(scores, dtype=torch.float64).T, strict=True)
        ]


PROTOCOLS: dict[str, Callable[[], Protocol]] = {Digits.name: Digits}

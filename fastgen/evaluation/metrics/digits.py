"""What is measured on the bundled digits: the honest offline counterparts of FID, CLIP score and diversity, under their own names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation.diversity import mode_entropy, pairwise_distance, vendi_score
from fastgen.evaluation.extractors import find_extractor
from fastgen.evaluation.extractors.base import Pictures
from fastgen.evaluation.frechet import FeatureStatistics, bootstrap_floor, frechet_distance, half_floor
from fastgen.evaluation.metrics.base import Heading, Measured, Metric, Needs, Options, Resources, Row, Unavailable, Value, feature
from fastgen.evaluation.preparation import quantised
from fastgen.evaluation.worlds import digits

FLOOR_REPEATS = 20
FEATURES, LOGITS, PIXELS = (feature("digits_classifier", layer) for layer in ("features", "logits", "pixels"))


class Digits(Metric):
    """fd_digits_named and prompt_accuracy of the set `named`, everything else of `open`.

    fd_*: Fréchet distance to all real images, of classifier features (64-d) or 8x8 grey values in [-1, 1] (64-d); the classifier was
    trained on part of the reference. Accuracies are fractions of images whose predicted digit agrees with the prompt. Over the samples of
    one prompt text, mean over texts: diversity is the mean feature distance of two samples; vendi the Vendi score of the features as they
    are (not negative, but cosines of real digits average 0.42, far from saturation: real digits of one class score 1.2 to 1.5, all of them
    7.9); mode_entropy the effective number of predicted digits, at most 10, of the generic prompts alone: there every digit is a right
    answer, while a wrong parity would pass for diversity. Each set as a whole should look like all real images; these are quantised too.
    """

    class Config(Options):
        set: None = None

    shows = {  # noqa: RUF012
        "prompt_accuracy": Heading("prompt accuracy", "↑", 3),
        "parity_accuracy": Heading("parity accuracy", "↑", 3),
        "fd_digits": Heading("FD-digits", "↓"),
        "fd_digits_named": Heading("FD named", "↓"),
        "fd_digits_pixel": Heading("FD pixel", "↓"),
        "diversity": Heading("diversity"),
        "vendi": Heading("Vendi"),
        "mode_entropy": Heading("modes"),
    }

    resampling = "jackknife"  # a picture that is drawn twice is no distance from itself

    def __init__(self, config: Any, sets: Sequence[str], resources: Resources = Resources()) -> None:  # noqa: B008
        if lacking := sorted({"named", "open"} - set(sets)):
            raise UserError(f"metrics.digits: needs sets named and open; {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not there")
        super().__init__(config, sets, resources)

    def needs(self) -> Needs:
        return Needs({"named": (FEATURES, LOGITS), "open": (FEATURES, LOGITS, PIXELS)})

    def measure(self, measured: Measured) -> list[Value]:
        named, free = measured.sets["named"], measured.sets["open"]
        if not all(set(digits.PROMPTS[name]()).issuperset(each.prompts) for name, each in (("named", named), ("open", free))):
            raise Unavailable("needs the prompts fastgen:digits/named and fastgen:digits/open in sets named and open")
        if len(named) < 2 or len(set(free.prompts)) == len(free):
            raise Unavailable(f"needs two pictures of one prompt: {len(free)} were drawn of set open, of a prompt each")
        named_features, features, pixels = (
            measured.tables[where, of].read() for where, of in (("named", FEATURES), ("open", FEATURES), ("open", PIXELS))
        )
        named_digits, free_digits = (measured.tables[where, LOGITS].read().argmax(1) for where in ("named", "open"))
        right = named_digits == torch.tensor([digits.digit_of(prompt) for prompt in named.prompts])
        values = {
            "fd_digits": self._distance(features, self._real["features"]),
            "fd_digits_named": self._distance(named_features, self._real["features"]),
            "fd_digits_pixel": self._distance(pixels, self._real["pixels"]),
            "prompt_accuracy": float(right.double().mean()),
            "diversity": pairwise_distance(features, free.prompts),
            "vendi": vendi_score(features, free.prompts),
        }
        counts = dict.fromkeys(values, len(free)) | {"fd_digits_named": len(named), "prompt_accuracy": len(named)}
        parities = torch.tensor([-1 if (parity := digits.parity_of(prompt)) is None else parity for prompt in free.prompts])
        generic = parities < 0
        if not bool(generic.all()):
            guessed = free_digits[~generic] % 2
            values["parity_accuracy"] = float((guessed == parities[~generic]).double().mean())
            counts["parity_accuracy"] = len(guessed)
        texts = [prompt for prompt, chosen in zip(free.prompts, generic.tolist(), strict=True) if chosen]
        values["mode_entropy"], counts["mode_entropy"] = mode_entropy(free_digits[generic], texts), len(texts)
        return [Value(name, values[name], counts[name]) for name in _ORDER if name in values]

    def floors(self) -> list[Row]:
        """Both distances of resampled real images (bootstrap, and half against half over split seeds); real diversities and accuracy.

        `named` and `open` have equal size and reference, so the floor of fd_digits is also that of fd_digits_named. vendi and
        mode_entropy depend on the number of samples, so they are means over draws of one real image for each open prompt.
        """
        n = len(digits.labels())
        rows: list[Row] = []
        for name, features in (("fd_digits", self._real["features"]), ("fd_digits_pixel", self._real["pixels"])):
            mean, std = bootstrap_floor(features, FLOOR_REPEATS, seed=0)
            rows.append(Row(name=name, model="real", value=mean, n=n, std=std, std_over="bootstrap", floor="bootstrap"))
            mean, std = half_floor(features, FLOOR_REPEATS, seed=0)
            rows.append(Row(name=name, model="real", value=mean, n=n // 2, std=std, std_over="seeds", floor="half"))
        accuracy = float((self._real["logits"].argmax(1) == digits.labels()).double().mean())
        rows.append(Row(name="diversity", model="real", value=self._real_diversity(), n=n))
        rows.append(Row(name="prompt_accuracy", model="real", value=accuracy, n=n))
        return rows + self._real_samples()

    def _distance(self, features: Tensor, real: Tensor) -> float:
        return frechet_distance(FeatureStatistics.from_features(features), FeatureStatistics.from_features(real))

    @cached_property
    def _real(self) -> dict[str, Tensor]:
        """Layers of the real images, quantised as generated ones are."""
        kind = find_extractor("digits_classifier")
        extractor, pixels = kind(kind.Config(), self.resources), quantised(digits.images(), "edm")
        parts = [extractor(Pictures(batch, ("",) * len(batch)), ("features", "logits", "pixels")) for batch in pixels.split(512)]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}

    def _real_diversity(self) -> float:
        groups = [text for text, rows in digits.described().items() for _ in rows]
        return pairwise_distance(self._real["features"][torch.cat(list(digits.described().values()))], groups)

    def _real_samples(self) -> list[Row]:
        """vendi and mode_entropy of real images in place of the generated ones: as many for each text, none twice, drawn again by seed."""
        described, num_generic = digits.described(), digits.num_generic()
        texts = sorted(digits.open_prompts(), key=list(described).index)  # generic ones stay first
        scores: list[list[float]] = []
        for seed in range(FLOOR_REPEATS):
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.cat([rows[torch.randperm(len(rows), generator=generator)[: texts.count(text)]] for text, rows in described.items()])
            shown = self._real["logits"].argmax(1)[drawn[:num_generic]]
            scores.append([vendi_score(self._real["features"][drawn], texts), mode_entropy(shown, texts[:num_generic])])
        counts = {"vendi": len(texts), "mode_entropy": num_generic}
        return [
            Row(name=name, model="real", value=float(over.mean()), n=counts[name], std=float(over.std()), std_over="seeds")
            for name, over in zip(counts, torch.tensor(scores, dtype=torch.float64).T, strict=True)
        ]


_ORDER = ("fd_digits", "fd_digits_named", "fd_digits_pixel", "prompt_accuracy", "parity_accuracy", "diversity", "vendi", "mode_entropy")

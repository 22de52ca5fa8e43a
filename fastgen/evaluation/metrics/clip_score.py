"""How well pictures fit their prompts, by CLIP. Every convention gives other numbers: they are presets, and none of them is the default."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.errors import nearest
from fastgen.evaluation.extractors.clip_inputs import cosines
from fastgen.evaluation.extractors.open_clip_networks import Precision
from fastgen.evaluation.metrics.base import Feature, Heading, Measured, Needs, Options, Value, feature
from fastgen.evaluation.metrics.picture_scores import PictureScores

# dmd2: Yin et al. 2024, main/coco_eval/coco_evaluator.py, which calls the model ViT-G/14 and crops and resizes pictures to 256 by Lanczos
# before (a protocol's `prepare`, or `square`). sana-mjhq: OpenAI's network and its logit scale. torchmetrics: its `CLIPScore` 1.x with default
# arguments. original: Hessel et al. 2021 (arXiv:2104.08718), whose figures are of fp16.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "dmd2": {"model": "ViT-g-14", "pretrained": "laion2b_s12b_b42k", "prefix": "A photo depicts ", "scale": 1.0, "clamp": "none"},
        "sana-mjhq": {"model": "ViT-L-14", "pretrained": "openai", "prefix": "", "scale": 100.0, "clamp": "none"},
        "torchmetrics": {"model": "ViT-L-14", "pretrained": "openai", "prefix": "", "scale": 100.0, "clamp": "mean"},
        "original": {"model": "ViT-B-32", "pretrained": "openai", "prefix": "A photo depicts ", "scale": 2.5, "clamp": "pictures"},
    }
)
_BLOCK = 4096  # pictures


class ClipScore(PictureScores):
    """scale · cosine of a picture's and its prompt's embedding, mean over pictures."""

    class Config(Options):
        """Either a preset, or model and pretrained as open_clip calls them. prefix: put before each prompt. clamp: negative values are 0, those
        of pictures or only the mean. square: of pictures as drawn instead of the protocol's `prepare`, as of the extractor (DMD2: 256)."""

        set: str | None = None
        preset: Literal["dmd2", "sana-mjhq", "torchmetrics", "original"] | None = None
        model: str
        pretrained: str
        prefix: str = ""
        scale: float = 1.0
        clamp: Literal["none", "pictures", "mean"] = "none"
        precision: Precision = "fp32"
        square: Annotated[int, Field(ge=1, le=4096)] | None = None

        @model_validator(mode="before")
        @classmethod
        def _filled(cls, given: Any) -> Any:
            """With everything that the preset decides, so that results.json says it too."""
            return _with_preset(given) if isinstance(given, Mapping) else given

    shows = {"clip_score": Heading("CLIP score", "↑", -1)}  # noqa: RUF012
    convention = "mean over pictures of scale * cos(picture, prefix + prompt)"

    def needs(self) -> Needs:
        return Needs({self.set: self._features})

    @property
    def _features(self) -> tuple[Feature, Feature]:
        names = ("model", "pretrained", "prefix", "precision")
        options = {name: getattr(self.config, name) for name in names}  # the same of both, so that one extractor makes them
        if self.config.square is not None:
            options["square"] = self.config.square
        return feature("open_clip", "image", **options), feature("open_clip", "text", **options)

    def picture_scores(self, measured: Measured) -> Tensor:
        images, texts = (measured.tables[self.set, each] for each in self._features)
        pairs = zip(images.blocks(_BLOCK), texts.blocks(_BLOCK), strict=True)
        scores = self.config.scale * torch.cat([cosines(some, their) for some, their in pairs])
        return scores.clamp(min=0) if self.config.clamp == "pictures" else scores

    def measure(self, measured: Measured) -> list[Value]:
        (found,) = super().measure(measured)
        return [_not_negative(found) if self.config.clamp == "mean" else found]


def _with_preset(given: Mapping[str, Any]) -> Mapping[str, Any]:
    preset = given.get("preset")
    if preset is None:
        if not {"model", "pretrained"} <= given.keys():
            raise ValueError(f"give a preset ({', '.join(PRESETS)}), or model and pretrained")
        return given
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}; {nearest(str(preset), PRESETS)}")
    decided = PRESETS[preset]
    if others := [name for name in decided if given.get(name, decided[name]) != decided[name]]:
        raise ValueError(f"preset {preset} says what {' and '.join(others)} is: leave out the one or the other")
    return {**decided, **given}


def _not_negative(found: Value) -> Value:
    interval = None if found.interval is None else (max(found.interval[0], 0.0), max(found.interval[1], 0.0))
    return found._replace(value=max(found.value, 0.0), interval=interval)

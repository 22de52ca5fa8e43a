"""How different the pictures of one prompt are from each other, by DINOv2: few-step students lose this first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.evaluation.metrics.base import Heading, Measured, Metric, Needs, Unavailable, Value, feature
from fastgen.evaluation.metrics.picture_scores import mean_value

CLS = feature("dinov2", "cls", resize="torch")  # as FD-DINOv2 has it, so that one network makes both
_GROUPS = 256  # prompts that are read at a time


class DinoDiversity(Metric):
    """Mean over prompts of the mean of 1 - cosine over all pairs of that prompt's pictures, of the class token of dinov2-large."""

    shows = {"dino_diversity": Heading("DINO diversity", "", 3)}  # noqa: RUF012
    convention = "mean over prompts of mean pairwise 1 - cos of DINOv2 ViT-L/14 class tokens of pictures of the same prompt"

    def needs(self) -> Needs:
        return Needs({self.set: (CLS,)})

    def scores(self, measured: Measured) -> dict[str, Tensor]:
        """For each picture, the mean of its 1 - cosine to the others of its prompt."""
        size = measured.sets[self.set].per_prompt
        if size < 2:
            raise Unavailable(f"needs several pictures of each prompt: give the set {self.set} per_prompt: 2 or more")
        blocks = measured.tables[self.set, CLS].blocks(_GROUPS * size)
        return {"dino_diversity": torch.cat([mean_distances(block.unflatten(0, (-1, size))).flatten() for block in blocks])}

    def measure(self, measured: Measured) -> list[Value]:
        return [mean_value("dino_diversity", self.scores(measured)["dino_diversity"], measured.sets[self.set])]


def mean_distances(features: Tensor) -> Tensor:
    """(G, n) fp64 of features (G, n, D) of G prompts: each one's mean 1 - cosine to the n - 1 others of its prompt."""
    directions = normalize(features.double(), dim=-1)
    cosines = directions @ directions.transpose(1, 2)
    others = cosines.sum(2) - cosines.diagonal(dim1=1, dim2=2)
    return 1 - others / (features.shape[1] - 1)

"""ImageReward (Xu et al. 2023, arXiv:2304.05977), whose package pins versions of timm and transformers that cannot live in our environment."""

from __future__ import annotations

from fastgen.evaluation.metrics.base import Heading
from fastgen.evaluation.metrics.external_process import ExternalMetric


class ImageReward(ExternalMetric):
    """Mean over pictures of the reward for picture and prompt, as an external program computes it."""

    shows = {"image_reward": Heading("ImageReward", "↑", 3)}  # noqa: RUF012
    install = "pip install image-reward there"
    convention = "mean over pictures of the score that an external program gives picture and prompt"

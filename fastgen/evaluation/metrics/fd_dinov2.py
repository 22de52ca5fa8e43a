"""FD-DINOv2: the Fréchet distance of DINOv2 features (Stein et al. 2023, arXiv:2306.04675), as EDM2 measures it. It is no FID."""

from __future__ import annotations

from typing import Literal

from fastgen.evaluation.frechet import Gaussian
from fastgen.evaluation.metrics.base import Feature, Heading, Measured, Needs, Options, Table, Unavailable, feature
from fastgen.evaluation.metrics.frechet_metric import CONVENTION, FrechetMetric


class FdDinov2(FrechetMetric):
    """Fréchet distance to the reference of the class token of dinov2-large (1024)."""

    class Config(Options):
        """resize: `torch`, as EDM2 and its reference statistics have it, or `pil`, as dgm-eval."""

        set: str | None = None
        resize: Literal["torch", "pil"] = "torch"

    shows = {"fd_dinov2": Heading("FD-DINOv2", "↓")}  # noqa: RUF012
    convention = f"squared Frechet distance of Gaussian fits of DINOv2 ViT-L/14 class tokens at 224x224, {CONVENTION}"

    def needs(self) -> Needs:
        return Needs({self.set: (self._cls,)}, reference=(self._cls,))

    @property
    def _cls(self) -> Feature:
        return feature("dinov2", "cls", resize=self.config.resize)

    def sides(self, measured: Measured) -> tuple[Table, Gaussian]:
        table, real = measured.tables[self.set, self._cls], measured.real().statistics(self._cls)
        if min(len(table), 2 if real.n is None else real.n) < 2:
            raise Unavailable(f"needs two generated and two reference pictures or more, there are {len(table)} and {real.n}")
        if len(real.mean) != table.width:
            raise Unavailable(f"the reference has {len(real.mean)} features a picture, DINOv2's have {table.width}: it is of another extractor")
        return table, real

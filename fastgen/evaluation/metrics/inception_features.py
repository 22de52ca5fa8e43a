"""What metrics on Inception features have in common: their options, their feature, and names for when the network is another than FID's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from fastgen.evaluation.frechet import Gaussian
from fastgen.evaluation.metrics.base import Feature, Measured, Metric, Needs, Table, Unavailable, feature


class InceptionOptions(Metric.Config):
    """Those of extractor `inception`, where they are explained. With `weights`, and their `sha256`, the network is another than FID's, and so
    are the rows' names."""

    resize: Literal["tf1", "clean", "pytorch_fid"] = "tf1"
    dtype: Literal["fp32", "fp64"] = "fp32"
    weights: str | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _known(self) -> InceptionOptions:
        if (self.weights is None) != (self.sha256 is None):
            raise ValueError("weights of one's own need both weights and sha256")
        return self


class InceptionMetric(Metric):
    """A metric of one layer's features. others: for each name in `shows`, what the row is called where weights are not FID's, of which the hash
    becomes a part: nothing that is not FID is called FID."""

    Config = InceptionOptions
    others: ClassVar[Mapping[str, str]]
    layer: ClassVar[str] = "pool3"
    extra: ClassVar[Mapping[str, Any]] = {}  # options of the extractor that the metric itself sets
    config: Any

    @property
    def feature(self) -> Feature:
        return self.feature_of(self.layer)

    def feature_of(self, layer: str) -> Feature:
        options = {"resize": self.config.resize, "dtype": self.config.dtype, **self.extra}
        if self.config.weights is not None:
            options |= {"weights": self.config.weights, "sha256": self.config.sha256}
        return feature("inception", layer, **options)

    def called(self, name: str) -> str:
        return name if self.config.sha256 is None else f"{self.others[name]}_{self.config.sha256[:8]}"

    @property
    def rows(self) -> Sequence[str]:
        return tuple(map(self.called, self.shows))

    def needs(self) -> Needs:
        return Needs({self.set: (self.feature,)}, reference=(self.feature,))

    def generated(self, measured: Measured) -> Table:
        return measured.tables[self.set, self.feature]

    def statistics(self, measured: Measured) -> Gaussian:
        """The reference's; Unavailable unless it and the generated pictures suffice for a covariance and have the same features."""
        table, real = self.generated(measured), measured.real().statistics(self.feature)
        require(2, "images", len(table), real.n)
        if table.width != real.mean.numel():
            raise Unavailable(f"the reference's statistics are of {real.mean.numel()} numbers a picture, the generated pictures' of {table.width}")
        return real


def require(fewest: int, what: str, generated: int, real: int | None = None) -> None:
    """Unavailable where there are fewer generated or real images."""
    if min(generated, generated if real is None else real) < fewest:
        raise Unavailable(f"needs at least {fewest} {what}, got {generated} generated{'' if real is None else f' and {real} real'} ones")

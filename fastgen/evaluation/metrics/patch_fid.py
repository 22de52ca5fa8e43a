"""Patch-FID: FID of what high resolutions show, the central pixels (Lin et al. 2024, SDXL-Lightning, arXiv:2402.13929; DMD2)."""

from __future__ import annotations

from typing import Literal

from fastgen.evaluation.metrics.base import Heading, Measured, Needs, Unavailable, Value
from fastgen.evaluation.metrics.fid import Fid
from fastgen.evaluation.metrics.inception_features import InceptionOptions


class PatchFid(Fid):
    """FID of the central 299 x 299 pixels of pictures as they were drawn, before the protocol resizes them, as DMD2's evaluation has it.

    Unavailable where a generated picture is smaller: DMD2 resizes those whole, which would be FID. Smaller real ones are resized whole.
    """

    class Config(InceptionOptions):
        resize: Literal["tf1", "clean", "pytorch_fid"] = "clean"  # of real pictures that are smaller than a patch

    shows = {"patch_fid": Heading("patch-FID", "↓")}  # noqa: RUF012
    others = {"patch_fid": "fd_inception_patch"}  # noqa: RUF012
    extra = {"crop": 299}  # noqa: RUF012
    convention = f"central 299x299 pixels of pictures as drawn, smaller real ones resized whole; {Fid.convention}"

    def needs(self) -> Needs:
        return Needs({self.set: (self.feature, self.feature_of("cropped"))}, reference=(self.feature,))

    def measure(self, measured: Measured) -> list[Value]:
        cropped = measured.tables[self.set, self.feature_of("cropped")]
        if small := len(cropped) - sum(int(block.sum()) for block in cropped.blocks()):
            raise Unavailable(f"needs pictures of 299x299 pixels or more, {small} of {len(cropped)} are smaller")
        return super().measure(measured)

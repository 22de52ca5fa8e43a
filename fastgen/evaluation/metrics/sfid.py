"""sFID: FID of features that still know where in the picture they are (Nash et al. 2021, arXiv:2103.03841)."""

from __future__ import annotations

from fastgen.evaluation.metrics.base import Heading
from fastgen.evaluation.metrics.fid import Fid


class Sfid(Fid):
    """Fréchet distance of `spatial` features, as ADM's evaluator has them: 7 channels on 17 x 17 places.

    Unchecked until it has been measured with the real weights against ADM's numbers: see `extractors/inception.py`.
    """

    shows = {"sfid": Heading("sFID (unchecked)", "↓")}  # noqa: RUF012
    others = {"sfid": "fd_inception_spatial"}  # noqa: RUF012
    layer = "spatial"
    convention = f"first 7 channels of mixed_6/conv on 17x17, unchecked against ADM's numbers; {Fid.convention}"

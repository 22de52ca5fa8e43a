"""Means and covariances of features in files: those of EDM, pytorch-fid, clean-fid and ADM (`.npz`), EDM2's (`.pkl`), and our own, which say
what they are of."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastgen import records
from fastgen.errors import UserError
from fastgen.evaluation.archives import Archive
from fastgen.evaluation.extractors.base import Feature
from fastgen.evaluation.frechet import Gaussian, GaussianFit
from fastgen.evaluation.plain_pickle import read_plain_pickle
from fastgen.files import write_atomically

_PAIRS = {"mu": "sigma", "mu_s": "sigma_s"}  # of an npz; ADM's second one is of the spatial layer
_PICKLED = {"inception": "fid", "dinov2": "fd_dinov2"}  # by extractor, EDM2's names
_WIDEST = 2**14  # dimensions; the covariance of more would take 2 GiB
_ASYMMETRY = 1e-5  # of the largest entry: what fp32 sums leave
_CONVENTIONS = "fastgen"  # the key of our own


class Stated(records.Schema):
    """What our own statistics are of. hash: of the extractor; pictures: of the real pictures."""

    extractor: str
    layer: str
    options: dict[str, Any]
    hash: str
    prepare: dict[str, Any]
    pictures: str | None


class _Raw(NamedTuple):
    mu: np.ndarray
    sigma: np.ndarray
    n: int | None


class StatisticsFile:
    """A file of statistics, opened: its arrays are read when they are asked for. UserError where it holds none, or is a pickle and
    `allow_pickle` is not set. stated: what it says of itself, None of files that others have written."""

    def __init__(self, path: Path, key: str, *, allow_pickle: bool = False) -> None:
        self.path, self.key = path, key
        self.stated: dict[str, Any] | None = None
        self._entries = self._of_pickle(allow_pickle) if path.suffix.lower() in (".pkl", ".pickle") else self._of_archive(Archive(path))
        if not self._entries:
            raise UserError(f"{key}: {str(path)!r} holds no statistics, which are mu and sigma")

    def fit(self, of: Feature) -> GaussianFit | None:
        """What the file knows of a feature, as far as it can tell; None where it is of another one. UserError where that is no Gaussian."""
        entry = self._entry(of)
        if entry is None:
            return None
        raw = self._entries[entry]()
        return GaussianFit(*_checked(raw, f"{self.key}: {str(self.path)!r}: {entry}"), raw.n, str(self.path))

    def _entry(self, of: Feature) -> str | None:
        """Of whole pictures are the statistics that others publish, by FID's own network and its pool3 unless they say something else."""
        if self.stated is not None:
            return "mu"
        special = any(dict(of.options).get(option) is not None for option in ("crop", "weights"))
        if of.extractor == "inception" and (special or of.layer not in ("pool3", "spatial")):
            return None
        if self.path.suffix.lower() == ".npz":
            entry = "mu_s" if of.layer == "spatial" else "mu"
        else:
            entry = None if of.layer == "spatial" else _PICKLED.get(of.extractor)
        return entry if entry in self._entries else None

    def _of_archive(self, archive: Archive) -> dict[str, Callable[[], _Raw]]:
        found = archive.members
        for mean, cov in _PAIRS.items():
            if (mean in found) != (cov in found):
                there, lacking = (mean, cov) if mean in found else (cov, mean)
                raise UserError(f"{self.key}: {str(self.path)!r} holds {there} but no {lacking}")
        n = int(archive.array("n")) if "n" in found and found["n"].shape == () and found["n"].dtype.kind in "iu" else None
        if _CONVENTIONS in found:
            try:
                self.stated = records.parse(str(archive.array(_CONVENTIONS)), Stated)
            except ValueError as error:
                raise UserError(f"{self.key}: cannot read {str(self.path)!r}: its conventions are {error}") from error

        def reader(mean: str, cov: str) -> Callable[[], _Raw]:
            def read() -> _Raw:
                _check_shapes(found[mean].shape, found[cov].shape, f"{self.key}: {str(self.path)!r}: {mean}")  # before memory is asked for
                return _Raw(archive.array(mean), archive.array(cov), n if mean == "mu" else None)

            return read

        return {mean: reader(mean, cov) for mean, cov in _PAIRS.items() if mean in found}

    def _of_pickle(self, allow_pickle: bool) -> dict[str, Callable[[], _Raw]]:
        if not allow_pickle:
            why = "it is a pickle, which can run anything when it is loaded"
            raise UserError(f"{self.key}: {str(self.path)!r} is not read: {why}; --allow-pickle reads the arrays in it, and nothing else")
        content = read_plain_pickle(self.path)
        if not isinstance(content, dict):
            raise UserError(f"{self.key}: {str(self.path)!r} holds no statistics, which are a dict with fid: {{mu, sigma}}")
        count = content.get("num_images")
        n = count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else None
        pairs = {name: each for name, each in content.items() if isinstance(each, dict) and {"mu", "sigma"} <= each.keys()}
        return {str(name): lambda each=each: _Raw(np.asarray(each["mu"]), np.asarray(each["sigma"]), n) for name, each in pairs.items()}


def _check_shapes(mean: tuple[int, ...], cov: tuple[int, ...], where: str) -> None:
    if len(mean) != 1 or cov != (*mean, *mean) or not 0 < mean[0] <= _WIDEST:
        raise UserError(f"{where}: mu of shape {mean} and sigma of shape {cov} are not (D,) and (D, D) of D from 1 to {_WIDEST} features")


def _checked(raw: _Raw, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance in fp64; UserError unless they are those of a Gaussian."""
    _check_shapes(raw.mu.shape, raw.sigma.shape, where)
    if raw.mu.dtype.kind != "f" or raw.sigma.dtype.kind != "f":
        raise UserError(f"{where}: mu and sigma are {raw.mu.dtype} and {raw.sigma.dtype}, not floats")
    mean, cov = (torch.from_numpy(each.astype(np.float64)) for each in (raw.mu, raw.sigma))
    if not bool(mean.isfinite().all() and cov.isfinite().all()):
        raise UserError(f"{where}: it holds NaN or infinity")
    if float((cov - cov.T).abs().max()) > _ASYMMETRY * float(cov.abs().max()):
        raise UserError(f"{where}: sigma is not symmetric, so it is no covariance")
    if float(cov.diagonal().min()) < 0:
        raise UserError(f"{where}: sigma has negative variances, so it is no covariance")
    return mean, cov


def write_statistics(path: Path, fit: Gaussian, stated: Mapping[str, Any]) -> Path:
    """Put statistics with what they are of, a Stated, into an `.npz`, whose mu and sigma pytorch-fid, clean-fid and EDM read as well."""
    content = records.checked(dict(stated), Stated)
    count = {} if fit.n is None else {"n": np.int64(fit.n)}
    buffer = io.BytesIO()
    conventions = {_CONVENTIONS: np.array(json.dumps(content, sort_keys=True))}
    np.savez_compressed(buffer, mu=fit.mean.numpy(), sigma=fit.cov.numpy(), **count, **conventions)  # type: ignore[arg-type]
    return write_atomically(path, buffer.getvalue())

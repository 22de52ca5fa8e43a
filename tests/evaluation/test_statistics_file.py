"""Statistics of features as EDM, pytorch-fid, clean-fid, ADM and EDM2 write them, and our own; nothing that a pickle names is run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgen.errors import UserError
from fastgen.evaluation.extractors.base import feature
from fastgen.evaluation.frechet import FeatureStatistics, Gaussian, GaussianFit, frechet_distance
from fastgen.evaluation.plain_pickle import read_plain_pickle
from fastgen.evaluation.statistics_file import StatisticsFile, write_statistics

POOL, SPATIAL, CLASS_TOKEN = feature("inception", "pool3"), feature("inception", "spatial"), feature("dinov2", "cls")
STATED = {"extractor": "inception", "layer": "pool3", "options": {"resize": "tf1"}, "hash": "ab", "prepare": {}, "pictures": None}


def features(width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(40, width)) @ np.random.default_rng(seed + 1).normal(size=(width, width)) + seed


def moments(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def check(fit: Gaussian | None, rows: np.ndarray, rtol: float = 1e-12) -> None:
    assert fit is not None
    torch.testing.assert_close(fit.mean, torch.from_numpy(rows.mean(0)), rtol=rtol, atol=rtol)
    torch.testing.assert_close(fit.cov, torch.from_numpy(np.cov(rows, rowvar=False)), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])  # EDM and clean-fid, pytorch-fid
def test_means_and_covariances_of_others_are_read(tmp_path: Path, save: Any) -> None:
    rows = features()
    save(tmp_path / "ref.npz", **moments(rows))
    file = StatisticsFile(tmp_path / "ref.npz", "reference.file")
    fit = file.fit(POOL)
    check(fit, rows)
    check(file.fit(CLASS_TOKEN), rows)  # whose file it is nobody can tell
    assert file.stated is None and fit is not None and fit.n is None and fit.origin == str(tmp_path / "ref.npz")
    save(tmp_path / "ref.npz", **{name: each.astype(np.float32) for name, each in moments(rows).items()})
    check(StatisticsFile(tmp_path / "ref.npz", "reference.file").fit(POOL), rows, rtol=1e-5)


def test_a_distance_to_a_file_is_the_distance_to_its_features(tmp_path: Path) -> None:
    real, drawn = torch.from_numpy(features()), torch.from_numpy(features(seed=3))
    np.savez(tmp_path / "ref.npz", **moments(real.numpy()))  # type: ignore[arg-type]
    fit = StatisticsFile(tmp_path / "ref.npz", "reference.file").fit(POOL)
    assert fit is not None
    statistics = FeatureStatistics.from_features(drawn)
    expected = frechet_distance(statistics, FeatureStatistics.from_features(real))
    assert frechet_distance(statistics, fit) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(fit, statistics) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(ValueError, match=r"^feature dimensions differ: 4 and 5 \(.*ref\.npz\)$"):
        frechet_distance(FeatureStatistics.from_features(drawn[:, :4]), fit)


def test_adms_second_pair_is_of_the_spatial_layer(tmp_path: Path) -> None:
    pool, spatial = features(5), features(7, seed=5)
    second = {f"{name}_s": each for name, each in moments(spatial).items()}
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **moments(pool), **second)  # type: ignore[arg-type]
    file = StatisticsFile(tmp_path / "adm.npz", "reference.file")
    check(file.fit(POOL), pool)
    check(file.fit(SPATIAL), spatial)
    np.savez(tmp_path / "edm.npz", **moments(pool))  # type: ignore[arg-type]
    assert StatisticsFile(tmp_path / "edm.npz", "reference.file").fit(SPATIAL) is None


def test_statistics_of_whole_pictures_are_not_those_of_patches_or_other_layers(tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", **moments(features()))  # type: ignore[arg-type]
    file = StatisticsFile(tmp_path / "ref.npz", "reference.file")
    assert file.fit(feature("inception", "pool3", crop=299)) is None
    assert file.fit(feature("inception", "pool3", weights="mine.pth", sha256="0" * 64)) is None  # they are of FID's own network
    assert file.fit(feature("inception", "logits_unbiased")) is None
    assert file.fit(feature("inception", "pool3", crop=None)) is not None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_edm2s_pickle_is_read_where_that_is_allowed(tmp_path: Path, protocol: int) -> None:
    pool, token = features(5), features(3, seed=5)
    content = {"num_images": 40, "fid": moments(pool), "fd_dinov2": moments(token)}
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(
        UserError, match=r"^reference\.file: '.*ref\.pkl' is not read: it is a pickle, .*; --allow-pickle reads the arrays in it, and"
    ):
        StatisticsFile(tmp_path / "ref.pkl", "reference.file")
    file = StatisticsFile(tmp_path / "ref.pkl", "reference.file", allow_pickle=True)
    check(file.fit(POOL), pool)
    check(file.fit(CLASS_TOKEN), token)
    assert (fit := file.fit(POOL)) is not None and fit.n == 40
    assert file.fit(SPATIAL) is None and file.fit(feature("open_clip", "image")) is None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_in_a_pickle_are_numpys(tmp_path: Path, protocol: int) -> None:
    content = {
        "order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i2"),
        "empty": np.zeros((0, 4), np.float32),
        "list": [np.array([True, False]), 1.5, None, "text", b"bytes"],
        "scalar": np.float32(0.25),
        "strided": np.arange(10)[::3],
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    found = read_plain_pickle(tmp_path / "a.pkl")
    for name in ("order", "big", "empty", "strided"):
        assert np.array_equal(found[name], content[name]) and found[name].dtype == content[name].dtype, name
    assert found["list"][0].tolist() == [True, False] and found["list"][1:] == content["list"][1:] and found["scalar"] == 0.25


def test_a_pickle_of_numpy_1_is_read(tmp_path: Path) -> None:
    content = pickle.dumps({"fid": moments(features())}, 2).replace(b"numpy._core.", b"numpy.core.")
    (tmp_path / "old.pkl").write_bytes(content)
    assert b"cnumpy.core.multiarray\n" in content
    check(StatisticsFile(tmp_path / "old.pkl", "x", allow_pickle=True).fit(POOL), features())


class Bomb:
    """Runs when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def test_a_pickle_that_would_run_something_is_refused_without_running_it(tmp_path: Path) -> None:
    import os
    import subprocess

    target = tmp_path / "ran"
    for call, arguments in (
        (os.system, (f"touch {target}",)),
        (open, (str(target), "w")),
        (eval, ("1",)),
        (subprocess.call, (["touch", str(target)],)),
    ):
        bomb = {"num_images": 1, "fid": {**moments(features()), "note": Bomb(call, *arguments)}}
        (tmp_path / "ref.pkl").write_bytes(pickle.dumps(bomb))
        with pytest.raises(UserError, match=r"^the pickle asks for .*, which is no array of numbers; it is not loaded, for that might run anything$"):
            StatisticsFile(tmp_path / "ref.pkl", "reference.file", allow_pickle=True)
        assert not target.exists()


@pytest.mark.parametrize("name", [b"c_codecs\nencode\n", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n"])
def test_a_pickle_cannot_change_what_reads_it(tmp_path: Path, name: bytes) -> None:
    for state in (b"}X\x04\x00\x00\x00noteX\x01\x00\x00\x00xs", b"(N}X\x0c\x00\x00\x00__defaults__)st"):
        (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + name + state + b"b.")  # BUILD: the attributes of what is named
        with pytest.raises(UserError, match=r"^cannot read '.*a\.pkl': "):
            read_plain_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "content",
    [
        np.array([{"a": 1}], dtype=object),  # objects in an array
        np.array(["text"]),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
        np.array(["2026-01-01"], dtype="M8[D]"),
        torch.zeros(2),
        Path("x"),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"fid": content}))
    with pytest.raises(UserError, match=r"^(cannot read '.*a\.pkl': |the pickle asks for )"):
        read_plain_pickle(tmp_path / "a.pkl")


def test_damaged_pickles_are_refused_or_hold_numbers(tmp_path: Path) -> None:
    whole = pickle.dumps({"num_images": 40, "fid": moments(features(3))}, 4)
    draw = np.random.default_rng(0)
    refusals: list[str] = []
    for _ in range(150):
        changed = bytearray(whole)
        changed[int(draw.integers(len(changed)))] = int(draw.integers(256))
        (tmp_path / "a.pkl").write_bytes(bytes(changed[: len(changed) - int(draw.integers(0, 3)) * 7]))
        try:
            fit = StatisticsFile(tmp_path / "a.pkl", "x", allow_pickle=True).fit(POOL)
        except UserError as error:
            refusals.append(str(error))
        else:
            assert fit is None or fit.cov.shape == (len(fit.mean),) * 2
    assert len(refusals) > 50
    assert all(len(refusal.splitlines()) == 1 for refusal in refusals)


def bad(**changes: Any) -> dict[str, Any]:
    return {name: each for name, each in (moments(features(3)) | changes).items() if each is not None}


SKEW = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"mean": np.zeros(3)}, r"reference\.file: '.*' holds no statistics, which are mu and sigma$"),
        (bad(sigma=None), r"reference\.file: '.*' holds mu but no sigma$"),
        (bad(mu=None), r"reference\.file: '.*' holds sigma but no mu$"),
        (
            bad(mu=np.zeros((3, 1))),
            r"reference\.file: '.*': mu: mu of shape \(3, 1\) and sigma of shape \(3, 3\) are not \(D,\) and \(D, D\) of D from 1",
        ),
        (bad(sigma=np.zeros((3, 4))), r".*: mu: mu of shape \(3,\) and sigma of shape \(3, 4\) are not"),
        (bad(mu=np.zeros(4)), r".*: mu: mu of shape \(4,\) and sigma of shape \(3, 3\) are not"),
        (bad(mu=np.zeros(0), sigma=np.zeros((0, 0))), r".*: mu: mu of shape \(0,\)"),
        (bad(mu=np.zeros(3, int)), r".*: mu: mu and sigma are int64 and float64, not floats$"),
        (bad(mu=np.array([0, np.nan, 0])), r".*: mu: it holds NaN or infinity$"),
        (bad(sigma=np.full((3, 3), np.inf)), r".*: mu: it holds NaN or infinity$"),
        (bad(sigma=SKEW), r".*: mu: sigma is not symmetric, so it is no covariance$"),
        (bad(sigma=-np.eye(3)), r".*: mu: sigma has negative variances, so it is no covariance$"),
        (bad(fastgen=np.array("no JSON")), r"reference\.file: cannot read '.*': its conventions are not valid JSON"),
        (bad(fastgen=np.array('{"extractor": "inception"}')), r"reference\.file: cannot read '.*': its conventions are key layer: missing$"),
    ],
)
def test_what_is_no_gaussian_is_refused(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    np.savez(tmp_path / "ref.npz", **content)
    with pytest.raises(UserError, match=f"^{said}"):
        StatisticsFile(tmp_path / "ref.npz", "reference.file").fit(POOL)


def test_a_covariance_that_fp32_sums_have_left_a_little_askew_is_one(tmp_path: Path) -> None:
    content = moments(features(3))
    content["sigma"][0, 1] *= 1 + 1e-6
    np.savez(tmp_path / "ref.npz", **content)  # type: ignore[arg-type]
    assert StatisticsFile(tmp_path / "ref.npz", "x").fit(POOL) is not None


@pytest.mark.parametrize("content", [{"fid": {"mu": 1.0, "sigma": 2.0}}, {"fid": {"mu": "a", "sigma": []}}, {"num_images": 3}, [1, 2], 7])
def test_a_pickle_without_statistics_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError):
        StatisticsFile(tmp_path / "ref.pkl", "reference.file", allow_pickle=True).fit(POOL)


def test_our_own_say_what_they_are_of_and_others_read_them(tmp_path: Path) -> None:
    rows = torch.from_numpy(features())
    fit = FeatureStatistics.from_features(rows)
    path = write_statistics(tmp_path / "new/own.npz", fit, STATED)
    with np.load(path) as theirs:  # as pytorch-fid does: no pickles
        assert np.array_equal(theirs["mu"][:], fit.mean.numpy()) and np.array_equal(theirs["sigma"][:], fit.cov.numpy())
    file = StatisticsFile(path, "reference.file")
    assert file.stated == STATED
    again = file.fit(POOL)
    assert again is not None and again.n == 40 and torch.equal(again.mean, fit.mean) and torch.equal(again.cov, fit.cov)
    unknown = write_statistics(tmp_path / "unknown.npz", GaussianFit(fit.mean, fit.cov), STATED)
    assert (found := StatisticsFile(unknown, "x").fit(POOL)) is not None and found.n is None
    with pytest.raises(ValueError, match="key hash: missing"):
        write_statistics(tmp_path / "no.npz", fit, {key: value for key, value in STATED.items() if key != "hash"})

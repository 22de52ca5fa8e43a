"""results.json says what its numbers depend on, and files of every age are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation import protocol as protocols
from fastgen.evaluation import results
from fastgen.evaluation.extractors.base import Extractor, Pictures, Resources
from fastgen.evaluation.extractors.digits_classifier import DigitsClassifier
from fastgen.evaluation.metrics.base import Heading, Measured, Metric, Needs, Options, Value
from fastgen.evaluation.protocol import Protocol, load_protocol, protocol_from
from fastgen.evaluation.results import Missing, Row, cached, provenance, read_results, write_results
from fastgen.rng import derive_seed

ROWS: list[Row] = [
    Row(name="plain", model="student", value=7.25, n=3594, steps=1, guidance=1.0),
    Row(name="plain", model="teacher", value=5.0, n=3594, std=0.25, std_over="subsets", interval=[4.5, 5.5], interval_over="images"),
]


class Plain(Metric):
    class Config(Options):
        set: str | None = None
        scale: float = 100.0
        file: str = ""

    shows: ClassVar = {"plain": Heading("plain")}

    def needs(self) -> Needs:
        return Needs({})

    def measure(self, measured: Measured) -> list[Value]:
        return []


class Grey(Extractor):
    convention: ClassVar[str] = "the mean of 8-bit levels"

    @property
    def hash(self) -> str:
        return "0" * 64

    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        return {}


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> Protocol:
    monkeypatch.setattr(protocols, "find_metric", lambda name, where="": Plain)
    monkeypatch.setattr(results, "find_extractor", lambda name: Grey)
    sets = {"open": {"prompts": None, "count": 6, "per_prompt": 2, "seed": 3}, "named": {"prompts": None, "count": 4, "first_seed": 100}}
    return protocol_from({"name": "mine", "sets": sets, "quantisation": "truncate", "metrics": {"plain": {"set": "named"}}})


def test_provenance_holds_every_convention_and_hash(protocol: Protocol) -> None:
    models = {"student": {"sha256": "b" * 64, "scheduler": {"_class_name": "EulerDiscreteScheduler", "shift": 3.0}, "stores": {"open": "0123"}}}
    reference = {"kind": "pictures", "sha256": "c" * 64}
    origin = provenance(protocol, model_hash="abc", extractors={"grey": "0" * 64}, reference=reference, models=models)
    assert origin["conventions"] == {
        "quantisation": "truncate: floor(255 y)",
        "prepare": {"crop": "none", "resize": None, "filter": "lanczos"},
        "chunk": 64,
        "seeds": {"open": "derived from ('evaluation', 3, id)", "named": "100 + place in the set"},
        "subset_seed": 0,
        "metrics": {"plain": {"set": "named", "scale": 100.0, "file": ""}},
        "extractors": {"grey": "the mean of 8-bit levels"},
    }
    assert origin["prompt_sets"] == {
        "open": {"hash": protocol.sets["open"].hash, "images": 6, "per_prompt": 2},
        "named": {"hash": protocol.sets["named"].hash, "images": 4, "per_prompt": 1},
    }
    assert (origin["extractors"], origin["reference"], origin["models"]) == ({"grey": "0" * 64}, reference, models)
    assert (origin["protocol_hash"], origin["model_hash"], origin["threads"]) == (protocol.hash(), "abc", torch.get_num_threads())
    assert torch.__version__.startswith(origin["versions"]["torch"]) and origin["versions"]["pillow"]
    assert origin["device"] and origin["platform"] and origin["date"].endswith("+00:00")
    assert (origin["batch_size"], provenance(protocol, batch_size=3)["batch_size"]) == (protocol.spec.batch_size, 3)
    assert json.loads(json.dumps(origin)) == origin


def test_no_folder_of_this_machine_is_written(protocol: Protocol, tmp_path: Path) -> None:
    """Not with what a user has said, nor with why something is missing."""
    place = tmp_path / "some user"
    protocol.spec.metrics["plain"] = {"set": "named", "file": str(place / "weights.pth")}
    models = {"student": {"call": {"file": str(place / "a.json"), "negative_prompt_2": "/imagine a"}}}
    reference = {"stated": {"pictures": str(place / "real")}}
    origin = provenance(protocol, extractors={f"grey(weights={tmp_path}/grey.pth)": "0" * 64}, reference=reference, models=models)
    reason = f"'{place}/mine.yaml': reference.file: no file '{place}/a.npz': get it from https://example.org/a/b.npz"
    written = write_results(tmp_path / "results.json", "mine", ROWS, origin, missing=[Missing(name="fid", model="", reason=reason)])
    assert str(tmp_path) not in (tmp_path / "results.json").read_text()
    assert written["missing"][0]["reason"] == "'mine.yaml': reference.file: no file 'a.npz': get it from https://example.org/a/b.npz"
    assert written["provenance"]["models"]["student"]["call"] == {"file": "a.json", "negative_prompt_2": "/imagine a"}
    assert written["provenance"]["conventions"]["metrics"]["plain"]["file"] == "weights.pth"
    assert list(written["provenance"]["extractors"]) == ["grey(weights=grey.pth)"]


def test_seeds_follow_the_rule_that_is_written(protocol: Protocol) -> None:
    assert protocol.sets["open"].seeds == tuple(derive_seed("evaluation", 3, id) for id in range(6))
    assert protocol.sets["named"].seeds == (100, 101, 102, 103)


def test_results_round_trip_with_what_is_missing(tmp_path: Path) -> None:
    path, missing = tmp_path / "student" / "results.json", [Missing(name="fid", model="student", reason="needs weights")]
    written = write_results(path, "mine", ROWS, {"threads": 2}, missing=missing, stop_after=64)
    assert written == read_results(path)
    assert written == {"protocol": "mine", "metrics": ROWS, "missing": missing, "provenance": {"threads": 2}, "partial": {"stop_after": 64}}
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    assert "partial" not in write_results(path, "mine", ROWS, {})


def test_files_without_the_newer_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    old = {"protocol": "digits", "metrics": [{"name": "fd_digits", "model": "student", "value": 7}], "provenance": {"classifier_hash": "x"}}
    path.write_text(json.dumps(old))
    assert read_results(path) == old


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"missing": [{"name": "fid", "model": "student"}]}, r"key missing\.0\.reason: missing"),
        ({"missing": {}}, "key missing: must be a list"),
        ({"partial": {"stop_after": "64"}}, r"key partial\.stop_after: must be a whole number"),
        ({"metrics": [{**ROWS[1], "interval": [1.0]}]}, r"key metrics\.0\.interval"),
        ({"metrics": [{**ROWS[1], "interval": [1.0, None]}]}, r"key metrics\.0\.interval\.1: must be a number"),
        ({"metrics": [{**ROWS[1], "value": "7"}]}, r"key metrics\.0\.value: must be a number"),
        ({"provenance": []}, "key provenance: must be a JSON object"),
    ],
)
def test_a_damaged_key_is_named(tmp_path: Path, more: dict[str, object], message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"protocol": "mine", "metrics": ROWS, "provenance": {}} | more))
    with pytest.raises(UserError, match=rf"results\.json.*{message}"):
        read_results(path)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"metrics": []}'])
def test_something_else_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"results\.json") as caught:
        read_results(path)
    assert "\n" not in str(caught.value)


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, "mine", ROWS, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(path, "mine", [Row(name="plain", model="student", value=float("nan"), n=1)], {})
    assert read_results(path)["metrics"] == ROWS
    assert len(list(tmp_path.iterdir())) == 1


def test_provenance_of_digits_has_the_classifiers_hash() -> None:
    digits, extractor = load_protocol("digits"), DigitsClassifier(DigitsClassifier.Config(), Resources())
    origin = provenance(digits, model_hash="abc", extractors={"digits_classifier": extractor.hash})
    assert origin["extractors"]["digits_classifier"].startswith("38457468c6f7f032")  # of the weights that published numbers were made with
    assert origin["conventions"]["extractors"]["digits_classifier"] == DigitsClassifier.convention != ""
    assert {name: each["images"] for name, each in origin["prompt_sets"].items()} == {"named": 1797, "open": 1797}


def test_cache_computes_once_for_each_key(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute(name: str) -> list[Row]:
        calls.append(name)
        return [Row(name=name, model="teacher", value=1.5, n=3)]

    for name in ("a", "a", "b", "a"):
        assert cached(name, lambda name=name: compute(name), folder=tmp_path) == [Row(name=name, model="teacher", value=1.5, n=3)]
    assert calls == ["a", "b"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(hashlib.sha256(key.encode()).hexdigest() for key in "ab")


def test_one_flipped_bit_is_computed_again(tmp_path: Path) -> None:
    cached("a", lambda: ROWS, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for at in range(content.index(b"7.25"), content.index(b"7.25") + 4):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.warns(UserWarning, match="computing them again"):
            assert cached("a", lambda: ROWS, folder=tmp_path) == ROWS


def test_without_a_home_the_rows_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="could not be cached"):
        assert cached("a", lambda: ROWS) == ROWS


@pytest.mark.parametrize("content", ['{"key": "a", "rows"', '{"key": "other", "rows": []}', "[]", b"\xff\xfe\x00"])
def test_a_corrupted_entry_is_computed_again_and_replaced(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / f"{hashlib.sha256(b'a').hexdigest()}.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="computing them again"):
        assert cached("a", lambda: ROWS, folder=tmp_path) == ROWS
    assert cached("a", lambda: pytest.fail("the entry was not replaced"), folder=tmp_path) == ROWS


def test_a_cache_that_cannot_be_written_does_not_lose_the_rows(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="could not be cached"):
        assert cached("a", lambda: ROWS, folder=tmp_path / "file" / "below") == ROWS


def test_the_default_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    cached("a", lambda: ROWS)
    assert len(list((tmp_path / ".cache/fastgen/results").glob("*.json"))) == 1

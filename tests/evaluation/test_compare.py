"""Two results files beside each other, through the command's own function: paired where the stores are there, said so where they are not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from fastgen import cli
from fastgen.errors import UserError
from fastgen.evaluation import protocol as protocols
from fastgen.evaluation import versions
from fastgen.evaluation.compare import Side, Sources, compare, unpaired
from fastgen.evaluation.compare_table import comparison_table
from fastgen.evaluation.extraction import Extractors, stored_name
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.intervals import mean_interval
from fastgen.evaluation.metrics.base import Heading, Measured, Metric, Needs, Value, feature
from fastgen.evaluation.protocol import Protocol, protocol_from
from fastgen.evaluation.references import load_reference
from fastgen.evaluation.results import Row, model_key, provenance, write_results
from fastgen.evaluation.settings import Settings
from fastgen.evaluation.store import Store
from fastgen.progress import Progress

COUNT, HASH = 64, "5" * 64
FEATURE = feature("digits_classifier", "features")


class Brightness(Metric):
    """The mean of a score of each picture, and, measured again, its standard deviation."""

    shows: ClassVar = {"brightness": Heading("brightness", "↑", 3), "contrast": Heading("contrast", "", 3)}

    def needs(self) -> Needs:
        return Needs({"main": (FEATURE,)})

    def measure(self, measured: Measured) -> list[Value]:
        rows = measured.tables["main", FEATURE].read().double()
        mean = mean_interval(rows.flatten())
        over = "images"
        return [Value("brightness", mean.value, len(rows), mean.std, over, mean.interval, over), Value("contrast", float(rows.std()), len(rows))]

    def scores(self, measured: Measured) -> dict[str, Tensor]:
        return {"brightness": measured.tables["main", FEATURE].read().double().flatten()}


class NeedsReference(Metric):
    shows: ClassVar = {"distance": Heading("distance", "↓", 2)}

    def needs(self) -> Needs:
        return Needs({"main": (FEATURE,)}, reference=(FEATURE,))

    def measure(self, measured: Measured) -> list[Value]:
        return [Value("distance", float(measured.tables["main", FEATURE].read().mean() - measured.real().statistics(FEATURE).mean), COUNT)]


class ToTeacher(Metric):
    shows: ClassVar = {"gap": Heading("gap", "↓", 3)}

    def needs(self) -> Needs:
        return Needs({"main": (FEATURE,)}, teacher=True)

    def measure(self, measured: Measured) -> list[Value]:
        return [Value("gap", float(self.scores(measured)["gap"].mean()), COUNT)]

    def scores(self, measured: Measured) -> dict[str, Tensor]:
        assert measured.teacher is not None
        mine, theirs = (each.tables["main", FEATURE].read().double().flatten() for each in (measured, measured.teacher))
        return {"gap": (mine - theirs).abs()}


KINDS = {"brightness": Brightness, "distance": NeedsReference, "gap": ToTeacher}


@pytest.fixture(autouse=True)
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "find_metric", lambda name, where="": KINDS[name])


def protocol(**changed: Any) -> Protocol:
    sets = {"main": {"prompts": None, "count": COUNT, **changed.pop("set", {})}}
    return protocol_from(content(sets=sets, **changed))


def content(**changed: Any) -> dict[str, Any]:
    """Of a protocol file."""
    sets = {"main": {"prompts": None, "count": COUNT}}
    return {"name": "mine", "sets": sets, "metrics": {"brightness": None, "distance": None}, "chunk": 16, **changed}


def scores(shift: float, seed: int) -> Tensor:
    """(COUNT, 1); those of two seeds correlate by 0.9, for they share what an id's prompt and noise decide."""
    shared, own = (torch.randn(COUNT, 1, generator=torch.Generator().manual_seed(each)) for each in (99, seed))
    return shift + math.sqrt(0.9) * shared + math.sqrt(0.1) * own


def stored(folder: Path, rows: Tensor, of: Protocol) -> Store:
    store = Store(folder, len(rows), of.sets["main"].chunk)
    for chunk in store.chunks:
        ids = store.ids(chunk)
        store.write(chunk, {stored_name(FEATURE, HASH): rows[ids.start : ids.stop]}, {})
    return store


def written(folder: Path, rows: Tensor, of: Protocol | None = None, *, distance: float = 3.0, steps: int = 4, **changed: Any) -> Path:
    """A results file of pictures with these features, and the store of them."""
    of = of or protocol()
    store = stored(folder.parent / f"store-{folder.name}", rows, of)
    mean = mean_interval(rows.flatten())
    assert mean.std is not None and mean.interval is not None
    about = {"model": "student", "steps": steps, "n": len(rows)}
    metrics: list[Any] = [
        {"name": "brightness", "value": mean.value, "std": mean.std, "std_over": "images", "interval": list(mean.interval), **about},
        {"name": "contrast", "value": float(rows.double().std()), **about},
        {"name": "distance", "value": distance, "std": 0.5, "std_over": "bootstrap", **about},
        {"name": "seconds_per_1000_images", "value": 250.0 * steps, **about},
    ]
    models = {"student": {"stores": {"main": store.folder.name}}}
    origin = provenance(of, extractors={FEATURE.source: HASH}, models=models) | changed.pop("origin", {})
    path = folder / "results.json"
    write_results(path, of.name, metrics, origin, **changed)
    return path


def compared(a: Path, b: Path, *, of: Protocol | None = None, **options: Any) -> dict[str, Any]:
    """With stores beside the two folders."""
    return compare(a, b, Sources(of or protocol(), Settings(a.parent.parent)), **options)


def lines(comparison: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    (pair,) = comparison["pairs"]
    return {line["name"]: line for line in pair["differences"]}


def half(line: Mapping[str, Any]) -> float:
    return (line["interval"][1] - line["interval"][0]) / 2


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return written(tmp_path / "a", scores(0.0, 1)), written(tmp_path / "b", scores(0.2, 2), distance=2.5)


def test_stores_pair_the_ids_and_shrink_the_interval(pair: tuple[Path, Path]) -> None:
    found = lines(compared(*pair, resamples=300))
    d = (scores(0.2, 2) - scores(0.0, 1)).double().flatten()
    brightness = found["brightness"]
    assert brightness["difference"] == pytest.approx(float(d.mean()), rel=1e-6)
    assert brightness["interval_over"] == "bootstrap" and brightness["n"] == COUNT
    assert half(brightness) == pytest.approx(1.96 * float(d.std()) / 8, rel=0.12)
    assert brightness["interval"][0] < 0.2 < brightness["interval"][1]
    rows = [json.loads(path.read_text())["metrics"][0] for path in pair]
    apart = unpaired(*rows).interval
    assert apart is not None and half(brightness) < 0.5 * (apart[1] - apart[0]) / 2
    assert found["contrast"]["interval_over"] == "bootstrap" and 0 < half(found["contrast"]) < 0.5
    assert "interval" not in found["seconds_per_1000_images"]


def test_a_metric_that_lacks_something_is_unpaired_and_says_why(pair: tuple[Path, Path]) -> None:
    comparison = compared(*pair)
    line = lines(comparison)["distance"]
    half_of_each = 1.959963984540054 * 0.5
    assert (line["difference"], line["interval_over"]) == (-0.5, "unpaired")
    assert line["interval"] == pytest.approx([-0.5 - math.sqrt(2) * half_of_each, -0.5 + math.sqrt(2) * half_of_each], rel=1e-12)
    assert comparison["pairs"][0]["notes"][0].startswith("distance: not paired: needs reference pictures")


def test_unpaired_intervals_reach_as_far_as_their_sides_do() -> None:
    """Zou & Donner 2008, eq. 4, by hand: a = 10 in [9, 13], b = 20 in [16, 22]: 10 - sqrt(3^2 + 4^2) and 10 + sqrt(1^2 + 2^2)."""
    a, b = {"value": 10.0, "interval": [9.0, 13.0]}, {"value": 20.0, "interval": [16.0, 22.0]}
    assert unpaired(a, b) == (10.0, (pytest.approx(5.0), pytest.approx(10 + math.sqrt(5))), "unpaired")
    assert unpaired(a, {"value": 20.0}).interval is None
    assert unpaired(a, {"value": 20.0, "std": 3.0, "std_over": "images"}).interval is None  # of single scores: no error of their mean


@pytest.mark.parametrize("damage", ["gone", "truncated", "flipped", "protocol", "unsaid", "other"])
def test_without_sound_stores_the_rows_own_intervals_serve(pair: tuple[Path, Path], damage: str) -> None:
    store, said = pair[1].parent.parent / "store-b", ""
    sources = Sources(protocol(), Settings(store.parent))
    (array,) = store.glob("*.npy")
    if damage == "gone":
        store.rename(store.with_name("elsewhere"))
        said = f"the features of '{pair[1]}' are not in '{store}' (--store)"
    elif damage == "truncated":
        array.write_bytes(array.read_bytes()[:-4])
        said = "lacks 4 of 4 chunks"
    elif damage == "flipped":
        damaged = bytearray(array.read_bytes())
        damaged[-1] ^= 1
        array.write_bytes(damaged)
        said = "lacks 1 of 4 chunks"
    elif damage == "protocol":

        def unreadable() -> Protocol:
            raise UserError("no file 'mine.yaml'")

        sources, said = Sources.of(unreadable, Settings(store.parent), Resources()), "nothing is paired: no file 'mine.yaml'"
    elif damage == "unsaid":
        record = json.loads(pair[1].read_text())
        record["provenance"]["models"] = {}
        pair[1].write_text(json.dumps(record))
        said = f"'{pair[1]}' does not say where the features of its pictures are"
    else:
        record = json.loads(pair[1].read_text())
        record["provenance"]["models"]["student"]["stores"]["main"] = "store-a"
        pair[1].write_text(json.dumps(record))
        said = "gives brightness other values than the files"
    comparison = compare(*pair, sources)
    line = lines(comparison)["brightness"]
    expected = unpaired(*(json.loads(path.read_text())["metrics"][0] for path in pair))
    assert expected.interval is not None
    assert (line["interval_over"], line["interval"]) == ("unpaired", pytest.approx(list(expected.interval), rel=1e-12))
    assert "interval" not in lines(comparison)["contrast"]
    assert said in " ".join(comparison["pairs"][0]["notes"])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": "yours"}, "protocol: mine / yours"),
        ({"quantisation": "truncate"}, "quantisation: edm: floor(255 y + 0.5) / truncate: floor(255 y)"),
        ({"prepare": {"resize": 256}}, "prepare.resize: none / 256"),
        ({"set": {"seed": 7}}, "seeds.main: derived from ('evaluation', 0, id) / derived from ('evaluation', 7, id)"),
        ({"chunk": 32}, "chunk: 16 / 32"),
        ({"seed": 3}, "subset_seed: 0 / 3"),
    ],
)
def test_unlike_protocols_are_refused_with_both_sides_on_one_line(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    a, b = written(tmp_path / "a", scores(0, 1)), written(tmp_path / "b", scores(0, 2), protocol(**changed))
    with pytest.raises(UserError) as caught:
        compared(a, b)
    assert str(caught.value).startswith(f"'{a}' and '{b}' do not measure the same: ")
    assert told in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert f"protocol hash: {protocol().hash()[:8]} / {protocol(**changed).hash()[:8]}" in str(caught.value)


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        ({"extractors": {FEATURE.source: "6" * 64}}, "extractor digits_classifier: 55555555 / 66666666"),
        ({"reference": {"kind": "pictures", "sha256": "7" * 64}}, "reference: 88888888 / 77777777"),
        ({"protocol_hash": None}, "/ not recorded"),
        ({"prompt_sets": {"main": {"hash": "9" * 64, "images": COUNT, "per_prompt": 1}}}, "prompts main.hash: "),
        ({"classifier_hash": "7" * 64}, "classifier: 88888888 / 77777777"),
    ],
)
def test_other_files_behind_the_numbers_are_refused(tmp_path: Path, origin: dict[str, Any], told: str) -> None:
    before = {"reference": {"kind": "pictures", "sha256": "8" * 64}, "classifier_hash": "8" * 64}
    a, b = written(tmp_path / "a", scores(0, 1), origin=before), written(tmp_path / "b", scores(0, 2), origin=before | origin)
    with pytest.raises(UserError, match="do not measure the same") as caught:
        compared(a, b)
    assert told in str(caught.value)


def test_other_counts_and_a_quick_look_are_refused(tmp_path: Path) -> None:
    a = written(tmp_path / "a", scores(0, 1))
    quick = written(tmp_path / "b", scores(0, 2), stop_after=32)
    with pytest.raises(UserError, match="pictures of each set: all / the first 32"):
        compared(a, quick)
    fewer = written(tmp_path / "c", scores(0, 2)[:48])
    with pytest.raises(UserError, match="pictures of brightness: 64 / 48; pictures of contrast: 64 / 48"):
        compared(a, fewer)


def test_two_quick_looks_of_the_same_pictures_are_paired(tmp_path: Path) -> None:
    paths = [written(tmp_path / name, scores(0.0, seed)[:32], stop_after=32) for name, seed in (("a", 1), ("b", 2))]
    assert lines(compared(paths[0], paths[1]))["brightness"]["interval_over"] == "bootstrap"


def test_each_step_count_has_a_store_of_its_own(tmp_path: Path) -> None:
    """Shifted by 0.1 at 1 step, and by 0.5 at 4."""
    paths: list[Path] = []
    for name, shifts in (("a", (0.0, 0.0)), ("b", (0.1, 0.5))):
        files = [written(tmp_path / f"{name}{steps}", scores(shift, 1), steps=steps) for steps, shift in zip((1, 4), shifts, strict=True)]
        one, four = (json.loads(path.read_text()) for path in files)
        one["metrics"] += four["metrics"]
        one["provenance"]["models"] = {model_key("student", steps): {"stores": {"main": f"store-{name}{steps}"}} for steps in (1, 4)}
        files[0].write_text(json.dumps(one))
        paths.append(files[0])
    for pair, shift in zip(compared(*paths)["pairs"], (0.1, 0.5), strict=True):
        line = next(line for line in pair["differences"] if line["name"] == "brightness")
        assert line["interval_over"] == "bootstrap" and line["difference"] == pytest.approx(shift, abs=1e-6)
        assert line["interval"] == pytest.approx([shift, shift], abs=1e-6)  # the same scores but for the shift


def test_a_metric_of_the_teacher_reads_each_files_teacher(tmp_path: Path) -> None:
    of, paths = protocol(metrics={"gap": None}), []
    teacher = stored(tmp_path / "store-t", scores(0.0, 3), of).folder.name
    for name, seed in (("a", 1), ("b", 2)):
        path = written(tmp_path / name, scores(1.0, seed), of)
        record = json.loads(path.read_text())
        value = float((scores(1.0, seed) - scores(0.0, 3)).double().abs().mean())
        row = {"name": "gap", "model": "student", "steps": 4, "n": COUNT, "value": value}
        record["metrics"] = [row]
        paths.append(path)
        path.write_text(json.dumps(record))
        assert compared(path, path, of=of)["pairs"][0]["notes"] == [f"gap: not paired: '{path}' records no teacher"]
        row["against"] = "teacher, 25 steps"
        record["provenance"]["models"]["teacher, 25 steps"] = {"stores": {"main": teacher}}
        record["provenance"]["models"]["teacher, 4 steps"] = {"stores": {"main": "another"}}
        path.write_text(json.dumps(record))
    line = lines(compared(*paths, of=of, resamples=300))["gap"]
    first, second = ((scores(1.0, seed) - scores(0.0, 3)).double().abs().flatten() for seed in (1, 2))
    assert half(line) == pytest.approx(1.96 * float((second - first).std()) / 8, rel=0.12)


def test_features_of_a_reference_are_read_where_the_evaluation_left_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by another version, or on another kind of device, than the evaluation's."""
    (tmp_path / "real").mkdir()
    for index in range(2):
        Image.new("RGB", (8, 8), (90 * index,) * 3).save(tmp_path / f"real/{index}.png")
    of, settings = protocol(reference={"images": str(tmp_path / "real")}), Settings(tmp_path)
    block = of.spec.reference
    assert block is not None
    reference = load_reference(block, Extractors(Resources()), tmp_path, chunk=of.spec.chunk)
    expected = reference.table(FEATURE).read()
    side = Side(tmp_path / "a.json", {"provenance": {"reference": reference.record}}, "student", 4, {})
    monkeypatch.setattr(versions, "FORMAT", 0)
    monkeypatch.setattr(Extractors, "__call__", lambda *_: pytest.fail("extracted again"))
    found = Sources(of, settings).reference(side)
    assert found is not None and torch.equal(found.table(FEATURE).read(), expected)


TEACHER = {"sha256": "a" * 64, "steps": 25, "guidance": 1.5, "scheduler": {"shift": 3.0}, "source": "sd35", "device": "cuda", "stores": {}}


def beside(path: Path, teacher: Mapping[str, Any], *, alone: bool = False) -> Path:
    """The results file with a row that is measured against this teacher, or with no other."""
    record = json.loads(path.read_text())
    key = model_key("teacher", teacher.get("steps"))
    row = {"name": "gap", "model": "student", "steps": 4, "n": COUNT, "value": 0.5, "against": key}
    record["metrics"] = [row, *(each for each in record["metrics"] if not alone or each["name"] == "seconds_per_1000_images")]
    record["provenance"]["models"][key] = teacher
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sha256": "b" * 64}, "teacher's sha256: aaaaaaaa / bbbbbbbb"),
        ({"steps": 50}, "teacher's steps: 25 / 50"),
        ({"guidance": 1.0}, "teacher's guidance: 1.5 / 1.0"),
        ({"scheduler": {"shift": 1.0}}, "teacher's scheduler.shift: 3.0 / 1.0"),
    ],
)
def test_rows_against_different_teachers_are_left_out_and_the_others_compared(pair: tuple[Path, Path], change: dict[str, Any], told: str) -> None:
    paths = beside(pair[0], TEACHER), beside(pair[1], {**TEACHER, **change})
    comparison = compared(*paths)
    assert {"brightness", "contrast", "distance"} <= lines(comparison).keys() and "gap" not in lines(comparison)
    assert f"gap: not compared, for the teachers differ: {told}" in comparison["pairs"][0]["notes"]
    alone = beside(pair[0], TEACHER, alone=True), beside(pair[1], {**TEACHER, **change}, alone=True)
    with pytest.raises(UserError, match=rf"do not measure the same: {re.escape(told)}$"):
        compared(*alone)


@pytest.mark.parametrize("change", [{}, {"source": "mine"}, {"device": "cpu"}, {"stores": {"main": "x"}}, {"revision": "main"}])
def test_the_same_teacher_is_the_same_wherever_it_lies(pair: tuple[Path, Path], change: dict[str, Any]) -> None:
    assert "gap" in lines(compared(beside(pair[0], TEACHER), beside(pair[1], {**TEACHER, **change})))


def test_another_teacher_is_no_matter_where_one_file_alone_is_measured_against_it(pair: tuple[Path, Path]) -> None:
    comparison = compared(beside(pair[0], TEACHER), pair[1])
    assert "b has no gap" in comparison["pairs"][0]["notes"] and "brightness" in lines(comparison)


def test_a_reference_at_hand_must_be_the_files(tmp_path: Path) -> None:
    """Files of one reference may be compared with a protocol that names another: the hash of protocols does not say which."""
    (tmp_path / "real").mkdir()
    for index in range(2):
        Image.new("RGB", (8, 8), (90 * index,) * 3).save(tmp_path / f"real/{index}.png")
    of = protocol(reference={"images": str(tmp_path / "real")})
    paths = [written(tmp_path / name, scores(0, seed), of, origin={"reference": {"sha256": "0" * 64}}) for name, seed in (("a", 1), ("b", 2))]
    (note,) = compared(*paths, of=of)["pairs"][0]["notes"]
    assert note == f"distance: not paired: the protocol's reference is not the one that '{paths[0]}' was measured with: its SHA-256 differs"


def test_the_command_prints_the_table_and_writes_json(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = pair[0].parent.parent
    (root / "mine.yaml").write_text(yaml.safe_dump(content()))
    words = ["evaluate", "--compare", *map(str, pair), "--store", str(root), "--resamples", "20"]
    assert cli.main([*words, "--protocol", str(root / "mine.yaml"), "--output", str(root / "c.json")]) == 0
    out = capsys.readouterr().out
    comparison = compared(*pair, resamples=20)
    assert json.loads((root / "c.json").read_text()) == comparison
    assert out == f"{comparison_table(comparison)}\ncomparison: {root / 'c.json'}\n"
    assert cli.main(words) == 0
    assert "nothing is paired: unknown protocol 'mine' (--protocol)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compare", "A", "missing.json"], "cannot read 'missing.json'"),
        (["--compare", "A", "B", "--protocol", "unheard"], "unknown protocol 'unheard' (--protocol)"),
        (["student", "--compare", "A", "B"], "--compare takes two results files and no model, got 'student' as well"),
        (["--compare", "A"], "requires 2 arguments"),
        (["--compare", "A", "B", "--resamples", "1"], "resamples"),
        ([], "MODEL: missing: name what to measure, or two results files with --compare"),
    ],
)
def test_mistakes_are_one_line(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    files = {"A": str(pair[0]), "B": str(pair[1])}
    assert cli.main(["evaluate", *(files.get(word, word) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


class Heard(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.lines.append(f"{what}: {total}")

    def warn(self, message: str) -> None:
        self.lines.append(message)

    def finish(self) -> None:
        self.lines.append("over")


def test_other_versions_are_a_warning_and_resampling_shows_progress(tmp_path: Path) -> None:
    a = written(tmp_path / "a", scores(0, 1))
    torch_version = json.loads(a.read_text())["provenance"]["versions"]["torch"]
    b = written(tmp_path / "b", scores(0, 2), origin={"versions": {"torch": "1.0"}, "device": "TPU", "batch_size": 3})
    heard = Heard()
    comparison = compared(a, b, resamples=12, progress=heard)
    assert comparison["warnings"] == [f"torch: {torch_version} / 1.0", comparison["warnings"][1], "batch size: 16 / 3"]
    assert comparison["warnings"][1].endswith(" / TPU")
    assert heard.lines == [*(f"the two were measured with another {each}" for each in comparison["warnings"]), "resampling brightness: 12", "over"]


def test_step_counts_are_matched(tmp_path: Path) -> None:
    one, four, other = (written(tmp_path / name, scores(0, 1), steps=steps) for name, steps in (("1", 1), ("4", 4), ("o", 4)))
    assert lines(compared(one, four))["seconds_per_1000_images"]["difference"] == 750.0
    both = json.loads(one.read_text())
    both["metrics"] += json.loads(four.read_text())["metrics"]
    one.write_text(json.dumps(both))
    (pair,) = compared(one, other)["pairs"]
    assert (pair["a"]["steps"], pair["b"]["steps"]) == (4, 4)
    two = written(tmp_path / "2", scores(0, 1), steps=2)
    with pytest.raises(UserError, match=r"has student, 1 step, student, 4 steps and .* has student, 2 steps; measure both with the same --steps"):
        compared(one, two)


def test_teachers_and_real_pictures_are_beside_the_point(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a", scores(0, 1)), written(tmp_path / "b", scores(0, 2))
    for path, value in ((a, 1.0), (b, 2.0)):
        record = json.loads(path.read_text())
        record["metrics"] += [{"name": "contrast", "model": "teacher", "steps": 50, "value": value, "n": COUNT}]
        record["metrics"] += [{"name": "contrast", "model": "real", "value": value, "n": COUNT, "floor": "half"}]
        path.write_text(json.dumps(record))
    comparison = compared(a, b)
    assert len(comparison["pairs"]) == 1 and comparison["pairs"][0]["a"]["model"] == "student"


def test_old_files_are_compared_by_what_they_record(tmp_path: Path) -> None:
    rows = [
        Row(name="fd_digits", model="student", value=7.0, n=1797, steps=1),
        Row(name="prompt_accuracy", model="student", value=0.9, n=1797, steps=1),
    ]
    origin = {"protocol_hash": "1" * 64, "classifier_hash": "2" * 64, "versions": {"torch": "2.13"}}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, value in zip(paths, (7.0, 6.5), strict=True):
        path.write_text(json.dumps({"protocol": "digits", "metrics": [{**rows[0], "value": value}, rows[1]], "provenance": origin}))
    without_count = json.loads(paths[1].read_text())
    del without_count["metrics"][1]["n"]
    paths[1].write_text(json.dumps(without_count))
    comparison = compare(paths[0], paths[1], Sources(None, Settings(tmp_path), reason="not asked for"))
    assert lines(comparison)["fd_digits"] == {"name": "fd_digits", "a": 7.0, "b": 6.5, "difference": -0.5, "n": 1797}
    assert comparison_table(comparison).splitlines() == [
        f"a  {paths[0]}: student, 1 step",
        f"b  {paths[1]}: student, 1 step",
        "metric                 a      b   b - a  95 % of b - a  images",
        "FD-digits ↓         7.00   6.50  -0.500                  1,797",
        "prompt accuracy ↑  0.900  0.900  0.0000                  1,797",
        "nothing is paired: not asked for",
    ]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metrics": []}', '{"protocol": "mine", "metrics": [{}], "provenance": {}}'])
def test_damaged_files_are_named(pair: tuple[Path, Path], content: str) -> None:
    pair[1].write_text(content)
    with pytest.raises(UserError, match=r"cannot read .*b/results\.json") as caught:
        compared(*pair)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damaged", [[], "text", {"student": 3}, {"student": {"stores": {"main": ["x"]}}}])
def test_a_damaged_record_of_stores_is_no_store(pair: tuple[Path, Path], damaged: Any) -> None:
    record = json.loads(pair[0].read_text())
    record["provenance"]["models"] = damaged
    pair[0].write_text(json.dumps(record))
    comparison = compared(*pair)
    assert lines(comparison)["brightness"]["interval_over"] == "unpaired"
    assert "does not say where" in comparison["pairs"][0]["notes"][0]


def test_files_with_nothing_in_common_are_refused(pair: tuple[Path, Path]) -> None:
    record = json.loads(pair[0].read_text())
    pair[0].write_text(json.dumps(record | {"metrics": []}))
    with pytest.raises(UserError, match="no model of the one file goes with one of the other"):
        compared(*pair)


def test_the_table_says_what_each_interval_rests_on(pair: tuple[Path, Path]) -> None:
    record = json.loads(pair[1].read_text())
    record["metrics"] = [row for row in record["metrics"] if row["name"] != "contrast"]
    record["missing"] = [{"name": "contrast", "model": "student", "reason": "needs more"}]
    pair[1].write_text(json.dumps(record))
    text = comparison_table(compared(*pair)).splitlines()
    assert text[:2] == [f"a  {pair[0]}: student, 4 steps", f"b  {pair[1]}: student, 4 steps"]
    assert text[2].split() == ["metric", "a", "b", "b", "-", "a", "95", "%", "of", "b", "-", "a", "images"]
    assert text[-3:-1] == ["95 % intervals of b - a:", "the same pictures' ids drawn again for both, 100 times"] and text[-1].startswith(
        "† from what"
    )
    assert "b has no contrast (needs more)" in text
    print("\n".join(text))

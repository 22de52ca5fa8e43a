"""From pictures to features and rows: chunk by chunk, each picture once, and whatever cannot be measured said in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from synthetic import COSTS, METRICS, Colours, Kept, Painter, evaluation, install, levels, numbers, paint, small
from torch import Tensor

from fastgen.errors import NotFinite, UserError
from fastgen.evaluation import runner
from fastgen.evaluation.extraction import Extractors
from fastgen.evaluation.extractors.base import Feature, Pictures, Resources, feature
from fastgen.evaluation.protocol import Protocol
from fastgen.evaluation.weights import Unavailable
from fastgen.progress import Progress


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


class Warnings(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


def test_every_picture_is_drawn_once_in_chunks_aligned_to_ids(tmp_path: Path):
    """Sets a (ids 0 to 19) and b (20 to 30) in chunks of 8, three at a time."""
    protocol, painter = small({"level": None, "darkest": {"set": "b"}}), Painter()
    measured = evaluation(protocol, tmp_path)
    assert measured.draw(painter)
    sizes = [[3, 3, 2, 3, 3, 2, 3, 1], [3, 3, 2, 3]]
    assert [len(call) for call in painter.calls] == [3, *sizes[0], *sizes[1]]
    assert painter.calls[0] == [0, 1, 2] and painter.ids == list(range(31))
    tried = [(1, ("mean",)), (1, ("levels",))]  # of each metric on the first picture, before anything is kept
    assert Colours.calls == [*tried, (8, ("mean",)), (8, ("mean",)), (4, ("mean",)), (8, ("levels",)), (3, ("levels",))]


def test_rows_are_those_of_the_8_bit_pictures(tmp_path: Path):
    protocol = small({"level": None, "darkest": {"set": "b"}})
    measured = evaluation(protocol, tmp_path)
    measured.draw(Painter())
    level, darkest, *costs = measured.rows()
    assert level == {
        "name": "level",
        "model": "student",
        "value": pytest.approx(float(levels(protocol.sets["a"]).double().mean()), rel=1e-6),
        "n": 20,
        "steps": 1,
        "guidance": 1.5,
    }
    assert (darkest["name"], darkest["value"], darkest["n"]) == ("darkest", float(levels(protocol.sets["b"]).min()), 11)
    assert [(row["name"], row["n"]) for row in costs] == [(name, 31) for name in COSTS]
    assert all(row["value"] > 0 for row in costs)
    assert measured.missing == []


def test_a_set_that_nothing_is_measured_on_is_not_drawn(tmp_path: Path):
    painter = Painter()
    measured = evaluation(small({"level": {"set": "b"}}), tmp_path)
    measured.draw(painter)
    assert painter.ids == list(range(20, 31))


def test_layers_of_one_extractor_are_asked_for_together_and_other_options_apart(tmp_path: Path):
    measured = evaluation(small({"level": None, "darkest": None, "level_again": {"scale": 2.0}}), tmp_path)
    measured.draw(Painter())
    assert Colours.calls[3:] == [call for size in (8, 8, 4) for call in ((size, ("mean", "levels")), (size, ("mean",)))]
    level, _, twice = numbers(measured.rows())
    assert twice["value"] == pytest.approx(2 * level["value"])


def test_pictures_of_one_prompt_are_extracted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Groups of three: a chunk of 8 holds three of them, and a quick look whole ones."""
    seen: list[tuple[str, int]] = []
    call = Colours.__call__

    def watched(self: Colours, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        seen.append(("".join(pictures.prompts), pictures.per_prompt))
        return call(self, pictures, layers)

    monkeypatch.setattr(Colours, "__call__", watched)
    sets = {"a": {"prompts": "fastgen:classes/4", "per_prompt": 3}}
    painter = Painter()
    evaluation(small(sets=sets), tmp_path / "whole").draw(painter)
    assert painter.ids == list(range(12))
    evaluation(small(sets=sets), tmp_path / "quick", stop_after=8).draw(painter)
    assert seen == [("000", 3), ("000111222", 3), ("333", 3), ("000", 3), ("000111", 3)]


@pytest.mark.parametrize(("asked", "drawn"), [(1, (1, 1)), (10, (10, 10)), (12, (12, 11)), (500, (20, 11))])
def test_a_quick_look_draws_the_first_pictures_of_each_set(tmp_path: Path, asked: int, drawn: tuple[int, int]):
    protocol, painter = small({"level": None, "level_again": {"set": "b"}}), Painter()
    measured = evaluation(protocol, tmp_path, stop_after=asked)
    measured.draw(painter)
    assert painter.ids == [*range(drawn[0]), *range(20, 20 + drawn[1])]
    rows = numbers(measured.rows())
    assert [row["n"] for row in rows] == list(drawn)
    for row, name in zip(rows, "ab", strict=True):
        assert row["value"] == pytest.approx(float(levels(protocol.sets[name].head(asked)).double().mean()), rel=1e-6)


def test_pictures_are_handed_on_before_they_are_prepared(tmp_path: Path):
    kept = Kept()
    protocol = small(prepare={"resize": 4, "filter": "box"})
    measured = evaluation(protocol, tmp_path, kept=kept)
    measured.draw(Painter())
    assert torch.equal(kept.pixels, levels(protocol.sets["a"]))
    across = (levels(protocol.sets["a"]).double().unflatten(3, (4, 2)).mean(4) + 0.5).floor()  # Pillow rounds once a direction
    boxes = (across.unflatten(2, (4, 2)).mean(3) + 0.5).floor()
    assert measured.rows()[0]["value"] == pytest.approx(float(boxes.mean()), rel=1e-6)


def test_pictures_of_8_bits_stay_what_they_are(tmp_path: Path):
    protocol = small(quantisation="truncate")
    measured = evaluation(protocol, tmp_path)
    measured.draw(Painter(steps=None, spoil=lambda images, ids: (images * 255 + 0.5).floor().to(torch.uint8)))
    rows = measured.rows()
    assert rows[0]["value"] == pytest.approx(float(levels(protocol.sets["a"]).double().mean()), rel=1e-6)
    assert [row["name"] for row in rows] == ["level"]  # pictures that lay there cost nothing


def nan_at(picture: int) -> Callable[[Tensor, Sequence[int]], Tensor]:
    def spoil(images: Tensor, ids: Sequence[int]) -> Tensor:
        if picture in ids:
            images[list(ids).index(picture), 1, 2, 3] = float("nan")
        return images

    return spoil


def test_a_picture_that_is_none_stops_and_what_was_drawn_stays(tmp_path: Path):
    with pytest.raises(NotFinite, match="1 of 3 images that the generator returned are not finite"):
        evaluation(small(), tmp_path).draw(Painter(spoil=nan_at(12)))
    painter = Painter()
    assert evaluation(small(), tmp_path).draw(painter)
    assert painter.ids == list(range(8, 20))


def failing(calls: Collection[int], value: float | None) -> type[Colours]:
    """An extractor of which some calls give features that are not finite or, where value is None, cannot read their weights; of scale 1
    alone."""

    class Damaged(Colours):
        def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
            made = super().__call__(pictures, layers)
            if self.config.scale == 1 and len(self.calls) in calls:
                if value is None:
                    raise UserError("cannot read 'colours.safetensors': it is damaged")
                made["mean"][[0, -1], 2] = value
            return made

    return Damaged


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_stop_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float):
    install(monkeypatch, failing([3], value))  # of the second chunk
    with pytest.raises(UserError, match=r"^features colours-\w{12}-mean of 2 of 8 pictures are not finite") as caught:
        evaluation(small(), tmp_path).draw(Painter())
    assert "\n" not in str(caught.value) and not isinstance(caught.value, NotFinite)  # the model's pictures are sound
    painter = Painter()
    assert evaluation(small(), tmp_path).draw(painter)
    assert painter.ids == list(range(8, 20))


@pytest.mark.parametrize(
    ("value", "reason"),
    [(float("nan"), "features colours-.*-mean of 1 of 1 pictures are not finite: .*"), (None, r"cannot read 'colours\.safetensors': it is damaged")],
)
def test_damaged_weights_cost_their_own_metrics_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float | None, reason: str):
    install(monkeypatch, failing(range(100), value))
    measured = evaluation(small({"level": None, "level_again": {"scale": 2.0}}), tmp_path)
    measured.draw(Painter())
    assert [row["value"] for row in numbers(measured.rows())] == [pytest.approx(2 * float(levels(small().sets["a"]).double().mean()), rel=1e-6)]
    ((name, model, said),) = [each.values() for each in measured.missing]
    assert (name, model) == ("level", "") and re.fullmatch(reason, str(said))
    with pytest.raises(UserError, match=f"^protocol small: nothing can be measured: level: {reason}$"):
        evaluation(small(), tmp_path).draw(Painter())


def test_weights_that_fail_on_the_reference_cost_their_own_metrics_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, failing(range(100), float("nan")))
    monkeypatch.setitem(METRICS, "to_real_again", METRICS["to_real"])
    (tmp_path / "real").mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8), (60 * index,) * 3).save(tmp_path / "real" / f"{index}.png")
    protocol = small({"to_real": None, "to_real_again": {"scale": 2.0}}, reference={"images": str(tmp_path / "real")})
    measured = evaluation(protocol, tmp_path / "stores")
    measured.draw(Painter())
    (row,) = numbers(measured.rows())
    assert row["value"] == pytest.approx(2 * (0 + 60 + 120) / 3, rel=1e-6)
    assert [each["name"] for each in measured.missing] == ["to_real"]


def test_a_wrong_size_is_refused_after_one_batch(tmp_path: Path):
    painter = Painter(side=9)
    with pytest.raises(UserError, match=r"protocol small measures images of shape \(3, 8, 8\), the model makes \(3, 9, 9\)"):
        evaluation(small(size=[8, 8]), tmp_path).draw(painter)
    assert painter.calls == [[0, 1, 2]] and Colours.calls == []


@pytest.mark.parametrize("size", [[8, 8], None])
@pytest.mark.parametrize("picture", [5, 8, 19])
def test_a_size_that_changes_later_is_refused_too(tmp_path: Path, size: list[int] | None, picture: int):
    def grow(images: Tensor, ids: Sequence[int]) -> Tensor:
        return images if max(ids) < picture else images.repeat(1, 1, 2, 2)

    with pytest.raises(UserError, match=r"\(3, 16, 16\)"):
        evaluation(small({"darkest": None}, size=size), tmp_path).draw(Painter(spoil=grow))
    painter = Painter()
    assert evaluation(small({"darkest": None}, size=size), tmp_path).draw(painter)
    assert painter.ids == list(range(picture // 8 * 8, 20))


def test_a_generator_that_returns_another_number_of_pictures_is_an_error_of_ours(tmp_path: Path):
    with pytest.raises(ValueError, match="returned 2 images for 3 prompts"):
        evaluation(small(), tmp_path).draw(Painter(spoil=lambda images, ids: images[:2]))


def test_what_cannot_be_measured_leaves_the_others(tmp_path: Path):
    said = Warnings()
    metrics = {"level": {"weights": "absent"}, "to_real": None, "darkest": None}
    measured = evaluation(small(metrics), tmp_path, progress=said)
    reasons = {
        "level": "needs colours.safetensors from example.org: put it into a folder and name that with --weights-dir",
        "to_real": "needs reference pictures or statistics: give the protocol a reference, or --images",
    }
    assert measured.missing == [{"name": name, "model": "", "reason": reason} for name, reason in reasons.items()]
    assert said.said == [f"warning: {name} is not measured: {reason}" for name, reason in reasons.items()]
    measured.draw(Painter())
    assert [row["name"] for row in numbers(measured.rows())] == ["darkest"]
    assert len(measured.missing) == 2


def test_nothing_that_can_be_measured_is_refused_before_anything_is_drawn(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"^protocol small: nothing can be measured: level: needs colours\.safetensors.*; to_real: needs ref"
    ) as caught:
        evaluation(small({"level": {"weights": "absent"}, "to_real": None}), tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_metric_that_needs_more_pictures_says_so_of_each_model(tmp_path: Path):
    measured = evaluation(small({"level": {"least": 50}, "darkest": None}), tmp_path)
    for name in ("teacher", "student"):
        measured.draw(Painter(name))
    assert [(row["name"], row["model"]) for row in numbers(measured.rows())] == [("darkest", "teacher"), ("darkest", "student")]
    assert measured.missing == [{"name": "level", "model": name, "reason": "needs 50 pictures, 20 were drawn"} for name in ("teacher", "student")]


def test_the_teachers_pictures_are_those_of_the_same_ids(tmp_path: Path):
    protocol = small({"level": None, "to_teacher": None})
    measured = evaluation(protocol, tmp_path)
    measured.draw(Painter("student", spoil=lambda images, ids: images / 2))
    measured.draw(Painter("teacher", of="e"))
    rows = numbers(measured.rows())
    assert [(row["name"], row["model"]) for row in rows] == [("level", "student"), ("to_teacher", "student"), ("level", "teacher")]
    ours, theirs = ((paint(protocol.sets["a"].seeds) / scale * 255 + 0.5).floor().double().mean((2, 3)) for scale in (2, 1))
    assert rows[1]["value"] == pytest.approx(float((ours - theirs).abs().mean()), rel=1e-6)
    assert measured.missing == []


def test_without_the_teacher_what_needs_it_is_missing(tmp_path: Path):
    measured = evaluation(small({"level": None, "to_teacher": None}), tmp_path)
    measured.draw(Painter())
    assert [row["name"] for row in numbers(measured.rows())] == ["level"]
    assert measured.missing == [{"name": "to_teacher", "model": "student", "reason": "needs the teacher's pictures, which are not measured here"}]


class Real:
    """A reference whose mean is 3, unless it says why it has none: at once, or once its pictures are read."""

    warnings = ("grey pictures",)

    def __init__(self, at_once: str = "", later: str = "") -> None:
        self.at_once, self.later = at_once, later
        self.asked: list[list[Feature]] = []

    def check(self, features: Sequence[Feature]) -> None:
        if self.at_once:
            raise Unavailable(self.at_once)

    def gather(self, features: Sequence[Feature], **_: Any) -> bool:
        self.asked.append(list(features))
        if self.later:
            raise Unavailable(self.later)
        return True

    def statistics(self, of: Feature) -> Any:
        assert of == feature("colours", "mean", scale=1.0, weights="here")
        return SimpleNamespace(mean=torch.tensor([1.0, 2.0, 6.0]))


def with_reference(monkeypatch: pytest.MonkeyPatch, real: Real, metrics: dict[str, Any]) -> Protocol:
    monkeypatch.setattr(runner, "load_reference", lambda *_, **__: real)
    return small(metrics, reference={"images": "photographs"})


def test_a_reference_is_handed_to_what_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, said = Real(), Warnings()
    measured = evaluation(with_reference(monkeypatch, real, {"to_real": None, "level": None}), tmp_path, progress=said)
    assert real.asked == [[feature("colours", "mean", scale=1.0, weights="here")]] and said.said == ["warning: grey pictures"]
    measured.draw(Painter())
    assert measured.rows()[0]["value"] == 3.0 and measured.missing == []


@pytest.mark.parametrize("when", ["at_once", "later"])
def test_a_reference_that_has_not_what_is_asked_leaves_the_other_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str):
    real = Real(**{when: "is of another extractor"})
    measured = evaluation(with_reference(monkeypatch, real, {"to_real": None, "level": None}), tmp_path)
    measured.draw(Painter())
    assert [row["name"] for row in numbers(measured.rows())] == ["level"]
    assert measured.missing == [{"name": "to_real", "model": "", "reason": "is of another extractor"}]
    with pytest.raises(UserError, match="nothing can be measured: to_real: is of another extractor"):
        evaluation(with_reference(monkeypatch, real, {"to_real": None}), tmp_path)


def test_features_are_kept_under_everything_that_they_depend_on(tmp_path: Path):
    """Another model, prompt set, quantisation or preparation begins a store of its own; another metric, or another batch size, does not."""
    first = Painter()
    evaluation(small(), tmp_path).draw(first)
    same: list[dict[str, Any]] = [{"batch_size": 7}, {"metrics": {"level_again": None}}, {"description": "words"}, {"name": "other"}]
    for change in same:
        painter = Painter()
        evaluation(small(**change), tmp_path).draw(painter)
        assert painter.calls == []
    sets = small().spec.model_dump()["sets"]
    other: list[dict[str, Any]] = [
        {"quantisation": "truncate"},
        {"prepare": {"resize": 4}},
        {"chunk": 4},
        {"sets": sets | {"a": sets["a"] | {"seed": 2}}},
        {"metrics": {"level": {"scale": 2.0}}},
    ]
    for change in other:
        painter = Painter()
        evaluation(small(**change), tmp_path).draw(painter)
        assert painter.ids == list(range(20)), change
    painter = Painter(steps=2)
    evaluation(small(), tmp_path).draw(painter)
    assert painter.ids == list(range(20))


def test_floors_are_computed_once_for_each_list_of_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    metrics = {"level": None, "to_real": None}
    without = evaluation(with_reference(monkeypatch, Real(at_once="absent"), metrics), tmp_path)
    assert [row["name"] for row in without.floors()] == ["level"]
    whole = evaluation(with_reference(monkeypatch, Real(), metrics), tmp_path)
    assert [row["name"] for row in whole.floors()] == ["level", "level"]  # of the metric that was missing before, too
    monkeypatch.setattr(whole.metrics["level"], "floors", lambda: pytest.fail("computed again"))
    assert len(whole.floors()) == 2


def test_an_extractor_is_built_once_and_named_after_options_and_weights(monkeypatch: pytest.MonkeyPatch):
    built: list[Any] = []

    class Counted(Colours):
        def __init__(self, config: Any, resources: Resources) -> None:
            super().__init__(config, resources)
            built.append(config)

        @property
        def hash(self) -> str:
            return weights

    install(monkeypatch, Counted)
    names: list[str] = []
    for digit in "01":
        weights = digit * 64
        known = Extractors(Resources())
        features = [feature("colours", "mean"), feature("colours", "levels"), feature("colours", "mean", scale=2.0)]
        known.require(features)
        known.require(features)
        names += [known.name(each) for each in features]
        assert known.name(features[0]).rpartition("-")[0] == known.name(features[1]).rpartition("-")[0]
    assert len(built) == 4 and len(set(names)) == 6


def test_an_option_that_an_extractor_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"extractor colours.*scal.*did you mean 'scale'"):
        Extractors(Resources()).require([feature("colours", "mean", scal=2.0)])

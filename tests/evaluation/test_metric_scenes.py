"""Protocol scenes: its prompts and seeds, and its metrics on pictures and features whose values are known."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from measuring import seen
from torch import Tensor

from fastgen.data import scenes
from fastgen.errors import UserError
from fastgen.evaluation import teacher_statistics
from fastgen.evaluation.diversity import vendi_score
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.frechet import FeatureStatistics, GaussianFit, frechet_distance
from fastgen.evaluation.metrics import fd_scenes_teacher as by_teacher
from fastgen.evaluation.metrics.base import Measured, Value
from fastgen.evaluation.metrics.scenes import ABSENT, Scenes, accuracies, diversity, modes
from fastgen.evaluation.protocol import Protocol, protocol_from
from fastgen.evaluation.tables import Table
from fastgen.evaluation.weights import Unavailable
from fastgen.evaluation.worlds import scenes as world

TEACHER = "a" * 64
NAMES = ("scene_accuracy", "colour_accuracy", "digit_accuracy", "relation_accuracy", "fd_scenes", "vendi", "mode_entropy")
FEW, LESS = 40, 400
COLOURS, DIGITS = list(itertools.permutations(range(4), 2)), list(itertools.product(range(10), repeat=2))
SETS = {name: {"prompts": f"fastgen:scenes/{name}", "count": FEW, "first_seed": seed} for name, seed in (("full", 0), ("open", 10_000))}


@pytest.fixture(autouse=True)
def less(monkeypatch: pytest.MonkeyPatch) -> scenes.Scenes:
    """Fewer real scenes than the protocol compares with, the first ones."""
    of = world.reference()
    world.meanings()  # of all, as are the open prompts
    world.open_prompts()
    few = scenes.Scenes(*(getattr(of, field.name)[:LESS] for field in fields(of)))
    monkeypatch.setattr(world, "reference", lambda: few)
    return few


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> GaussianFit:
    """Statistics of a teacher in place of the bundled ones."""
    classifier = by_teacher.find_extractor("scenes_classifier")
    extractor = classifier(classifier.Config(), Resources())
    rows = torch.randn(300, 128, generator=torch.Generator().manual_seed(0))
    found = FeatureStatistics.from_features(rows)
    fit = GaussianFit(found.mean, found.cov, found.n)
    statistics = teacher_statistics.TeacherStatistics(fit, TEACHER, extractor.hash)
    monkeypatch.setattr(by_teacher, "read_statistics", lambda: statistics)
    return fit


@pytest.fixture
def protocol(known: GaussianFit) -> Protocol:
    return protocol_from({"name": "few", "size": [16, 16], "sets": SETS, "metrics": {"scenes": None, "fd_scenes_teacher": None}, "chunk": FEW})


def real(count: int = FEW) -> Tensor:
    """The reference's scenes, in the order of the prompts, in [0, 1]."""
    return (world.reference().images[:count] + 1) / 2


def values(protocol: Protocol, measured: Measured) -> dict[str, Value]:
    return {value.name: value for metric in protocol.metrics(Resources()).values() for value in metric.measure(measured)}


def test_prompts_follow_the_reference() -> None:
    full, free, of = world.full(), world.open_prompts(), world.held_out(1)
    assert (len(full), len(free)) == (2000, 5000)
    colours, shown, related = world.meant(full)
    assert torch.equal(colours, of.colours[:2000]) and torch.equal(shown, of.digits[:2000]) and torch.equal(related, of.relations[:2000])
    for row in (0, 7, 1999):
        assert full[row] == scenes.full_caption(of.colours[row].tolist(), of.digits[row].tolist(), int(of.relations[row]))
        assert free[row] in scenes.open_captions(of.colours[row].tolist(), of.digits[row].tolist())
    assert Counter(free)[scenes.TWO] == 1250
    assert set(free) <= {text for pair in COLOURS for shown in DIGITS for text in scenes.open_captions(pair, shown)}


def test_what_is_generated_is_fixed() -> None:
    content = hashlib.sha256(json.dumps([world.full(), world.open_prompts()]).encode()).hexdigest()
    # Of published numbers: a change of it is a new protocol and needs a new name.
    assert content.startswith("0dda02b69df2edf8")


def test_further_real_scenes_are_others_of_the_same_digits() -> None:
    assert not torch.equal(world.held_out(2).images[:LESS], world.reference().images)
    assert torch.equal(world.held_out(1).images[:LESS], world.reference().images)


def moments_of(colours: Tensor, corners: Tensor) -> Tensor:
    """Moments (N, 12) of one pixel of each of two colours at corners (N, 2, 2)."""
    glyph = torch.zeros(len(colours), 2, 8, 8)
    glyph[..., 0, 0] = 1
    return scenes.moments(scenes.compose(glyph, colours, corners)).flatten(1)


def test_accuracies_of_pictures_that_are_right_and_wrong_in_one_thing_each() -> None:
    text = "a red three left of a blue seven"
    prompt = next(prompt for prompt in world.full() if " left of " in prompt)
    (one, other), (first, second), _ = world.meanings()[prompt]
    third = next(colour for colour in range(4) if colour not in (one, other))
    assert text.split()[3:5] == prompt.split()[3:5]
    shown = torch.full((6, 4), float(ABSENT))
    shown[:, one], shown[:, other] = first, second
    shown[1, one] = (first + 1) % 10 if (first + 1) % 10 != second else (first + 2) % 10  # another digit
    shown[2, third] = 1.0  # a third colour
    shown[3, one], shown[3, other] = second, first  # the digits exchanged
    shown[5, other] = ABSENT  # one is missing
    colours = torch.tensor([[one, other]]).repeat(6, 1)
    corners = torch.tensor([[[4, 0], [5, 8]]]).repeat(6, 1, 1)
    corners[4] = corners[4].flip(0)  # on the other side
    found = accuracies(shown, moments_of(colours, corners), (prompt,) * 6)
    distinct = first != second
    assert found["colour_accuracy"] == pytest.approx(4 / 6)
    assert found["digit_accuracy"] == pytest.approx(3 / 6)
    assert found["relation_accuracy"] == pytest.approx(5 / 6)
    assert found["scene_accuracy"] == pytest.approx((1 if distinct else 2) / 6)


def test_no_relation_where_a_colour_is_nowhere() -> None:
    prompt = world.full()[0]
    colours, shown, _ = world.meant((prompt,))
    right = torch.full((1, 4), float(ABSENT)).scatter(1, colours, shown.float())
    found = accuracies(right, torch.zeros(1, 12), (prompt,))
    assert (found["colour_accuracy"], found["digit_accuracy"]) == (1, 1)
    assert (found["relation_accuracy"], found["scene_accuracy"]) == (0, 0)


def test_modes_are_combinations_and_what_is_no_scene_is_one_mode() -> None:
    shown = torch.full((7, 4), float(ABSENT))
    shown[:, 0], shown[:, 2] = 3, 7
    colours = torch.tensor([[0, 2]]).repeat(7, 1)
    corners = torch.tensor([[[4, 0], [4, 8]]]).repeat(7, 1, 1)
    corners[1] = torch.tensor([[5, 1], [3, 7]])  # elsewhere, the same scene
    corners[2] = corners[2].flip(0)  # the other relation
    shown[3, 0] = 4  # another digit
    shown[4, 2], shown[4, 3] = ABSENT, 7  # another colour
    colours[4] = torch.tensor([0, 3])
    shown[5, 1] = 1.0  # three colours
    shown[6, 0] = ABSENT  # one
    number = modes(shown, moments_of(colours, corners)).tolist()
    assert number[0] == number[1] and number[5] == number[6] == -1
    assert len(set(number)) == 5
    features = torch.rand(7, 128, generator=torch.Generator().manual_seed(0))
    found = diversity(features, shown, moments_of(colours, corners))
    shares = torch.tensor([2, 2, 1, 1, 1]) / 7
    assert found["mode_entropy"] == pytest.approx(math.exp(-(shares * shares.log()).sum()))
    assert found["vendi"] == pytest.approx(vendi_score(features, [""] * 7))


def test_values_are_those_of_the_tables(protocol: Protocol, known: GaussianFit) -> None:
    generator = torch.Generator().manual_seed(1)
    pictures = {name: (real() + 0.1 * torch.randn(FEW, 3, 16, 16, generator=generator)).clamp(0, 1) for name in ("full", "open")}
    measured = seen(protocol, pictures)
    found = values(protocol, measured)
    assert tuple(found) == (*NAMES, "fd_scenes_teacher")
    features = next(table.read() for (name, of), table in measured.tables.items() if name == "open" and of.layer == "features")
    assert features.shape == (FEW, 128) and features.min() >= 0
    metric = protocol.metrics(Resources())["scenes"]
    assert isinstance(metric, Scenes)
    reference = FeatureStatistics.from_features(metric._real(world.reference())["features"])
    assert found["fd_scenes"].value == pytest.approx(frechet_distance(FeatureStatistics.from_features(features), reference), rel=1e-6)
    assert found["fd_scenes_teacher"].value == pytest.approx(frechet_distance(FeatureStatistics.from_features(features), known), rel=1e-6)
    assert [found[name].n for name in (*NAMES, "fd_scenes_teacher")] == [FEW] * 5 + [FEW // 4] * 2 + [FEW]


def test_real_scenes_are_right(protocol: Protocol) -> None:
    found = values(protocol, seen(protocol, {"full": real(), "open": real()}))
    assert found["scene_accuracy"].value >= 0.9
    assert found["relation_accuracy"].value >= 0.95
    assert found["mode_entropy"].value >= FEW // 4 - 2
    noise = torch.rand(FEW, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    far = values(protocol, seen(protocol, {"full": noise, "open": noise}))
    assert far["fd_scenes"].value > 3 * found["fd_scenes"].value
    assert far["scene_accuracy"].value <= 0.05


def test_floors_are_small_and_real_scenes_are_right(less: scenes.Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "NUM_OPEN", LESS)
    monkeypatch.setattr(world, "NUM_FULL", LESS // 2)
    prompts = world.full()[: LESS // 2], world.open_prompts()[:LESS]
    monkeypatch.setattr(world, "full", lambda: prompts[0])
    monkeypatch.setattr(world, "open_prompts", lambda: prompts[1])
    metric = Scenes(Scenes.Config(), ["full", "open"])
    rows = metric.floors()
    assert [(row["name"], row.get("floor"), row["n"]) for row in rows] == [
        *((name, None, LESS // 2) for name in NAMES[:4]),
        ("fd_scenes", None, LESS),
        *((name, None, LESS // 4) for name in ("vendi", "mode_entropy")),
        ("fd_scenes", "training", LESS),
    ]
    assert {row["model"] for row in rows} == {"real"}
    found = {row["name"]: row for row in rows if "floor" not in row}
    assert found["scene_accuracy"]["value"] > 0.95
    distances = torch.tensor([metric._distance(metric._real(world.held_out(seed))["features"]) for seed in range(2, 5)]).double()
    assert found["fd_scenes"]["value"] == pytest.approx(float(distances.mean()), rel=1e-6)
    assert found["fd_scenes"].get("std") == pytest.approx(float(distances.std()), rel=1e-5)
    noise = metric._real(replace(less, images=torch.rand(less.images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1))["features"]
    assert found["fd_scenes"]["value"] < metric._distance(noise) / 10
    assert 0.9 * LESS // 4 < found["mode_entropy"]["value"] <= LESS // 4


def test_another_teacher_is_refused(protocol: Protocol, known: GaussianFit) -> None:
    metric = protocol.metrics(Resources())["fd_scenes_teacher"]
    measured = seen(protocol, {"full": real(), "open": real()})
    value = metric.measure(measured)[0].value
    assert metric.measure(replace(measured, taught_by=TEACHER))[0].value == value
    with pytest.raises(Unavailable, match="distilled from, another teacher"):
        metric.measure(replace(measured, taught_by="b" * 64))
    other = by_teacher.FdScenesTeacher(by_teacher.FdScenesTeacher.Config(teacher="b" * 64), ["full", "open"])
    with pytest.raises(Unavailable, match="the bundled statistics are of the teacher aaaaaaaaaaaa"):
        other.needs()


def test_statistics_of_another_classifier_are_refused(protocol: Protocol, known: GaussianFit, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = teacher_statistics.TeacherStatistics(known, TEACHER, "c" * 64)
    monkeypatch.setattr(by_teacher, "read_statistics", lambda: statistics)
    with pytest.raises(Unavailable, match="of another classifier"):
        by_teacher.FdScenesTeacher(by_teacher.FdScenesTeacher.Config(), ["open"]).needs()


def test_without_statistics_everything_else_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(by_teacher, "read_statistics", lambda: teacher_statistics.read_statistics(tmp_path))
    protocol = protocol_from({"name": "few", "sets": SETS, "metrics": {"scenes": None, "fd_scenes_teacher": None}})
    with pytest.raises(Unavailable, match=r"^needs the statistics of the bundled teacher: python -m fastgen\.assets\.build scenes statistics$"):
        protocol.metrics(Resources())["fd_scenes_teacher"].needs()


def test_other_prompts_are_not_measured_by_the_labels_of_these(known: GaussianFit) -> None:
    sets = {name: {"prompts": "fastgen:digits/open", "count": 8} for name in ("full", "open")}
    protocol = protocol_from({"name": "mine", "sets": sets, "metrics": {"scenes": None, "fd_scenes_teacher": None}})
    empty = {(name, of): Table(torch.zeros(8, 128)) for name in sets for of in [by_teacher.FEATURES]}
    for metric in protocol.metrics(Resources()).values():
        with pytest.raises(Unavailable, match="needs the prompts fastgen:scenes/full and fastgen:scenes/open in sets full and open"):
            metric.measure(Measured(protocol.sets, empty))


def test_a_protocol_of_ones_own_without_its_sets_is_refused() -> None:
    with pytest.raises(UserError, match=r"^protocol mine: metrics\.scenes: needs sets full and open; open is not there$"):
        protocol_from({"name": "mine", "sets": {"full": {"prompts": "fastgen:scenes/full"}}, "metrics": {"scenes": None}})


def test_too_few_pictures_are_refused_in_one_line(protocol: Protocol) -> None:
    protocol.sets.update({name: each.head(4) for name, each in protocol.sets.items()})
    with pytest.raises(Unavailable, match="needs two pictures of the prompt 'two digits'; 4 were drawn"):
        values(protocol, seen(protocol, dict.fromkeys(protocol.sets, real(4))))


def test_the_teacher_s_statistics_are_written_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a generator that draws real scenes."""
    drawn: list[int] = []

    def generate(prompts: list[str], seeds: list[int]) -> Tensor:
        drawn.extend(seeds)
        return real()[: len(prompts)]

    generator = SimpleNamespace(steps=28, guidance=2.0)
    monkeypatch.setattr(teacher_statistics, "load_teacher", lambda *_, **__: generator)
    monkeypatch.setattr(teacher_statistics, "_features", lambda extractor, of, prompts, seeds: torch.rand(len(generate(prompts, seeds)), 128))
    monkeypatch.setattr(teacher_statistics, "source_hash", lambda source: TEACHER)
    monkeypatch.setattr(teacher_statistics.world, "open_prompts", lambda: ("two digits",) * FEW)
    record = teacher_statistics.write_statistics(tmp_path, 3)
    known = teacher_statistics.read_statistics(tmp_path)
    assert (known.teacher, known.extractor, known.fit.n) == (TEACHER, record["extractor"], FEW)
    assert drawn[0] == 10**6 + 3 * world.NUM_OPEN and len(set(drawn)) == FEW

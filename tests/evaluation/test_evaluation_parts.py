"""However an evaluation is cut up, its numbers are the same: batch sizes, several processes, kills and resumption."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import Colours, Kept, Painter, arrays, evaluation, install, numbers, small
from torch import Tensor

import fastgen
from fastgen.evaluation import store as stores
from fastgen.evaluation.dumps import DumpFolder
from fastgen.evaluation.external import External
from fastgen.evaluation.extraction import WHOLE, Part
from fastgen.evaluation.extractors.base import Pictures, Resources
from fastgen.evaluation.protocol import Protocol, protocol_from
from fastgen.evaluation.results import Row
from fastgen.evaluation.runner import Evaluation
from fastgen.evaluation.settings import Settings
from fastgen.evaluation.store import Store
from fastgen.evaluation.subjects.generated import GeneratorSubject
from fastgen.generator import ImageGenerator
from fastgen.progress import Progress

COUNT, CHUNK = 90, 64  # of each of two sets: chunks of 64 and 26


@pytest.fixture(scope="module")
def generator() -> ImageGenerator:
    """The bundled teacher in a single step: a real network, text encoder and decoder."""
    return fastgen.load_teacher("fastgen:digits", steps=1)


@pytest.fixture(scope="module")
def digits() -> Protocol:
    """Protocol digits on the first prompts of its sets, measured by the bundled classifier."""
    sets = {name: {"prompts": f"fastgen:digits/{name}", "count": COUNT, "first_seed": seed} for name, seed in (("named", 0), ("open", 10_000))}
    return protocol_from({"name": "few-digits", "size": [8, 8], "sets": sets, "metrics": {"digits": None}, "chunk": CHUNK})


class Teacher(GeneratorSubject):
    """Remembers the ids of every call; the first is a warm-up."""

    def __init__(self, generator: ImageGenerator) -> None:
        super().__init__(generator, "teacher", content="0" * 64, source="fastgen:digits")
        self.calls: list[list[int]] = []

    def draw(self, prompts: list[str], seeds: list[int], ids: Sequence[int]) -> Tensor:
        self.calls.append(list(ids))
        return super().draw(prompts, seeds, ids)

    @property
    def ids(self) -> list[int]:
        return [each for call in self.calls[1:] for each in call]


class Left(NamedTuple):
    """What an evaluation leaves: 8-bit pictures by id, features by the names of their files, rows."""

    pixels: Tensor
    features: dict[str, np.ndarray]
    rows: list[Row]


def left(protocol: Protocol, generator: ImageGenerator, root: Path, batch_size: int) -> Left:
    measured = evaluation(protocol, root, kept=(kept := Kept()), batch_size=batch_size)
    assert measured.draw(Teacher(generator))
    return Left(kept.pixels, {name: np.load(root / name) for name in arrays(root)}, numbers(measured.rows()))


def test_the_batch_size_changes_rounding_alone(digits: Protocol, generator: ImageGenerator, tmp_path: Path):
    whole, *others = (left(digits, generator, tmp_path / str(size), size) for size in (64, 7, 1))
    assert len(whole.features) == 5
    for other in others:
        moved = (other.pixels.int() - whole.pixels.int()).abs()
        assert int(moved.max()) <= 1 and float((moved > 0).double().mean()) <= 1e-4
        most = int(moved.flatten(1).any(1).sum())
        for name, rows in whole.features.items():
            assert np.any(other.features[name] != rows, axis=1).sum() <= most  # pictures that are the same have the same features
            assert np.allclose(other.features[name], rows, rtol=0, atol=0.1)  # a level is 1/127.5 of a pixel
        for row, wanted in zip(other.rows, whole.rows, strict=True):
            assert row == {**wanted, "value": pytest.approx(wanted["value"], rel=1e-3)}


def test_parts_give_the_bits_of_one_process(digits: Protocol, generator: ImageGenerator, tmp_path: Path):
    one = evaluation(digits, tmp_path / "one")
    assert one.draw(subject := Teacher(generator)) and subject.ids == list(range(2 * COUNT))
    wanted = numbers(one.rows())
    halves, subjects = [evaluation(digits, tmp_path / "two", part=Part(index, 2)) for index in (0, 1)], [Teacher(generator) for _ in range(2)]
    assert [half.draw(each) for half, each in zip(halves, subjects, strict=True)] == [False, True]
    assert [len(each.ids) for each in subjects] == [2 * 64, 2 * 26]
    assert sorted(subjects[0].ids + subjects[1].ids) == list(range(2 * COUNT))
    assert arrays(tmp_path / "two") == arrays(tmp_path / "one") and len(arrays(tmp_path / "one")) == 5
    assert numbers(halves[1].rows()) == wanted
    for joined in (halves[0], evaluation(digits, tmp_path / "two", batch_size=1)):
        assert joined.draw(last := Teacher(generator)) and last.calls == []
        assert numbers(joined.rows()) == wanted
        assert [row["n"] for row in joined.rows()[-2:]] == [2 * COUNT] * 2  # what drawing cost both parts


def test_a_part_that_ends_last_measures_what_the_others_drew_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch)
    other = evaluation(small(), tmp_path, part=Part(1, 2))

    def meanwhile(images: Tensor, ids: Sequence[int]) -> Tensor:
        if 16 in ids:
            assert not other.draw(Painter())
        return images

    mine = evaluation(small(), tmp_path, part=Part(0, 2))
    assert mine.draw(Painter(spoil=meanwhile))
    whole = evaluation(small(), tmp_path / "one")
    whole.draw(Painter())
    assert numbers(mine.rows()) == numbers(whole.rows())


def test_more_parts_than_chunks_leave_some_without_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch)
    painters = [Painter() for _ in range(5)]
    done = [evaluation(small(), tmp_path, part=Part(index, 5)).draw(each) for index, each in enumerate(painters)]
    assert [each.ids for each in painters] == [list(range(8)), list(range(8, 16)), list(range(16, 20)), [], []]
    assert painters[4].calls == []  # no warm-up either
    assert done == [False, False, True, True, True]


METRICS = {"level": None, "darkest": {"set": "b"}}


def interrupt(images: Tensor, ids: Sequence[int]) -> Tensor:
    raise KeyboardInterrupt


def at(picture: int, do: Callable[[Tensor, Sequence[int]], Tensor]) -> Callable[[Tensor, Sequence[int]], Tensor]:
    return lambda images, ids: do(images, ids) if picture in ids else images


@pytest.mark.parametrize("picture", [0, 7, 8, 19, 20, 30])
def test_an_interrupted_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: int):
    """The same rows, and no chunk drawn twice: of set a those from 0, 8 and 16, of set b from 20 and 28."""
    install(monkeypatch)
    whole = evaluation(small(METRICS), tmp_path / "whole")
    whole.draw(Painter())
    with pytest.raises(KeyboardInterrupt):
        evaluation(small(METRICS), tmp_path / "killed").draw(Painter(spoil=at(picture, interrupt)))
    resumed, painter = evaluation(small(METRICS), tmp_path / "killed"), Painter()
    assert resumed.draw(painter)
    assert painter.ids == list(range(max(start for start in (0, 8, 16, 20, 28) if start <= picture), 31))
    assert numbers(resumed.rows()) == numbers(whole.rows())
    assert arrays(tmp_path / "killed") == arrays(tmp_path / "whole")


def kills(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but a SIGKILL in place of its call number `calls`."""
    done = 0

    def call(*args: Any, **more: Any) -> Any:
        nonlocal done
        done += 1
        if done == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **more)

    return call


@pytest.mark.parametrize(
    ("where", "name", "calls", "again"),
    [
        (Painter, "draw", 13, 28),  # the pictures of b's second chunk
        (stores, "write_atomically", 5, 28),  # its record, once its rows are on disk
        (stores, "write_atomically", 1, 0),
        (Store, "_allocate", 2, 20),  # before there is an array of b
        (os, "replace", 1, 0),
        (os, "fsync", 8, 20),  # in the middle of writing b's first record
    ],
    ids=["drawing", "record", "first record", "array", "half an array", "half a record"],
)
def test_a_killed_process_leaves_what_another_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, calls: int, again: int
):
    install(monkeypatch)
    whole = evaluation(small(METRICS), tmp_path / "whole")
    whole.draw(Painter())

    def work() -> None:
        setattr(where, name, kills(calls, getattr(where, name)))
        evaluation(small(METRICS), tmp_path / "killed").draw(Painter())

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed, painter = evaluation(small(METRICS), tmp_path / "killed"), Painter()
    assert resumed.draw(painter)
    assert painter.ids == list(range(again, 31))
    assert numbers(resumed.rows()) == numbers(whole.rows())
    assert arrays(tmp_path / "killed") == arrays(tmp_path / "whole")
    assert list((tmp_path / "killed").rglob("*.npy.*")) == []


def real_pictures(folder: Path, *, marked: int | None = None, cut: Collection[int] = ()) -> Path:
    """20 pictures of noise, in chunks of 0 to 7, 8 to 15 and 16 to 19: one may be of white alone, some may end early."""
    folder.mkdir()
    for index in range(20):
        noise = np.random.default_rng(index).integers(0, 250, (64, 64, 3), dtype=np.uint8)
        path = folder / f"{index}.png"
        Image.fromarray(np.full_like(noise, 255) if index == marked else noise).save(path)
        if index in cut:
            path.write_bytes(path.read_bytes()[:3000])
    return folder


class OutOfMemory(Colours):
    """Of scale 3, which no white picture fits."""

    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        if self.config.scale == 3 and bool((pictures.pixels == 255).flatten(1).all(1).any()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(pictures, layers)


class Told(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


WITH_REAL = {"level": None, "to_real": {"scale": 3.0}, "to_real_again": {"scale": 2.0}}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("marked", [2, 13])  # in a chunk of part 1/2, and of 2/2
def test_an_extractor_that_fails_on_a_parts_reference_costs_what_it_costs_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marked: int, order: tuple[int, int]
):
    install(monkeypatch, OutOfMemory)
    protocol = small(WITH_REAL, reference={"images": str(real_pictures(tmp_path / "real", marked=marked))})
    whole, told = evaluation(protocol, tmp_path / "whole", progress=(one := Told())), Told()
    whole.draw(Painter())
    wanted = numbers(whole.rows())
    assert [row["name"] for row in wanted] == ["level", "to_real_again"] and [each["name"] for each in whole.missing] == ["to_real"]
    parts = []
    for index in order:
        parts.append(evaluation(protocol, tmp_path / "parts", part=Part(index, 2), progress=told))
        assert parts[-1].draw(Painter()) == (len(parts) == 2)
    assert numbers(parts[1].rows()) == wanted
    assert parts[1].missing == whole.missing and set(told.said) == set(one.said)
    drawn = [arrays(each.drawn[0].stores["a"].folder) for each in (whole, parts[1])]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3  # what the reference cost is extracted all the same


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("cut", [(3,), (12,), (3, 12)])
def test_a_reference_of_which_pictures_are_damaged_costs_the_same_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: tuple[int, ...], order: tuple[int, int]
):
    install(monkeypatch)
    protocol = small(WITH_REAL, reference={"images": str(real_pictures(tmp_path / "real", cut=cut))})
    whole = evaluation(protocol, tmp_path / "whole")
    whole.draw(Painter())
    wanted = numbers(whole.rows())
    assert [row["name"] for row in wanted] == ["level"] and [each["name"] for each in whole.missing] == ["to_real", "to_real_again"]
    first = f"{str(tmp_path / 'real' / f'{cut[0]}.png')!r} is not a picture that can be read"
    assert (f"2 of 20 pictures cannot be read, the first: {first}" if len(cut) > 1 else f"reference.images: {first}") in whole.missing[0]["reason"]
    parts = [evaluation(protocol, tmp_path / "parts", part=Part(index, 2)) for index in order]
    assert [part.draw(Painter()) for part in parts] == [False, True]
    assert numbers(parts[1].rows()) == wanted
    assert parts[1].missing == whole.missing


def test_a_part_counts_its_own_pictures_of_a_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other's may lie on another machine."""
    install(monkeypatch)
    parts = [evaluation(small(), tmp_path / "store", part=Part(index, 2), kept=DumpFolder(tmp_path / f"machine{index}")) for index in (0, 1)]
    assert [part.draw(Painter()) for part in parts] == [False, True]
    assert parts[1].left == 0
    names = [sorted(path.name for path in (tmp_path / f"machine{index}/student_1step/a").glob("*.png")) for index in (0, 1)]
    assert names == [[f"{row:06d}.png" for row in (*range(8), *range(16, 20))], [f"{row:06d}.png" for row in range(8, 16)]]
    painter = Painter()
    assert evaluation(small(), tmp_path / "store", part=Part(1, 2), kept=DumpFolder(tmp_path / "machine2")).draw(painter)
    assert painter.ids == list(range(8, 16))  # for the dump alone


COUNTED = "import json, pathlib, sys; print(json.dumps({'value': len([*pathlib.Path(sys.argv[-1]).glob('*.png')]), 'n': 20}))"


def test_programs_see_pictures_of_the_store_whatever_becomes_of_a_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch)
    resources = Resources(external={"image_reward": External((sys.executable, "-S", "-c", COUNTED))})

    def measured(part: Part, dump: DumpFolder | None) -> Evaluation:
        return Evaluation(small({"image_reward": None}), resources, Settings(tmp_path / "store", part=part), dump=dump)

    parts = [measured(Part(index, 2), DumpFolder(tmp_path / f"machine{index}")) for index in (0, 1)]
    assert [part.draw(Painter()) for part in parts] == [False, True]
    shutil.rmtree(tmp_path / "machine0")
    (folder,) = parts[1].drawn[0].pictures.values()
    assert folder.is_relative_to(tmp_path / "store") and len([*folder.glob("*.png")]) == 20
    assert [row["value"] for row in numbers(parts[1].rows())] == [20.0]
    again, painter = measured(WHOLE, None), Painter()
    assert again.draw(painter) and painter.calls == []

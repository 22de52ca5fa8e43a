"""Protocol digits on generators of which everything is known: what is drawn, how often, and what is said of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from linear_classifier import LinearClassifier
from measuring import COSTS, measure
from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation import extraction
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.extractors.digits_classifier import DigitsClassifier
from fastgen.evaluation.protocol import Protocol
from fastgen.evaluation.settings import part_of
from fastgen.evaluation.unkept import missing_at_start, run_protocol, what_is_real
from fastgen.progress import Progress

Generate = Callable[[list[str], list[int], int], Tensor]


def real_generator(real: Tensor, calls: list[tuple[int, int]]) -> Generate:
    """A generator that shows real image `seed mod 10,000`, as its prompts ask in `named`."""

    def generate(prompts: list[str], seeds: list[int], steps: int) -> Tensor:
        assert len(prompts) == len(seeds)
        calls.append((len(prompts), steps))
        return real[torch.tensor(seeds) % 10_000]

    return generate


def test_a_generator_of_real_images(protocol: Protocol, real: Tensor):
    calls: list[tuple[int, int]] = []
    rows = run_protocol(protocol, real_generator(real, calls), model="student", steps=[2, 1], guidance=1.5, batch_size=300)
    expected: Mapping[str, float] = measure(protocol, {"named": real, "open": real})
    chunked = [*[300, 212] * 3, 261]  # chunks of 512
    assert calls == [(300, 2), *[(size, 2) for size in chunked * 2], (300, 1), *[(size, 1) for size in chunked * 2]]
    for steps in (2, 1):
        values = {row["name"]: row for row in rows if row.get("steps") == steps}
        assert {name: values[name]["value"] for name in expected} == expected
        assert values.keys() == {*expected, *COSTS}
        assert (values["parity_accuracy"]["n"], values["mode_entropy"]["n"]) == (898, 899)
        assert values["fd_digits"]["n"] == values["prompt_accuracy"]["n"] == 1797
        assert values["seconds_per_1000_images"]["n"] == 3594
        assert values["peak_memory_bytes"]["value"] > 2**20
    assert all(row["model"] == "student" and row.get("guidance") == 1.5 for row in rows)
    assert len(rows) == 2 * 10


def test_the_batch_size_changes_no_metric(protocol: Protocol, real: Tensor):
    def values(batch_size: int | None) -> dict[str, float]:
        rows = run_protocol(protocol, real_generator(real, []), model="m", steps=[1], guidance=1, batch_size=batch_size)
        return {row["name"]: row["value"] for row in rows if row["name"] not in COSTS}

    assert values(None) == values(100) == values(1797)


class Watched(Progress):
    """Says what it was told; being told takes time, by the clock `now`."""

    def __init__(self, now: list[float]) -> None:
        self.now, self.open = now, 0
        self.counted: list[tuple[str, int, list[int]]] = []

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.counted.append((what, total, []))
        self.open += 1

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        self.now[0] += 1000
        self.counted[-1][2].append(done)

    def finish(self) -> None:
        self.open -= 1


def test_time_is_that_of_generating_every_image(protocol: Protocol, real: Tensor, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    generate = real_generator(real, [])

    def slow(prompts: list[str], seeds: list[int], steps: int) -> Tensor:
        now[0] += steps * len(prompts) / 100
        return generate(prompts, seeds, steps)

    monkeypatch.setattr(extraction.time, "perf_counter", lambda: now[0])
    rows = run_protocol(protocol, slow, model="m", steps=[1, 4], guidance=1, progress=Watched(now))
    seconds = {row.get("steps"): row["value"] for row in rows if row["name"] == "seconds_per_1000_images"}
    assert seconds == pytest.approx({1: 10.0, 4: 40.0})


def test_progress_counts_every_image_once(protocol: Protocol, real: Tensor):
    watched = Watched([0.0])
    run_protocol(protocol, real_generator(real, []), model="student", steps=[1, 2], guidance=1, batch_size=512, progress=watched)
    pictures = [512, 1024, 1536, 1797, 2309, 2821, 3333, 3594]
    drawn = [(f"pictures of the student, {steps}", 3594, pictures) for steps in ("1 step", "2 steps")]
    assert watched.counted == [*drawn, *[(f"metrics of the student, {steps}", 1, [1]) for steps in ("1 step", "2 steps")]]
    assert watched.open == 0


def test_nothing_is_left_on_disk(protocol: Protocol, real: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_protocol(protocol, real_generator(real, []), model="m", steps=[1], guidance=1)
    with pytest.raises(ValueError, match="returned 0 images"):
        run_protocol(protocol, lambda p, s, n: real[:0], model="m", steps=[1], guidance=1)
    assert list(tmp_path.iterdir()) == []


def test_what_is_real_needs_no_model(protocol: Protocol, classifier: LinearClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    floors, extractors = what_is_real(protocol)
    metric = protocol.metrics(Resources())["digits"]
    assert floors == metric.floors() and {row["model"] for row in floors} == {"real"}
    assert list(extractors) == ["digits_classifier"] and extractors["digits_classifier"] == DigitsClassifier({}, Resources()).hash
    assert missing_at_start(protocol, Resources()) == []


def test_mistakes_are_refused_before_the_whole_set_is_generated(protocol: Protocol, real: Tensor):
    calls: list[tuple[int, int]] = []
    generate = real_generator(real.repeat(1, 1, 2, 2), calls)
    for steps in ([], [0], [1, -1]):
        with pytest.raises(UserError, match="at least 1"):
            run_protocol(protocol, generate, model="m", steps=steps, guidance=1)
    with pytest.raises(UserError, match="at least 1"):
        run_protocol(protocol, generate, model="m", steps=[1], guidance=1, batch_size=0)
    assert calls == []
    with pytest.raises(UserError, match=r"\(3, 8, 8\), the model makes \(3, 16, 16\)"):
        run_protocol(protocol, generate, model="m", steps=[1], guidance=1)
    assert calls == [(256, 1)]
    with pytest.raises(ValueError, match="255 images for 256 prompts"):
        run_protocol(protocol, lambda p, s, n: real[: len(p) - 1], model="m", steps=[1], guidance=1)


def test_parts_are_counted_from_one():
    assert [tuple(part_of(text)) for text in ("1/1", "1/2", "2/2", "1000000/1000000")] == [(0, 1), (0, 2), (1, 2), (999_999, 10**6)]
    for text in ("", "1", "/", "0/2", "3/2", "-1/2", "1/2/3", "a/b", "1.0/2", "1/" + "9" * 5000):
        with pytest.raises(UserError, match=r"^--part: .* is not i/n, such as 1/4 to 4/4$"):
            part_of(text)

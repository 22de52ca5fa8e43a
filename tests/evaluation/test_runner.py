from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation import runner
from fastgen.evaluation.protocols import Digits, Row
from fastgen.evaluation.runner import cached, provenance, read_results, run_protocol, write_results

ROWS: list[Row] = [Row(name="fd_digits", model="student", value=7.25, n=1797, steps=1, guidance=1.0)]


def real_generator(real: Tensor, calls: list[tuple[int, int]]) -> runner.Generate:
    """A generator that shows real image `seed mod 10,000`, as its prompts ask in `named`."""

    def generate(prompts: list[str], seeds: list[int], steps: int) -> Tensor:
        assert len(prompts) == len(seeds)
        calls.append((len(prompts), steps))
        return real[torch.tensor(seeds) % 10_000]

    return generate


def test_a_generator_of_real_images(protocol: Digits, real: Tensor):
    calls: list[tuple[int, int]] = []
    rows = run_protocol(protocol, real_generator(real, calls), model="student", steps=[2, 1], guidance=1.5, batch_size=1000)
    expected: Mapping[str, float] = protocol.measure({"named": real, "open": real})
    assert calls == [(1000, 1), *[(1000, 2), (797, 2)] * 2, *[(1000, 1), (797, 1)] * 2]
    for steps in (2, 1):
        values = {row["name"]: row for row in rows if row.get("steps") == steps}
        assert {name: values[name]["value"] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert values.keys() == {*expected, "seconds_per_1000_images", "peak_memory_bytes"}
        assert (values["parity_accuracy"]["n"], values["mode_entropy"]["n"]) == (898, 899)
        assert values["fd_digits"]["n"] == values["prompt_accuracy"]["n"] == 1797
        assert values["seconds_per_1000_images"]["n"] == 3594
        assert values["peak_memory_bytes"]["value"] > 2**20
    assert all(row["model"] == "student" and row.get("guidance") == 1.5 for row in rows)
    assert len(rows) == 2 * 10


def test_the_batch_size_changes_no_metric(protocol: Digits, real: Tensor):
    def values(batch_size: int) -> dict[str, float]:
        rows = run_protocol(protocol, real_generator(real, []), model="m", steps=[1], guidance=1, batch_size=batch_size)
        return {row["name"]: row["value"] for row in rows if row["name"] not in ("seconds_per_1000_images", "peak_memory_bytes")}

    assert values(256) == values(1797)


def test_time_is_that_of_generating_every_image(protocol: Digits, real: Tensor, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    generate = real_generator(real, [])

    def slow(prompts: list[str], seeds: list[int], steps: int) -> Tensor:
        now[0] += steps * len(prompts) / 100
        return generate(prompts, seeds, steps)

    def progress(done: int, total: int, label: str) -> None:
        now[0] += 1000  # drawing a progress bar is not generation

    monkeypatch.setattr(runner.time, "perf_counter", lambda: now[0])
    rows = run_protocol(protocol, slow, model="m", steps=[1, 4], guidance=1, progress=progress)
    seconds = {row.get("steps"): row["value"] for row in rows if row["name"] == "seconds_per_1000_images"}
    assert seconds == pytest.approx({1: 10.0, 4: 40.0})


def test_progress_counts_every_image_once(protocol: Digits, real: Tensor):
    seen: list[tuple[int, int, str]] = []
    run_protocol(
        protocol,
        real_generator(real, []),
        model="m",
        steps=[1, 2],
        guidance=1,
        batch_size=900,
        progress=lambda done, total, label: seen.append((done, total, label)),
    )
    assert [done for done, _, _ in seen] == [900, 1797, 2697, 3594, 4494, 5391, 6291, 7188]
    assert {total for _, total, _ in seen} == {7188}
    assert seen[0][2] == "m, 1 steps, named"


def test_mistakes_are_refused_before_the_whole_set_is_generated(protocol: Digits, real: Tensor):
    calls: list[tuple[int, int]] = []
    generate = real_generator(real.repeat(1, 1, 2, 2), calls)
    for steps in ([], [0], [1, -1]):
        with pytest.raises(UserError, match="at least 1"):
            run_protocol(protocol, generate, model="m", steps=steps, guidance=1)
    assert calls == []
    with pytest.raises(UserError, match=r"the model makes \(3, 16, 16\)"):
        run_protocol(protocol, generate, model="m", steps=[1], guidance=1)
    assert calls == [(256, 1)]
    with pytest.raises(ValueError, match="255 images for 256 prompts"):
        run_protocol(protocol, lambda p, s, n: real[: len(p) - 1], model="m", steps=[1], guidance=1)


def test_results_round_trip(protocol: Digits, tmp_path: Path):
    path = tmp_path / "student" / "results.json"
    origin = provenance(protocol, model_hash="abc")
    write_results(path, "digits", ROWS, origin)
    assert read_results(path) == {"protocol": "digits", "metrics": ROWS, "provenance": origin}
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    assert list(json.loads(path.read_text())) == ["protocol", "metrics", "provenance"]


def test_a_failed_write_keeps_the_old_results(tmp_path: Path):
    path = tmp_path / "results.json"
    write_results(path, "digits", ROWS, {})
    broken: list[Row] = [Row(name="fd_digits", model="student", value=float("nan"), n=1)]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(path, "digits", broken, {})
    assert read_results(path)["metrics"] == ROWS
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [None, "{", "[]", '{"metrics": []}'])
def test_reading_something_else_says_so(tmp_path: Path, content: str | None):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"results\.json"):
        read_results(path)


def test_provenance_names_what_the_numbers_depend_on(protocol: Digits):
    origin = provenance(protocol, model_hash="abc")
    assert origin["versions"]["torch"] == torch.__version__.split("+")[0] or origin["versions"]["torch"] == torch.__version__
    assert origin["protocol_hash"] == protocol.hash()
    assert origin["classifier_hash"] == protocol.extractor_hash()
    assert origin["model_hash"] == "abc"
    assert origin["threads"] == torch.get_num_threads()
    assert origin["device"] and origin["platform"] and origin["date"].endswith("+00:00")


def test_cache_computes_once_for_each_key(tmp_path: Path):
    calls: list[str] = []

    def compute(name: str) -> list[Row]:
        calls.append(name)
        return [Row(name=name, model="teacher", value=1.5, n=3)]

    for name in ("a", "a", "b", "a"):
        assert cached(name, lambda name=name: compute(name), folder=tmp_path) == [Row(name=name, model="teacher", value=1.5, n=3)]
    assert calls == ["a", "b"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(hashlib.sha256(key.encode()).hexdigest() for key in "ab")


def test_one_flipped_bit_is_computed_again(tmp_path: Path):
    cached("a", lambda: ROWS, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for at in range(content.index(b"7.25"), content.index(b"7.25") + 4):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.warns(UserWarning, match="computing them again"):
            assert cached("a", lambda: ROWS, folder=tmp_path) == ROWS


def test_without_a_home_the_rows_are_computed(monkeypatch: pytest.MonkeyPatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="could not be cached"):
        assert cached("a", lambda: ROWS) == ROWS


@pytest.mark.parametrize("content", ['{"key": "a", "rows"', '{"key": "other", "rows": []}', "[]", b"\xff\xfe\x00"])
def test_a_corrupted_entry_is_computed_again_and_replaced(tmp_path: Path, content: str | bytes):
    path = tmp_path / f"{hashlib.sha256(b'a').hexdigest()}.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="computing them again"):
        assert cached("a", lambda: ROWS, folder=tmp_path) == ROWS
    assert cached("a", lambda: pytest.fail("the entry was not replaced"), folder=tmp_path) == ROWS


def test_a_cache_that_cannot_be_written_does_not_lose_the_rows(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="could not be cached"):
        assert cached("a", lambda: ROWS, folder=tmp_path / "file" / "below") == ROWS


def test_the_default_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    cached("a", lambda: ROWS)
    assert len(list((tmp_path / ".cache/fastgen/results").glob("*.json"))) == 1

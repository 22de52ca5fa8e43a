"""The sampling benchmark counts what it says, and draws what users draw."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import sampling
from benchmarks.measuring import alone
from benchmarks.measuring.case import Case, LeftOut, Target
from benchmarks.random_sd3 import MEDIUM, TINY, Untexted, live_pipeline
from benchmarks.sampling import Network
from fastgen import generator as generators
from fastgen.denoiser import Denoiser, Predictor
from fastgen.sampling import few_step

CPU, REHEARSAL = Target("cpu"), Target("cpu", rehearsal=True)


@pytest.fixture(scope="module")
def tiny() -> Network:
    """fp32, of random weights."""
    pipeline = live_pipeline(TINY, "cpu", torch.float32)
    return Network("tiny", Untexted(pipeline, max_sequence_length=TINY.text_tokens), pipeline.transformer, "cpu", own_steps=5)


def clock(monkeypatch: pytest.MonkeyPatch, milliseconds: Iterator[float]) -> list[int]:
    """Each call takes the next of these times; what is returned counts the calls."""
    calls = [0]

    def elapsed(call: Any, target: Target) -> float:
        calls[0] += 1
        call()
        return next(milliseconds)

    monkeypatch.setattr(sampling, "elapsed", elapsed)
    return calls


def count_samples(network: Network) -> tuple[list[int], Any]:
    """The batch sizes of the network's calls from now on, and how to stop."""
    sizes: list[int] = []
    handle = network.backbone.register_forward_pre_hook(lambda _m, _a, given: sizes.append(len(given["hidden_states"])), with_kwargs=True)
    return sizes, handle.remove


def test_images_per_second_are_batch_over_median(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two calls before, of which the first compiles, are not among them."""
    clock(monkeypatch, iter([9000.0, 500.0, 10.0, 40.0, 2000.0]))
    row = sampling.drawn(tiny.student(2), 3, CPU)
    assert (row["median_ms"], row["n"], row["compile_s"], row["peak_bytes"]) == (40.0, 3, 8.5, None)
    assert row["images_per_s"] == pytest.approx(3 / 0.040, rel=1e-12)


def test_a_slow_call_is_not_made_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.5 s of calls, three at least; two of those that take longer than four seconds each."""
    for each, count in ((5000.0, 2), (3000.0, 3), (1000.0, 3), (100.0, 15)):
        calls = clock(monkeypatch, iter([each] * 100))
        row = sampling.repeated(lambda: None, CPU)
        assert (calls[0], row["n"], row["median_ms"]) == (count, count, each)


def test_rows_say_how_often_the_network_was_called(tiny: Network) -> None:
    """Steps times the batch, twice that with guidance, in one call of twice the batch."""
    prompts, seeds = sampling.prompts_and_seeds(3)
    for model, drawing in (("teacher", tiny.teacher()), *(("student", tiny.student(steps)) for steps in (4, 2, 1))):
        row = sampling._row(tiny, model, drawing, 3, "no")
        sizes, stop = count_samples(tiny)
        drawing(prompts, seeds)
        stop()
        assert sizes == [3 * row["evaluations"] // row["steps"]] * row["steps"]
        assert sum(sizes) == 3 * row["evaluations"] == 3 * row["steps"] * (2 if model == "teacher" else 1)
    assert sampling._row(tiny, "teacher", tiny.teacher(), 1, "no") | {"text": ""} == {
        "network": "tiny", "model": "teacher", "steps": 5, "guidance": 7.0, "evaluations": 10, "batch": 1, "picture": [3, 64, 64],
        "dtype": "float32", "compiled": "no", "text": "",
    }  # fmt: skip


def test_the_bundled_teacher_is_drawn_as_load_teacher_draws_it() -> None:
    network = sampling.digits(CPU, 2)
    prompts, seeds = sampling.prompts_and_seeds(2)
    teacher, student = generators.load_teacher("fastgen:digits"), generators.load_teacher("fastgen:digits", guidance=1.0, steps=2)
    assert (network.teacher().steps, network.teacher().guidance) == (teacher.steps, teacher.guidance) == (25, 1.5)
    assert torch.equal(network.teacher()(prompts, seeds), teacher(prompts, seeds))
    assert torch.equal(network.student(2)(prompts, seeds), student(prompts, seeds))


def test_pictures_are_those_of_a_loop_written_out(tiny: Network) -> None:
    """The student: x0 from noise, the eps that belongs to it, the next time of FlowMap's grid with shift 3; the VAE's picture of the last x0."""
    prompts, seeds = sampling.prompts_and_seeds(2)
    cond = tiny.family.encode_prompts(prompts)
    x = torch.cat([torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    times = [3 * t / (1 + 2 * t) for t in (1.0, 0.5)]
    backbone: Any = tiny.backbone
    with torch.no_grad():
        for t, after in ((times[0], times[1]), (times[1], 0.0)):
            velocity = backbone(hidden_states=x, timestep=torch.full((2,), 1000 * t), **cond, return_dict=False)[0]
            x = x + (after - t) * velocity
        pixels = tiny.family.vae.decode(x / 1.5305 + 0.0609).sample  # type: ignore[attr-defined]
    torch.testing.assert_close(tiny.student(2)(prompts, seeds), (pixels / 2 + 0.5).clamp(0, 1), atol=2e-5, rtol=0)


def test_stock_draws_the_same_pictures(tiny: Network) -> None:
    """In fp32; so the two calls do the same work."""
    for drawing in (tiny.teacher(4), tiny.student(4)):
        prompts, seeds = sampling.prompts_and_seeds(2)
        stock = sampling.stock_call(tiny, drawing)
        sizes, stop = count_samples(tiny)
        theirs = stock(prompts, seeds)
        stop()
        assert sum(sizes) == 2 * 4 * (1 if drawing.guidance == 1 else 2)
        torch.testing.assert_close(drawing(prompts, seeds), theirs, atol=2e-5, rtol=0)


def test_stock_rows_compare_calls_made_in_turn(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, iter([30.0, 20.0, 60.0, 30.0, 7.0, 7.0, 7.0, 7.0]))
    teacher, student = sampling.against_stock(lambda target, batch: tiny, REHEARSAL)
    assert (teacher["median_ms"], teacher["stock_median_ms"], teacher["ratio"]) == (45.0, 25.0, 1.75)
    assert (student["ratio"], student["guidance"], student["steps"], student["images_per_s"]) == (1.0, 1.0, 4, pytest.approx(1 / 0.007))
    assert max(teacher["difference"], student["difference"]) < 2e-5


def test_students_stand_beside_their_teacher(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in one step and two repeats each, after the VAE's two: the speedup is the ratio of whole pictures' times."""
    times = [4.0, 4.0, *(t for each in (80.0, 40.0, 20.0, 10.0) for t in (500.0, 300.0, each, each))]
    clock(monkeypatch, iter(times))
    rows = sampling.against_teacher(lambda target, batch: tiny, 2, REHEARSAL, compiled=False)
    assert [(row["model"], row["steps"], row["speedup"]) for row in rows] == [
        ("teacher", 5, 1.0), ("student", 4, 2.0), ("student", 2, 4.0), ("student", 1, 8.0)
    ]  # fmt: skip
    assert {row["decode_median_ms"] for row in rows} == {4.0} and rows[3]["images_per_s"] == pytest.approx(200)


@pytest.mark.parametrize("blocks_alone", [False, True])
def test_compiled_networks_draw_the_same(blocks_alone: bool) -> None:
    pipeline = live_pipeline(replace(TINY, transformer=TINY.transformer | {"num_layers": 1}), "cpu", torch.float32)
    network = Network("tiny", Untexted(pipeline, max_sequence_length=8), pipeline.transformer, "cpu", own_steps=2, blocks_alone=blocks_alone)
    eager = network.student(1)(["a"], [5])
    how = network.compile(REHEARSAL)
    compiled = [module for module in network.backbone.modules() if module._compiled_call_impl is not None]
    assert how.startswith("blocks" if blocks_alone else "whole")
    assert compiled == (network.family.blocks(network.backbone) if blocks_alone else [network.backbone])
    torch.testing.assert_close(network.student(1)(["a"], [5]), eager, atol=1e-5, rtol=0)
    torch.compiler.reset()


def test_latents_are_few_steps_of_the_network(tiny: Network) -> None:
    prompts, seeds = sampling.prompts_and_seeds(2)
    predict = Predictor(Denoiser(tiny.backbone, tiny.family), tiny.family)
    noise = generators.noise_from_seeds(seeds, tiny.family.latent.shape)
    with torch.no_grad():
        own = few_step(predict, noise, tiny.family.grid(4), tiny.family.encode_prompts(prompts), renoise="euler")
    assert torch.equal(tiny.student(4).latents(prompts, seeds), own)


def test_medium_has_the_real_sizes() -> None:
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    with torch.device("meta"):
        transformer, vae = SD3Transformer2DModel(**MEDIUM.transformer), AutoencoderKL(**MEDIUM.vae)
    count = lambda network: sum(parameter.numel() for parameter in network.parameters())  # noqa: E731
    assert count(transformer) == 2_243_171_520 and count(vae) == 83_819_683
    sides: Any = (transformer.config, vae.config)
    assert sides[0].sample_size * 2 ** (len(sides[1].block_out_channels) - 1) == 1024


def test_random_networks_are_made_in_their_dtype_and_again_the_same() -> None:
    before = torch.random.get_rng_state()
    first, second = (live_pipeline(TINY, "cpu", torch.bfloat16) for _ in range(2))
    for network, again in ((first.transformer, second.transformer), (first.vae, second.vae)):
        state = network.state_dict()
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
    assert torch.get_default_dtype() == torch.float32 and torch.equal(torch.random.get_rng_state(), before)


def test_text_is_random_but_the_prompts_own(tiny: Network) -> None:
    texts = tiny.family.encode_prompts(["one", "two", "one"])["encoder_hidden_states"]
    assert texts.shape == (3, 77 + 8, 24) and torch.equal(texts[0], texts[2]) and not torch.equal(texts[0], texts[1])
    assert abs(texts.mean()) < 0.1 and abs(texts.std() - 1) < 0.1


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LeftOut, match="minutes a picture on a CPU"):
        sampling.sd35_medium(CPU, 1)
    monkeypatch.setattr(Target, "free_bytes", lambda self: 20 * 10**9)
    with pytest.raises(LeftOut, match=r"needs about 31 GB, 20\.0 GB are free"):
        sampling.sd35_medium(Target("cuda"), 4)
    with pytest.raises(LeftOut, match=r"needs about 26 GB, 20\.0 GB are free"):
        sampling.as_loaded(sampling.sd35_medium, Target("cuda"))


def test_a_loaded_student_is_fp32() -> None:
    """As `load_student` and `load_teacher` give them."""
    (row,) = sampling.as_loaded(sampling.sd35_medium, REHEARSAL)
    loaded: Any = generators.load_teacher(live_pipeline(TINY, "cpu", torch.bfloat16), guidance=1.0).predict
    dtype = next(loaded.denoiser.backbone.parameters()).dtype
    assert (row["dtype"], row["model"], row["steps"], row["guidance"]) == ("float32", "student", 4, 1.0) and dtype == torch.float32


def test_case_names_are_unique() -> None:
    for target in (CPU, REHEARSAL, Target("cuda")):
        names = [case.name for case in sampling.cases(target)]
        assert len(set(names)) == len(names)


def test_a_benchmark_alone_shows_rows_and_what_is_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "free_memory", lambda: None)

    def measure() -> list[Any]:
        raise LeftOut("too small")

    made = [Case("a, one", lambda: [{"x": 1}]), Case("b", measure), Case("a, two", lambda: [{"x": math.pi}])]
    alone.main(lambda target: made, "", ["--device", "cpu", "--only", "a", "b"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ['{"case": "a, one", "x": 1}', '{"case": "b", "status": "left out", "reason": "too small"}']
    alone.main(lambda target: made, "", ["--device", "cpu", "--only", "a, t"])
    assert capsys.readouterr().out == f'{{"case": "a, two", "x": {math.pi}}}\n'

"""The attention benchmark on the CPU: what it counts, what it holds for true, whom it refuses, and a rehearsal of all of it."""

from __future__ import annotations

import base64
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import naive
from fastgen_kernels.jvp_attention import configs
from fastgen_kernels.jvp_attention.reference import jvp_attention as reference
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.kernels import contenders, jvp_attention, peers, problems
from benchmarks.kernels.contenders import Attend, Contender
from benchmarks.kernels.peers import PEERS, Peer
from benchmarks.kernels.problems import Inputs, Problem, errors, truth
from benchmarks.measuring.case import LeftOut, Row, Target

CPU = Target("cpu", rehearsal=True)
SELF = Problem("self", 3, 12, 12, 16)
CAUSAL = replace(SELF, name="causal", causal=True)
TEXT = Problem("text", 3, 12, 7, 16, "q")
OLD, FORK = PEERS


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("problem", [replace(SELF, num_queries=512, num_keys=256), replace(TEXT, num_queries=512)])
def test_flops_are_those_of_the_references_products(problem: Problem) -> None:
    inputs, means = problem.inputs("cpu", torch.float32), pytest.approx(1.0, rel=1e-2)  # it also takes means of keys and values
    assert counted(lambda: reference(*inputs.primals)) / problem.flops("forward") == means
    assert counted(lambda: reference(*inputs.primals, *inputs.tangents)) / problem.flops("jvp") == means


@pytest.mark.parametrize("problem", [SELF, TEXT])
def test_flops_of_a_gradient_are_pytorchs(problem: Problem) -> None:
    q, k = (1, 3, problem.num_queries, 16), (1, 3, problem.num_keys, 16)
    gradient = sdpa_backward_flop_count(q, q, k, k)
    assert problem.flops("backward") == sdpa_flop_count(q, k, k) + gradient
    assert problem.flops("jvp_backward") == problem.flops("jvp") + gradient


def test_causal_counts_half() -> None:
    assert {CAUSAL.flops(work) / SELF.flops(work) for work in problems.RESULTS} == {0.5}


@pytest.mark.parametrize("problem", [SELF, CAUSAL, TEXT], ids=lambda problem: problem.name)
def test_the_truth_is_forward_and_reverse_mode_of_the_definition(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "CHECKED", 5)
    inputs = problem.inputs("cpu", torch.float64)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return naive(q, k, v, None, problem.causal)[0]

    tangents = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(inputs.primals, inputs.tangents, strict=True))
    gradients = torch.func.vjp(attention, *inputs.primals)[1](inputs.do)
    values = (*torch.func.jvp(attention, inputs.primals, tangents)[:2], *gradients)
    results: dict[str, torch.Tensor] = dict(zip(problems.RESULTS["jvp_backward"], values, strict=True))
    true = truth(problem, inputs)
    assert true["dq"][1].tolist() == [0, 3, 6, 8, 11] and len(true["dk"][1]) == len(true["dv"][1]) == 5 and len(true["o"][1]) == 12
    assert max(errors(results, true).values()) < 1e-14
    for name, x in results.items():
        assert errors({name: 1.01 * x}, true)[f"error_{name}"] == pytest.approx(0.01)


def test_the_problems_are_named_once_and_those_of_most_worth_come_first() -> None:
    found, every = list(jvp_attention.cases(Target("cuda"))), [*jvp_attention.FIRST, *jvp_attention.REST]
    assert len({case.name for case in found}) == len(found)
    assert [case.name for case in found[:4]] == ["self_4k_d128", "self_8k_d128", "self_16k_d128", "self_4k_d64"]
    assert all(3 < case.seconds < 60 for case in found) and [case.seconds < 40 for case in found].count(False) <= 2
    sizes = {(p.head_size, p.num_queries) for p in every if p.name.startswith("self")}
    assert sizes == {(d, 1024 * n) for d in (64, 128, 256) for n in (1, 4, 8, 16, 32)}
    assert all(p.heads * p.head_size == 2048 for p in every if not p.name.startswith("wan"))
    assert set(jvp_attention.COMPARED) <= set(every)


@pytest.fixture(scope="module")
def rehearsed() -> dict[tuple[str, str], Row]:
    found = {case.name: list(case.measure()) for case in jvp_attention.cases(CPU)}
    return {(name, row["contender"]): row for name, rows in found.items() for row in rows}


def test_a_rehearsal_measures_all_that_a_cpu_can(rehearsed: dict[tuple[str, str], Row]) -> None:
    here = {"flash_forward", "fastgen_forward", "fastgen_jvp", "fastgen_backward", "fastgen_jvp_backward", "flash_backward", "math_jvp"}
    for problem in jvp_attention.TINY:
        measured = {who for (case, who), row in rehearsed.items() if case == problem.name and "status" not in row}
        assert measured == here
        for row in (rehearsed[problem.name, who] for who in here):
            assert row["problem"]["causal"] == problem.causal and row["dtype"] == "bfloat16" and row["n"] >= 3 and row["first_call_s"] > 0
            assert row["tflop_per_s"] == pytest.approx(problem.flops(row["work"]) / row["median_ms"] / 1e9)
            assert row["ratio"] == row["median_ms"] / rehearsed[problem.name, "flash_forward"]["median_ms"]
            assert {name for name in row if name.startswith("error")} == {f"error_{name}" for name in problems.RESULTS[row["work"]]}
        assert rehearsed[f"{problem.name}_others", "flex_forward"]["error_o"] < 5e-3
    assert json.loads(json.dumps(list(rehearsed.values()))) == list(rehearsed.values())


def test_a_rehearsal_says_what_a_cpu_lacks(rehearsed: dict[tuple[str, str], Row]) -> None:
    assert not [row for row in rehearsed.values() if row.get("status") == "failed"]
    for name in ("cudnn_forward", "cudnn_backward"):
        assert rehearsed["self_tiny", name]["reason"] == "cuDNN's attention needs CUDA"
    assert rehearsed["self_tiny_others", OLD.name]["reason"] == "its kernel needs CUDA"
    assert rehearsed["text_tiny_others", FORK.name]["reason"] == "needs tangents of keys and values too"


def contender(attend: Callable[[Inputs], tuple[torch.Tensor, ...]], **options: Any) -> Contender:
    @contextmanager
    def open(problem: Problem, inputs: Inputs, target: Target) -> Iterator[Attend]:
        yield lambda: attend(inputs)

    return Contender("stand-in", "jvp", open, **options)


def right(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    o, to, _ = reference(*inputs.primals, *inputs.tangents)
    assert to is not None
    return o, to


def raising(error: Exception) -> Callable[..., Any]:
    def attend(*arguments: Any, **options: Any) -> Any:
        raise error

    return attend


def row_of(who: Contender, dtype: torch.dtype = torch.float32) -> Row:
    return jvp_attention.measure(SELF, [who], CPU, dtype)[0]


@pytest.mark.parametrize(
    ("spoil", "error"), [(lambda x: 1.01 * x, pytest.approx(0.01, rel=1e-3)), (lambda x: x * torch.nan, pytest.approx(torch.nan, nan_ok=True))]
)
def test_what_is_wrong_gets_its_error_and_no_time(spoil: Callable[[torch.Tensor], torch.Tensor], error: Any) -> None:
    def wrong(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return right(inputs)[0], spoil(right(inputs)[1])

    row = row_of(contender(wrong))
    assert row["status"] == "failed" and row["reason"].startswith("wrong result: error_to ") and row["error_to"] == error and row["error_o"] < 1e-6
    assert not {"median_ms", "tflop_per_s", "ratio"} & row.keys()


def test_ours_is_held_to_four_times_less_than_others() -> None:
    def attend(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return right(inputs)[0] * (1 + 2e-5), right(inputs)[1]

    assert "median_ms" in row_of(contender(right, ours=True)) and "median_ms" in row_of(contender(attend))
    assert row_of(contender(attend, ours=True))["status"] == "failed"
    assert jvp_attention.bound("error_dq", torch.bfloat16, ours=True) == 1e-2


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (LeftOut("no such thing"), "left out", "no such thing"),
        (torch.OutOfMemoryError("tried\nmuch"), "left out", "out of memory: tried"),
        (RuntimeError("No available kernel. Aborting execution."), "left out", "RuntimeError: No available kernel. Aborting execution."),
        (AssertionError(), "left out", "AssertionError: "),
    ],
)
def test_an_error_is_that_contenders_alone(error: Exception, status: str, reason: str) -> None:
    first, second = jvp_attention.measure(SELF, [contender(raising(error)), contender(right)], CPU, torch.float32)
    assert (first["status"], first["reason"]) == (status, reason)
    assert second["median_ms"] > 0 and "ratio" not in second


def test_an_error_of_ours_is_a_failure() -> None:
    assert row_of(contender(raising(RuntimeError("does not compile")), ours=True))["status"] == "failed"


def test_an_error_of_the_device_ends_the_case() -> None:
    with pytest.raises(torch.AcceleratorError):
        row_of(contender(raising(torch.AcceleratorError("unspecified launch failure"))))


def test_scores_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "free_bytes", lambda self: 2**30)
    row = jvp_attention.attempt(contenders.contenders()[-1], replace(SELF, num_keys=2**24), SELF.inputs("cpu", torch.float32), {}, CPU)
    assert row["reason"] == "its scores need 18 GiB, 1 GiB are free"


def test_flash_attention_3_is_active_only_while_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", done.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: done.append("restored"))
    with contenders.flash3()(SELF, SELF.inputs("cpu", torch.float32), CPU) as call:
        assert done == ["FA3"] and call()[0].shape == (1, 3, 12, 16)
    assert done == ["FA3", "restored"]
    monkeypatch.setattr(jvp_attention, "kernel_time", raising(RuntimeError("broken")))
    assert row_of(Contender("fa3_backward", "backward", contenders.flash3(backward=True)))["reason"] == "RuntimeError: broken"
    assert done == 2 * ["FA3", "restored"]


def test_flash_attention_3_where_pytorch_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    who = Contender("fa3_forward", "forward", contenders.flash3())
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", list)
    assert row_of(who)["reason"] == f"PyTorch {torch.__version__} offers no FlashAttention 3"
    monkeypatch.undo()
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", raising(ImportError("No module named 'flash_attn_interface'")))
    assert row_of(who)["reason"].endswith("not installed: No module named 'flash_attn_interface'")


def test_tiles_are_those_chosen_since_the_contender_was_opened() -> None:
    pytest.importorskip("triton")
    configs.launch_chosen(("old_kernel", 1), [configs.Config(16, 16, 1, 1)], lambda config: None, num_scores=1)
    with contenders.fastgen("jvp")(SELF, SELF.inputs("cpu", torch.float32), CPU):
        assert contenders.tiles() is None
        configs.launch_chosen(("forward_kernel", 64), [configs.Config(128, 64, 8, 2)], lambda config: None, num_scores=1)
        assert contenders.tiles() == {"forward_kernel": {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 2}}
    configs.forget()


def test_memory_is_what_a_call_takes_beyond_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 100), ("max_memory_allocated", 350)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert jvp_attention._peak(lambda: None, Target("cuda")) == 250
    assert jvp_attention._peak(lambda: None, CPU) is None


LONG = Problem("long", 2, 4096, 4096, 64)


@pytest.mark.parametrize(
    ("problem", "old", "fork"),
    [
        (LONG, None, None),
        (replace(LONG, causal=True), None, None),
        (replace(LONG, head_size=72), "takes head sizes 16, 32, 64, 128, 256, not 72", "takes head sizes 16, 32, 64, 128, 256, not 72"),
        (replace(LONG, num_queries=4090, num_keys=4090), "takes lengths that 32 divides, not 4090", None),
        (replace(LONG, num_queries=2048), "takes self-attention only", None),
        (replace(LONG, num_keys=512), "takes self-attention only", "takes no fewer keys than queries"),
        (replace(LONG, num_keys=512, tangents="q"), "needs tangents of keys and values too", "needs tangents of keys and values too"),
    ],
)
def test_which_problems_a_peer_takes(problem: Problem, old: str | None, fork: str | None) -> None:
    assert (OLD.obstacle(problem, "cuda"), FORK.obstacle(problem, "cuda")) == (old, fork)


def write_wheel(peer: Peer, folder: Path) -> None:
    with zipfile.ZipFile(folder / f"{peer.distribution.replace('-', '_')}-{peer.version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("jvp_flash_attention/__init__.py", "")
        wheel.writestr("jvp_flash_attention/names.py", f"NAME = {peer.name!r}")
        wheel.writestr("jvp_flash_attention/jvp_attention.py", "from .names import NAME")


def test_two_packages_of_one_import_name_are_loaded_side_by_side(tmp_path: Path) -> None:
    fakes = [replace(peer, name=f"fake_{peer.name}") for peer in PEERS]
    for fake in fakes:
        write_wheel(fake, tmp_path)
    assert [fake.module(tmp_path).NAME for fake in fakes] == [fake.name for fake in fakes]


def install(peer: Peer, folder: Path, *, content: str, recorded: str) -> None:
    """What pip leaves of a package, whose file was perhaps replaced later."""
    record = base64.urlsafe_b64encode(hashlib.sha256(recorded.encode()).digest()).rstrip(b"=").decode()
    metadata = folder / f"{peer.distribution.replace('-', '_')}-{peer.version}.dist-info"
    for path, text in (
        (folder / peers.PACKAGE / "__init__.py", ""),
        (folder / peers.ENTRY, content),
        (metadata / "METADATA", f"Metadata-Version: 2.1\nName: {peer.distribution}\nVersion: {peer.version}\n"),
        (metadata / "RECORD", f"{peers.ENTRY},sha256={record},1\n"),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_an_installed_package_is_taken_if_no_other_has_overwritten_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    peer = Peer("fake_installed", "fake-peer-of-fastgen", "1.0", pads=False)
    install(peer, tmp_path, content="NAME = 'other'", recorded="NAME = 'own'")
    with pytest.raises(LeftOut, match=r"fake-peer-of-fastgen was overwritten .* carry its wheel in benchmarks/\.peers"):
        peer.module(tmp_path)
    with pytest.raises(LeftOut, match=r"fake-peer-of-fastgen 1\.0 is installed, not 2\.0"):
        replace(peer, version="2.0").module(tmp_path)
    install(peer, tmp_path, content="NAME = 'own'", recorded="NAME = 'own'")
    assert peer.module(tmp_path).NAME == "own"


def test_a_missing_package_is_named_with_its_version(tmp_path: Path) -> None:
    with pytest.raises(LeftOut, match=r"no-such-peer 3\.1 is not here \(carry its wheel in .*\)"):
        Peer("missing", "no-such-peer", "3.1", pads=True).module(tmp_path)


@pytest.mark.parametrize("problem", jvp_attention.TINY[:2], ids=lambda problem: problem.name)
def test_the_fork_is_measured_on_a_cpu(problem: Problem) -> None:
    try:
        FORK.module()
    except LeftOut as reason:
        pytest.skip(str(reason))
    row = jvp_attention.measure(problem, [contenders.others()[-1]], CPU, torch.float32)[0]
    assert row["median_ms"] > 0 and row["error_o"] < 1e-6 and row["error_to"] < 1e-6

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastgen.ema import EMA


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def test_shadows_start_as_fp32_copies() -> None:
    weight = parameter(1.0, 2.0, dtype=torch.bfloat16)
    ema = EMA({"w": weight}, 0.9)
    assert ema.shadow["w"].dtype == torch.float32
    weight.data.fill_(7)
    assert ema.shadow["w"].tolist() == [1, 2]


def test_shadows_on_the_cpu_are_copies_too() -> None:
    """Here their parameters lie there as well; where they do not, the test that needs a GPU looks."""
    weight = parameter(1.0, 2.0)
    average, usual = EMA({"w": weight}, 0.9, "cpu"), EMA({"w": weight}, 0.9)
    weight.data.fill_(7)
    for each in (average, usual):
        each.update()
    assert average.shadow["w"].tolist() == usual.shadow["w"].tolist() != [7, 7]


@pytest.mark.gpu
def test_shadows_of_weights_on_a_gpu_stay_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weight = nn.Parameter(torch.tensor([1.0, 2.0], device="cuda"))
    average = EMA({"w": weight}, 0.9, "cpu")
    weight.data.fill_(7)
    average.update()
    assert average.shadow["w"].device.type == "cpu"
    with average.applied():
        assert weight.device.type == "cuda" and weight.tolist() == pytest.approx(average.shadow["w"].tolist())


def test_warm_up_by_hand() -> None:
    weight = parameter(0.0)
    ema = EMA({"w": weight}, 0.25)
    expected = 0.0
    # (1 + n)/(10 + n) = .1, 2/11, .25, 4/13 > .25, ...
    for decay, value in zip((0.1, 2 / 11, 0.25, 0.25, 0.25), (1.0, 3.0, -2.0, 5.0, 0.5), strict=True):
        weight.data.fill_(value)
        ema.update()
        expected = decay * expected + (1 - decay) * value
        assert ema.shadow["w"].item() == pytest.approx(expected, rel=1e-6)
    assert ema.updates == 5
    assert weight.item() == 0.5


def test_average_of_bf16_parameters_moves() -> None:
    weight = parameter(1.0, dtype=torch.bfloat16)
    ema = EMA({"w": weight}, 0.999)
    ema.updates = 100_000  # past the warm-up
    narrow = torch.ones(1, dtype=torch.bfloat16)
    weight.data.fill_(2)
    for _ in range(1000):
        ema.update()
        narrow.lerp_(weight.detach(), 1 - 0.999)
    assert narrow.item() == 1  # the trap: a step of .001 is below bf16's resolution
    assert ema.shadow["w"].item() == pytest.approx(2 - 0.999**1000, rel=1e-4)


def test_zero_decay_follows() -> None:
    weight = parameter(1.0)
    ema = EMA({"w": weight}, 0.0)
    weight.data.fill_(4)
    ema.update()
    assert ema.shadow["w"].item() == 4


@pytest.mark.parametrize("decay", [1.0, -0.1, 2.0])
def test_decay_is_checked(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"\[0, 1\), got {decay}"):
        EMA({}, decay)


def averaged(dtype: torch.dtype) -> tuple[EMA, dict[str, nn.Parameter], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(3, 5, generator=generator).to(dtype)) for name in ("a", "b")}
    ema = EMA(parameters, 0.5)
    for value in parameters.values():
        value.data += 1
    ema.update()
    return ema, parameters, {name: value.detach().clone() for name, value in parameters.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_swaps_and_restores_bit_for_bit(dtype: torch.dtype) -> None:
    ema, parameters, before = averaged(dtype)
    storage = {name: value.data_ptr() for name, value in parameters.items()}
    with ema.applied():
        for name, value in parameters.items():
            assert torch.equal(value, ema.shadow[name].to(dtype))
            assert not torch.equal(value, before[name])
    for name, value in parameters.items():
        assert torch.equal(value, before[name])
        assert value.data_ptr() == storage[name]
        assert value.requires_grad


def test_applied_restores_after_an_exception() -> None:
    ema, parameters, before = averaged(torch.float32)
    shadow = {name: value.clone() for name, value in ema.shadow.items()}

    def fail() -> None:
        with ema.applied():
            parameters["a"].data.zero_()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    for name, value in parameters.items():
        assert torch.equal(value, before[name])
        assert torch.equal(ema.shadow[name], shadow[name])


def test_applied_leaves_the_callers_grad_mode() -> None:
    ema, parameters, _ = averaged(torch.float32)
    with ema.applied():
        assert torch.is_grad_enabled()
        loss = parameters["a"].square().sum()
    assert loss.requires_grad
    with torch.no_grad(), ema.applied():
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_state_round_trip() -> None:
    ema, parameters, _ = averaged(torch.float32)
    state = {name: value.clone() for name, value in ema.state_dict().items()}
    fresh = EMA(parameters, 0.5)
    fresh.load_state_dict(state)
    assert fresh.updates == 1
    for _ in range(3):
        for value in parameters.values():
            value.data *= 1.5
        ema.update()
        fresh.update()
    for name in parameters:
        assert torch.equal(fresh.shadow[name], ema.shadow[name])
        assert not torch.equal(fresh.shadow[name], state[name])


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_state_must_match(change: str) -> None:
    ema, _, _ = averaged(torch.float32)
    state = {name: value.clone() for name, value in ema.state_dict().items()}
    if change == "missing":
        del state["b"]
    elif change == "extra":
        state["c"] = torch.zeros(2)
    else:
        state["a"] = torch.zeros(5)  # would broadcast
    with pytest.raises(ValueError, match="averaged weights do not match"):
        ema.load_state_dict(state)

"""Formats against their definitions, computed by hand, and against the libraries that have them too."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from narrow import FORMATS as NAMES
from narrow import needs_bitsandbytes
from torch import Tensor, nn

from fastgen import optional
from fastgen.errors import UserError
from fastgen.surgery import formats
from fastgen.surgery.formats import FORMATS


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def again(name: str, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    own = FORMATS[name]  # type: ignore[index]
    return own.read(own.write(weight), weight.shape, dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# Relative errors of normal weights: half a step of eight, four and about eight bits, and of sixteen levels.
BOUNDS = {"bf16": (1e-3, 2.5e-3), "fp8": (0.015, 0.035), "int8": (4e-3, 1e-2), "nf4": (0.06, 0.11)}


@pytest.mark.parametrize("shape", [(96, 100), (7, 9), (1, 5), (6, 3, 3, 3), (4, 2, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_comes_back_as_near_as_the_format_allows(name: str, shape: tuple[int, ...]) -> None:
    weight = normal(*shape)
    read = again(name, weight)
    assert read.shape == weight.shape and read.dtype == torch.float32
    least, most = BOUNDS[name]
    assert relative(read, weight) < 2 * most
    if weight.numel() > 1000:
        assert least < relative(read, weight) < most


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_in_fewer_bits_is_the_same_rounded(name: str) -> None:
    weight = normal(32, 40)
    read = again(name, weight)
    assert torch.equal(again(name, weight, torch.bfloat16), read.bfloat16())
    assert relative(again(name, weight, torch.float64), read) < 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_zeros_are_zeros_and_outliers_stay_finite(name: str) -> None:
    weight = normal(4, 64)
    weight[1], weight[2, 5] = 0, 1e4
    read = again(name, weight)
    assert not read[1].any()
    assert read[2, 5].item() == pytest.approx(1e4, rel=5e-3)
    assert relative(read[[0, 3]], weight[[0, 3]]) < 0.12, "one channel's outlier costs the others nothing"


def test_int8_rounds_to_127_steps_of_each_channel() -> None:
    weight = torch.tensor([[1.27, -0.634, 0.0049], [0.5, 0.25, -0.125]])
    written = FORMATS["int8"].write(weight)
    assert written["codes"].tolist() == [[127, -63, 0], [127, 64, -32]]
    torch.testing.assert_close(written["scale"], torch.tensor([[0.01], [0.5 / 127]]))
    torch.testing.assert_close(again("int8", weight), torch.tensor([[1.27, -0.63, 0.0], [0.5, 32 / 127, -16 / 127]]))


def test_fp8_keeps_three_bits_after_the_first() -> None:
    weight = torch.tensor([[448.0, 17.0, 18.9, -0.53]]) / 100  # codes are these numbers times 100: 17 is halfway between 16 and 18
    torch.testing.assert_close(again("fp8", weight), torch.tensor([[448.0, 16.0, 18.0, -0.5]]) / 100)
    assert FORMATS["fp8"].write(weight)["codes"].dtype == torch.float8_e4m3fn


@needs_bitsandbytes
def test_nf4_takes_the_nearest_of_sixteen_levels_of_each_64_weights() -> None:
    weight = normal(4, 96)
    written = FORMATS["nf4"].write(weight)
    blocks, levels = weight.reshape(-1, 64), written["levels"]
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / scale[..., None] - levels).abs().argmin(-1)
    torch.testing.assert_close(again("nf4", weight), (levels[nearest] * scale).reshape(weight.shape))
    assert written["codes"].nbytes == weight.numel() // 2


def test_int8_is_nearer_than_torchao() -> None:
    """torchao's weight-only int8 divides by half of 255 and clips what then rounds to 128."""
    quantization = pytest.importorskip("torchao.quantization")
    layer, weight = nn.Linear(100, 96, bias=False), normal(96, 100)
    layer.weight.data = weight.clone()
    quantization.quantize_(nn.Sequential(layer), quantization.Int8WeightOnlyConfig())
    theirs = layer.weight.dequantize().detach()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((again("int8", weight) - theirs).abs() <= 1.01 * step).all()
    assert relative(again("int8", weight), weight) < relative(theirs, weight)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_without_data_take_the_same_bytes(name: str) -> None:
    own, shape = FORMATS[name], (96, 100)  # type: ignore[index]
    real, meta = own.write(normal(*shape)), own.write(torch.empty(shape, device="meta"))
    assert {key: (value.shape, value.dtype) for key, value in meta.items()} == {key: (value.shape, value.dtype) for key, value in real.items()}
    assert own.read(meta, torch.Size(shape), torch.float32).shape == shape


def test_an_absent_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    formats.check_installed("int8", "teacher.quantise")
    with pytest.raises(
        UserError, match=r"^recipe key teacher\.quantise: nf4 needs the package bitsandbytes, .*pip install 'fastgen-distill\[quantise\]'$"
    ):
        formats.check_installed("nf4", "teacher.quantise")


def test_nothing_is_imported_before_it_is_needed() -> None:
    program = "import sys; import fastgen.surgery.held; sys.exit('bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

"""Another processor, acted on this one: `pytest --rounding` shows the tests that take rounding for a promise.

Which kernel runs, and in which order it adds, depends on the processor, the shapes, the strides and where the memory begins. Here every
result of arithmetic that rounds differs in its last bits, by a pattern that depends on exactly these. Equal calls stay equal: a run
against its repetition, a resumed run against the whole one. A batch of 15 against five of 3, or a network against a copy that was loaded
from a file, does not, and a test that asserts equal bits there fails, as it does on somebody's machine.
What is exact by IEEE 754 and does not depend on the order (sums and products of two numbers, roots, copies) is left as it is, and so are
results with few digits, such as exp(0) or a sum of small integers. Child processes are not changed, and test_jvp_sdpa.py, which compares
with the calls that PyTorch's own attention refuses, fails: under any dispatch mode it refuses fewer.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ULPS = 1
# Parts of operators' names, as in `native_layer_norm_backward`.
WORDS = """
mm addmm bmm baddbmm addbmm mv addmv dot linear matmul conv2d convolution attention linalg inverse cholesky cdist dist
sum nansum mean var std norm prod logsumexp softmax cumsum cumprod logcumsumexp cov trapz pool2d bilinear2d bicubic2d trilinear3d fft
exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan atan2 sinh cosh tanh sigmoid silu gelu mish softplus elu
erf erfc erfinv ndtri pow rsqrt hypot lgamma digamma lerp addcmul addcdiv
"""
ROUNDED = frozenset(WORDS.split())
# By dtype: integers of that size, and the low digits that a short number leaves zero.
DIGITS = {
    torch.float64: (torch.int64, 0xFFFF),
    torch.float32: (torch.int32, 0xFF),
    torch.bfloat16: (torch.int16, 0x7),
    torch.float16: (torch.int16, 0x1F),
}


def _look(value: Any) -> Any:
    """What a kernel may depend on besides the numbers themselves."""
    return (tuple(value.shape), value.stride(), value.dtype, value.data_ptr() % 64) if type(value) in (Tensor, torch.nn.Parameter) else None


class Rounding(TorchDispatchMode):
    """Moves results by at most `ulps` (below 128) units in the last place."""

    def __init__(self, ulps: int = ULPS) -> None:
        super().__init__()
        self.ulps = ulps
        self.rounded: dict[Any, bool] = {}
        self.moves: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # what is below has no business with anybody's mode above
            return self._dispatched(func, args, kwargs or {})

    def _dispatched(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if func not in self.rounded:
            self.rounded[func] = not ROUNDED.isdisjoint(func._schema.name.split("::")[1].split("_"))
        if self.rounded[func]:
            call = (func, *(_look(value) for value in tree_leaves((args, kwargs))))
            for i, value in enumerate(out if isinstance(out, (tuple, list)) else [out]):
                self._move(value, (call, i))
        return out

    def _move(self, value: Any, call: Any) -> None:
        if type(value) is not Tensor or value.dtype not in DIGITS or value.device.type != "cpu" or value._is_zerotensor() or not value.numel():
            return
        integers, low = DIGITS[value.dtype]
        bits, key = value.view(integers), (call, value.shape)
        if key not in self.moves:
            generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
            moves = torch.randint(-self.ulps, self.ulps + 1, value.shape, generator=generator, dtype=torch.int8)
            # Sums of 16-bit numbers are made in 32 bits, so another order changes the 16-bit result of few.
            self.moves[key] = moves if value.itemsize > 2 else moves * (torch.rand(value.shape, generator=generator) < 1 / 16)
        bits.add_(self.moves[key] * (bits & low != 0))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    with Rounding():
        return (yield)

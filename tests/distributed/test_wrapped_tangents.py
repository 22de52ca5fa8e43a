"""tangent() through wrapped networks on two processes (gloo, CPU). Run with `pytest -m distributed`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tangents import Network, Opaque, gradient, inputs, math_tangent, network, normal, relative
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.jvp import AttentionCalls, check_tangent, refuse_unsupported, tangent

pytestmark = pytest.mark.distributed


def shifted_inputs(rank: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A batch of its own for each process."""
    (x, t), tangents = inputs()
    return (x + rank, t), tangents


def sharded(net: Network, **kwargs: Any) -> Network:
    from torch.distributed.fsdp import fully_shard

    for block in net.blocks:
        fully_shard(block, **kwargs)
    return fully_shard(net, **kwargs)  # type: ignore[return-value]


def ddp_without_gradients(rank: int) -> None:
    primals, tangents = shifted_inputs(rank)
    expected = math_tangent(network(), primals, tangents)[1]
    with torch.no_grad():
        assert relative(tangent(nn.parallel.DistributedDataParallel(network()), primals, tangents)[1], expected) <= 1e-12


def ddp_with_gradients(rank: int) -> None:
    primals, tangents = shifted_inputs(rank)
    net = network()
    expected, mean = math_tangent(net, primals, tangents)[1], gradient(net, net(*primals))
    dist.all_reduce(mean)
    module = nn.parallel.DistributedDataParallel(net)
    out, d_out = tangent(module, primals, tangents)
    assert relative(d_out, expected) <= 1e-12
    (out * normal(*out.shape, seed=5)).sum().backward()
    assert relative(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]), mean / 2) <= 1e-12


def ddp_that_searches_unused_parameters_is_refused(rank: int) -> None:
    module = nn.parallel.DistributedDataParallel(network(), find_unused_parameters=True)
    with pytest.raises(UserError, match="find_unused_parameters"):
        refuse_unsupported(module)


def fsdp_without_gradients(rank: int) -> None:
    (primals, tangents), calls = shifted_inputs(rank), AttentionCalls()
    expected = math_tangent(network(), primals, tangents)[1]
    module = sharded(network())
    with torch.no_grad():
        assert relative(tangent(module, primals, tangents, calls=calls)[1], expected) <= 1e-12
    assert calls == AttentionCalls(fused=4)
    assert check_tangent(module, primals, tangents, module).relative_error <= 1e-7


def fsdp_after_a_training_step(rank: int) -> None:
    primals, tangents = shifted_inputs(rank)
    module, plain = sharded(network()), network()
    for net in (module, plain):
        (net(*inputs()[0]).square().mean()).backward()  # the same data everywhere, so that the mean over processes is no change
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad)
    with torch.no_grad():
        assert relative(tangent(module, primals, tangents)[1], math_tangent(plain, primals, tangents)[1]) <= 1e-12


def fsdp_in_bf16_keeps_times_in_fp32(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    primals, tangents = shifted_inputs(rank)
    expected = math_tangent(network(), primals, tangents)[1]
    module = sharded(network(torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False))
    (x, t), (dx, dt) = primals, tangents
    with torch.no_grad():
        d_out = tangent(module, (x.bfloat16(), t.float()), (dx.bfloat16(), dt.float()))[1]
    assert relative(d_out.double(), expected) <= 2e-2


def fsdp_with_gradients_is_refused(rank: int) -> None:
    primals, tangents = shifted_inputs(rank)
    with pytest.raises(RuntimeError, match=r"FSDPModule: call it under torch\.no_grad"):
        tangent(sharded(network()), primals, tangents)


def fsdp_names_the_wrong_layer(rank: int) -> None:
    primals, tangents = shifted_inputs(rank)
    net = network()
    net.blocks[1].act = Opaque()
    module = sharded(net)
    with pytest.raises(UserError, match=r"layer blocks\.1\.act of type Opaque"):
        check_tangent(module, primals, tangents, module)


CASES: dict[str, list[Callable[[int], None]]] = {
    "ddp": [ddp_without_gradients, ddp_with_gradients, ddp_that_searches_unused_parameters_is_refused],
    "fsdp2": [
        fsdp_without_gradients, fsdp_after_a_training_step, fsdp_in_bf16_keeps_times_in_fp32, fsdp_with_gradients_is_refused,
        fsdp_names_the_wrong_layer,
    ],
}  # fmt: skip


def process(rank: int, wrapper: str, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for case in CASES[wrapper]:
            case(rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", CASES)
def test_on_two_processes(wrapper: str, tmp_path: Path) -> None:
    mp.spawn(process, (wrapper, str(tmp_path / "store")), nprocs=2)  # type: ignore[attr-defined]
